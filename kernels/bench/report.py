"""The table for people, the JSON file for programs, and a line of progress."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from peqa_kernels.bench.row import Row

COLUMNS = ("", "value", "bar", "", "time µs", "peer µs", "floor µs", "ceiling", "of floor")
ALWAYS = (
    "device",
    "rows",
    "tasks",
    "time_us",
    "floor_us",
)  # keys of every JSON row; null where one does not apply
NAME_WIDTH = 72  # a longer name has a line of its own


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write one JSON array of rows, each with ALWAYS; the file is whole or not there.

    OSError when it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(
        json.dumps([dict.fromkeys(ALWAYS) | row.to_dict() for row in rows], indent=1) + "\n", encoding="utf-8"
    )
    partial.replace(path)


def print_table(rows: Sequence[Row], out: TextIO) -> None:
    """Print aligned rows without empty columns, then what the columns mean and how many bars are met."""
    cells = [COLUMNS, *map(_cells, rows)]
    used = [i for i in range(len(COLUMNS)) if i == 0 or any(line[i] for line in cells[1:])]
    cells = [tuple(line[i] for i in used) for line in cells]
    names, *columns = zip(*cells, strict=True)
    first = max(len(name) for name in names if len(name) <= NAME_WIDTH)
    widths = [max(map(len, column)) for column in columns]
    for name, *line in cells:
        if len(name) > NAME_WIDTH:
            out.write(f"{name}\n")
            name = ""
        rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        out.write("  ".join([name.ljust(first), *rest]).rstrip() + "\n")
    judged = [row for row in rows if row.bar is not None]
    if COLUMNS[-1] in cells[0]:
        out.write(
            "\nfloor µs: bytes that must be moved at this run's memory rate, or operations at its bf16 matmul rate, "
            "whichever take longer.\nceiling: that rate. of floor: the floor over the time.\n"
        )
    out.write(f"{sum(bool(row.ok) for row in judged)} of {len(judged)} bars met\n")


def _cells(row: Row) -> tuple[str, ...]:
    bar = "" if row.bar is None else f"{row.op} {row.bar:.3g}"
    full = row.facts.get("full_bar")
    if row.bar is not None and full is not None and full != row.bar:
        bar += f" (of {full:.3g})"
    verdict = {None: "", True: "ok", False: "missed"}[row.ok]
    times = (_micro(row.facts.get(key)) for key in ("time_us", "peer_us", "floor_us"))
    share = row.facts.get("of_floor")
    return (
        row.name,
        f"{row.value:.3g} {row.unit}" if abs(row.value) < 1000 else f"{row.value:.0f} {row.unit}",
        bar,
        verdict,
        *times,
        _ceiling(row.facts),
        "" if share is None else f"{share:.2f}",
    )


def _ceiling(facts: dict[str, Any]) -> str:
    """The rate that the floor rests on."""
    if "ceiling_gbytes" not in facts:
        return ""
    if facts["bytes_floor_us"] >= facts["flops_floor_us"]:
        return f"{facts['ceiling_gbytes']:.0f} GB/s"
    return f"{facts['ceiling_gflops']:.0f} GF/s"


def _micro(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


class Progress:
    """What is being measured: one line that is written over on a terminal, a line per case elsewhere."""

    def __init__(self, cases: int, out: TextIO) -> None:
        """Count up to `cases`."""
        self._cases = cases
        self._out = out
        self._live = out.isatty()
        self._begin = time.monotonic()
        self._number = 0
        self._case = ""

    def case(self, name: str) -> None:
        """A case begins."""
        self._number += 1
        self._case = name
        self.detail("")
        if not self._live:
            self._out.write(f"{self._head()}\n")

    def detail(self, label: str) -> None:
        """What the case is at; shown on a terminal only."""
        if self._live:
            self._out.write(f"\r\x1b[K{self._head()} {label}"[: _columns()])
            self._out.flush()

    def end(self) -> float:
        """Clear the line; seconds since the beginning."""
        if self._live:
            self._out.write("\r\x1b[K")
        return time.monotonic() - self._begin

    def _head(self) -> str:
        seconds = time.monotonic() - self._begin
        return f"[{self._number}/{self._cases} {seconds:4.0f} s] {self._case}"


def _columns() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return 100
