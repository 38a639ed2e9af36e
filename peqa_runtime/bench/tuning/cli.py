"""`python -m peqa_runtime.bench.tuning`: measure, fetch the data, or write the tables of the document anew."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from peqa_kernels.bench.report import Progress
from peqa_runtime.bench.tuning.bench import Bench
from peqa_runtime.bench.tuning.fetch import fetch
from peqa_runtime.bench.tuning.plan import FULL, REDUCED, Plan
from peqa_runtime.bench.tuning.render import around_tables, render, text_table
from peqa_runtime.bench.tuning.store import RowFile
from peqa_runtime.errors import InvalidData, PeqaError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when everything was measured, whatever the bars say."""
    given = _parser().parse_args(arguments)
    try:
        if given.verb == "fetch":
            fetch(given.folder, say=lambda line: print(line, file=sys.stderr))
        elif given.verb == "render":
            _render(given.rows, given.document)
        else:
            _measure(given)
    except (PeqaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; rows that were measured are kept", file=sys.stderr)
        return 130
    return 0


def _measure(given: argparse.Namespace) -> None:
    if given.document is not None:
        around_tables(given.document)  # refused before hours are spent, not after
    home = Path(os.environ.get("PEQA_HOME") or "~/.peqa").expanduser()
    work = given.work or home / "bench-tuning"
    rows = RowFile(given.out or work / "rows.json")
    base = given.base or _demo_base(home)
    bench = Bench(given.data, work, base, _plan(given), rows, given.device)
    cells = bench.cells()
    progress = Progress(len(cells), sys.stderr)
    for cell in cells:
        progress.case(cell.names[0])
        if not cell.is_done(rows):
            rows.add(cell.rows())
    progress.end()
    print(text_table(rows.rows.values()))
    if given.document is not None:
        render(rows.rows.values(), given.document)


def _plan(given: argparse.Namespace) -> Plan:
    plan = FULL if given.full else REDUCED
    lists: dict[str, Any] = {}
    kinds: tuple[tuple[str, str, type[str] | type[int]], ...] = (
        ("only", "parts", str),
        ("tasks", "tasks", str),
        ("methods", "methods", str),
        ("bits", "bits", int),
        ("seeds", "seeds", int),
        ("text_kinds", "text_kinds", str),
    )
    for name, key, kind in kinds:
        value = getattr(given, name)
        if value is not None:
            try:
                lists[key] = tuple(kind(word) for word in value.split(","))
            except ValueError:
                raise InvalidData(
                    f"--{name.replace('_', '-')} takes numbers with commas between them, got {value!r}"
                ) from None
    numbers: dict[str, Any] = {
        key: value
        for key, value in (
            ("windows", given.windows),
            ("test_rows", given.test_rows),
            ("text_tokens", given.text_tokens),
            ("task_steps", given.task_steps),
        )
        if value is not None
    }
    return replace(plan, **lists, **numbers)


def _render(rows: Path, document: Path) -> None:
    if not rows.is_file():
        raise InvalidData(f"{rows}: no such file; `make bench-tuning OUT={rows}` writes it")
    render(RowFile(rows).rows.values(), document)


def _demo_base(home: Path) -> Path:
    from peqa_runtime.demo.setup import ensure_demo

    return ensure_demo(home).base


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m peqa_runtime.bench.tuning", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="measure what is not measured yet", description="Measure, row by row.")
    run.add_argument("data", type=Path, help="folder of the data; `fetch` makes one")
    run.add_argument("--out", type=Path, metavar="FILE", help="rows as one JSON array; those in it are kept")
    run.add_argument("--document", type=Path, metavar="FILE", help="write its tables anew from the rows")
    run.add_argument("--full", action="store_true", help="all bits, methods, tasks, three seeds: for a GPU")
    run.add_argument("--only", metavar="PARTS", help="some of cost,perplexity,sweep,tasks")
    run.add_argument("--tasks", help="some of sql,slots,intents,e2e,gsm8k")
    run.add_argument("--methods", help="some of rtn,gptq,blockwise")
    run.add_argument("--bits", help="some of 4,3,2")
    run.add_argument("--seeds", help="such as 0,1,2")
    run.add_argument("--windows", type=int, help="windows of the test text")
    run.add_argument("--test-rows", type=int, help="rows of a task's test file")
    run.add_argument("--text-kinds", help="kinds of sets tuned on text, some of channel,channel+input,group")
    run.add_argument("--text-tokens", type=int, help="tokens to tune on")
    run.add_argument("--task-steps", type=float, help="times a task's own steps")
    run.add_argument("--base", type=Path, help="imported base; default: the demo's, under $PEQA_HOME")
    run.add_argument("--work", type=Path, help="bases, sets and answers; default: $PEQA_HOME/bench-tuning")
    run.add_argument("--device", default="auto")
    get = verbs.add_parser("fetch", help="get the public data", description="Fetch the data and check it.")
    get.add_argument("folder", type=Path)
    tables = verbs.add_parser("render", help="tables of a document", description="Write tables from rows.")
    tables.add_argument("rows", type=Path)
    tables.add_argument("document", type=Path)
    return parser
