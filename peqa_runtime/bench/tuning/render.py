"""Tables from rows: for a terminal, and as Markdown between two marks of a document."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peqa_runtime.errors import InvalidData

BEGIN, END = "<!-- tuning tables: begin -->", "<!-- tuning tables: end -->"
Rows = Iterable[dict[str, Any]]


def text_table(rows: Rows) -> str:
    """Aligned lines of name, value and verdict."""
    cells = [(row["name"], _value(row), _verdict(row)) for row in rows]
    widths = [max((len(cell[i]) for cell in cells), default=0) for i in range(2)]
    return "\n".join(f"{n.ljust(widths[0])}  {v.rjust(widths[1])}  {b}".rstrip() for n, v, b in cells)


def render(rows: Rows, document: Path) -> None:
    """Replace what stands between the marks of `document`, or begin it. `InvalidData` where a mark is missing."""
    listed = list(rows)
    before, after = around_tables(document)
    tables = "\n\n".join(
        part
        for part in (_bars(listed), _perplexity(listed), _tasks(listed), _sweep(listed), _cost(listed))
        if part
    )
    staged = document.with_name(f".{document.name}.{os.getpid()}")
    staged.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
    os.replace(staged, document)


def around_tables(document: Path) -> tuple[str, str]:
    """What stands before and after the marks of `document`, or of one to be made; `InvalidData` where one lacks."""
    text = document.read_text(encoding="utf-8") if document.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InvalidData(
            f"{document} must hold the lines {BEGIN!r} and {END!r} once each: the tables go between them"
        )
    before, rest = text.split(BEGIN)
    return before, rest.split(END)[1]


def _of(rows: Sequence[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["name"].startswith(f"tuning/{part}/")]


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""
    made = [f"### {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*made, *(f"| {' | '.join(line)} |" for line in lines)])


def _bars(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        (
            f"`{row['name']}`",
            _value(row),
            f"{row['op']} {row['bar']:g}",
            "met" if row["ok"] else "**missed**",
            _more(row),
            row["date"],
            row["device"],
        )
        for row in rows
        if row["bar"] is not None
    ]
    return _table("Goals", ("row", "measured", "goal", "", "", "date", "hardware"), lines)


def _more(row: dict[str, Any]) -> str:
    if "difference" in row:
        return f"{row['kind']}: {row['difference']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}] against LoRA"
    return str(row.get("base", ""))


def _perplexity(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each base and kind of set tuned on text; a base that is not tuned yet has one, too."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in _of(rows, "perplexity"):
        _, _, base, when, *_ = row["name"].split("/")
        if when == "before" or when.startswith("after"):
            found.setdefault(base, {}).setdefault(when, []).append(row)
    lines = []
    for base, parts in found.items():
        before = parts.pop("before", [])
        for when, after in parts.items() or {"": before}.items():
            last = after[-1]
            shown = (
                when.removeprefix("after-").replace("after", "channel"),
                _mean(before),
                _mean(after if when else []),
                str(last.get("train_tokens", "")),
                str(last["tokens"]),
                _seeds(after if when else []),
            )
            commands = (last.get("base_command"), last.get("train_command"), last["command"])
            lines.append((base, *shown, last["date"], last["device"], _commands(*commands)))
    head = ("base", "tuned", "before", "after", "tuned on tokens", "read on tokens", "seeds")
    where = ("date", "hardware", "commands")
    return _table("Perplexity, wikitext-2 raw test, context 1024", (*head, *where), lines)


def _tasks(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in _of(rows, "task"):
        _, _, task, way, *seed = row["name"].split("/")
        if row["bar"] is not None:
            continue
        value = f"{row['value']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"
        cost = ("", "", "", "", "")
        if seed:
            pace = f"{row['seconds_per_step']:.2f}"
            cost = (
                _size(row["bytes_per_task"]),
                f"{row['parameters']:,}",
                _size(row["peak_memory_bytes"]),
                pace,
                f"{row['learning_rate']:g}",
            )
        commands = (
            row.get("train_command"),
            row["command"] if row.get("train_command") != row["command"] else None,
        )
        lines.append(
            (
                task,
                way,
                value,
                str(row["rows"]),
                *cost,
                str(row.get("seed", "")),
                row["date"],
                row["device"],
                _commands(*commands),
            )
        )
    head = (
        "task",
        "way",
        "metric [95 %]",
        "rows",
        "bytes per task",
        "trained",
        "peak memory",
        "s per step",
        "lr",
    )
    return _table("Tasks", (*head, "seed", "date", "hardware", "commands"), lines)


def _sweep(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each task and way, with the first trial's command; others differ in what they are named by."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in _of(rows, "sweep"):
        _, _, task, way, _ = row["name"].split("/")
        found.setdefault((task, way), []).append(row)
    lines = []
    for (task, way), trials in found.items():
        losses = [
            f"{row['name'].rpartition('/')[2].removeprefix('lr')}: {row['value']:.4f}" for row in trials
        ]
        first = trials[0]
        where = (_seeds(trials[:1]), first["date"], first["device"], _commands(first["command"]))
        lines.append((task, way, " · ".join(losses), *where))
    head = ("task", "way", "rate, and what differs from cosine decay and beta2 0.999: loss")
    return _table(
        "Trials: held-out loss after the sweep's steps",
        (*head, "seed", "date", "hardware", "command of the first"),
        lines,
    )


def _cost(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        (
            row["name"].removeprefix("tuning/cost/"),
            _value(row),
            row["date"],
            row["device"],
            f"`{row['command']}`",
        )
        for row in _of(rows, "cost")
    ]
    return _table(
        "Cost of a step, 16 rows of 64 tokens, a quarter of them in the loss, seed 0",
        ("", "", "date", "hardware", "command"),
        lines,
    )


def _mean(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    values = [row["value"] for row in rows]
    spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.2f}{spread}"


def _seeds(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(str(row["seed"]) for row in rows)


def _commands(*commands: str | None) -> str:
    """In the order in which they are run."""
    return "<br>".join(f"`{command}`" for command in commands if command)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _value(row: dict[str, Any]) -> str:
    return _size(row["value"]) if row["unit"] == "bytes" else f"{row['value']:.4g} {row['unit']}".rstrip()


def _verdict(row: dict[str, Any]) -> str:
    return "" if row["bar"] is None else f"{row['op']} {row['bar']:g} {'ok' if row['ok'] else 'missed'}"
