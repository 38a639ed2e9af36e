"""The untuned tile of a launch: chosen by what the compiled kernels take and by the bytes that a launch moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from peqa_kernels.quant_matmul.gpu_layout import Layout
from peqa_kernels.quant_matmul.tuning import Scales, Tile, bucket

MOST_SPLIT_ROW_TILES = 8  # of a launch that splits K: each has counters
MOST_SPLITS = 16
MOST_SUMS = 128  # that one thread adds up: more splits cost more than they bring, and registers spill
DENSE_ROWS = 1024  # from here on floats made once per launch cost less than codes unpacked in every tile

# The costs below are in bytes that one processor could have loaded from memory meanwhile: 32 a nanosecond on an H200.
# None of them was measured on a GPU.
_FLIGHT = 32 << 10  # bytes that a processor has asked for while it loads as fast as that: a microsecond's
_CACHE_RATE = 1.6  # the second-level cache delivers so many times as much, and one processor takes it
_BEGIN = 24 << 10  # until the first weights of a wave of programs are there
_MEET = 32 << 10  # until the last program of a split knows that it is the last
_ADD_UP = 0.4  # a byte of sums, read by one program while the others rest
_STEP = 2 << 10  # barriers and addresses of one step of a program
_ISSUE = 0.32  # a weight: 2.5 of the 3.9 instructions that fit in while half a byte comes
_EARLY = 0.5  # what counts of that which an early launch can gain at best: how much it does gain is not known


@dataclass(frozen=True)
class Gpu:
    """What the rule needs to know of a device."""

    name: str
    processors: int  # streaming multiprocessors
    register_products: bool  # wgmma with the weights in registers (Hopper)
    early_launch: bool  # a launch may begin while the one before it ends (Hopper and later)
    shared: int = 228 << 10  # bytes of shared memory of a processor; those of Hopper unless told


def tile_for(
    layout: Layout,
    rows: int,
    dtype: torch.dtype,
    scales: Scales,
    gpu: Gpu,
    *,
    invariant: bool = False,
    fractional: bool = False,
) -> Tile:
    """The untuned tile for a batch of `rows`: the cheapest of `choices`, and of the splits of K that each may have.

    `fractional`: zero points are no integers, which takes a few registers more where there are groups.
    `invariant`: the same tile and the same splits whatever the number of rows and the kind of scales, so that a row's
    bits do not depend on the batch. Large batches then do the splits one after the other.
    """
    rows = bucket(rows)
    tiles = choices(layout, rows, dtype, scales, gpu, invariant=invariant, fractional=fractional)
    if tiles[0].dense or tiles[0].taskwise:
        return tiles[0]
    if invariant:
        splits = _best([tiles[0]._replace(ahead=0)], layout, tiles[0].rows, gpu).splits
        return tiles[0]._replace(splits=splits, in_turn=splits > 1 and rows > 64)
    return _best(tiles, layout, rows, gpu)


def choices(
    layout: Layout,
    rows: int,
    dtype: torch.dtype,
    scales: Scales,
    gpu: Gpu,
    *,
    invariant: bool = False,
    fractional: bool = False,
) -> list[Tile]:
    """All tiles that `tile_for` chooses from, before splits; a test compiles them for sm_80 and sm_90 without spills.

    `rows` is a bucket; the other arguments are `tile_for`'s.
    """
    if dtype == torch.float32:
        tiles = [Tile(16, 64, 4, 2)]  # two products for each
    elif invariant:
        tiles = [_invariant_tile(layout, gpu)]
    elif rows <= 64:
        tiles = list(_decode_tiles(layout, rows, scales, gpu, fractional=fractional))
    elif rows >= DENSE_ROWS and scales != "group":
        return [_prefill_tile(layout, scales, gpu)._replace(dense=True)]
    else:
        tiles = [_prefill_tile(layout, scales, gpu, fractional=fractional)]
    early = gpu.early_launch and rows <= 64 and dtype != torch.float32
    return [tile._replace(ahead=4) for tile in tiles] if early else tiles


def safe(tile: Tile) -> Tile:
    """The tile to use instead of one that computes wrongly on this device: narrow, and no loads under way."""
    return tile._replace(rows=8, outputs=64, stages=1, warps=4, splits=1, in_turn=False, ahead=0)


def cost(tile: Tile, layout: Layout, rows: int, gpu: Gpu) -> float:
    """What a launch takes, in bytes that one processor could have loaded meanwhile."""
    row_tiles = -(-rows // tile.rows)
    panels = layout.padded // tile.outputs
    programs = row_tiles * panels * tile.splits
    steps = -(-layout.tiles // tile.splits)
    weights = tile.outputs * layout.step * layout.bits / 8
    inputs = 2 * tile.rows * layout.step
    sums = 4 * tile.rows * tile.outputs if tile.splits > 1 else 0
    together = programs_per_processor(tile, layout, gpu)
    busiest = -(-programs // gpu.processors)  # programs of a processor that gets most
    resident = min(busiest, together)
    waves = -(-programs // (gpu.processors * together))
    memory = panels * layout.tiles * weights / gpu.processors
    caches = programs * (steps * (weights + inputs) + 2 * sums) / gpu.processors / _CACHE_RATE
    # By Little's law a processor gets what it has under way in each time of flight, however little the others take.
    under_way = resident * max(1, tile.stages - 1) * weights
    pace = busiest * steps * weights * max(_FLIGHT / under_way, 1 / _CACHE_RATE)
    hidden = min(1.0, 0.4 + resident * tile.warps / 24)  # latency, by other warps
    issue = busiest * steps * (tile.outputs * layout.step * _ISSUE / hidden + _STEP / resident)
    meeting = _MEET + tile.splits * sums * _ADD_UP if tile.splits > 1 else 0.0
    overhead = waves * _BEGIN + meeting
    late = max(memory, caches, pace, issue) + overhead
    # A launch that begins early loads its first weights while memory would rest, at the end of the launch before.
    ahead = min(gpu.processors * together, programs) * min(tile.ahead, steps) * weights / gpu.processors
    early = max(memory, max(memory - ahead, caches, pace, issue) + overhead)
    return late - _EARLY * (late - early)


def programs_per_processor(tile: Tile, layout: Layout, gpu: Gpu) -> int:
    """Programs that share a processor's registers, as the compiled kernels take them, and its shared memory."""
    if tile.warps == 8:
        fit = 2 if tile.rows <= 16 or (tile.rows == 32 and tile.outputs == 256) else 1
    else:
        fit = 4 if tile.rows <= 16 else 3 if tile.rows <= 32 else 2
    weights, inputs = tile.outputs * layout.step * layout.bits // 8, 2 * tile.rows * layout.step
    taken = (tile.stages - 1) * weights + tile.stages * inputs + 1024
    return max(1, min(fit, gpu.shared // taken))


def _decode_tiles(
    layout: Layout, rows: int, scales: Scales, gpu: Gpu, *, fractional: bool = False
) -> Iterator[Tile]:
    """1 to 64 activations: one tile of them, except where registers do not suffice for their sums and scales."""
    odd = layout.bits in (2, 3)
    many = layout.groups_per_tile > 2 and (odd or fractional or rows > 8)
    if scales == "group" and (many or (layout.bits != 4 and layout.groups > 1 and not gpu.register_products)):
        yield Tile(16, 64, 4, 3)  # sums of a group, of all, and scales of both kinds at once
        return
    most = 64
    scaled = scales == "channel+input"  # inputs and their scales are in registers at once
    crowded = scaled and layout.groups > 1 and not gpu.register_products
    if scales == "group" or layout.groups_per_tile > 2 or crowded:
        most = 16
    elif scaled or layout.groups_per_tile > 1 or not gpu.register_products:
        most = 32
    size = min(most, max(16, rows) if odd else rows)
    wide = size == 64 and layout.groups > 1  # sums of a group beside those of all: two threads share them
    stages = 4 if size <= 16 or gpu.register_products else 3  # an A100 has less shared memory
    yield Tile(size, layout.panel, 8 if wide and layout.panel == 128 else 4, stages)
    plain = layout.groups == 1 and scales in ("base", "channel") and layout.bits == 4
    if plain and size == rows and gpu.register_products:
        if size == 8:
            yield Tile(size, 64, 4, 6)  # twice the programs: processors are filled without splits
        if 256 in layout.widths:
            yield Tile(size, 256, 8, 4)  # inputs come from the cache half as often


def _prefill_tile(layout: Layout, scales: Scales, gpu: Gpu, *, fractional: bool = False) -> Tile:
    """More than 64 activations. Groups of inputs add as many sums again, which fill the registers."""
    warps = 8 if layout.panel == 128 else 4
    taskwise = scales == "group"
    crowded = layout.groups_per_tile > 1 or (fractional and layout.groups > 1)
    if warps == 4 or not gpu.register_products or crowded or taskwise:
        size = 64 if gpu.register_products or layout.bits != 8 else 32
        if layout.groups_per_tile > 1 and (taskwise or fractional):
            size = 32
        return Tile(size, layout.panel, warps, 3, taskwise=taskwise)
    return Tile(128, layout.panel, warps, 3)


def _invariant_tile(layout: Layout, gpu: Gpu) -> Tile:
    """Any number of activations, of any kind of scales."""
    if layout.groups_per_tile > 1:
        return Tile(16, 64, 4, 3) if gpu.register_products else Tile(8, 64, 4, 2)
    if layout.groups == 1:
        return Tile(32, layout.panel, 4, 3)
    return Tile(16, layout.panel if gpu.register_products else 64, 4, 3)


def _best(tiles: list[Tile], layout: Layout, rows: int, gpu: Gpu) -> Tile:
    """The cheapest of the tiles under any split of K."""
    found = [
        tile._replace(splits=splits)
        for tile in tiles
        for splits in splits_of(layout.tiles)
        if may_split(tile, splits, rows)
    ]
    return min(found, key=lambda tile: cost(tile, layout, rows, gpu))


def may_split(tile: Tile, splits: int, rows: int) -> bool:
    """Whether a launch of `rows` may have so many splits: by its counters, and by what one program adds up."""
    counted = -(-rows // tile.rows) <= MOST_SPLIT_ROW_TILES
    return splits == 1 or (counted and splits * tile.rows * tile.outputs <= 32 * tile.warps * MOST_SUMS)


def splits_of(tiles: int) -> list[int]:
    """Numbers of parts up to MOST_SPLITS that `tiles` tiles of K can be cut into, each part with a tile at least."""
    return sorted({-(-tiles // -(-tiles // wanted)) for wanted in range(1, min(tiles, MOST_SPLITS) + 1)})
