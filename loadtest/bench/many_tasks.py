"""Thousands of tasks registered: their memory, resident traffic beside them, and the first token of a cold one."""

from __future__ import annotations

import asyncio
import os
import random
import time
from bisect import bisect_left
from collections.abc import Callable
from math import nan
from pathlib import Path
from statistics import median

from peqa_loadtest.bench.figure import Figure, figure
from peqa_loadtest.bench.fresh_updates import variant
from peqa_loadtest.bench.process import ServerProcess
from peqa_loadtest.bench.session import Session, failures, open_session, rate
from peqa_loadtest.client import Answer, LoadTestError
from peqa_loadtest.report import percentile
from peqa_loadtest.swap import put_set

RESIDENT = 8  # tasks of the traffic that goes on; as many streams
UPLOADS_AT_ONCE = 4
ROUNDS = 7
RESIDENT_SHARE = 0.97  # "no slowdown", within what two halves of one run differ by
COLD_EXTRA_MS = 100.0
PROBE_TOKENS = 4
PROBES_IN_TURN = 5  # of cold tasks, then of warm ones
PROBE_EVERY = 0.4  # seconds
BESIDE_SHARE = 0.95  # of the tokens/s that the traffic makes beside probes of warm tasks


async def many_tasks(
    start: Callable[[str], ServerProcess],
    work: Path,
    files: list[Path],
    count: int,
    probes: int,
    prompt_tokens: int,
    output_tokens: int,
) -> list[Figure]:
    """`start(name)` gives a server on one of two stores, the folders `work` / name: one gets `count` tasks, the other
    those with traffic."""
    names = [f"resident-{i}" for i in range(RESIDENT)]
    data = files[0].read_bytes()
    with start("many") as server:
        session = await open_session(server, prompt_tokens, output_tokens)
        await session.put_tasks(names, files)
        empty = server.memory_mb()
        begin = time.monotonic()
        await _register(session, data, count - RESIDENT)
        upload_ms = (time.monotonic() - begin) / max(1, count - RESIDENT) * 1e3
        after_upload = server.memory_mb()
        await session.close()
    # Started anew: every set but those asked for since lies on the disk only.
    with start("many") as server, start("few") as other:
        session = await open_session(server, prompt_tokens, output_tokens)
        small = await open_session(other, prompt_tokens, output_tokens)
        await small.put_tasks(names, files)
        registered = server.memory_mb()
        many: list[float] = []
        few: list[float] = []
        for _ in range(ROUNDS):
            for one, rates in ((session, many), (small, few)):
                await one.load(names, RESIDENT, RESIDENT)
                answers = await one.load(names, RESIDENT, 2 * RESIDENT)
                if failures(answers):
                    raise LoadTestError("requests of the resident traffic failed")
                rates.append(rate(answers))
        _leave_page_cache(work / "many")
        cold, warm, beside = await _first_tokens(session, names, count, probes)
        for one in (session, small):
            await one.close()
        start_seconds = server.start_seconds
    extra = (percentile(cold, 99) - percentile(warm, 99)) * 1e3
    facts = {"tasks": count, "probes": probes}
    return [
        figure("served/many-tasks/memory", registered, "MB", "<=", None, without_tasks_mb=empty, **facts),
        figure("served/many-tasks/memory-after-uploads", after_upload, "MB", "<=", None, **facts),
        figure("served/many-tasks/upload", upload_ms, "ms", "<=", None, at_once=UPLOADS_AT_ONCE, **facts),
        figure("served/many-tasks/start", start_seconds, "s", "<=", None, **facts),
        figure(
            "served/many-tasks/resident-traffic",
            median(one / other for one, other in zip(many, few, strict=True)),
            "x",
            ">=",
            RESIDENT_SHARE,
            **facts,
        ),
        figure("served/many-tasks/traffic-beside-cold-loads", beside, "x", ">=", BESIDE_SHARE, **facts),
        figure(
            "served/many-tasks/cold-first-token-p99-extra",
            extra,
            "ms",
            "<=",
            COLD_EXTRA_MS,
            cold_p50_ms=percentile(cold, 50) * 1e3,
            cold_p99_ms=percentile(cold, 99) * 1e3,
            warm_p50_ms=percentile(warm, 50) * 1e3,
            warm_p99_ms=percentile(warm, 99) * 1e3,
            **facts,
        ),
    ]


def _leave_page_cache(folder: Path) -> None:
    """Make the system forget the contents of files, so that who asks for one reads the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


async def _register(session: Session, data: bytes, count: int) -> None:
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await put_set(session.client, f"many-{number}", f"variant {number}", variant(data, number))

    await asyncio.gather(*(work() for _ in range(UPLOADS_AT_ONCE)))


async def _first_tokens(
    session: Session, resident: list[str], count: int, probes: int
) -> tuple[list[float], list[float], float]:
    """Seconds to the first token of tasks never asked for and of resident ones, in turn, beside resident traffic.

    Last: the traffic's tokens/s while cold tasks were probed, over those while warm ones were.
    """
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    spans: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    answers: list[Answer] = []
    done = asyncio.Event()

    async def traffic() -> None:
        while not done.is_set():
            answers.extend(await session.load(resident, 2, 4))

    beside = asyncio.create_task(traffic())
    numbers = random.Random("cold").sample(range(count - RESIDENT), min(probes, count - RESIDENT))
    try:
        for first in range(0, len(numbers), PROBES_IN_TURN):
            turn = range(first, min(first + PROBES_IN_TURN, len(numbers)))
            for kind, tasks in (
                ("cold", [f"many-{numbers[i]}" for i in turn]),
                ("warm", [resident[i % RESIDENT] for i in turn]),
            ):
                begin = time.perf_counter()
                for i, task in enumerate(tasks, start=1):
                    times[kind].append(await _first_token(session, task))
                    # At one pace: a wait for a load leaves the traffic no more of the engine than it had.
                    await asyncio.sleep(max(0.0, begin + i * PROBE_EVERY - time.perf_counter()))
                spans[kind].append((begin, time.perf_counter()))
    finally:
        done.set()
        await beside
    if failures(answers) or not answers:
        raise LoadTestError(f"{failures(answers)} of {len(answers)} requests beside the probes failed")
    usual = _rate_in(answers, spans["warm"]) or nan
    return times["cold"], times["warm"], _rate_in(answers, spans["cold"]) / usual


async def _first_token(session: Session, task: str) -> float:
    (prompt,) = session.prompts(1)
    answer = await session.client.complete(task, prompt, PROBE_TOKENS)
    if answer.failure is not None or not answer.text_times:
        raise LoadTestError(f"no first token of task {task}: {answer.failure}")
    return answer.text_times[0] - answer.started


def _rate_in(answers: list[Answer], spans: list[tuple[float, float]]) -> float:
    """Tokens/s that came within the spans of time."""
    moments = sorted(moment for answer in answers for moment in answer.text_times)
    came = sum(bisect_left(moments, end) - bisect_left(moments, begin) for begin, end in spans)
    return came / sum(end - begin for begin, end in spans) if spans else nan
