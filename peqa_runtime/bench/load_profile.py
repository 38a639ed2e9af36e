"""Where the time of a load goes: prompts and decodes of streams that end and begin anew, offline."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from peqa_kernels.bench.row import Row
from peqa_kernels.native.decoder import KINDS
from peqa_runtime.bench.workload import Load, Prompts, mixed
from peqa_runtime.core import Request
from peqa_runtime.engine.engine import Engine

STREAMS = (1, 8, 32)
ROUNDS = 3  # requests of each stream
LEAST_REQUESTS = 6

T = TypeVar("T")


def load_profile(engine: Engine, load: Load, prompts: Prompts, flops_per_second: float) -> list[Row]:
    """Shares of the time, and what products in 16 bits allow: tokens/s if nothing but them took time.

    `flops_per_second`: of F.linear in bf16 with many rows, measured in the same run.
    """
    rows = []
    for streams in STREAMS:
        requests = max(LEAST_REQUESTS, ROUNDS * streams)
        parts, seconds = _measure(engine, load, prompts, streams, requests)
        tokens_per_second = requests * load.output_tokens / seconds
        ceiling = flops_per_second / request_flops(engine, load) * load.output_tokens
        name = f"engine/load-profile/{streams}-streams"
        facts = {
            "streams": streams,
            "requests": requests,
            "tasks": load.tasks,
            "device": engine.model.device.type,
        }
        rows += [
            Row(f"{name}/{part}", value / seconds, "of time", "<=", None, facts | {"time_us": value * 1e6})
            for part, value in parts.items()
        ]
        facts |= {"tokens_per_s": tokens_per_second, "ceiling_gflops": flops_per_second / 1e9}
        rows.append(Row(f"{name}/linear-bf16-ceiling", ceiling, "tokens/s", ">=", None, facts))
        rows.append(Row(f"{name}/of-ceiling", tokens_per_second / ceiling, "x", ">=", None, facts))
    return rows


def request_flops(engine: Engine, load: Load) -> float:
    """2 N K of every linear for each token that a request computes, and of the head for each that it samples.

    Attention is not counted. The last token that a request samples is not computed.
    """
    weights = sum(linear.out_features * linear.in_features for linear in engine.model.linears)
    hidden = int(engine.model.model.config.get_text_config().hidden_size)
    computed = load.prompt_tokens + load.output_tokens - 1
    return 2.0 * (weights * computed + engine.model.vocab_size * hidden * load.output_tokens)


def _measure(
    engine: Engine, load: Load, prompts: Prompts, streams: int, requests: int
) -> tuple[dict[str, float], float]:
    """Seconds of each part, and of all, for `requests` requests with `streams` of them at a time."""
    tasks = mixed(load.task_names, requests)
    numbers = itertools.count()

    def begin() -> None:
        number = next(numbers)
        if number < requests:
            lease = engine.tasks.acquire(tasks[number])
            prompt = prompts.write(load.prompt_tokens)
            engine.add_request(
                Request(f"load-{number}", prompt, load.params, lease.task, lease.revision, lease.kind), lease
            )

    native = engine.model.lean.native if engine.model.lean is not None else None
    with _stopwatches(engine) as parts:
        before = native.ticks() if native else ()
        started = time.perf_counter()
        for _ in range(streams):
            begin()
        while engine.has_work:
            for output in engine.step():
                if output.finish_reason is not None:
                    begin()
        seconds = time.perf_counter() - started
        after = native.ticks() if native else ()
    if native:
        tick = native.seconds_per_tick()
        inner = {kind: (b - a) * tick for kind, a, b in zip(KINDS, before, after, strict=True)}
        parts = inner | {"call": parts.pop("model") - sum(inner.values())} | parts
    return parts | {"rest": seconds - sum(parts.values())}, seconds


def _computed(compute: Callable[[], Tensor]) -> Tensor:
    """What is computed, not only launched."""
    logits = compute()
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    return logits


@contextmanager
def _stopwatches(engine: Engine) -> Iterator[dict[str, float]]:
    """Seconds that the parts of the engine's steps take, as long as the context lasts."""
    parts = {"model": 0.0, "scheduling": 0.0, "inputs": 0.0, "sampling": 0.0}
    scheduler: Any = engine.scheduler
    runner: Any = engine.runner

    def timed(part: str, call: Callable[..., T]) -> Callable[..., T]:
        def run(*args: Any, **options: Any) -> T:
            begin = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                parts[part] += time.perf_counter() - begin

        return run

    prepare = runner.prepare
    prepared = timed("inputs", prepare)
    watched = (
        (scheduler, "schedule", timed("scheduling", scheduler.schedule)),
        (scheduler, "update", timed("scheduling", scheduler.update)),
        (runner, "prepare", lambda batch: timed("model", partial(_computed, prepared(batch)))),
        (runner.sampler, "sample", timed("sampling", runner.sampler.sample)),
    )
    for owner, name, call in watched:
        setattr(owner, name, call)
    try:
        yield parts
    finally:
        for owner, name, _ in watched:
            delattr(owner, name)
