"""`python -m peqa_kernels.bench`: measure on the devices that are there, print the table, write its rows."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peqa_kernels.bench import attention, cpu, gpu
from peqa_kernels.bench.case import Case
from peqa_kernels.bench.machine import PROBES, measure_machine
from peqa_kernels.bench.report import Progress, print_table, write_json
from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Clock, GraphReplay, Timer

if TYPE_CHECKING:
    from peqa_kernels.quant_matmul.gpu_compile import Job


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when everything was measured, whatever the bars say, 1 when a case failed."""
    options = _parser().parse_args(arguments)
    devices = [name for name in ("cuda", "cpu") if options.device in ("auto", name)]
    if not torch.cuda.is_available():
        if options.device == "cuda":
            print("no CUDA device is to be had here; leave --device out", file=sys.stderr)
            return 2
        devices = ["cpu"]
    cases = {name: [c for c in _cases(name) if options.only in c.name] for name in devices}
    compiles = "cuda" in devices and not options.only
    progress = Progress(sum(map(len, cases.values())) + len(devices) + compiles, sys.stderr)
    rows: list[Row] = []
    failed: list[str] = []
    try:
        with torch.inference_mode():
            if compiles:
                progress.case("compiling")
                compile_beforehand(gpu.jobs(gpu.PLAN))
            for name in devices:
                _measure(torch.device(name), cases[name], options.seconds, progress, rows, failed)
    finally:  # what was measured is kept, also after Ctrl-C
        seconds = progress.end()
        print_table(rows, sys.stdout)
        if options.out is not None:
            write_json(options.out, rows)
    print(f"{len(rows)} rows in {seconds:.0f} s" + (f", written to {options.out}" if options.out else ""))
    for name in failed:
        print(f"not measured: {name}", file=sys.stderr)
    return 1 if failed else 0


def compile_beforehand(jobs: Iterable[Job]) -> None:
    """Fill Triton's cache by many processes, which are gone before anything is measured."""
    from peqa_kernels.quant_matmul.gpu_compile import Compilers

    with Compilers() as compilers:
        for reason in compilers.compile(jobs):
            print(f"not compiled beforehand: {reason}", file=sys.stderr)


def _measure(
    device: torch.device,
    cases: list[Case],
    seconds: float,
    progress: Progress,
    rows: list[Row],
    failed: list[str],
) -> None:
    """Measure the machine, then each case, into `rows`; a case that raises is named in `failed`, the others go on."""
    progress.case(f"{device.type} rates")
    timer: Timer
    if device.type == "cuda":
        timer = GraphReplay(show=progress.detail)
    else:
        timer = Clock(seconds, show=progress.detail)
    machine = measure_machine(device, timer)
    facts = {"device": machine.name}
    linear = {**facts, "rows": PROBES[device.type].rows}
    rows += [
        Row(f"{device.type}/machine/read-rate", machine.read_rate / 1e9, "GB/s", ">=", None, facts),
        Row(f"{device.type}/machine/copy-rate", machine.copy_rate / 1e9, "GB/s", ">=", None, facts),
        Row(
            f"{device.type}/machine/linear-bf16-rate", machine.bf16_rate / 1e9, "GFLOP/s", ">=", None, linear
        ),
    ]
    for case in cases:
        progress.case(case.name)
        try:
            rows += case.run(machine, timer)
        except Exception:  # noqa: BLE001  the command's edge: one case must not cost the others of a rare machine
            failed.append(case.name)
            traceback.print_exc()


def _cases(device: str) -> list[Case]:
    if device == "cpu":
        return cpu.cases(cpu.PLAN)
    return gpu.cases(gpu.PLAN) + attention.cases(attention.SHAPES)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m peqa_kernels.bench",
        description="Measure the kernels against this machine's own rates and against torch's kernels.",
        epilog="example: python -m peqa_kernels.bench --out rows.json",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as one JSON array")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: what is there"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds TEXT")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="spent on each comparison on the CPU (default 2)"
    )
    return parser
