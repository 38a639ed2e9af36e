"""Measured figures with their bars, as rows that both halves of the bench share: plain JSON objects."""

from __future__ import annotations

import json
import operator
import os
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Figure = dict[str, Any]  # name, value, unit, op, bar, ok, and facts
Op = Literal[">=", "<="]
_HOLDS = {">=": operator.ge, "<=": operator.le}


def figure(
    name: str, value: float, unit: str, op: Op, bar: float | None = None, **facts: float | str | None
) -> Figure:
    """A row; `ok` is None where there is no bar. `name` is stable from run to run."""
    ok = None if bar is None else bool(_HOLDS[op](value, bar))
    return {"name": name, "value": value, "unit": unit, "op": op, "bar": bar, "ok": ok, **facts}


def write_figures(path: Path, figures: list[Figure]) -> None:
    """Write one JSON array; the file is whole or not there. OSError when it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def print_figures(figures: list[Figure], console: Console) -> None:
    """The table and how many bars are met."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for title in ("value", "bar", ""):
        table.add_column(title, justify="right", no_wrap=True)
    for row in figures:
        bar = "" if row["bar"] is None else f"{row['op']} {row['bar']:.3g}"
        verdict = {None: "", True: "[green]ok[/]", False: "[red]missed[/]"}[row["ok"]]
        table.add_row(row["name"], f"{_number(row['value'])} {row['unit']}", bar, verdict)
    console.print(table)
    judged = [row for row in figures if row["bar"] is not None]
    console.print(f"{sum(row['ok'] for row in judged)} of {len(judged)} bars met")


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
