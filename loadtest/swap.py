"""Change a task's scale set while requests run, and check that every answer belongs to exactly one revision.

Before the load each set is uploaded and its greedy answers to a small pool of prompts are recorded. After the load each
answer for the task must equal the recorded answer of the very revision that it names, and that revision must have been
the task's at some moment between the request's start and its first token: once an upload has returned 200, no new
request may see the one before. This relies on a server whose greedy answer does not depend on its batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from peqa_loadtest.client import Answer, CompletionClient, LoadTestError, failure_of


@dataclass(frozen=True)
class Revision:
    """One scale set on the server, and what it answers."""

    name: str  # file name
    digest: str  # the server's `revision`
    data: bytes = field(repr=False)
    answers: dict[str, str] = field(repr=False)  # prompt -> greedy text


@dataclass(frozen=True)
class Upload:
    """One accepted PUT; times are time.perf_counter() readings."""

    digest: str
    started: float
    finished: float  # when its 200 had been read


class UploadHistory:
    """The accepted uploads of a task, in order; the first one is what a load begins with."""

    def __init__(self, now: Upload) -> None:
        self._uploads = [now]

    def add(self, upload: Upload) -> None:
        """Take up the next one."""
        self._uploads.append(upload)

    @property
    def changes(self) -> int:
        """How many there were since the load began."""
        return len(self._uploads) - 1

    def allowed(self, answer: Answer) -> set[str]:
        """Revisions that were the task's at some moment between the request's start and its first token."""
        first = answer.text_times[0] if answer.text_times else answer.finished
        before = [upload for upload in self._uploads if upload.finished <= answer.sent]
        during = [u for u in self._uploads if u.finished > answer.sent and u.started <= first]
        return {upload.digest for upload in before[-1:] + during}


async def ticks(every: float, stop: asyncio.Event) -> AsyncIterator[None]:
    """A tick every `every` seconds, until `stop` is set; those that came while work was done follow at once."""
    due = time.perf_counter()
    while True:
        due += every
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), max(0.0, due - time.perf_counter()))
        if stop.is_set():
            return
        yield


@dataclass
class SwapReport:
    """Outcome of the check."""

    task: str
    uploads: int
    checked: int
    could_be_stale: int  # of those: answers for which at least one revision would have been stale
    answers_per_revision: dict[str, int]
    violations: list[str]


class SwapCheck:
    """Uploads a task's sets in turn and judges the answers."""

    def __init__(self, task: str, revisions: list[Revision], now: Upload) -> None:
        self.task = task
        self._revisions = {revision.digest: revision for revision in revisions}
        self.history = UploadHistory(now)
        self._violations: list[str] = []

    async def keep_swapping(self, client: CompletionClient, every: float, stop: asyncio.Event) -> None:
        """Upload the next set every `every` seconds, late ones at once, until `stop` is set."""
        revisions = itertools.cycle(self._revisions.values())
        async for _ in ticks(every, stop):
            await self._upload(client, next(revisions))

    async def _upload(self, client: CompletionClient, revision: Revision) -> None:
        started = time.perf_counter()
        try:
            digest = await put_set(client, self.task, revision.name, revision.data)
        except LoadTestError as error:
            self._violations.append(f"upload failed: {error}")
            return
        self.history.add(Upload(digest, started, time.perf_counter()))
        if digest != revision.digest:
            self._violations.append(
                f"upload of {revision.name} returned revision {digest}, before {revision.digest}"
            )

    def violation(self, answer: Answer) -> str | None:
        """What is wrong with an answer for the task; None = nothing."""
        what = f"answer to {answer.prompt[:24]!r}…"
        if len(answer.revisions) != 1:
            return f"{what} names {len(answer.revisions)} revisions"
        (digest,) = answer.revisions
        matching = {r.digest for r in self._revisions.values() if r.answers.get(answer.prompt) == answer.text}
        if not matching:
            return f"{what} is no revision's answer; it names {digest[:12]}"
        if digest not in matching:
            return (
                f"{what} names revision {digest[:12]} but is the answer of {sorted(d[:12] for d in matching)}"
            )
        if digest not in self.history.allowed(answer):
            return f"{what} is stale: revision {digest[:12]} was replaced before the request began"
        return None

    def report(self, answers: list[Answer]) -> SwapReport:
        """Judge every answer for the task that did not fail."""
        mine = [answer for answer in answers if answer.task == self.task and answer.failure is None]
        violations = [found for answer in mine if (found := self.violation(answer)) is not None]
        uploads = self.history.changes
        if uploads == 0:
            violations.append("no upload fell into the run: send more requests or lower --swap-every")
        if not mine:
            violations.append(f"no answer for task {self.task!r} to check")
        counts = Counter(next(iter(answer.revisions)) for answer in mine if len(answer.revisions) == 1)
        sharp = sum(not self._revisions.keys() <= self.history.allowed(answer) for answer in mine)
        return SwapReport(self.task, uploads, len(mine), sharp, dict(counts), self._violations + violations)


async def prepare_swap(
    client: CompletionClient, task: str, files: list[Path], prompts: list[str], max_tokens: int
) -> SwapCheck:
    """Upload each set once and record its answers to the pool of prompts.

    Raises LoadTestError when an upload or a reference request fails, when an answer names another revision than the
    upload returned, or when two sets cannot be told apart by their answers.
    """
    revisions, upload = [], None
    for path in files:
        started, data = time.perf_counter(), path.read_bytes()
        digest = await put_set(client, task, path.name, data)
        upload = Upload(digest, started, time.perf_counter())
        answers = {}
        for prompt in prompts:
            answer = await client.complete(task, prompt, max_tokens)
            if answer.failure is not None:
                raise LoadTestError(f"reference answer of {path.name}: {answer.failure.message}")
            if answer.revisions != {digest}:
                raise LoadTestError(
                    f"after the upload of {path.name} as revision {digest} an answer names {answer.revisions}"
                )
            answers[prompt] = answer.text
        revisions.append(Revision(path.name, digest, data, answers))
    for i, one in enumerate(revisions):
        for other in revisions[:i]:
            if one.answers == other.answers:
                raise LoadTestError(
                    f"{other.name} and {one.name} answer alike: the check could not tell them apart"
                )
    assert upload is not None, "at least one file"
    return SwapCheck(task, revisions, upload)


async def put_set(client: CompletionClient, task: str, name: str, data: bytes) -> str:
    """Upload a scale set; returns its revision. Raises LoadTestError when the server does not take it."""
    response = await client.call("PUT", f"/v1/tasks/{task}", data)
    if response.status_code not in (200, 201):
        failure = failure_of(response.status_code, response.content)
        raise LoadTestError(f"PUT /v1/tasks/{task} with {name}: HTTP {failure.status}: {failure.message}")
    try:
        return str(response.json()["revision"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise LoadTestError(f"PUT /v1/tasks/{task}: the answer names no revision") from error


async def remember_task(client: CompletionClient, task: str) -> bytes | None:
    """The set that the task has now; None = the task does not exist."""
    response = await client.call("GET", f"/v1/tasks/{task}/content")
    return response.content if response.status_code == 200 else None


async def restore_task(client: CompletionClient, task: str, data: bytes | None) -> None:
    """Leave the task with the set that it had before the run, or without any."""
    if data is None:
        await client.call("DELETE", f"/v1/tasks/{task}")
    else:
        await put_set(client, task, "the set from before the run", data)
