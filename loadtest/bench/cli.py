"""`python -m peqa_loadtest.bench`: both halves of the engine's bench, one table, one file of rows."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

from peqa_loadtest.bench.disconnects import disconnects
from peqa_loadtest.bench.endurance import endurance
from peqa_loadtest.bench.figure import Figure, print_figures, write_figures
from peqa_loadtest.bench.gpu_load import gpu_is_there, mixed_load
from peqa_loadtest.bench.many_tasks import many_tasks
from peqa_loadtest.bench.offline import OfflineBench
from peqa_loadtest.bench.overload import overload
from peqa_loadtest.bench.process import ServerProcess
from peqa_loadtest.bench.session import Session, open_session
from peqa_loadtest.bench.shutdown import shutdown
from peqa_loadtest.bench.structured import structured
from peqa_loadtest.bench.throughput import coarse_throughput, throughput
from peqa_loadtest.bench.updates import updates
from peqa_loadtest.client import LoadTestError

SERVED = (
    "throughput",
    "structured",
    "updates",
    "disconnects",
    "overload",
    "endurance",
    "sigterm",
    "many-tasks",
    "gpu-load",
)
PARTS = ("offline", *SERVED)
OFFLINE_PARTS = ("mixed", "profile", "equality", "gpu")
ON_ONE_SERVER = SERVED[:6]
WIDTH = 130  # columns of the table where there is no terminal to ask


@dataclass(frozen=True)
class Options:
    """One run. The counts are those that the figures are stated for."""

    base: Path | None
    work: Path
    parts: tuple[str, ...]
    device: str
    prompt_tokens: int = 128
    output_tokens: int = 64
    tasks: int = 16
    rounds: int = 2
    requests_per_stream: int = 2
    structured_rounds: int = 16
    updates: int = 1000
    disconnects: int = 500
    overload_seconds: float = 60.0
    minutes: float = 2.0
    many_tasks: int = 10_000
    probes: int = 100
    offline: tuple[str, ...] = ()  # passed on to the offline half

    def server(self, store: str, device: str | None = None, extra: tuple[str, ...] = ()) -> ServerProcess:
        """A server of the base on a store of this run; not started. `device` None: the run's. `extra`: arguments."""
        base = [] if self.base is None else [str(self.base)]
        arguments = [
            *base,
            "--store",
            str(self.work / store),
            "--device",
            device or self.device,
            "--log-level",
            "warning",
            *extra,
        ]
        return ServerProcess(arguments, self.work / f"{store}.log")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 when everything was measured, whatever the bars say, 1 when it could not be."""
    given = _parser().parse_args(arguments)
    parts = tuple(given.only.split(",")) if given.only else PARTS
    if unknown := set(parts) - set(PARTS):
        print(f"--only knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    progress = Console(stderr=True)
    rows: list[Figure] = []
    begin = time.monotonic()
    failure = None
    if given.work is not None:
        try:
            given.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"error: --work {given.work}: {error.strerror}", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory(prefix="peqa-bench-", dir=given.work) as folder:
        try:
            asyncio.run(_collect(_options(given, parts, Path(folder)), progress, rows))
        except (LoadTestError, httpx.HTTPError) as error:
            failure = f"{type(error).__name__}: {error}"
        finally:  # what was measured is kept, also after Ctrl-C
            print_figures(rows, console)
            if given.out is not None:
                write_figures(given.out, rows)
    written = f", written to {given.out}" if given.out else ""
    print(f"{len(rows)} rows in {time.monotonic() - begin:.0f} s{written}")
    if failure is not None:
        print(f"not measured to the end: {failure}", file=sys.stderr)
    return 0 if failure is None else 1


async def _collect(options: Options, progress: Console, rows: list[Figure]) -> None:
    """Measure into `rows`, and say on stderr what is being measured."""
    begin = time.monotonic()
    with progress.status("…") if progress.is_terminal else contextlib.nullcontext() as status:
        async for name, found in measure(options):
            rows += found
            line = f"{time.monotonic() - begin:5.0f} s  {name}"
            if status is not None:
                status.update(line)
            else:
                progress.print(line, highlight=False)


async def measure(options: Options) -> AsyncIterator[tuple[str, list[Figure]]]:
    """Name of what comes next, with the rows of what is done."""
    offline = OfflineBench(options.base, options.device, options.work, list(options.offline))
    if "offline" in options.parts:
        yield "the engine offline", []
        yield "the engine offline: done", offline.figures(*OFFLINE_PARTS)
    yield "scale sets", []
    files = offline.scale_sets(options.tasks)
    tasks = [f"task-{i}" for i in range(options.tasks)]
    if set(ON_ONE_SERVER) & set(options.parts):
        yield "a server starts", []
        with options.server("store") as server:
            session = await open_session(server, options.prompt_tokens, options.output_tokens)
            await session.put_tasks(tasks, files)
            for part in ON_ONE_SERVER:
                if part in options.parts:
                    yield part, []
                    yield f"{part}: done", await _on_one_server(part, options, session, tasks, files, offline)
            await session.close()
    if "throughput" in options.parts and options.device == "cpu":
        yield "throughput with 8-bit activations", []
        try:
            rows = await _coarse(options, tasks, offline)
        except LoadTestError as error:  # kernels in torch have none
            yield f"8-bit activations: not measured: {error}", []
        else:
            yield "8-bit activations: done", rows
    if "sigterm" in options.parts:
        yield "sigterm", []
        yield "sigterm: done", await shutdown(lambda: options.server("store"), options.prompt_tokens)
    if "many-tasks" in options.parts:
        yield f"{options.many_tasks} tasks", []
        found = await many_tasks(
            options.server,
            options.work,
            files,
            options.many_tasks,
            options.probes,
            options.prompt_tokens,
            options.output_tokens,
        )
        yield "many tasks: done", found
    if "gpu-load" in options.parts and gpu_is_there():
        yield "a mixed load on a GPU", []
        with options.server("gpu", "cuda") as server:
            sizes = (options.prompt_tokens, options.output_tokens)
            yield "a mixed load on a GPU: done", await mixed_load(server, tasks, files, *sizes)


async def _coarse(options: Options, tasks: list[str], offline: OfflineBench) -> list[Figure]:
    with options.server("store", extra=("--activation-bits", "8")) as server:  # the store has the tasks
        session = await open_session(server, options.prompt_tokens, options.output_tokens)
        try:
            counts = options.rounds, options.requests_per_stream
            return await coarse_throughput(session, tasks, offline, *counts)
        finally:
            await session.close()


async def _on_one_server(
    part: str, options: Options, session: Session, tasks: list[str], files: list[Path], offline: OfflineBench
) -> list[Figure]:
    if part == "throughput":
        return await throughput(session, tasks, offline, options.rounds, options.requests_per_stream)
    if part == "structured":
        return await structured(session, options.structured_rounds)
    if part == "updates":
        return await updates(session, tasks[:4], files, options.updates)
    if part == "disconnects":
        return await disconnects(session, tasks, options.disconnects)
    if part == "overload":
        return await overload(session, tasks[:4], options.overload_seconds)
    assert part == "endurance", part
    return await endurance(session, tasks[:4], files, options.minutes)


def _options(given: argparse.Namespace, parts: tuple[str, ...], work: Path) -> Options:
    offline = [
        "--prompt-tokens",
        given.prompt_tokens,
        "--output-tokens",
        given.output_tokens,
        "--tasks",
        given.tasks,
    ]
    offline += ["--seconds", given.seconds, "--batches", given.batches]
    return Options(
        given.base,
        work,
        parts,
        given.device,
        prompt_tokens=given.prompt_tokens,
        output_tokens=given.output_tokens,
        tasks=given.tasks,
        rounds=given.rounds,
        structured_rounds=given.structured_rounds,
        updates=given.updates,
        disconnects=given.disconnects,
        overload_seconds=given.overload_seconds,
        minutes=given.minutes,
        many_tasks=given.many_tasks,
        probes=given.probes,
        offline=tuple(map(str, offline)),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m peqa_loadtest.bench",
        description="Measure the engine offline and served, with bars.",
        epilog="example: python -m peqa_loadtest.bench --only throughput,updates --out rows.json",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "base", type=Path, nargs="?", help="a base folder; none: the demo's, under $PEQA_HOME"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as one JSON array")
    parser.add_argument("--only", metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--device", default="cpu", help="of all rows but the GPU's own")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where temporary files go; 10 000 tasks take 4 GB"
    )
    parser.add_argument("--overload-seconds", type=float, default=60.0, help="of ten times too many requests")
    parser.add_argument("--minutes", type=float, default=2.0, help="of mixed load with updates")
    for name, count, what in (
        ("prompt-tokens", 128, "tokens of a prompt"),
        ("output-tokens", 64, "tokens of an answer"),
        ("tasks", 16, "tasks of the mix"),
        ("rounds", 2, "offline and served throughput, in turn"),
        ("structured-rounds", 16, "JSON to a schema and free text, in turn"),
        ("updates", 1000, "updates under load"),
        ("disconnects", 500, "clients that hang up"),
        ("many-tasks", 10_000, "registered tasks"),
        ("probes", 100, "first tokens of cold tasks"),
        ("batches", 200, "random mixed batches, offline"),
        ("seconds", 20, "of each offline comparison"),
    ):
        parser.add_argument(f"--{name}", type=int, default=count, help=what)
    return parser
