"""Which requests a load test sends: tasks, prompts and starting times, all drawn from one seed."""

from __future__ import annotations

import bisect
import itertools
import random
from dataclasses import dataclass
from typing import Literal

from peqa_loadtest.words import WORDS

Mix = Literal["uniform", "zipf"]
ZIPF_EXPONENT = 1.0  # the k-th task of the list gets 1/k of the first one's requests


@dataclass(frozen=True)
class PlannedRequest:
    """One request before it is sent."""

    number: int  # no two requests of a run share it; the prompt depends on it
    task: str
    prompt: str
    start: float | None = None  # seconds after the beginning; None = when a worker is free


class PromptWriter:
    """Texts of a given number of words in which no two numbers agree, from the first word on where words suffice.

    A server's prefix cache therefore helps no request of the run. The same seed gives the same texts.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._order = random.Random(f"order {seed}").sample(WORDS, len(WORDS))

    def write(self, number: int, words: int) -> str:
        """The prompt of request `number` (>= 0), `words` (>= 2) words long."""
        again, first = divmod(number, len(WORDS))
        rest = random.Random(f"prompt {self._seed} {number}").choices(WORDS, k=words - 2)
        return " ".join([self._order[first], self._order[(first + 1 + again) % len(WORDS)], *rest])


def choose_tasks(tasks: list[str], mix: Mix, count: int, seed: int) -> list[str]:
    """The task of each of `count` requests.

    uniform: every run of len(tasks) requests holds each task once, in random order. zipf: independent draws with
    weights 1, 1/2, 1/3 … in the order in which the tasks are given.
    """
    rng = random.Random(f"tasks {seed}")
    if mix == "uniform":
        rounds = -(-count // len(tasks))
        return [task for _ in range(rounds) for task in rng.sample(tasks, len(tasks))][:count]
    sums = list(itertools.accumulate(rank**-ZIPF_EXPONENT for rank in range(1, len(tasks) + 1)))
    return [tasks[bisect.bisect(sums, rng.random() * sums[-1], hi=len(tasks) - 1)] for _ in range(count)]


def arrival_times(count: int, rate: float, seed: int) -> list[float]:
    """Starting times in seconds of a Poisson process of `rate` requests per second."""
    rng = random.Random(f"arrivals {seed}")
    return list(itertools.accumulate(rng.expovariate(rate) for _ in range(count)))


def plan_requests(
    tasks: list[str],
    *,
    mix: Mix,
    count: int,
    words: int,
    seed: int,
    first_number: int = 0,
    rate: float | None = None,
    prompts_of: dict[str, list[str]] | None = None,
) -> list[PlannedRequest]:
    """The requests of a run.

    Args:
        tasks: names that the client picks from.
        words: length of a prompt.
        first_number: number of the first request; runs whose numbers do not meet share no prompt.
        rate: requests per second of an open loop; None = closed loop.
        prompts_of: tasks whose prompts come from a fixed pool, in turn.
    """
    writer = PromptWriter(seed)
    starts = arrival_times(count, rate, seed) if rate is not None else [None] * count
    turns = {task: itertools.cycle(pool) for task, pool in (prompts_of or {}).items()}
    plan = []
    for i, task in enumerate(choose_tasks(tasks, mix, count, seed)):
        number = first_number + i
        prompt = next(turns[task]) if task in turns else writer.write(number, words)
        plan.append(PlannedRequest(number, task, prompt, starts[i]))
    return plan
