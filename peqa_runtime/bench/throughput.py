"""Output tokens per second of `Engine.generate`: mixed tasks against the base alone, and many streams."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Call
from peqa_runtime.bench.workload import Load, Prompts, mixed
from peqa_runtime.engine.engine import Engine

MIXED_SHARE = 0.97
LEAST_ROUNDS = 15
CONCURRENT = (1, 8, 32)
STREAMS = 64
ROUNDS_OF_STREAMS = 2  # requests of each stream, so that starts and ends overlap as they do in a server


@dataclass(frozen=True)
class Pairs:
    """Two ways measured one after the other, again and again: what a slow minute does to both leaves their ratio alone.

    `ratio`: median of one's seconds over the other's of each round; `one` and `other`: median seconds.
    """

    ratio: float
    one: float
    other: float
    rounds: int


def in_pairs(
    one: Sequence[Call], other: Sequence[Call], seconds: float, show: Callable[[str], None]
) -> Pairs:
    """Calls of both ways in turn, for about `seconds` and LEAST_ROUNDS rounds at least; who begins alternates."""
    for call in (*one, *other):
        call()  # rows are written
    turns = itertools.cycle(one), itertools.cycle(other)
    taken: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(taken) < LEAST_ROUNDS or time.perf_counter() < end:
        times = [0.0, 0.0]
        for way in (0, 1) if len(taken) % 2 == 0 else (1, 0):
            call = next(turns[way])
            begin = time.perf_counter()
            call()
            times[way] = time.perf_counter() - begin
        taken.append((times[0], times[1]))
        show(f"round {len(taken)}")
    ratio = statistics.median(a / b for a, b in taken)
    return Pairs(
        ratio, statistics.median(a for a, _ in taken), statistics.median(b for _, b in taken), len(taken)
    )


def mixed_against_base(
    engine: Engine, load: Load, prompts: Prompts, seconds: float, show: Callable[[str], None]
) -> list[Row]:
    """Batches in which each sequence has a task of its own (as far as there are tasks) against the base alone."""
    rows = []
    for count in CONCURRENT:
        turns = -(-load.tasks // count)  # as many calls as it takes for every task to have its turn
        base = [_generation(engine, load, prompts, mixed([], count))]
        many = [
            _generation(engine, load, prompts, mixed(load.task_names[turn * count :], count))
            for turn in range(turns)
        ]
        found = in_pairs(base, many, seconds, partial(_of_sequences, show, count))
        tokens = count * load.output_tokens
        facts = {
            "sequences": count,
            "tasks": min(count, load.tasks),
            "tokens_per_s": tokens / found.other,
            "base_tokens_per_s": tokens / found.one,
            "samples": found.rounds,
        }
        rows.append(
            Row(f"engine/mixed-tasks/{count}-sequences/vs-base", found.ratio, "x", ">=", MIXED_SHARE, facts)
        )
    return rows


def _of_sequences(show: Callable[[str], None], count: int, what: str) -> None:
    show(f"{count} sequences, {what}")


def many_streams(engine: Engine, load: Load, prompts: Prompts, *, repeats: int = 1) -> Row:
    """Output tokens/s of one long `generate`, as a server is asked to keep up with."""
    count = STREAMS * ROUNDS_OF_STREAMS
    tasks = mixed(load.task_names, count)
    rates = []
    _generation(engine, load, prompts, tasks[:STREAMS])()  # warm-up: rows and the cache's memory written
    for _ in range(repeats):
        work = [prompts.write(load.prompt_tokens) for _ in range(count)]
        begin = time.perf_counter()
        done = engine.generate(work, load.params, task=tasks)
        rates.append(sum(len(one.token_ids) for one in done) / (time.perf_counter() - begin))
    facts = {"streams": STREAMS, "requests": count, "samples": repeats}
    return Row(f"engine/offline/{STREAMS}-streams", statistics.median(rates), "tokens/s", ">=", None, facts)


def _generation(engine: Engine, load: Load, prompts: Prompts, tasks: list[str]) -> Call:
    def call() -> None:
        engine.generate([prompts.write(load.prompt_tokens) for _ in tasks], load.params, task=tasks)

    return call
