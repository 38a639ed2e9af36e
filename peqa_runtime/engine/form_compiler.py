"""Compiles the forms that strangers send: off the event loop, a few at a time, each in a bounded time and memory."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from peqa_runtime.constraint import Constraint
from peqa_runtime.engine.guidance import Guidance
from peqa_runtime.errors import Overloaded

THREADS = 2
WAITING = 16
"""Forms in work or waiting; more are refused."""


class FormCompiler:
    """A queue before a `Guidance`. Thread-safe."""

    def __init__(self, guidance: Guidance) -> None:
        self._guidance = guidance
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="peqa-forms")
        self._lock = threading.Lock()
        self._pending = 0

    def submit(self, constraint: Constraint) -> Future[None]:
        """Compile a form. The future raises `InvalidRequest` with param "structured"; this raises `Overloaded`.

        A form that is known waits for nobody's.
        """
        if self._guidance.knows(constraint):
            ready: Future[None] = Future()
            ready.set_result(None)
            return ready
        with self._lock:
            if self._pending >= WAITING:
                raise Overloaded(f"{self._pending} forms of answers wait to be compiled; try again later")
            self._pending += 1
        try:
            future = self._threads.submit(self._guidance.compile_carefully, constraint)
        except BaseException:
            self._done()
            raise
        future.add_done_callback(lambda _: self._done())
        return future

    def close(self) -> None:
        """Compile nothing more; what waits is cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _done(self) -> None:
        with self._lock:
            self._pending -= 1
