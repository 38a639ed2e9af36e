"""A task that every update gives a content the server never had, as tuning does.

Uploads of sets that were there before spare the server most of the work: the trial forward, the writing, the syncing.
"""

from __future__ import annotations

import asyncio
import struct
import time

from peqa_loadtest.client import Answer, CompletionClient, LoadTestError
from peqa_loadtest.swap import Upload, UploadHistory, put_set, ticks

HALF_ONE = 0x3C00  # fp16 1.0; the next 1023 patterns lie between 1 and 2
MOST_VARIANTS = 1 << 16


def variant(data: bytes, number: int) -> bytes:
    """A set file that differs from `data` in its last two fp16 scales, for each `number` < 2**16 another."""
    high, low = divmod(number, 256)
    return data[:-4] + struct.pack("<HH", HALF_ONE + high, HALF_ONE + low)


class FreshUpdates:
    """Uploads variants of one set to a task. What they answer is not known before, but which of them may."""

    def __init__(self, task: str, data: bytes, now: Upload) -> None:
        """`now`: the upload of what the task has at first."""
        self.task = task
        self.failed = 0
        self.history = UploadHistory(now)
        self._data = data
        self._digests = {now.digest}

    async def keep_updating(self, client: CompletionClient, every: float, stop: asyncio.Event) -> None:
        """Upload the next variant every `every` seconds, late ones at once, until `stop` is set."""
        async for _ in ticks(every, stop):
            started, number = time.perf_counter(), len(self._digests)
            if number == MOST_VARIANTS:
                raise LoadTestError(f"more than {MOST_VARIANTS} updates of one task")
            try:
                digest = await put_set(client, self.task, f"variant {number}", variant(self._data, number))
            except LoadTestError:
                self.failed += 1
                continue
            self.failed += digest in self._digests  # it was there before: nothing was updated
            self._digests.add(digest)
            self.history.add(Upload(digest, started, time.perf_counter()))

    def mixed(self, answers: list[Answer]) -> int:
        """Answers that name no single revision of the task."""
        return sum(
            len(answer.revisions) != 1 or not answer.revisions <= self._digests
            for answer in self._mine(answers)
        )

    def stale(self, answers: list[Answer]) -> int:
        """Answers of one revision that was replaced before their request began."""
        return sum(
            len(answer.revisions) == 1 and not answer.revisions <= self.history.allowed(answer)
            for answer in self._mine(answers)
            if answer.revisions <= self._digests
        )

    def _mine(self, answers: list[Answer]) -> list[Answer]:
        return [answer for answer in answers if answer.task == self.task and answer.failure is None]


async def prepare_fresh(client: CompletionClient, task: str, data: bytes) -> FreshUpdates:
    """Upload the set that the variants are made of. Raises LoadTestError when the server does not take it."""
    started = time.perf_counter()
    digest = await put_set(client, task, "variant 0", variant(data, 0))
    return FreshUpdates(task, data, Upload(digest, started, time.perf_counter()))
