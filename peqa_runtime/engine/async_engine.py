"""The engine in a thread of its own, with asyncio streams in front.

    loop thread(s)                            engine thread
    submit, cancel  --- commands (a queue) -->  drain commands, step, drain commands, step, ...
    TokenStream     <-- one call per step and loop ---

Three rules: the engine never waits for a reader; a reader is never left waiting (cancel, stop and the thread's death
wake it); a refusal is raised by `submit`, in the caller.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from peqa_runtime.constraint import Constraint
from peqa_runtime.core import Lease, Request, TokenOutput
from peqa_runtime.engine.canary import Trial
from peqa_runtime.engine.engine import Engine
from peqa_runtime.engine.form_compiler import FormCompiler
from peqa_runtime.engine.guidance import Form
from peqa_runtime.engine.queue_gauge import QueueGauge
from peqa_runtime.engine.token_stream import Reservation, TokenStream, deliver_all
from peqa_runtime.errors import EngineDead, Overloaded
from peqa_runtime.scales.scale_set import ScaleSet

logger = logging.getLogger(__name__)

_NO_ROW_WAIT = 0.02
"""Seconds between two looks when all that waits lacks a row that somebody outside the engine holds."""


@dataclass(frozen=True)
class _Add:
    request: Request
    lease: Lease | None
    form: Form | None


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _Stop:
    deadline: float  # time.monotonic()


_Command = _Add | _Abort | _Stop | Trial


class AsyncEngine:
    """Runs an `Engine` in a thread. `submit` and `TokenStream` belong to event loops; the rest is thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._forms = FormCompiler(engine.guidance)
        self._streams: dict[str, TokenStream] = {}
        self._queue = QueueGauge(engine.config)
        self._lock = threading.Lock()  # guards _streams, _queue and _error: nobody submits to a dead engine
        self._error: EngineDead | None = None
        self._failure: str | None = None
        self._deadline: float | None = None
        self._rejected = 0
        engine.tasks.check = self.try_out
        self._thread = threading.Thread(target=self._run, name="peqa-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once the engine has stopped or died (true while it drains)."""
        return self._thread.is_alive()

    @property
    def failure(self) -> str | None:
        """Why the engine died; None while it lives and after `stop`."""
        return self._failure

    def submit(self, request: Request, lease: Lease | None = None) -> TokenStream:
        """Start a request and return its outputs' stream. Call it in the event loop that reads the stream.

        The engine keeps the revision leased until the request's last output, whatever happens. `lease`, when given,
        is the engine's from here on, also when this raises; without one the caller must hold a lease on the revision
        during this call. Raises `InvalidRequest`, `PromptTooLong`, `Overloaded` (too many wait), `EngineDead`.
        """
        own = lease or self.engine.pin(request)
        try:
            assert own is None or own.revision == request.revision, "the lease is of another revision"
            stream = TokenStream(request, asyncio.get_running_loop(), self.abort)
            form = self.engine.check(request)
            with self._lock:
                if self._error is not None:
                    raise self._error
                with self._counting_refusals():
                    self._queue.refuse_more(self._running())
                assert request.request_id not in self._streams, "request ids are unique"
                self._streams[request.request_id] = stream
                self._queue.add(request)
                self._commands.put(_Add(request, own, form))
        except BaseException:
            self.engine.unpin(own)
            raise
        return stream

    def prepare(self, constraint: Constraint) -> Future[None]:
        """Compile the form of a request, so that `submit` finds it at hand; see `FormCompiler.submit`."""
        return self._forms.submit(constraint)

    def reserve(self, task: str, choices: int = 1) -> Reservation:
        """Let a request of the task in with all its choices, before anything is done for it, unless too much waits; to
        be given back when it was submitted, or will not be. Raises `Overloaded`, `EngineDead`."""
        with self._lock, self._counting_refusals():
            if self._error is not None:
                raise self._error
            self._queue.refuse(task, self._running(), choices)
            self._queue.reserve(task, choices)
        return Reservation(functools.partial(self._give_up, task, choices))

    def abort(self, request_id: str) -> None:
        """End a request; nothing happens when it has ended. Its stream gets no output from this."""
        with self._lock:
            self._forget(request_id)
        self._commands.put(_Abort(request_id))

    def try_out(self, scale_set: ScaleSet) -> None:
        """Compute with a set that is no task's yet, beside what runs; see `Canary`. Blocks meanwhile.

        Content that passed before is not computed again. Raises `InvalidScaleSet`, `EngineDead`.
        """
        trial = Trial(scale_set)
        with self._lock:
            if self._error is not None:
                raise self._error
            if self.engine.canary.knows(scale_set.revision):
                return
            self._commands.put(trial)
        trial.verdict.result()

    def stats(self) -> dict[str, float]:
        """The engine's numbers (see `Engine.stats`), with requests that have not reached it counted as waiting."""
        stats = self.engine.stats()
        stats["requests_waiting"] = max(0, len(self._streams) - int(stats["requests_running"]))
        with self._lock:
            stats["expected_wait_seconds"] = self._queue.wait("", self._running())
        stats["rejected_total"] = self._rejected
        return stats

    def tasks_in_work(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """How many requests of each task (a blend: its name) run at this moment, and how many wait."""
        running = Counter(sequence.request.task for sequence in self.engine.scheduler.running.copy())
        with self._lock:
            everyone = Counter(stream.task for stream in self._streams.values())
        return running, everyone - running

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for `drain_seconds`, abort the rest, end the thread.

        Blocks until the thread has ended: from an event loop call it with `asyncio.to_thread`. Safe to call twice.
        """
        with self._lock:
            if self._error is None:
                self._error = EngineDead("the engine is shutting down")
        self._commands.put(_Stop(time.monotonic() + drain_seconds))
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _forget(self, request_id: str) -> None:
        """Strike off a stream that gets no more outputs. Needs the lock."""
        if self._streams.pop(request_id, None) is not None:
            self._queue.drop(request_id)

    def _give_up(self, task: str, choices: int) -> None:
        with self._lock:
            self._queue.give_up(task, choices)

    def _running(self) -> list[str]:
        """Ids of the requests that have a place."""
        return [sequence.request_id for sequence in self.engine.scheduler.running.copy()]

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except Overloaded:
            self._rejected += 1
            raise

    def _run(self) -> None:
        """The thread: it ends by `stop`, or by an error that the engine could not contain."""
        error = EngineDead("the engine has stopped")
        try:
            while not self._finished():
                self._take_commands()
                trial = self.engine.canary.next
                if self.engine.has_work:
                    before, begin = self.engine.step_tokens, time.perf_counter()
                    outputs = self.engine.step()
                    self._deliver(outputs, self.engine.step_tokens - before, time.perf_counter() - begin)
                    if not outputs and not self.engine.scheduler.running:
                        time.sleep(_NO_ROW_WAIT)
                if trial is not None and self.engine.canary.next is trial:  # there was no room in the step
                    self.engine.judge()
        except EngineDead as dead:
            logger.critical("the engine has ended itself: %s", dead)
            error = dead
            self._failure = str(dead)
        except BaseException as problem:  # whatever ends the thread must reach the readers
            logger.critical("the engine's thread died", exc_info=problem)
            error = EngineDead(f"the engine died of {type(problem).__name__}: {problem}")
            self._failure = str(error)
        finally:
            self._end(error)

    def _finished(self) -> bool:
        if self._deadline is None:
            return False
        idle = not self._busy and self._commands.empty()
        return idle or time.monotonic() >= self._deadline

    @property
    def _busy(self) -> bool:
        return self.engine.has_work or self.engine.canary.next is not None

    def _take_commands(self) -> None:
        """Carry out what was asked meanwhile; wait for a command when there is nothing else to do."""
        idle = not self._busy and self._deadline is None
        while idle or not self._commands.empty():
            command = self._commands.get()
            idle = False
            match command:
                case _Add(request, lease, form):
                    if failed := self.engine.admit(request, lease, form):
                        self._deliver(failed, 0, 0.0)
                case _Abort(request_id):
                    self.engine.abort(request_id)
                case _Stop(deadline):
                    self._deadline = deadline
                case Trial():
                    self.engine.canary.add(command)

    def _deliver(self, outputs: list[TokenOutput], tokens: int, seconds: float) -> None:
        """Hand a step's outputs over: one call per loop, whatever the number of its requests."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[TokenStream, TokenOutput | EngineDead]]] = {}
        with self._lock:
            self._queue.step(tokens, seconds)
            for output in outputs:
                stream = self._streams.get(output.request_id)
                if stream is None:
                    continue  # cancelled during the step
                by_loop.setdefault(stream.loop, []).append((stream, output))
                stream.num_generated += output.token_id is not None
                if output.finished:
                    if output.finish_reason in ("stop", "length"):
                        self._queue.finish(output.request_id, stream.num_generated, output.num_cached_tokens)
                    self._forget(output.request_id)
        for loop, items in by_loop.items():
            self._call(loop, items)

    def _call(
        self,
        loop: asyncio.AbstractEventLoop,
        items: list[tuple[TokenStream, TokenOutput | EngineDead]],
    ) -> None:
        try:
            loop.call_soon_threadsafe(deliver_all, items)
        except RuntimeError:  # the loop is closed: nobody will ever read these
            for stream, _ in items:
                self.abort(stream.request_id)

    def _end(self, error: EngineDead) -> None:
        """Free everything and wake every reader: with an abort after `stop`, with the error after a death."""
        with self._lock:
            stopped = self._deadline is not None
            self._error = error
            streams = self._streams.copy()
            for request_id in streams:
                self._forget(request_id)
        for stream in streams.values():  # first of all: cleaning up after a death may fail
            last = TokenOutput(stream.request_id, finish_reason="abort") if stopped else error
            self._call(stream.loop, [(stream, last)])
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Add):
                self.engine.unpin(command.lease)
            elif isinstance(command, Trial):
                self.engine.canary.add(command)
        self.engine.canary.give_up(error)
        self._forms.close()
        self.engine.close()
