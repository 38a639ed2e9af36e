"""What the routes work with: the engine, the tasks and the facts of the model, behind narrow protocols.

A route asks `Gate` for the services; while the model loads, and while the server drains, the gate answers 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from fastapi import Request as HttpRequest

from peqa_runtime.constraint import Constraint
from peqa_runtime.core import BaseManifest, Blend, Lease, Request, RevisionInfo, TaskInfo, TokenOutput
from peqa_runtime.text import TokenTexts
from peqa_server.access.caller import Anybody, Caller
from peqa_server.access.guarded_tasks import GuardedTasks
from peqa_server.access.upload_ledger import UploadLedger
from peqa_server.http.body_room import BodyRoom
from peqa_server.http.errors import ApiError
from peqa_server.observe.access_log import note_of
from peqa_server.observe.metrics import Metrics
from peqa_server.settings import ServerSettings
from peqa_server.tasks.upload import UploadLane
from peqa_server.threads import Threads

READERS = 2  # threads for long bodies; lists of lists may take thirty times their bytes of memory
STORE_THREADS = 8  # for calls of the tasks that may wait for the disk, or a minute for the store's lock

Phase = Literal["starting", "ready", "draining", "failed"]


class TokenStream(Protocol):
    """The outputs of one request, in order; the last one has `finish_reason`."""

    def __aiter__(self) -> AsyncIterator[TokenOutput]: ...

    def cancel(self) -> None:
        """End the request; its blocks are free at the next step."""


class Reservation(Protocol):
    """A request's place in the count of what waits, while it is prepared."""

    def release(self) -> None:
        """It was submitted, or will not be. Safe to call twice."""


class EngineService(Protocol):
    """What the server needs of `peqa_runtime.engine.AsyncEngine`."""

    @property
    def alive(self) -> bool: ...

    @property
    def failure(self) -> str | None: ...

    def prepare(self, constraint: Constraint) -> Future[None]: ...

    def reserve(self, task: str, choices: int) -> Reservation: ...

    def submit(self, request: Request) -> TokenStream: ...

    def stats(self) -> Mapping[str, float]: ...

    def tasks_in_work(self) -> tuple[Mapping[str, int], Mapping[str, int]]: ...

    def stop(self, drain_seconds: float = 0.0) -> None: ...


class TaskService(Protocol):
    """What the server needs of `peqa_runtime.scales.TaskLibrary`.

    Every method may block on the disk, but for `acquire_soon`, `has`, `release`, `page`, `unusable` and `quarantined`:
    `Gate.store` has threads for these.
    """

    def acquire_soon(self, choice: str | Blend) -> Future[Lease]: ...

    def has(self, task: str) -> bool: ...

    def release(self, lease: Lease) -> None: ...

    def upload(self, task: str, data: bytes | Path, if_match: str | None = None) -> TaskInfo: ...

    def rollback(self, task: str, revision: str | None = None, if_match: str | None = None) -> TaskInfo: ...

    def delete(self, task: str, if_match: str | None = None) -> None: ...

    def info(self, task: str) -> TaskInfo: ...

    def page(self, after: str = "", limit: int | None = None) -> Sequence[TaskInfo]: ...

    def unusable(self) -> Mapping[str, str]: ...

    def quarantined(self) -> Mapping[str, str]: ...

    def revisions(self, task: str) -> Sequence[RevisionInfo]: ...

    def content(self, task: str, revision: str | None = None) -> bytes: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ServedModel:
    """The facts of the base that requests are checked against."""

    manifest: BaseManifest
    tokenizer: Any
    max_model_len: int
    vocab_size: int
    description: Mapping[str, str] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_id(self) -> str:
        """The name under which the base is served."""
        return self.manifest.model_id

    @cached_property
    def token_texts(self) -> TokenTexts:
        """Texts of single tokens, as answers show them."""
        return TokenTexts(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of answers: the start of the base's digest."""
        return "peqa-" + self.manifest.base_digest[:16]


@dataclass(frozen=True)
class Services:
    """Everything that exists once the model is loaded.

    `spool_folder`: where uploads are written while they come. `owners_folder`: where it is kept whose uploads take
    how much of the disk, for servers with keys; default: in the spool folder, for as long as that stays.
    """

    engine: EngineService
    tasks: TaskService
    model: ServedModel
    spool_folder: Path
    owners_folder: Path | None = None

    def seen_by(self, caller: Caller) -> Services:
        """The same, with the tasks that the caller may use, and changes checked and recorded."""
        ledger = UploadLedger(self.owners_folder or self.spool_folder / "owners")
        return replace(self, tasks=GuardedTasks(self.tasks, caller, ledger))


@dataclass
class _Life:
    """What changes while a server lives."""

    phase: Phase = "starting"
    failure: str | None = None
    services: Services | None = None
    running: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Gate:
    """The app's one piece of changing state: its phase, its services, and how much work runs in it.

    A request gets a view of it (`gate_of`), in which the services are those that its caller may use.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.uploads = UploadLane(settings)
        self.store = Threads(STORE_THREADS, "peqa-store")
        self.bodies = BodyRoom(settings.max_bodies_bytes)
        self.readers = Threads(READERS, "peqa-bodies")
        self._caller: Caller = Anybody()
        self._life = _Life()
        self._life.idle.set()

    def seen_by(self, caller: Caller) -> Gate:
        """A view for one caller; all views share what changes."""
        view = copy.copy(self)
        view._caller = caller
        return view

    @property
    def phase(self) -> Phase:
        """Where in its life the server is."""
        return self._life.phase

    @property
    def failure(self) -> str | None:
        """Why loading, or the engine, has failed."""
        return self._life.failure

    def open(self, services: Services) -> None:
        """The model is loaded: serve."""
        self._life.services = services
        self.metrics.watch(services.engine, services.tasks, services.model.model_id)
        if self.phase == "starting":
            self._life.phase = "ready"

    def fail(self, reason: str) -> None:
        """Loading ended with an error."""
        self._life.phase, self._life.failure = "failed", reason

    async def drain(self, seconds: float) -> bool:
        """Refuse new work and wait for what runs; False when some still ran at the end."""
        self._life.phase = "draining"
        try:
            await asyncio.wait_for(self._life.idle.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True

    @property
    def services(self) -> Services:
        """The services; 503 before the model is loaded."""
        services = self._life.services
        if services is None:
            raise ApiError(
                503,
                "the model is still loading; ask again shortly",
                code="starting",
                headers={"Retry-After": "2"},
            )
        return services if isinstance(self._caller, Anybody) else services.seen_by(self._caller)

    @property
    def healthy(self) -> bool:
        """False once the engine's thread is dead or loading failed."""
        if self.phase == "failed":
            return False
        if self._life.services is None:
            return True
        engine = self._life.services.engine
        return engine.alive and engine.failure is None

    @property
    def running(self) -> int:
        """Generations and uploads in work."""
        return self._life.running

    def enter(self) -> Services:
        """Begin one generation or upload; pair with `leave`. 503 while draining."""
        services = self.services
        if self.phase == "draining":
            raise ApiError(
                503,
                "this server is shutting down; ask another, or again shortly",
                code="draining",
                headers={"Retry-After": "5", "Connection": "close"},
            )
        self._life.running += 1
        self._life.idle.clear()
        return services

    def leave(self) -> None:
        """End one generation or upload."""
        self._life.running -= 1
        if self._life.running == 0:
            self._life.idle.set()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """`enter` and `leave` around a block."""
        self.enter()
        try:
            yield
        finally:
            self.leave()


def gate_of(request: HttpRequest) -> Gate:
    """The gate of the app that got this request, as its caller sees it."""
    gate: Gate = request.app.state.gate
    return gate.seen_by(note_of(request.scope).caller)
