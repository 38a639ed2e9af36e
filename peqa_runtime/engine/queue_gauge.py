"""How much waits, how long it will wait, and when that is too much: the engine's door. No torch, no thread.

Work is counted in tokens that must be computed: a request's prompt, and as many as its answer is likely to have. What
is measured corrects that: how long answers were, how much of the prompts the prefix cache knew, and how many tokens
steps computed a second, all smoothed over the last requests or seconds of work. A queue is full when somebody who
joined it now would wait longer than `max_wait` seconds for a place. Limits by number bound memory, as they do before
anything was measured.

A request is let in with all its choices or not at all: the last of them may not wait too long. Where nothing else of
its task is in work they wait for one another alone, and it is let in with as many as it has; else it would never be.

Who is next is the scheduler's matter, which serves tasks in turn. So a task of which nothing waits passes at most one
request of each other task, and is let in where the task that fills the queue is not. A blend counts for one of its
tasks, as in the `FairQueue`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from peqa_runtime.core import Request, payer_of
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.errors import Overloaded

_MEMORY_SECONDS = 10.0  # of steps, which the measured rate remembers
_MEMORY_REQUESTS = 0.95  # what is left of a finished request's weight after the next
_GUESSED_ANSWER = 128  # tokens, before any answer was seen
_LONGEST_RETRY = 60.0


@dataclass(frozen=True)
class _Entry:
    task: str
    prompt_tokens: int
    work: float


class QueueGauge:
    """Requests from their submission to their end. Its owner has a lock."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._entries: dict[str, _Entry] = {}
        self._reserved: Counter[str] = Counter()  # by task: choices that are being prepared
        self._step_tokens = self._step_seconds = 0.0
        self._answers = self._answered = 0.0  # decayed sums: tokens of answers, answers
        self._done = self._foreseen = 0.0  # likewise: tokens computed, and the work that was expected

    @property
    def rate(self) -> float | None:
        """Tokens computed in a second of steps; None before the first."""
        return self._step_tokens / self._step_seconds if self._step_seconds else None

    def reserve(self, task: str, choices: int = 1) -> None:
        """So many choices of this task are being prepared; they count from now on. To be paired with `give_up`."""
        self._reserved[payer_of(task)] += choices

    def give_up(self, task: str, choices: int = 1) -> None:
        """They are not any more: they were added, or refused."""
        payer = payer_of(task)
        self._reserved[payer] -= choices
        if not self._reserved[payer]:
            del self._reserved[payer]

    def add(self, request: Request) -> None:
        """A request was submitted."""
        prompt = len(request.prompt_token_ids)
        work = prompt + min(request.params.max_tokens, self._likely_answer())
        self._entries[request.request_id] = _Entry(request.payer, prompt, work)

    def drop(self, request_id: str) -> None:
        """A request has ended, or was never served."""
        self._entries.pop(request_id, None)

    def finish(self, request_id: str, generated: int, cached: int) -> None:
        """A request has come to its own end, with so many tokens; `cached` of its prompt needed no computing."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        keep = _MEMORY_REQUESTS
        self._answers, self._answered = keep * self._answers + generated, keep * self._answered + 1
        self._done = keep * self._done + entry.prompt_tokens - cached + generated
        self._foreseen = keep * self._foreseen + entry.work

    def step(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens."""
        keep = math.exp(-seconds / _MEMORY_SECONDS)
        self._step_tokens = keep * self._step_tokens + tokens
        self._step_seconds = keep * self._step_seconds + seconds

    def wait(self, task: str, running: Collection[str], choices: int = 1) -> float:
        """Seconds that the last of so many new choices of the task would wait for a place; `running`: ids of the
        requests that have one."""
        waiting, coming, before = self._waiting(running), self._reserved.total(), choices - 1
        free = self._config.max_sequences - len(running)
        if len(waiting) + coming + before < max(1, free) or not self.rate:
            return 0.0  # there is a place
        if free > 0:  # the first ones need not wait either: the next step takes them in
            left = max(0, free - len(waiting))
            before -= min(before, max(0, left - coming))
            coming -= min(coming, left)
            waiting = waiting[free:]
        mean = sum(e.work for e in waiting) / len(waiting) if waiting else self._mean_work()
        share = mean * coming / max(1, self._reserved.total())
        by_task = defaultdict(float, {name: count * share for name, count in self._reserved.items()})
        for entry in waiting:
            by_task[entry.task] += entry.work
        by_task[payer_of(task)] += mean * before
        total, own = sum(by_task.values()), by_task[payer_of(task)]
        ahead = min(total, (own + mean) * len(by_task))
        return ahead * self._correction() / self.rate

    def refuse(self, task: str, running: Collection[str], choices: int = 1) -> None:
        """Raise `Overloaded` when a new request of the task, for so many choices, should not be let in."""
        limit = self._config.max_wait
        seconds = self.wait(task, running)
        if seconds > limit:
            raise Overloaded(
                f"a request would wait about {seconds:.0f} s for its turn (the limit is {limit:g} s); try again later",
                retry_after=self._retry_after(seconds),
            )
        last = self.wait(task, running, choices) if choices > 1 and self._has_work(task) else 0.0
        if last > limit:
            raise Overloaded(
                f"the last of {choices} choices would wait about {last:.0f} s for its turn (the limit is {limit:g} s, "
                "while others of the task are in work); send fewer at once, or try again later",
                retry_after=self._retry_after(seconds),
            )
        self.refuse_more(running)

    def refuse_more(self, running: Collection[str]) -> None:
        """Raise `Overloaded` when there is no room for one request more, however short its wait."""
        config, waiting = self._config, self._waiting(running)
        for number, limit, what in (
            (len(waiting), config.max_waiting, "requests"),
            (sum(e.prompt_tokens for e in waiting), config.max_waiting_tokens, "tokens of prompts"),
        ):
            if number >= limit:
                work = sum(e.work for e in waiting) * self._correction()
                raise Overloaded(
                    f"{number} {what} wait already (the limit is {limit}); try again later",
                    retry_after=self._retry_after(work / self.rate if self.rate else 1.0),
                )

    def _has_work(self, task: str) -> bool:
        """Whether a request of the task runs, waits or is being prepared."""
        payer = payer_of(task)
        return payer in self._reserved or any(entry.task == payer for entry in self._entries.values())

    def _waiting(self, running: Collection[str]) -> list[_Entry]:
        if len(running) >= len(self._entries):
            return []
        served = set(running)
        return [entry for name, entry in self._entries.items() if name not in served]

    def _likely_answer(self) -> float:
        return self._answers / self._answered if self._answered else _GUESSED_ANSWER

    def _mean_work(self) -> float:
        """Of those that are known; before any, of a short one."""
        if not self._entries:
            return float(_GUESSED_ANSWER)
        return sum(entry.work for entry in self._entries.values()) / len(self._entries)

    def _correction(self) -> float:
        """Tokens that really had to be computed for one that was expected."""
        return self._done / self._foreseen if self._foreseen else 1.0

    @staticmethod
    def _retry_after(seconds: float) -> float:
        """When all that waits now has been served."""
        return min(_LONGEST_RETRY, max(1.0, math.ceil(seconds)))
