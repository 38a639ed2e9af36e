"""Tile sizes of the Triton kernel: a table of measured ones per GPU; for everything that it lacks, tile_rule's.

Tables are data: `tiles/<name of the GPU>.json`, written by `gpu_tune`. Nothing is tuned while serving.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from peqa_kernels.quant_matmul.gpu_layout import Layout

TABLES = Path(__file__).with_name("tiles")
BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # rows that a table distinguishes
Scales = Literal["base", "channel", "channel+input", "group"]


class Tile(NamedTuple):
    """What one program of the kernel works on, and how it is compiled."""

    rows: int  # activations
    outputs: int  # 64, 128 or 256: a whole panel, half of one or two
    warps: int
    stages: int  # depth of the load pipeline
    splits: int = 1  # programs that share one tile of the result, each with a part of K
    in_turn: bool = False  # one program does all the splits, in their order
    taskwise: bool = False  # group scales: one task of a tile after the other, each reading all codes
    dense: bool = False  # floats are made of the codes, for a product of torch's
    ahead: int = (
        0  # begin while the launch before ends, and fetch so many tiles of weights meanwhile (Hopper on)
    )


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


class Measured:
    """Microseconds of tiles, kept line by line in a file: a search that ends early goes on where it stopped."""

    def __init__(self, path: Path | None = None, stamp: str = "") -> None:
        """Read what the file holds; lines with another `stamp` (a compiler's version) count for nothing."""
        self._path = path
        self._stamp = stamp
        self._times: dict[tuple[Any, ...], dict[Tile, float | None]] = {}
        for text in path.read_text().splitlines() if path is not None and path.exists() else []:
            try:
                line = json.loads(text)
                if line["stamp"] == stamp:
                    self._times.setdefault(_key_of(line), {})[Tile(*line["tile"])] = line["us"]
            except (KeyError, TypeError, ValueError):
                continue  # cut off in the middle

    def of(self, layout: Layout, rows: int, dtype: torch.dtype, scales: Scales) -> dict[Tile, float | None]:
        """What is known of a launch; None for a tile that does not run."""
        return self._times.get(_key(layout, rows, dtype, scales), {})

    def add(
        self,
        layout: Layout,
        rows: int,
        dtype: torch.dtype,
        scales: Scales,
        tile: Tile,
        us: float | None,
    ) -> None:
        """Keep one more."""
        self._times.setdefault(_key(layout, rows, dtype, scales), {})[tile] = us
        if self._path is not None:
            line = {**line_of(layout, rows, dtype, scales, tile, us or 0.0), "us": us, "stamp": self._stamp}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def forget(self) -> None:
        """Delete the file, once all of a search is done."""
        self._times.clear()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


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
