"""Tasks that change several times a second while streams run: nothing failed, mixed or stale, and no stall.

One task gets two sets in turn, whose answers are known, another a set that the server never had, every time.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from peqa_loadtest.bench.figure import Figure, figure
from peqa_loadtest.bench.fresh_updates import ContentCheck, FreshUpdates, prepare_fresh
from peqa_loadtest.bench.session import Session, failures, gaps
from peqa_loadtest.client import Answer
from peqa_loadtest.report import percentile
from peqa_loadtest.swap import SwapCheck, prepare_swap

PER_SECOND = 5.0  # of both tasks together
STREAMS = 16
POOL = 8  # prompts of the changing task, whose answers are known
QUIET_SHARE = 0.3  # of the time with updates: as long the same load runs without, in as many pieces
SEGMENTS = 4
P99_RATIO = 1.10
CONTENTS = 32  # answers of the task with ever new sets that are asked for again
KEPT_PACE = (
    0.95  # of PER_SECOND: an upload that is under way when a piece of the load ends counts for the next
)
SMALLEST_PIECE = 4 * STREAMS  # requests: the streams end at different moments, once in each piece


async def updates(session: Session, tasks: list[str], files: list[Path], count: int) -> list[Figure]:
    """`count` updates, of the first two tasks in turn, under STREAMS streams, between pieces of the same load without
    updates."""
    changing, renewed = tasks[:2]
    pool = session.prompts(POOL)
    check = await prepare_swap(session.client, changing, files[:2], pool, session.output_tokens)
    fresh = await prepare_fresh(session.client, renewed, files[0].read_bytes())
    seconds = count / PER_SECOND / SEGMENTS
    loop, loud_seconds = asyncio.get_running_loop(), 0.0
    quiet: list[Answer] = []
    loud: list[Answer] = []
    for _ in range(SEGMENTS):
        quiet += await _load_for(session, tasks, {changing: pool}, seconds * QUIET_SHARE)
        stop, begin = asyncio.Event(), loop.time()
        changes = [
            asyncio.create_task(check.keep_swapping(session.client, 2 / PER_SECOND, stop)),
            asyncio.create_task(fresh.keep_updating(session.client, 2 / PER_SECOND, stop)),
        ]
        try:
            loud += await _load_for(session, tasks, {changing: pool}, seconds)
        finally:
            loud_seconds += loop.time() - begin
            stop.set()
            await asyncio.gather(*changes)
    contents = await fresh.check_contents(session.client, loud, session.output_tokens, CONTENTS)
    return _judge(check, fresh, quiet, loud, loud_seconds, contents)


async def _load_for(
    session: Session, tasks: list[str], prompts_of: dict[str, list[str]], seconds: float
) -> list[Answer]:
    """The load for about `seconds`: pieces of it until the time is over."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    answers: list[Answer] = []
    while not answers or loop.time() < end:
        answers += await session.load(tasks, STREAMS, SMALLEST_PIECE, prompts_of)
    return answers


def _judge(
    check: SwapCheck,
    fresh: FreshUpdates,
    quiet: list[Answer],
    loud: list[Answer],
    loud_seconds: float,
    contents: ContentCheck,
) -> list[Figure]:
    """Failed: without an answer. Stale: of a revision that was replaced before. Mixed: any other wrong answer.

    Of the task with ever new sets, that is one which the content it names does not give when asked again.
    """
    answers = quiet + loud
    mine = [a for a in answers if a.task == check.task and a.failure is None]
    wrong = [a for a in mine if check.violation(a) is not None]
    stale = sum(len(a.revisions) == 1 and not a.revisions <= check.history.allowed(a) for a in wrong)
    report = check.report(mine)
    refused = len(report.violations) - len(wrong)  # uploads that failed or came back as another revision
    mixed = len(wrong) - stale + fresh.mixed(answers) + contents.wrong
    before, during = percentile(gaps(quiet), 99), percentile(gaps(loud), 99)
    pace = 2 * min(report.uploads, fresh.history.changes) / loud_seconds
    facts = {
        "updates": report.uploads + fresh.history.changes,
        "fresh_updates": fresh.history.changes,
        "answers_of_the_task": len(mine),
        "fresh_answers_checked": contents.checked,
        "of_those_sharp": contents.sharp,
        "streams": STREAMS,
    }
    return [
        figure("served/updates/per-second", pace, "1/s", ">=", KEPT_PACE * PER_SECOND, **facts),
        figure(
            "served/updates/failed",
            failures(answers) + refused + fresh.failed,
            "requests",
            "<=",
            0,
            **facts,
        ),
        figure("served/updates/mixed", mixed, "answers", "<=", 0, **facts),
        figure("served/updates/told-apart", contents.sharp, "answers", ">=", 1, **facts),
        figure("served/updates/stale", stale + fresh.stale(answers), "answers", "<=", 0, **facts),
        figure(
            "served/updates/inter-token-p99-ratio",
            during / before,
            "x",
            "<=",
            P99_RATIO,
            without_ms=before * 1e3,
            with_ms=during * 1e3,
            **facts,
        ),
    ]
