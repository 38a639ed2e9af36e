"""`python -m peqa_runtime.bench`: measure the engine offline, print the table, write its rows."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from peqa_kernels.bench.report import Progress, print_table, write_json
from peqa_kernels.bench.row import Row
from peqa_runtime.bench.run import PARTS, Options, has_weights, measure
from peqa_runtime.bench.workload import Load, random_set
from peqa_runtime.errors import PeqaError
from peqa_runtime.model.base_checkpoint import read_manifest


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when everything was measured, whatever the bars say, 1 when the base is of no use."""
    given = _parser().parse_args(arguments)
    parts = tuple(given.only.split(",")) if given.only else PARTS
    if unknown := set(parts) - set(PARTS):
        print(f"--only knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if parts == ("gpu",) and given.sets is None and not torch.cuda.is_available():
        print("no CUDA device is to be had here, and --only gpu needs one", file=sys.stderr)
        return 2
    try:
        base = given.base or _demo_base()
        if given.sets is not None:
            _write_sets(base, given.sets, given.count)
            return 0
        return _measured(given, base, parts)
    except PeqaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _measured(given: argparse.Namespace, base: Path, parts: tuple[str, ...]) -> int:
    """Measure, print and write; 0."""
    if parts == ("gpu",) and not has_weights(base):
        print(f"{base} has a tokenizer only: the answers of CPU and GPU are not compared", file=sys.stderr)
    load = Load(given.prompt_tokens, given.output_tokens, given.tasks)
    options = Options(base, parts, given.device, given.seconds, given.batches, given.seed, load)
    progress = Progress(len(parts), sys.stderr)
    rows: list[Row] = []
    try:
        for found in measure(options, progress):
            rows += found
    finally:  # what was measured is kept, also after Ctrl-C
        seconds = progress.end()
        if not given.quiet:
            print_table(rows, sys.stdout)
        if given.out is not None:
            write_json(given.out, rows)
    if not given.quiet:
        print(f"{len(rows)} rows in {seconds:.0f} s" + (f", written to {given.out}" if given.out else ""))
    return 0


def _write_sets(base: Path, folder: Path, count: int) -> None:
    """Write `count` random scale set files for the base: what the served half uploads."""
    manifest = read_manifest(base)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        (folder / f"{seed:05d}.safetensors").write_bytes(random_set(manifest, seed))


def _demo_base() -> Path:
    from peqa_runtime.demo.setup import ensure_demo

    return ensure_demo(Path(os.environ.get("PEQA_HOME") or "~/.peqa").expanduser()).base


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m peqa_runtime.bench",
        description="Measure the engine without a server, with bars.",
        epilog="example: python -m peqa_runtime.bench --only mixed,profile --out rows.json",
    )
    parser.add_argument(
        "base",
        type=Path,
        nargs="?",
        help="a base folder, or for --only gpu that of a tokenizer; default: the demo's base, under $PEQA_HOME",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as one JSON array")
    parser.add_argument("--only", metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--device", default="cpu", help="of all rows but the GPU's own")
    parser.add_argument("--seconds", type=float, default=20.0, help="spent on each comparison (default 20)")
    parser.add_argument("--batches", type=int, default=200, help="random mixed batches (default 200)")
    parser.add_argument("--tasks", type=int, default=16, help="default 16")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default 128")
    parser.add_argument("--output-tokens", type=int, default=64, help="default 64")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, tasks and batches")
    parser.add_argument("--quiet", action="store_true", help="no table")
    parser.add_argument("--sets", type=Path, metavar="DIR", help="only write random scale set files into DIR")
    parser.add_argument("--count", type=int, default=16, help="… so many (default 16)")
    return parser
