"""The elementwise kernels: under Triton's interpreter, compiled for GPUs that are not there, and on one that is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_kernels import assert_no_spill, compile_for, machine_code

pytest.importorskip("triton")
CHECKS = Path(__file__).with_name("elementwise_triton_checks.py")
HIDDEN = [4096, 576, 5120, 16384]
HEADS = [(32, 8, 128), (9, 3, 64), (71, 1, 80), (8, 4, 256)]
KERNELS = ("norm_kernel", "silu_mul_kernel", "rotate_kernel")


def compile_kernel(kernel: Any, chosen: dict, arch: int, dtype: str) -> Any:
    """A kernel's machine code for a GPU that need not be there, launched as on that GPU."""
    chosen = chosen | ({"EARLY": True, "launch_pdl": True} if arch == 90 else {"EARLY": False})
    constants = {name: value for name, value in chosen.items() if name in kernel.arg_names}
    options = {name: value for name, value in chosen.items() if name not in constants}
    types = dict.fromkeys(kernel.arg_names, "fp32")
    types |= dict.fromkeys((name for name in types if name.endswith("_ptr")), f"*{dtype}")
    types |= dict.fromkeys(("position_ptr", "slot_ptr"), "*i64")
    unaligned = ("position_ptr", "slot_ptr", *(name for name in types if not name.endswith("_ptr")))
    return compile_for(arch, kernel, constants, types, options, unaligned)


def cases(name: str, *, all_sizes: bool) -> list[dict[str, Any]]:
    """A kernel as it is launched at some sizes, or at one."""
    from peqa_kernels.elementwise import gpu

    if name == "norm_kernel":
        found = [gpu.norm_options(size) | {"ADDS": adds} for size in HIDDEN for adds in (True, False)]
    elif name == "silu_mul_kernel":
        found = [gpu.silu_mul_options(size) for size in (11008, 1536)]
    else:
        found = [gpu.rotate_options(*heads, norms) for heads in HEADS for norms in (True, False)]
    return found if all_sizes else found[:1]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name: str, arch: int) -> None:
    check_compiled(name, cases(name, all_sizes=False)[0], arch, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_all_sizes_compile_without_spills(name: str, arch: int, dtype: str) -> None:
    for chosen in cases(name, all_sizes=True):
        check_compiled(name, chosen, arch, dtype)


def check_compiled(name: str, chosen: dict[str, Any], arch: int, dtype: str) -> None:
    """Rounded where torch's operations store their results, nothing fused, no memory touched before the wait."""
    from peqa_kernels.elementwise import gpu_kernel

    compiled = compile_kernel(getattr(gpu_kernel, name), chosen, arch, dtype)
    assert_no_spill(compiled, arch, chosen)
    sass, ptx = machine_code(compiled), compiled.asm["ptx"]
    assert "fma.rn.f32" not in ptx, chosen
    half = dtype.replace("fp", "f")
    if name == "rotate_kernel" and not chosen["HAS_NORMS"] and dtype != "fp32":
        # Four products and two sums for each pair of features, each of 16 bits: what fp32 and a rounding would give.
        operations = re.findall(rf"\b(?:mul|add|sub|fma)\.rn\.{half}\b", ptx)
        assert len(operations) == 6 * max(1, chosen["HALF"] // 32), chosen
    elif dtype != "fp32":
        assert re.search(rf"cvt\.rn\.{half}", ptx), chosen
    if name == "norm_kernel" and dtype != "fp32":
        assert re.search(r"LDG\.E\.128", sass), "16 bytes at a time"
    if arch == 90:
        before, after = sass.split("ACQBULK", 1)
        memory = re.compile(r"\b(LDG|STG)\b")
        assert not memory.search(before), "it may begin while what it reads is still written"
        assert memory.search(after)
        assert "PREEXIT" in after
    else:
        assert "ACQBULK" not in sass


def run(device: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, str(CHECKS), device],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "checks passed" in done.stdout


def test_under_the_interpreter() -> None:
    # Triton reads the switch when it is imported: a process of its own.
    run("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu() -> None:
    run("cuda")
