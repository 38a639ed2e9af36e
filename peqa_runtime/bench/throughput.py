"""Output tokens per second of `Engine.generate`: mixed tasks against the base alone, and many streams."""

from __future__ import annotations

import statistics
import time

from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Call, Timer, Way
from peqa_runtime.bench.workload import Load, Prompts, mixed
from peqa_runtime.engine.engine import Engine

MIXED_SHARE = 0.97
CONCURRENT = (1, 8, 32)
STREAMS = 64
ROUNDS_OF_STREAMS = 2  # requests of each stream, so that starts and ends overlap as they do in a server


def mixed_against_base(engine: Engine, load: Load, prompts: Prompts, timer: Timer) -> list[Row]:
    """Batches in which each sequence has a task of its own (as far as there are tasks) against the base alone."""
    rows = []
    for count in CONCURRENT:
        turns = -(-load.tasks // count)  # as many calls as it takes for every task to have its turn
        ways = (
            Way("base", [_generation(engine, load, prompts, mixed([], count))]),
            Way(
                "mixed",
                [
                    _generation(engine, load, prompts, mixed(load.task_names[turn * count :], count))
                    for turn in range(turns)
                ],
            ),
        )
        times = timer.compare(f"{count} sequences", *ways)
        tokens = count * load.output_tokens
        base, many = times["base"].median, times["mixed"].median
        facts = {
            "sequences": count,
            "tasks": min(count, load.tasks),
            "tokens_per_s": tokens / many,
            "base_tokens_per_s": tokens / base,
            "samples": times["mixed"].samples,
        }
        rows.append(
            Row(f"engine/mixed-tasks/{count}-sequences/vs-base", base / many, "x", ">=", MIXED_SHARE, facts)
        )
    return rows


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
