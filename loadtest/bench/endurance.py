"""Mixed load with updates for many minutes: memory stays flat, and no handle is left open."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from peqa_loadtest.bench.figure import Figure, figure
from peqa_loadtest.bench.fresh_updates import prepare_fresh
from peqa_loadtest.bench.session import Session, failures
from peqa_loadtest.client import Answer
from peqa_loadtest.swap import prepare_swap

STREAMS = 8
UPDATE_EVERY = 1.0
SAMPLE_EVERY = 2.0
WARM_UP = 0.3  # of the time: what the load and the updates keep has come to its size
MOST_GROWTH = 1.0  # MB/min
BLOCK_TOKENS = 16  # tokens of a KV block
FILLED = 1.2  # times the cache's tokens: blocks are handed out again before the last is first used


class Sample(NamedTuple):
    """What the server held at one moment."""

    minute: float
    megabytes: float
    handles: int


async def endurance(session: Session, tasks: list[str], files: list[Path], minutes: float) -> list[Figure]:
    """Load for `minutes`, while the first task gets two sets in turn and the second one new ones.

    The growth of memory is the slope of a line through the samples after the warm-up.
    """
    pool = session.prompts(STREAMS)
    check = await prepare_swap(session.client, tasks[0], files[:2], pool, session.output_tokens)
    fresh = await prepare_fresh(session.client, tasks[1], files[0].read_bytes())
    stop = asyncio.Event()
    await _fill_cache(session, tasks)
    samples: list[Sample] = []
    begin = time.monotonic()
    changes = asyncio.gather(
        check.keep_swapping(session.client, UPDATE_EVERY, stop),
        fresh.keep_updating(session.client, UPDATE_EVERY, stop),
    )
    watch = asyncio.create_task(_watch(session, samples, begin, stop))
    answers: list[Answer] = []
    try:
        while time.monotonic() < begin + 60 * minutes:
            answers += await session.load(tasks, STREAMS, 2 * STREAMS, {tasks[0]: pool})
    finally:
        stop.set()
        await asyncio.gather(changes, watch)
    steady = [sample for sample in samples if sample.minute >= WARM_UP * minutes]
    half = len(steady) // 2
    early, late = (median(s.handles for s in part) for part in (steady[:half], steady[half:]))
    report = check.report([answer for answer in answers if answer.task == check.task])
    growth = slope([(s.minute, s.megabytes) for s in steady])
    facts = {
        "minutes": minutes,
        "requests": len(answers),
        "uploads": report.uploads,
        "fresh_uploads": fresh.history.changes,
        "memory_mb": steady[-1].megabytes,
        "samples": len(steady),
    }
    return [
        figure("served/endurance/memory-growth", growth, "MB/min", "<=", MOST_GROWTH, **facts),
        figure("served/endurance/more-file-handles", late - early, "handles", "<=", 0, handles=late, **facts),
        figure(
            "served/endurance/failed",
            failures(answers)
            + len(report.violations)
            + fresh.failed
            + fresh.mixed(answers)
            + fresh.stale(answers),
            "requests",
            "<=",
            0,
            **facts,
        ),
    ]


async def _fill_cache(session: Session, tasks: list[str]) -> None:
    """Load until every block of the KV cache was in use: its memory is taken when it is first written."""
    server = session.server
    room = server.metric("peqa_kv_blocks") * BLOCK_TOKENS

    def seen() -> float:
        return sum(server.metric(f"peqa_engine_{kind}_tokens_total") for kind in ("prompt", "generation"))

    while seen() < FILLED * room:
        await session.load(tasks, STREAMS, 2 * STREAMS)


async def _watch(session: Session, samples: list[Sample], begin: float, stop: asyncio.Event) -> None:
    server = session.server
    while not stop.is_set():
        minute = (time.monotonic() - begin) / 60
        samples.append(Sample(minute, server.memory_mb(), server.open_files()))
        await asyncio.sleep(SAMPLE_EVERY)


def slope(samples: list[tuple[float, float]]) -> float:
    """Least-squares slope of y over x; 0 for fewer than two samples."""
    if len(samples) < 2:
        return 0.0
    middle = sum(x for x, _ in samples) / len(samples)
    height = sum(y for _, y in samples) / len(samples)
    spread = sum((x - middle) ** 2 for x, _ in samples)
    return sum((x - middle) * (y - height) for x, y in samples) / spread
