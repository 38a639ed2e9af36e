"""The Triton kernel: under Triton's interpreter, compiled for GPUs that are not there, and on one that is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
CHECKS = Path(__file__).with_name("quant_matmul_triton_checks.py")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_kernel(
    arch: int, bits: int, groups: int, group_size: int, rows: int, dtype: str = "bf16", kind: str = "channel"
) -> Any:
    """The kernel's machine code for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peqa_kernels.quant_matmul import gpu, tuning

    with_input, with_group = kind == "channel+input", kind == "group"
    tile = tuning.tile_for(rows, DTYPES[dtype], bits, in_scale=with_input, group_scale=with_group)
    step = tuning.inputs_per_step(group_size)
    constants = {
        **{
            "BITS": bits,
            "GROUPS": groups,
            "SIZE": group_size,
            "STEPS": -(-group_size // step),
            "SEGMENTS": 3,
        },
        **{"HAS_BIAS": True, "HAS_OUT": True, "HAS_IN": with_input, "HAS_GROUP": with_group},
        **{"HAS_ZEROS": True, "BM": tile.rows, "BN": tuning.PANEL, "BK": step, "STAGES": tile.stages},
    }
    integers = {"lo": "*i32", "hi": "*i32", "tiles": "*i32", "row": "*i32", "group_row": "*i32"}
    types = {**integers, "x": f"*{dtype}", "y": f"*{dtype}", "bias": f"*{dtype}"}
    signature, aligned = {}, {}
    for i, name in enumerate(gpu.quant_matmul_kernel.arg_names):
        number = "i32" if name in ("M", "N", "padded", "stride") else "*fp32"
        signature[name] = "constexpr" if name in constants else types.get(name, number)
        if signature[name] != "constexpr" and name != "M":
            aligned[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(gpu.quant_matmul_kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tile.warps},
    )


def spilled_bytes(compiled: Any, folder: Path) -> int:
    """Stack that the machine code takes; registers that did not suffice end there."""
    import triton.backends.nvidia

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:\d+ STACK:(\d+) ", usage)
    assert found, usage
    return int(found[1])


@pytest.mark.parametrize("bits", [3, 4])
def test_weights_reach_wgmma_in_registers(bits: int, tmp_path: Path) -> None:
    compiled = compile_kernel(90, bits, 32, 128, rows=1)
    products = [line for line in compiled.asm["ttgir"].splitlines() if "ttng.warp_group_dot " in line]
    assert products
    assert all("dot_op<{opIdx = 0" in line for line in products), products[0]
    assert spilled_bytes(compiled, tmp_path) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 32, 512])
@pytest.mark.parametrize("kind", ["channel", "channel+input", "group"])
@pytest.mark.parametrize(("groups", "group_size"), [(1, 4096), (32, 128), (128, 32)], ids=str)
@pytest.mark.parametrize(
    ("arch", "bits", "dtype"),
    [(90, 4, "bf16"), (90, 3, "bf16"), (90, 8, "bf16"), (80, 3, "fp16"), (80, 4, "fp32")],
)
def test_compiles_without_spills(
    arch: int, bits: int, dtype: str, groups: int, group_size: int, kind: str, rows: int, tmp_path: Path
) -> None:
    compiled = compile_kernel(arch, bits, groups, group_size, rows, dtype, kind)
    assert spilled_bytes(compiled, tmp_path) == 0
    assert compiled.metadata.shared <= (227 if arch == 90 else 163) * 1024


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
