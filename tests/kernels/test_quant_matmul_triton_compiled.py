"""Every configuration of the Triton kernel that ships, compiled for GPUs that need not be there."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from compiled_kernels import SHARED, assert_no_spill, compile_for, machine_code, registers_and_stack
from shipped_launches import (
    DTYPES,
    LAYOUTS,
    Case,
    Launch,
    check,
    compiled,
    covering,
    fault_of,
    gpu_of,
    launch_of,
    layout_of_case,
    shipped,
)

from peqa_kernels.quant_matmul.tile_rule import splits_of, tile_for
from peqa_kernels.quant_matmul.tuning import BUCKETS, Tile

QUICK = [Case(90, 4, -1, 1), Case(90, 4, 128, 512), Case(90, 3, -1, 512), Case(80, 4, 128, 16, "group")]
shipped = lru_cache(shipped)


def untuned(case: Case) -> Launch:
    """The launch that the rule chooses."""
    tile = tile_for(
        layout_of_case(case), case.rows, DTYPES[case.dtype], case.scales, gpu_of(case.arch),
        invariant=case.invariant, fractional=case.zeros == 2,
    )  # fmt: skip
    return launch_of(case, tile)


def loop_instructions(sass: str) -> Counter[str]:
    """Instructions of the shortest loop with a matrix product: the loop over K."""
    lines = sass.splitlines()
    labels = {line.strip()[:-1]: i for i, line in enumerate(lines) if re.match(r"\s*\.L_x_\d+:", line)}
    jumps = [
        (labels.get(m[1], i), i) for i, s in enumerate(lines) if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", s))
    ]
    loops = [lines[a:b] for a, b in jumps if any("HGMMA" in line or "HMMA" in line for line in lines[a:b])]
    assert loops
    operation = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
    return Counter(found[1] for line in min(loops, key=len) if (found := operation.search(line)))


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_quick_ones_compile_without_spills(case: Case) -> None:
    one = untuned(case)
    sass = machine_code(check(one))
    assert case.arch == 80 or one.tile.rows < 16 or "HGMMA" in sass


@lru_cache
def chosen(arch: int) -> list[Launch]:
    """Those that stand for all: about 190 of 29 000."""
    return covering(shipped(arch))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("arch", [80, 90])
def test_whatever_ships_compiles_without_spills(arch: int, bits: int) -> None:
    """Every tile and every pair of what launches differ in; `shipped_launches.py` as a command compiles all."""
    faults = [fault for one in chosen(arch) if one.case.bits == bits and (fault := fault_of(one))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_rule_chooses_nothing_else(arch: int) -> None:
    """Weights of other sizes take tiles, and no more splits, that are among those of the four layouts."""
    most: dict[Any, int] = {}
    for one in shipped(arch):
        key = kind(one.case, one.tile)
        most[key] = max(most.get(key, 0), one.tile.splits)
    sizes = itertools.product(
        ((128,), (4096,), (6144,), (22016, 22016), (960, 320, 320)), (512, 4096, 8192, 18944)
    )
    cases = itertools.product(
        (2, 3, 4, 8), (-1, 32, 128), ("channel", "channel+input", "group"), DTYPES, (1, 2)
    )
    for (segments, k), (bits, group, scales, dtype, zeros) in zip(itertools.cycle(sizes), cases):
        for rows, invariant in itertools.product(BUCKETS[:7], (False, True)):
            case = Case(arch, bits, group, rows, scales, dtype, zeros, segments, invariant, k)
            tile = untuned(case).tile
            assert tile.splits in splits_of(layout_of_case(case).tiles)
            assert tile.splits <= most[kind(case, tile)], (case, tile)


def kind(case: Case, tile: Tile) -> Any:
    """What `chosen` tells launches apart by, but for the sizes of the weight."""
    return case._replace(rows=0, segments=(), inputs=0, invariant=False), tile._replace(
        splits=1, in_turn=False
    )


def test_two_programs_of_256_outputs_by_32_rows_share_a_processor() -> None:
    """64 Ki registers: 128 for each of 512 threads."""
    found = check(launch_of(Case(90, 4, -1, 32), Tile(32, 256, 8, 4, 2, ahead=4)))
    assert registers_and_stack(found)[0] <= 128
    assert 2 * (found.metadata.shared + 1024) <= SHARED[90] + 1024


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("arch", [80, 90])
def test_unpacking_for_long_batches_compiles_without_spills(arch: int, bits: int) -> None:
    """Every group, kind of zero points and layout, in the dtypes by turns."""
    from peqa_kernels.quant_matmul import gpu_dense

    for i, (group, zeros) in enumerate([(-1, 0), (32, 1), (64, 2), (128, 1)]):
        sizes = LAYOUTS[0 if group == 128 else i]
        layout = layout_of_case(Case(arch, bits, group, 2048, segments=sizes[0], inputs=sizes[1]))
        constants = gpu_dense.unpack_constants(layout, zeros, assembly=True)
        types = {"words": "*i32", "scales": "*fp16", "zeros": "*fp32" if zeros == 2 else "*u8"}
        types["floats"] = "*bf16" if (i + bits) % 2 else "*fp16"
        found = compile_for(arch, gpu_dense.unpack_kernel, constants, types, {"num_warps": 4})
        assert_no_spill(found, arch, (group, zeros))
        if i == 0:
            assert re.search(r"STG\.E\.128", machine_code(found)), (
                "whole runs of floats are written at a time"
            )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", [80, 90])
def test_what_runs_before_and_after_a_product_compiles_without_spills(arch: int, dtype: str) -> None:
    from peqa_kernels.quant_matmul import gpu_dense, gpu_inputs

    rows, outputs = gpu_dense.FINISH_TILE
    kernels = [(gpu_dense.finish_kernel, {"HAS_OUT": True, "HAS_BIAS": True, "BM": rows, "BN": outputs})]
    kernels += [
        (gpu_inputs._scale_kernel, {"K": k, "SEGMENTS": segments, "BLOCK": gpu_inputs._BLOCK})
        for k, segments in ((4096, 1), (576, 3))
    ]
    kernels += [
        (gpu_inputs.total_kernel, gpu_inputs.total_constants(4096, groups)) for groups in (1, 32, 64, 128)
    ]
    types = dict.fromkeys(("x", "y", "copies", "bias"), f"*{dtype}") | dict.fromkeys(("out", "into"), "*fp16")
    types |= {"row": "*i32", "totals": "*fp32"}
    for kernel, constants in kernels:
        found = compile_for(arch, kernel, constants, types, {"enable_fp_fusion": True}, ("rows", "bank_rows"))
        assert_no_spill(found, arch, (kernel, constants))


def test_a_launch_waits_for_the_one_before_it() -> None:
    """It may begin early, but all that it reads or writes then is the prefetch of weights."""
    one = untuned(Case(90, 4, -1, 16))
    assert one.tile.ahead == 4
    before, after = machine_code(compiled(one)).split("ACQBULK", 1)
    assert before.count("UBLKPF.L2") == one.tile.ahead
    memory = re.compile(r"\b(LDG|LDGSTS|STG|ATOMG|RED|UBLKCP)\b")
    assert not memory.search(before)
    assert memory.search(after)
    assert "PREEXIT" in after, "the launch after it may begin once this one need not wait any more"
    assert "ACQBULK" not in machine_code(compiled(untuned(Case(80, 4, -1, 16))))


@pytest.mark.parametrize(
    ("bits", "rows", "dtype", "most"),
    [
        (4, 16, "bf16", 2.45),
        (4, 32, "bf16", 2.42),
        (4, 16, "fp16", 2.13),
        (3, 16, "bf16", 2.52),
        (2, 16, "bf16", 2.5),
    ],
)
def test_instructions_per_weight(bits: int, rows: int, dtype: str, most: float) -> None:
    """At 4.3 TB/s an H200 has 3.89 issue slots for a weight of 4 bits, 2.92 at 3 bits and 1.94 at 2 bits."""
    one = untuned(Case(90, bits, -1, rows, dtype=dtype))
    instructions = loop_instructions(machine_code(compiled(one)))
    lanes = 32 * one.tile.warps
    assert instructions.total() * lanes / (one.tile.outputs * 128) <= most, instructions
    assert instructions["I2F"] + instructions["I2FP"] == 0, "codes become floats without conversions"


@pytest.mark.parametrize("rows", [16, 64, 512])
def test_products_run_asynchronously(rows: int, tmp_path: Path) -> None:
    """The assembler waits after every single wgmma, and says so, when it cannot see that the loop runs at all."""
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled(untuned(Case(90, 4, -1, rows))).asm["ptx"])
    from triton.backends.nvidia.compiler import get_ptxas

    found = get_ptxas(90)
    done = subprocess.run(
        [found.path, "-arch=sm_90a", ptx, "-o", tmp_path / "again"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "serialized" not in done.stdout + done.stderr
