"""Ten times more requests than can be served: a bounded queue, and those let in are served as if nothing were."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from statistics import fmean

from peqa_loadtest.bench.figure import Figure, figure
from peqa_loadtest.bench.lean_client import LeanClient
from peqa_loadtest.bench.session import Session, rate
from peqa_loadtest.client import Answer
from peqa_loadtest.report import percentile
from peqa_loadtest.run import run_plan
from peqa_loadtest.workload import plan_requests

FACTOR = 10.0
PLACES = 64  # choices that the server computes at once, by default
MAX_WAIT = 20.0  # seconds that a request may wait for its turn, by default
AHEAD = 1.25  # of its places: so many requests at once keep all of them busy
ROUNDS = 2  # of all places, to find out the capacity
BURST_SECONDS = 30.0  # of work, all at once: more than a queue of default length takes
MOST_AT_ONCE = 1200  # which fills the queue of the fastest server
WATCH_EVERY = 0.25
TTFT_RATIO = 2.0
GOODPUT_RATIO = 0.9
QUEUE_RATIO = 1.5


@dataclass
class Outcome:
    """What came of one load. `most_waiting`: requests that waited in the server, at the worst moment seen."""

    answers: list[Answer]
    most_waiting: float

    @property
    def served(self) -> list[Answer]:
        """Those that were let in and answered whole."""
        return [answer for answer in self.answers if answer.failure is None]

    @property
    def refused(self) -> int:
        """Those that were told at once to come again."""
        return sum(a.failure is not None and a.failure.status == 429 for a in self.answers)

    @property
    def lost(self) -> int:
        """All others: let in and not answered, or failed in any other way."""
        return len(self.answers) - len(self.served) - self.refused

    @property
    def complaint(self) -> str | None:
        """What one of the lost ones says."""
        said = [a.failure for a in self.answers if a.failure is not None and a.failure.status != 429]
        return f"{said[0].status}: {said[0].message}" if said else None

    @property
    def first_tokens(self) -> list[float]:
        """Seconds from when each served request was due to its first token."""
        return [answer.text_times[0] - answer.started for answer in self.served if answer.text_times]


async def overload(
    session: Session,
    tasks: list[str],
    seconds: float,
    places: int = PLACES,
    max_wait: float = MAX_WAIT,
) -> list[Figure]:
    """Closed loop for the capacity, before and after; a burst that fills the queue once, then `seconds` of Poisson
    arrivals at a server that lets in what waits at most `max_wait` seconds."""

    async def at_capacity() -> Outcome:
        return await _measured(session, session.load(tasks, int(places * AHEAD), ROUNDS * places))

    peak = await at_capacity()
    capacity = len(peak.served) / _duration(peak.served)
    at_once = min(MOST_AT_ONCE, int(places + capacity * BURST_SECONDS))
    burst = await _measured(session, _open_loop(session, tasks, at_once, 1e6))
    many = await _measured(
        session, _open_loop(session, tasks, int(FACTOR * capacity * seconds), FACTOR * capacity)
    )
    return judge([peak, await at_capacity()], burst, many, capacity, max_wait)


def judge(
    peaks: list[Outcome], burst: Outcome, many: Outcome, capacity: float, max_wait: float
) -> list[Figure]:
    """The rows; `capacity` in requests per second. The peak is the mean of those measured before and after. A full
    queue is as long as the burst made it, or as what the capacity serves in the longest wait, whichever is more."""
    peak_rate = fmean(rate(peak.served) for peak in peaks)
    alone, together = (percentile(outcome.first_tokens, 99) for outcome in (burst, many))
    facts = {
        "capacity_per_s": capacity,
        "sent": len(many.answers),
        "served": len(many.served),
        "refused": many.refused,
    }
    everything = [many, burst, *peaks]
    lost = sum(outcome.lost for outcome in everything)
    complaint = next((outcome.complaint for outcome in everything if outcome.complaint), None)
    return [
        figure("served/overload/lost", lost, "requests", "<=", 0, complaint=complaint, **facts),
        figure(
            "served/overload/first-token-p99-ratio",
            together / alone,
            "x",
            "<=",
            TTFT_RATIO,
            queue_filled_once_s=alone,
            overloaded_s=together,
            **facts,
        ),
        figure(
            "served/overload/goodput-ratio",
            rate(many.served) / peak_rate,
            "x",
            ">=",
            GOODPUT_RATIO,
            tokens_per_s=rate(many.served),
            before_tokens_per_s=rate(peaks[0].served),
            after_tokens_per_s=rate(peaks[-1].served),
            **facts,
        ),
        figure(
            "served/overload/longest-queue",
            many.most_waiting,
            "requests",
            "<=",
            QUEUE_RATIO * max(1.0, burst.most_waiting, max_wait * capacity),
            burst=burst.most_waiting,
            **facts,
        ),
    ]


async def _open_loop(session: Session, tasks: list[str], count: int, per_second: float) -> list[Answer]:
    first = session.take_numbers(count)
    plan = plan_requests(
        tasks,
        mix="uniform",
        count=count,
        words=session.words,
        seed=first,
        first_number=first,
        rate=per_second,
    )
    return await run_plan(LeanClient(session.client), plan, session.output_tokens, concurrency=0)


async def _measured(session: Session, load: Coroutine[None, None, list[Answer]]) -> Outcome:
    """Await the load, and look at the server's queue meanwhile."""
    running = asyncio.ensure_future(load)
    most = 0.0
    while not running.done():
        await asyncio.wait({running}, timeout=WATCH_EVERY)
        most = max(most, await asyncio.to_thread(session.server.metric, "peqa_requests_waiting"))
    return Outcome(await running, most)


def _duration(answers: list[Answer]) -> float:
    return max(a.finished for a in answers) - min(a.started for a in answers)
