"""Tile sizes of the Triton kernel: a table of measured ones per GPU, and a rule for everything that it lacks.

Tables are data: `tiles/<name of the GPU>.json`, written by `gpu_tune`. Nothing is tuned while serving.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from peqa_kernels.quant_matmul.gpu_layout import Layout

TABLES = Path(__file__).with_name("tiles")
BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # rows that a table distinguishes
MOST_SPLIT_ROW_TILES = 8  # of a launch that splits K: each has counters
Scales = Literal["base", "channel", "channel+input", "group"]


class Tile(NamedTuple):
    """What one program of the kernel works on, and how it is compiled."""

    rows: int  # activations
    outputs: int  # 64 or 128: a whole panel or half of one
    warps: int
    stages: int  # depth of the load pipeline
    splits: int = 1  # programs that share one tile of the result, each with a part of K
    in_turn: bool = False  # one program does all the splits, in their order
    taskwise: bool = False  # group scales: one task of a tile after the other, each reading all codes


@dataclass(frozen=True)
class Gpu:
    """What the rule needs to know of a device."""

    name: str
    processors: int  # streaming multiprocessors
    register_products: bool  # wgmma with the weights in registers (Hopper)


def bucket(rows: int) -> int:
    """The entry of BUCKETS that a batch of `rows` belongs to: the next larger one."""
    return next((size for size in BUCKETS if rows <= size), BUCKETS[-1])


class TileTable:
    """Measured tiles of one GPU: lines with bits, group (-1: per channel), n, k, rows, scales, dtype, tile and us."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        """Index the lines; KeyError or TypeError for one that lacks a field or has a tile of another shape."""
        self.lines = lines
        self._tiles = {_key_of(line): Tile(*line["tile"]) for line in lines}

    def find(self, layout: Layout, rows: int, dtype: torch.dtype, scales: Scales) -> Tile | None:
        """Give the tile measured to be fastest, None where none was."""
        return self._tiles.get(_key(layout, rows, dtype, scales))

    def with_line(self, line: dict[str, Any]) -> TileTable:
        """The same table with one more line, in place of an older one for the same launch."""
        return TileTable([*(old for old in self.lines if _key_of(old) != _key_of(line)), line])

    @staticmethod
    def load(gpu_name: str, folder: Path = TABLES) -> TileTable:
        """Read the table of a GPU; empty where there is none. ValueError for a file that is no table."""
        path = table_path(gpu_name, folder)
        if not path.exists():
            return TileTable([])
        try:
            return TileTable(json.loads(path.read_text())["tiles"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no table of tiles: {error!r}; delete it or tune anew") from error

    def save(self, gpu_name: str, folder: Path = TABLES) -> Path:
        """Write the table, one line per entry, and give its path."""
        path = table_path(gpu_name, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(
            f"    {json.dumps(line)}" for line in sorted(self.lines, key=lambda line: str(_key_of(line)))
        )
        path.write_text(f'{{\n  "gpu": {json.dumps(gpu_name)},\n  "tiles": [\n{lines}\n  ]\n}}\n')
        return path


def table_path(gpu_name: str, folder: Path = TABLES) -> Path:
    """Where the table of a GPU lies: its name as CUDA gives it, in small letters and hyphens."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json")


def line_of(
    layout: Layout, rows: int, dtype: torch.dtype, scales: Scales, tile: Tile, us: float
) -> dict[str, Any]:
    """A line of the table, with the measured time in microseconds."""
    bits, group, n, k, size, name, kind = _key(layout, rows, dtype, scales)
    fields = {"bits": bits, "group": group, "n": n, "k": k, "rows": size, "dtype": name, "scales": kind}
    return {**fields, "tile": list(tile), "us": round(us, 2)}


def _key(layout: Layout, rows: int, dtype: torch.dtype, scales: Scales) -> tuple[Any, ...]:
    group = layout.group_size if layout.groups > 1 else -1
    # The output scale of a task is free: base and channel share their tiles.
    kind = "channel" if scales == "base" else scales
    name = str(dtype).removeprefix("torch.")
    return layout.bits, group, sum(layout.segments), layout.in_features, bucket(rows), name, kind


def _key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[field] for field in ("bits", "group", "n", "k", "rows", "dtype", "scales"))


def tile_for(
    layout: Layout, rows: int, dtype: torch.dtype, scales: Scales, gpu: Gpu, *, invariant: bool = False
) -> Tile:
    """The untuned tile for a batch of `rows`; a test compiles each for sm_80 and sm_90 without spills.

    `invariant`: the same tile and the same splits whatever the number of rows and the kind of scales, so that a row's
    bits do not depend on the batch. Large batches then do the splits one after the other.
    """
    rows = bucket(rows)
    if dtype == torch.float32:
        tile = Tile(16, 64, 4, 2)  # two products for each
    elif invariant:
        tile = _invariant_tile(layout, gpu)
    elif rows <= 64:
        tile = _decode_tile(layout, rows, scales, gpu)
    else:
        tile = _prefill_tile(layout, scales, gpu)
    if invariant:
        splits = _splits(layout, tile, tile.rows, gpu)
        return tile._replace(splits=splits, in_turn=splits > 1 and rows > 64)
    return tile if tile.taskwise else tile._replace(splits=_splits(layout, tile, rows, gpu))


def safe(tile: Tile) -> Tile:
    """The tile to use instead of one that computes wrongly on this device: narrow, and no loads under way."""
    return tile._replace(rows=8, stages=1, warps=4, splits=1, in_turn=False)


def _decode_tile(layout: Layout, rows: int, scales: Scales, gpu: Gpu) -> Tile:
    """1 to 64 activations: one tile of them, except where registers do not suffice for their sums and scales."""
    most = 64
    if scales == "group" or layout.groups_per_tile > 2:
        most = 16
    elif scales == "channel+input" or layout.groups_per_tile > 1 or not gpu.register_products:
        most = 32
    size = min(most, rows if layout.bits in (4, 8) else max(16, rows))
    return Tile(size, layout.panel, 4, 4 if size <= 16 else 3)


def _prefill_tile(layout: Layout, scales: Scales, gpu: Gpu) -> Tile:
    """More than 64 activations. Groups of inputs add as many sums again, which fill the registers."""
    warps = 8 if layout.panel == 128 else 4
    taskwise = scales == "group"
    if warps == 4 or not gpu.register_products or layout.groups_per_tile > 1 or taskwise:
        size = 64 if gpu.register_products or layout.bits != 8 else 32
        return Tile(size, layout.panel, warps, 3, taskwise=taskwise)
    return Tile(128, layout.panel, warps, 3)


def _invariant_tile(layout: Layout, gpu: Gpu) -> Tile:
    """Any number of activations, of any kind of scales."""
    if layout.groups_per_tile > 1:
        return Tile(16 if gpu.register_products else 8, 64, 4, 3)
    return Tile(32 if layout.groups == 1 else 16, layout.panel, 4, 3)


def _splits(layout: Layout, tile: Tile, rows: int, gpu: Gpu) -> int:
    """The number of parts of K that should finish first.

    Counted in steps of the loop: waves of programs times the steps of each, some to begin and end one, and the sums to
    write and add up. Three programs share a processor where registers allow, two with many sums, or one of eight warps.
    """
    row_tiles = -(-rows // tile.rows)
    if row_tiles > MOST_SPLIT_ROW_TILES:
        return 1
    programs = row_tiles * (layout.padded // tile.outputs)
    slots = gpu.processors * (3 if tile.rows <= 16 else 2 if tile.warps <= 4 else 1)
    best, least = 1, float("inf")
    for wanted in range(1, 17):
        per = -(-layout.tiles // wanted)
        splits = -(-layout.tiles // per)  # the last part has a step, too
        waves = -(-programs * splits // slots)
        steps = waves * (per + 3) + (0 if splits == 1 else 1 + splits * (0.25 + tile.rows / 96))
        if steps < least:
            best, least = splits, steps
    return best
