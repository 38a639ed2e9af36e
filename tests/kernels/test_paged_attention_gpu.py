"""The Triton kernels: under Triton's interpreter, compiled for GPUs that are not there, and on one that is."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_kernels import assert_no_spill, compile_for, machine_code, registers_and_stack
from interpreter import needs_loops

pytest.importorskip("triton")
CHECKS = Path(__file__).with_name("paged_attention_triton_checks.py")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_kernel(kernel: Any, constants: dict, options: dict, arch: int, dtype: str, queries: str) -> Any:
    """A kernel's machine code for a GPU that need not be there."""
    types = dict.fromkeys((name for name in kernel.arg_names if name.endswith("_ptr")), f"*{dtype}")
    types |= dict.fromkeys(("table_ptr", "starts_ptr", "lens_ptr"), "*i32") | {"slot_ptr": "*i64"}
    types |= dict.fromkeys(("part_ptr", "stat_ptr"), "*fp32") | dict.fromkeys(
        ("q_ptr", "out_ptr"), f"*{queries}"
    )
    types |= dict.fromkeys(("scale", "cap"), "fp32")
    aligned = tuple(name for name in kernel.arg_names if name.endswith("_ptr") or name.startswith("q_"))
    unaligned = tuple(name for name in kernel.arg_names if name not in aligned)
    return compile_for(arch, kernel, constants, types, options, unaligned)


def compile_attention(
    prefill: bool, arch: int, dtype: str, d: int, repeat: int, invariant: bool, queries: str | None = None
) -> Any:
    """The decode or prefill kernel as `paged_attention_gpu` launches it, with every option on."""
    from peqa_kernels.paged_attention import attend, gpu, tiles

    mode = {"invariant": invariant, "wgmma": arch == 90}
    tile = tiles.prefill_tile(d, DTYPES[dtype], **mode)
    if not prefill:
        tile = tiles.decode_tile(repeat, d, DTYPES[dtype], **mode)
    constants = {
        **{"heads": repeat * 4, "kv_heads": 4, "block_size": 16, "d": d, "d_v": d},
        **dict.fromkeys(("HAS_SINKS", "HAS_CAP", "HAS_WINDOW"), True),
        **gpu._tile_constants(tile, gpu.packing(repeat, tile)[0], d, d),
        **({"SPLITS": invariant} if prefill else {"EARLY": arch == 90}),
    }
    kernel = attend.prefill_kernel if prefill else attend.decode_kernel
    options = gpu._options(tile) | ({} if prefill or arch != 90 else {"launch_pdl": True})
    return compile_kernel(kernel, constants, options, arch, dtype, queries or dtype)


@pytest.mark.slow
@pytest.mark.parametrize("invariant", [False, True], ids=["default", "invariant"])
@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("dtype", "d", "repeat"),
    [
        ("bf16", 64, 3),
        ("bf16", 80, 71),
        ("fp16", 96, 1),
        ("bf16", 128, 1),
        ("bf16", 128, 8),
        ("bf16", 192, 4),
        ("bf16", 256, 2),
        ("fp32", 64, 3),
        ("fp32", 128, 4),
    ],
)
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(
    arch: int, dtype: str, d: int, repeat: int, prefill: bool, invariant: bool
) -> None:
    compiled = compile_attention(prefill, arch, dtype, d, repeat, invariant)
    assert_no_spill(compiled, 80)  # with no more shared memory than an A100 has
    if dtype != "fp32" and (prefill or d <= 128):  # a tile of keys is loaded while another one is multiplied
        buffers = [int(n) for n in re.findall(r"memdesc<(\d+)x\d+x\d+x", compiled.asm["ttgir"])]
        assert max(buffers) >= 2, buffers
    if arch == 90 and dtype != "fp32" and prefill:
        assert "wgmma.mma_async" in compiled.asm["ptx"]
    if invariant and dtype != "fp32":  # the same instructions in both kernels, whatever is around them
        other = compile_attention(not prefill, arch, dtype, d, repeat, invariant)
        shapes = [set(re.findall(r"mma\S*m\d+n\d+k\d+\S*", one.asm["ptx"])) for one in (compiled, other)]
        assert shapes[0] == shapes[1]
        assert shapes[0]


@pytest.mark.slow
@pytest.mark.parametrize("d", [192, 256])
@pytest.mark.parametrize("arch", [80, 90])
def test_wide_heads_in_fp32_spill_little(arch: int, d: int) -> None:
    """The exception that docs/design.md names, in bytes of each thread's stack: a query's halves fill 255 registers."""
    for prefill, invariant, most in ((False, False, 8), (True, False, 24), (True, True, 88)):
        stack = registers_and_stack(compile_attention(prefill, arch, "fp32", d, 2, invariant))[1]
        assert stack <= most, (prefill, invariant, stack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", [80, 90])
def test_the_write_compiles_without_spills(arch: int, dtype: str) -> None:
    from peqa_kernels.paged_attention import write

    constants = {"kv_heads": 8, "d": 192, "d_v": 128, "D": 256, "D_V": 128, "EARLY": arch == 90}
    options = {"num_warps": 1, "enable_fp_fusion": False} | ({"launch_pdl": True} if arch == 90 else {})
    assert_no_spill(compile_kernel(write.write_kernel, constants, options, arch, dtype, dtype), arch)


@pytest.mark.parametrize(("d", "queries"), [(8, "bf16"), (64, "fp32")])
def test_compiles_for_narrow_heads_and_queries_of_another_dtype(d: int, queries: str) -> None:
    assert compile_attention(False, 90, "bf16", d, 2, False, queries=queries).asm["cubin"]


@pytest.mark.parametrize("arch", [80, 90])
def test_the_combination_compiles_without_spills(arch: int) -> None:
    from peqa_kernels.paged_attention import attend

    constants = {
        "heads": 32,
        "d_v": 256,
        "HAS_SINKS": True,
        "HAS_WINDOW": True,
        "D_V": 256,
        "EARLY": arch == 90,
    }
    options = {"num_warps": 1, "enable_fp_fusion": False}
    compiled = compile_kernel(attend.combine_kernel, constants, options, arch, "bf16", "bf16")
    assert_no_spill(compiled, arch)
    # A fused multiply-add stands only where the source names it: one for the denominator, then one per feature.
    assert "fma.rn.f32" in compiled.asm["ptx"]


def test_launches_of_a_decode_step_wait_before_they_read() -> None:
    """They may begin while the launch before them still writes what they read."""
    from peqa_kernels.paged_attention import attend, write

    sizes = {"heads": 32, "kv_heads": 8, "d": 128, "d_v": 128, "D": 128, "D_V": 128, "EARLY": True}
    options = {"num_warps": 1, "enable_fp_fusion": False, "launch_pdl": True}
    for kernel, more in (
        (attend.combine_kernel, {"HAS_SINKS": True, "HAS_WINDOW": False}),
        (write.write_kernel, {}),
    ):
        constants = {name: value for name, value in (sizes | more).items() if name in kernel.arg_names}
        sass = machine_code(compile_kernel(kernel, constants, options, 90, "bf16", "bf16"))
        assert_waits_first(sass)
    assert_waits_first(machine_code(compile_attention(False, 90, "bf16", 128, 4, False)))
    assert "ACQBULK" not in machine_code(compile_attention(False, 80, "bf16", 64, 3, False))


def assert_waits_first(sass: str) -> None:
    """No access to memory before the wait."""
    before, after = sass.split("ACQBULK", 1)
    memory = re.compile(r"\b(LDG|LDGSTS|STG)\b")
    assert not memory.search(before)
    assert memory.search(after)
    assert "PREEXIT" in after


def test_splits_cover_all_positions_in_order() -> None:
    from peqa_kernels.paged_attention.tiles import FIRST_SPLIT, most_splits, split_of

    edges = [0] + [p for p in range(1, 300_000) if split_of(p) != split_of(p - 1)]
    assert [split_of(p) for p in edges] == list(range(len(edges)))
    assert all(p % FIRST_SPLIT == 0 for p in edges)
    widths = [b - a for a, b in itertools.pairwise(edges)]
    assert widths[:17] == [256] * 16 + [512]
    assert widths == sorted(widths)
    for window in (1, 20, 256, 257, 5000):
        for length in (1, 255, 256, 4097, 70_000):
            needed = split_of(length - 1) - split_of(max(0, length - window)) + 1
            assert needed <= most_splits(length, window) <= most_splits(100_000, window)


def test_a_decode_graph_launches_no_more_programs_than_fill_the_gpu() -> None:
    """32 sequences and heads under a reach of 4096 tokens: 16 splits each, whatever the lengths will be."""
    from peqa_kernels.paged_attention.gpu import split_programs
    from peqa_kernels.paged_attention.tiles import most_splits

    assert split_programs(32 * 32, most_splits(4096, None), 132) == 1
    assert split_programs(32 * 8, most_splits(4096, None), 132) == 3
    assert split_programs(8, most_splits(4096, None), 132) == 16, (
        "one sequence alone has a program for each split"
    )
    assert split_programs(8, most_splits(128_000, None), 132) == 66
    assert split_programs(4096, 1, 132) == 1


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
