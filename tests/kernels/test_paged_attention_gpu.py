"""The Triton kernels: under Triton's interpreter, compiled for GPUs that are not there, and on one that is."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CHECKS = Path(__file__).with_name("paged_attention_triton_checks.py")


def compile_attend(arch: int, dtype: str, d: int, repeat: int, prefill: bool, queries: str | None = None):
    """The attention kernel's machine code for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peqa_kernels.paged_attention import gpu

    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    tile = gpu.tile_shape(4096 if prefill else 8, 8, repeat, d, torch_dtype)
    constants = {
        **{"heads": repeat * 4, "repeat": repeat, "block_size": 16, "d": d, "d_v": d},
        **{"has_sinks": False, "has_softcap": True, "has_window": True},
        **{"QUERIES": tile.rows // repeat, "ROWS": tile.rows, "KEYS": tile.keys},
        **dict.fromkeys(("D", "D_V"), max(gpu.LEAST_WIDTH, triton.next_power_of_2(d))),
    }
    kernel = gpu._attend
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in ("table_ptr", "query_starts_ptr", "seq_lens_ptr"):
            signature[name] = "*i32"
        elif name in ("q_ptr", "out_ptr"):
            signature[name] = f"*{queries or dtype}"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "fp32" if name in ("scaling", "softcap") else "i32"
        if name.endswith(("_ptr", "_stride")):
            aligned[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tile.warps, "num_stages": 2},
    )


@pytest.mark.slow
@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize(
    ("dtype", "d", "repeat"),
    [("bf16", 64, 3), ("bf16", 96, 1), ("bf16", 128, 4), ("bf16", 256, 2), ("fp32", 64, 3), ("fp32", 256, 4)],
)
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(
    arch: int, dtype: str, d: int, repeat: int, prefill: bool, tmp_path: Path
) -> None:
    import triton.backends.nvidia

    cubin = tmp_path / "attend.cubin"
    cubin.write_bytes(compile_attend(arch, dtype, d, repeat, prefill).asm["cubin"])
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    assert "REG:" in usage
    assert "STACK:0 " in usage, usage


@pytest.mark.parametrize(("d", "queries"), [(8, "bf16"), (64, "fp32")])
def test_compiles_for_narrow_heads_and_queries_of_another_dtype(d: int, queries: str) -> None:
    assert compile_attend(90, "bf16", d, 2, prefill=False, queries=queries).asm["cubin"]


@pytest.mark.skipif(
    version("triton") < "3.9" and int(version("numpy").split(".")[1]) >= 4,
    reason="the interpreter of Triton before 3.9 fails on loops with a run-time bound under NumPy 2.4",
)
def test_under_the_interpreter() -> None:
    # Triton reads the switch when it is imported: a process of its own.
    done = subprocess.run(
        [sys.executable, str(CHECKS), "cpu"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "checks passed" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu() -> None:
    done = subprocess.run([sys.executable, str(CHECKS), "cuda"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
