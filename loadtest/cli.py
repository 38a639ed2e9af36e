"""The `peqa-loadtest` command."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from tqdm import tqdm

from peqa_loadtest.client import Answer, CompletionClient, LoadTestError, Target
from peqa_loadtest.report import Report, build_report, print_report
from peqa_loadtest.run import calibrate, run_plan
from peqa_loadtest.swap import SwapCheck, prepare_swap, remember_task, restore_task
from peqa_loadtest.workload import PlannedRequest, PromptWriter, plan_requests

WIDTH = 130  # columns of the report where there is no terminal to ask


class MixName(str, Enum):
    """--mix."""

    uniform = "uniform"
    zipf = "zipf"


class TaskField(str, Enum):
    """--task-field."""

    task = "task"
    model = "model"


@dataclass(frozen=True)
class Swap:
    """What changes while the load runs."""

    every: float  # seconds
    task: str
    files: list[Path]
    pool: int  # prompts whose answers are known


@dataclass(frozen=True)
class Options:
    """One load test."""

    target: Target
    tasks: list[str]
    mix: MixName
    concurrency: int
    input_tokens: int
    output_tokens: int
    requests: int
    rate: float | None
    seed: int
    warmup: int
    swap: Swap | None
    progress: bool

    def settings(self) -> dict[str, Any]:
        """What the report says about the run; no key."""
        return {
            "url": self.target.url,
            "task_field": self.target.task_field,
            "model": self.target.model,
            "tasks": self.tasks,
            "mix": self.mix.value,
            "concurrency": self.concurrency if self.rate is None else None,
            "rate": self.rate,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "requests": self.requests,
            "warmup": self.warmup,
            "seed": self.seed,
        }


async def load_test(options: Options) -> Report:
    """Probe, warm up, run, check. Raises LoadTestError when the test cannot be made."""
    count, warm = options.requests, options.warmup
    found = await calibrate(
        options.target, options.tasks[0], options.input_tokens, options.seed, count + warm
    )
    async with CompletionClient(found.target) as client:
        swap = options.swap
        if swap is None:
            return await _measure(options, client, found.words, found.notes, None)
        pool = [PromptWriter(options.seed).write(count + warm + 1 + i, found.words) for i in range(swap.pool)]
        before = await remember_task(client, swap.task)
        try:
            check = await prepare_swap(client, swap.task, swap.files, pool, options.output_tokens)
            return await _measure(options, client, found.words, found.notes, (check, pool))
        finally:
            await restore_task(client, swap.task, before)


async def _measure(
    options: Options,
    client: CompletionClient,
    words: int,
    notes: list[str],
    swapping: tuple[SwapCheck, list[str]] | None,
) -> Report:
    def plan(count: int, first_number: int, rate: float | None) -> list[PlannedRequest]:
        return plan_requests(
            options.tasks,
            mix=options.mix.value,
            count=count,
            words=words,
            seed=options.seed,
            first_number=first_number,
            rate=rate,
            prompts_of={swapping[0].task: swapping[1]} if swapping else None,
        )

    warmup = await run_plan(
        client, plan(options.warmup, options.requests, None), options.output_tokens, options.concurrency
    )
    stop = asyncio.Event()
    swapper = None
    if swapping is not None and options.swap is not None:
        swapper = asyncio.create_task(swapping[0].keep_swapping(client, options.swap.every, stop))
    try:
        with _progress(options) as on_answer:
            answers = await run_plan(
                client,
                plan(options.requests, 0, options.rate),
                options.output_tokens,
                options.concurrency,
                on_answer,
            )
    finally:
        stop.set()
        if swapper is not None:
            await swapper
    judged = swapping[0].report(answers) if swapping else None
    return build_report(options.settings(), answers, warmup, options.tasks, notes, judged)


@contextlib.contextmanager
def _progress(options: Options) -> Iterator[Any]:
    """A bar on stderr that counts answers and names the failed ones."""
    with tqdm(total=options.requests, unit="req", disable=not options.progress, dynamic_ncols=True) as bar:
        failed = 0

        def on_answer(answer: Answer) -> None:
            nonlocal failed
            if answer.failure is not None:
                failed += 1
                bar.set_postfix(failed=failed, refresh=False)
            bar.update()

        yield on_answer


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    url: Annotated[str, typer.Argument(help="the server, e.g. http://127.0.0.1:8000")],
    concurrency: Annotated[int, typer.Option(min=1, help="requests in flight (closed loop)")] = 16,
    tasks: Annotated[str, typer.Option(help="comma-separated names")] = "base",
    mix: Annotated[MixName, typer.Option(help="share of each task; zipf: 1, 1/2, 1/3 …")] = MixName.uniform,
    input_tokens: Annotated[int, typer.Option(min=2, help="tokens of a prompt, about")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="max_tokens")] = 64,
    requests: Annotated[int | None, typer.Option(min=1, help="default: 4 x concurrency, at least 32")] = None,
    rate: Annotated[float | None, typer.Option(help="requests/s at random times (open loop)")] = None,
    seed: Annotated[int, typer.Option(help="another seed: other prompts, order and times")] = 0,
    warmup: Annotated[int | None, typer.Option(min=0, help="not counted; default: concurrency")] = None,
    task_field: Annotated[TaskField, typer.Option(help="where the server reads the task")] = TaskField.task,
    model: Annotated[str | None, typer.Option(help="sent as `model`")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="off by itself where the server refuses it")] = True,
    api_key: Annotated[str | None, typer.Option(envvar="PEQA_API_KEY", help="sent as Bearer token")] = None,
    timeout: Annotated[float, typer.Option(help="seconds without a byte until a request has failed")] = 300.0,
    swap_every: Annotated[float | None, typer.Option(help="seconds between uploads during the run")] = None,
    swap_task: Annotated[str | None, typer.Option(help="whose scale set changes")] = None,
    swap_sets: Annotated[
        str | None, typer.Option(help="comma-separated .safetensors, uploaded in turn")
    ] = None,
    swap_pool: Annotated[int, typer.Option(min=1, help="prompts whose answers are compared")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
    quiet: Annotated[bool, typer.Option(help="no progress bar")] = False,
) -> None:
    """Load an OpenAI-style completion server with a mix of tasks and print its speed and errors.

    peqa-loadtest http://127.0.0.1:8000 --concurrency 16 --tasks base,sql,slots --mix zipf

    With --swap-every S --swap-task T --swap-sets A.safetensors,B.safetensors the task's scale set changes meanwhile,
    and every answer must belong to exactly one revision. Exits with 1 if nothing was answered or an answer did not.
    """
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise typer.BadParameter("--tasks needs at least one name")
    if rate is not None and rate <= 0:
        raise typer.BadParameter("--rate is positive")
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter("URL starts with http:// or https://")
    options = Options(
        Target(url.rstrip("/"), task_field.value, model, api_key, ignore_eos, timeout),
        tasks=names,
        mix=mix,
        concurrency=concurrency,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        requests=requests or max(32, 4 * concurrency),
        rate=rate,
        seed=seed,
        warmup=concurrency if warmup is None else warmup,
        swap=_swap(swap_every, swap_task, swap_sets, swap_pool, names),
        progress=not quiet,
    )
    try:
        report = asyncio.run(load_test(options))
    except LoadTestError as error:
        typer.echo(f"peqa-loadtest: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        console = Console()
        print_report(report, console if console.is_terminal else Console(width=WIDTH))
    if not report.ok:
        raise typer.Exit(1)


def _swap(
    every: float | None, task: str | None, sets: str | None, pool: int, tasks: list[str]
) -> Swap | None:
    if every is None and task is None and sets is None:
        return None
    if every is None or task is None or sets is None:
        raise typer.BadParameter("--swap-every, --swap-task and --swap-sets go together")
    files = [Path(name) for name in sets.split(",") if name]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise typer.BadParameter(f"--swap-sets: no file {', '.join(missing)}")
    if len(files) < 2:
        raise typer.BadParameter("--swap-sets needs two files or more")
    if task not in tasks:
        raise typer.BadParameter(f"--swap-task {task} is not among --tasks")
    if every < 0:
        raise typer.BadParameter("--swap-every is not negative")
    return Swap(every, task, files, pool)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
