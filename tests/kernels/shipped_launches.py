"""All launches of the matmul kernel that the rule of tiles allows, and few of them that hold all that they differ in.

Where K ends and how wide the outputs are change a kernel's loops, not what it has in its registers: four layouts
stand for all weights, and no split, the most splits, and the most whose last part is shorter for all numbers of splits.

    python tests/kernels/shipped_launches.py --arch 90 --bits 4 --every 1   # all of them: hours of one core
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from compiled_kernels import assert_no_spill, compile_for

from peqa_kernels.packing import packed_width
from peqa_kernels.quant_matmul import QuantizedWeight, gpu, gpu_kernel, tile_rule
from peqa_kernels.quant_matmul.gpu_inputs import needs_copies
from peqa_kernels.quant_matmul.gpu_layout import Layout, layout_of
from peqa_kernels.quant_matmul.tuning import BUCKETS, Scales, Tile

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Outputs of siblings, and inputs. Panels of 128 and of 64 that are partly filling, tiles of 128 inputs and of 64.
LAYOUTS = (((12288,), 4096), ((960, 320, 320), 4096), ((2560, 2560), 960), ((960, 320, 320), 960))
# A configuration holds a value of each; the choice holds every pair of these values that some configuration has.
TRAITS = ("bits", "group", "scales", "dtype", "zeros", "family", "cut", "parts")


class Case(NamedTuple):
    """A launch on a weight of `inputs` in groups of `group` (-1: one), fused siblings of `segments` outputs."""

    arch: int
    bits: int
    group: int
    rows: int
    scales: Scales = "channel"
    dtype: str = "bf16"
    zeros: int = 1  # integers
    segments: tuple[int, ...] = LAYOUTS[0][0]
    invariant: bool = False
    inputs: int = LAYOUTS[0][1]


class Launch(NamedTuple):
    """A case on one of the tiles that it may have, and what the kernel is compiled for then."""

    case: Case
    tile: Tile
    constants: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that share their machine code."""
        options = gpu.options(self.tile).items()
        return self.case.arch, self.case.dtype, *self.constants.items(), *options

    @property
    def traits(self) -> dict[str, Any]:
        """What is held to matter to the compiler, beside the tile."""
        case, tile = self.case, self.tile
        family = "taskwise" if tile.taskwise else "in turn" if tile.in_turn else "mixed"
        if tile.stages == 1:
            family = "safe"
        parts = -(-layout_of_case(case).tiles // tile.splits)
        return {
            **{name: getattr(case, name) for name in TRAITS[:5]},
            "family": (family, case.invariant, case.rows > 64),
            "cut": (case.segments, case.inputs),
            "parts": (tile.splits > 1, layout_of_case(case).tiles % parts != 0),
        }


@cache
def layout_of_sizes(bits: int, group: int, segments: tuple[int, ...], k: int) -> Layout:
    """How a weight of these sizes is cut up."""
    n, groups = sum(segments), 1 if group == -1 else k // group
    empty = partial(torch.empty, device="meta")
    qweight = empty((n, packed_width(k, bits)), dtype=torch.uint8)
    return layout_of(QuantizedWeight(qweight, empty((n, groups)), empty((n, groups)), bits, k), segments)


def layout_of_case(case: Case) -> Layout:
    """How the case's weight is cut up."""
    return layout_of_sizes(case.bits, case.group, case.segments, case.inputs)


def gpu_of(arch: int) -> tile_rule.Gpu:
    """An A100 or an H100."""
    hopper = arch == 90
    processors, shared = (132, 228 << 10) if hopper else (108, 164 << 10)
    return tile_rule.Gpu("any", processors, register_products=hopper, early_launch=hopper, shared=shared)


def launch_of(case: Case, tile: Tile) -> Launch:
    """The case on a tile."""
    assert not tile.dense, case
    copied = needs_copies(case.rows, totals=case.zeros == 2)
    inputs = "none" if case.scales != "channel+input" else "copies" if copied else "by row"
    constants = gpu.constants(
        layout_of_case(case), tile, case.zeros, case.dtype != "fp32",
        inputs=inputs, has_out=True, has_group=case.scales == "group", has_bias=True,
    )  # fmt: skip
    return Launch(case, tile, constants)


def shipped(arch: int) -> list[Launch]:
    """Every launch that the rule may choose on a GPU of this generation, once for each machine code."""
    found: dict[tuple[Any, ...], Launch] = {}
    kinds: tuple[Scales, ...] = ("channel", "channel+input", "group")
    for bits, group, scales, dtype, zeros, (segments, k), invariant in itertools.product(
        (2, 3, 4, 8), (-1, 32, 64, 128), kinds, DTYPES, (0, 1, 2), LAYOUTS, (False, True)
    ):
        if group > 0 and k % group:
            continue
        for rows in BUCKETS:
            case = Case(arch, bits, group, rows, scales, dtype, zeros, segments, invariant, k)
            for tile in _tiles(case):
                one = launch_of(case, tile)
                found.setdefault(one.key, one)
    return list(found.values())


def _tiles(case: Case) -> Iterator[Tile]:
    """Those of the rule for the case, with the splits that stand for all, and what takes their place if they fail."""
    layout = layout_of_case(case)
    device, fractional = gpu_of(case.arch), case.zeros == 2
    tiles = tile_rule.choices(
        layout, case.rows, DTYPES[case.dtype], case.scales, device, invariant=case.invariant, fractional=fractional
    )  # fmt: skip
    for tile in tiles:
        if tile.dense:
            continue
        yield tile
        yield tile_rule.safe(tile)
        rows = tile.rows if case.invariant else case.rows
        allowed = [
            n for n in tile_rule.splits_of(layout.tiles) if n > 1 and tile_rule.may_split(tile, n, rows)
        ]
        uneven = [n for n in allowed if layout.tiles % -(-layout.tiles // n)]
        for some in () if tile.taskwise else (allowed, uneven):
            if some:
                yield tile._replace(splits=some[-1], in_turn=case.invariant and case.rows > 64)


def covering(launches: list[Launch]) -> list[Launch]:
    """Few of the launches, with every tile, every pair of traits and every (bits, group, scales) that all have."""
    bit_of: dict[Any, int] = {}
    mixed = random.Random(0).sample(
        launches, len(launches)
    )  # of equally good ones not always those of two bits
    held = [(one, sum(1 << bit_of.setdefault(want, len(bit_of)) for want in _wants(one))) for one in mixed]
    missing = (1 << len(bit_of)) - 1
    chosen = []
    while missing:
        one, bits = max(held, key=lambda pair: (pair[1] & missing).bit_count())
        chosen.append(one)
        missing &= ~bits
    return chosen


def _wants(one: Launch) -> set[Any]:
    traits, tile = one.traits, one.tile
    shape = (
        tile.rows,
        tile.outputs,
        one.constants["BK"],
        tile.stages,
        tile.warps,
        tile.ahead,
        tile.splits > 1,
    )
    triple = tuple(traits[name] for name in ("bits", "group", "scales"))
    return {*itertools.combinations(traits.items(), 2), (*shape, tile.in_turn), triple}


def compiled(one: Launch) -> Any:
    """The kernel as the launch has it."""
    case = one.case
    types = dict.fromkeys(("words", "panels", "row", "group_row", "counters"), "*i32")
    types |= dict.fromkeys(("out", "into", "group", "scales"), "*fp16")
    types |= dict.fromkeys(("x", "y", "bias"), f"*{case.dtype}") | dict.fromkeys(("parts", "totals"), "*fp32")
    types["zeros"] = "*fp32" if case.zeros == 2 else "*u8"
    kernel, options = gpu_kernel.quant_matmul_kernel, gpu.options(one.tile)
    return compile_for(case.arch, kernel, one.constants, types, options, ("M", "bank_rows", "group_rows"))


def check(one: Launch) -> Any:
    """Compile it: no spills, and on Hopper every product takes its weights from registers. Gives what was compiled."""
    case, tile = one.case, one.tile
    found = compiled(one)
    assert_no_spill(found, case.arch, one)
    if case.arch == 90 and case.dtype != "fp32":
        products = [line for line in found.asm["ttgir"].splitlines() if "warp_group_dot " in line]
        if tile.rows >= 16:
            assert "wgmma.mma_async" in found.asm["ptx"], one
        assert all("dot_op<{opIdx = 0" in line for line in products), (one, products)
    return found


def fault_of(one: Launch) -> str:
    """What `check` says; nothing where it holds."""
    try:
        check(one)
    except Exception as error:  # noqa: BLE001  the next launch is to be compiled whatever this one does
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> int:
    """Compile all launches, or every so many of them; print those that fail. 1 if any does."""
    parser = argparse.ArgumentParser(
        description="Compile the matmul kernel for launches that the rule may choose."
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=(80, 90))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8], choices=(2, 3, 4, 8))
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth (default 1)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    launches = [one for arch in options.arch for one in shipped(arch) if one.case.bits in options.bits]
    launches = launches[:: options.every]
    faults = 0
    with ProcessPoolExecutor(options.processes) as pool:
        for fault in filter(None, pool.map(fault_of, launches)):
            print(fault, flush=True)
            faults += 1
    print(f"{faults} of {len(launches)} launches fail")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
