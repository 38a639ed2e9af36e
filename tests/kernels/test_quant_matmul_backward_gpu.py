"""Tuning's Triton kernels: under Triton's interpreter, compiled for GPUs that are not there, and on one that is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_kernels import assert_no_spill, compile_for
from interpreter import needs_loops

pytest.importorskip("triton")
CHECKS = Path(__file__).with_name("quant_matmul_backward_triton_checks.py")
FLOATS = ("scale_ptr", "zero_ptr", "out_ptr", "in_ptr", "group_ptr", "part_ptr")


def compile_kernel(kernel: Any, constants: dict, options: dict, arch: int, dtype: str) -> Any:
    """A kernel's machine code for a GPU that need not be there; sizes divide by 16, as a model's do."""
    types = dict.fromkeys((name for name in kernel.arg_names if name.endswith("_ptr")), f"*{dtype}")
    types |= {"code_ptr": "*u8"} | dict.fromkeys(FLOATS, "*fp32")
    aligned = (*types, "columns", "outputs", "inputs", "row_bytes")
    unaligned = tuple(name for name in kernel.arg_names if name not in aligned)
    return compile_for(arch, kernel, constants, types, options, unaligned)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("arch", [80, 90])
def test_panels_compile_without_spills(arch: int, bits: int, dtype: str) -> None:
    from peqa_kernels.quant_matmul import backward_gpu

    rows, columns = backward_gpu.PANEL_TILE
    constants = {"BITS": bits, "ROWS": rows, "COLUMNS": columns}
    constants |= dict.fromkeys(("HAS_OUT", "HAS_IN", "HAS_GROUP"), True)
    kernel = backward_gpu.dequantize_kernel
    assert_no_spill(
        compile_kernel(kernel, constants, {"num_warps": 4, "enable_fp_fusion": False}, arch, dtype), arch
    )


@pytest.mark.parametrize("arch", [80, 90])
def test_column_sums_compile_without_spills(arch: int) -> None:
    from peqa_kernels.quant_matmul import backward_gpu

    constants = dict(zip(("STEP", "COLUMNS", "MOST"), backward_gpu.DOT_TILE, strict=True))
    compiled = compile_kernel(
        backward_gpu.column_dot_kernel, constants, {"num_warps": 4, "enable_fp_fusion": False}, arch, "bf16"
    )
    assert_no_spill(compiled, arch)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "part"), [(2, 32), (3, 32), (4, 16), (8, 32)])
@pytest.mark.parametrize("arch", [80, 90])
def test_group_gradients_compile_without_spills(arch: int, bits: int, part: int) -> None:
    from peqa_kernels.quant_matmul import backward_gpu

    outputs, inputs, step = backward_gpu.GRADIENT_TILE
    constants = {
        "BITS": bits,
        "HAS_IN": True,
        "PART": part,
        "OUTPUTS": outputs,
        "INPUTS": inputs,
        "STEP": step,
    }
    options = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
    compiled = compile_kernel(backward_gpu.group_gradient_kernel, constants, options, arch, "bf16")
    assert_no_spill(compiled, 80)  # with no more shared memory than an A100 has
    if arch == 90:
        assert "wgmma.mma_async" in compiled.asm["ptx"]


@needs_loops
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
