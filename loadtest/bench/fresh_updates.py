"""A task that every update gives a content the server never had, as tuning does.

Uploads of sets that were there before spare the server most of the work: the trial forward, the writing, the syncing.
"""

from __future__ import annotations

import asyncio
import random
import struct
import time
from dataclasses import dataclass

from peqa_loadtest.client import Answer, CompletionClient, LoadTestError
from peqa_loadtest.swap import Upload, UploadHistory, put_set, ticks

HALF_ONE = 0x3C00  # fp16 1.0; the next 1023 patterns lie between 1 and 2
CHANGED = 512  # scales, the last of a file: enough to change what the set answers
MOST_VARIANTS = 1 << 16
AT_ONCE = 8  # tasks that contents are put on to be asked again


def variant(data: bytes, number: int) -> bytes:
    """A set file that differs from `data` in its last CHANGED fp16 scales, for each `number` < 2**16 another."""
    high, low = divmod(number, 256)
    rng = random.Random(number)
    scales = [HALF_ONE + rng.randrange(1024) for _ in range(CHANGED - 2)]
    scales += [HALF_ONE + high, HALF_ONE + low]
    return data[: -2 * CHANGED] + struct.pack(f"<{CHANGED}H", *scales)


@dataclass
class ContentCheck:
    """Answers that were asked for again with the content that they name."""

    checked: int
    wrong: int  # of those: another text
    sharp: int  # of those: another content would have answered otherwise


class FreshUpdates:
    """Uploads variants of one set to a task. What they answer is not known before, but which of them may."""

    def __init__(self, task: str, data: bytes, now: Upload) -> None:
        """`now`: the upload of what the task has at first."""
        self.task = task
        self.failed = 0
        self.history = UploadHistory(now)
        self._data = data
        self._digests = {now.digest: 0}  # the number of its variant

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
            self._digests[digest] = number
            self.history.add(Upload(digest, started, time.perf_counter()))

    def mixed(self, answers: list[Answer]) -> int:
        """Answers that name no single revision of the task."""
        return sum(
            len(answer.revisions) != 1 or not answer.revisions <= self._digests.keys()
            for answer in self._mine(answers)
        )

    def stale(self, answers: list[Answer]) -> int:
        """Answers of one revision that was replaced before their request began."""
        return sum(
            len(answer.revisions) == 1 and not answer.revisions <= self.history.allowed(answer)
            for answer in self._mine(answers)
            if answer.revisions <= self._digests.keys()
        )

    async def check_contents(
        self, client: CompletionClient, answers: list[Answer], max_tokens: int, most: int
    ) -> ContentCheck:
        """Ask again what `most` of the answers were asked, of the very content that they name and of another one.

        The contents are put on tasks of their own. Raises LoadTestError when the server does not take one, or does not
        answer.
        """
        mine = [
            a for a in self._mine(answers) if len(a.revisions) == 1 and a.revisions <= self._digests.keys()
        ]
        chosen = random.Random("contents").sample(mine, min(most, len(mine)))

        turn = iter(chosen)
        check = ContentCheck(len(chosen), 0, 0)

        async def again(task: str) -> None:
            for answer in turn:
                (digest,) = answer.revisions
                texts = []
                for number in (self._digests[digest], MOST_VARIANTS - 1):
                    await put_set(client, task, f"variant {number}", variant(self._data, number))
                    found = await client.complete(task, answer.prompt, max_tokens)
                    if found.failure is not None:
                        raise LoadTestError(f"variant {number} again: {found.failure.message}")
                    texts.append(found.text)
                check.wrong += texts[0] != answer.text
                check.sharp += texts[0] != texts[1]

        tasks = [f"{self.task}-again-{place}" for place in range(min(AT_ONCE, len(chosen)))]
        await asyncio.gather(*(again(task) for task in tasks))
        for task in tasks:
            await client.call("DELETE", f"/v1/tasks/{task}")
        return check

    def _mine(self, answers: list[Answer]) -> list[Answer]:
        return [answer for answer in answers if answer.task == self.task and answer.failure is None]


async def prepare_fresh(client: CompletionClient, task: str, data: bytes) -> FreshUpdates:
    """Upload the set that the variants are made of. Raises LoadTestError when the server does not take it."""
    started = time.perf_counter()
    digest = await put_set(client, task, "variant 0", variant(data, 0))
    return FreshUpdates(task, data, Upload(digest, started, time.perf_counter()))
