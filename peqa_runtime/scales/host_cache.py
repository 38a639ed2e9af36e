"""The middle tier: sets in host memory, between the device's rows and the disk, least recently used first to go."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from peqa_runtime.scales.scale_set import ScaleSet

_THREADS = 16
"""Loads at once. Each is a read and a digest, done without the interpreter's lock; many only where a disk hangs."""

Result = TypeVar("Result")


class HostCache:
    """Sets by revision, at most `limit_bytes` of them beyond those in use. Thread-safe.

    `in_use(revision)`: true while the set may not be dropped.
    """

    def __init__(self, limit_bytes: int, in_use: Callable[[str], object]) -> None:
        self.limit_bytes = limit_bytes
        self._in_use = in_use
        self._lock = threading.Lock()  # never held while the disk is read
        self._sets: OrderedDict[str, ScaleSet] = OrderedDict()
        self._used = 0
        self._retired: set[str] = set()
        self._loads: dict[str, Future[ScaleSet]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="peqa-load")
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0

    def get(self, revision: str) -> ScaleSet | None:
        """The set, when it is in memory."""
        with self._lock:
            found = self._sets.get(revision)
            if found is not None:
                self._sets.move_to_end(revision)
            return found

    def hit(self, revision: str) -> bool:
        """True when the set is in memory; counted for the metrics."""
        found = self.get(revision) is not None
        if found:
            with self._lock:
                self._counts["hits"] += 1
        return found

    def put(self, scale_set: ScaleSet) -> None:
        """Keep a set as the most recently used one."""
        with self._lock:
            self._keep(scale_set)
        self.shrink()

    def retire(self, revision: str) -> None:
        """Drop a set that no task has any more, at once or when its last user is done; `put` and `keep` undo it."""
        with self._lock:
            if revision in self._sets:
                self._retired.add(revision)
        self.shrink()

    def keep(self, revision: str) -> None:
        """Undo `retire` where the set is still in memory: a task has it again."""
        with self._lock:
            self._retired.discard(revision)

    def load(self, revision: str, read: Callable[[], ScaleSet]) -> Future[ScaleSet]:
        """The set from memory, or from `read`, called in a thread; who asks meanwhile gets the same load."""
        with self._lock:
            if revision in self._loads:
                return self._loads[revision]
            if revision in self._sets:
                done: Future[ScaleSet] = Future()
                done.set_result(self._sets[revision])
                return done
            self._loads[revision] = self._threads.submit(self._load, revision, read)
            return self._loads[revision]

    def later(self, work: Callable[[], Result]) -> Future[Result]:
        """Do what may wait for the disk, in a thread of the loads."""
        return self._threads.submit(work)

    def shrink(self) -> None:
        """Drop retired sets that nobody uses, then the least recently used of the others, down to the limit."""
        with self._lock:
            for revision in [revision for revision in self._retired if not self._in_use(revision)]:
                self._retired.discard(revision)
                self._used -= self._sets.pop(revision).num_bytes
            if self._used <= self.limit_bytes:
                return
            dropped, used = [], self._used
            for revision, scale_set in self._sets.items():
                if used <= self.limit_bytes:
                    break
                if not self._in_use(revision):  # who begins to use one pins it before looking here
                    dropped.append(revision)
                    used -= scale_set.num_bytes
            for revision in dropped:
                del self._sets[revision]
                self._retired.discard(revision)
            self._used = used

    def counts(self) -> tuple[int, int]:
        """Number of sets in memory and their bytes."""
        with self._lock:
            return len(self._sets), self._used

    def stats(self) -> dict[str, float]:
        """Numbers for metrics; counters end in `_total`."""
        sets, used = self.counts()
        return {
            "host_sets": sets,
            "host_bytes": used,
            "host_limit_bytes": self.limit_bytes,
            "set_hits_total": self._counts["hits"],
            "set_loads_total": self._counts["done"],
            "set_load_failures_total": self._counts["failed"],
            "set_load_seconds_total": self._seconds,
        }

    def _load(self, revision: str, read: Callable[[], ScaleSet]) -> ScaleSet:
        started = time.perf_counter()
        scale_set = None
        try:
            scale_set = read()
        finally:
            with self._lock:
                del self._loads[revision]
                self._counts["failed" if scale_set is None else "done"] += 1
                self._seconds += time.perf_counter() - started
                if scale_set is not None:
                    self._keep(scale_set)
            self.shrink()
        return scale_set

    def _keep(self, scale_set: ScaleSet) -> None:
        self._retired.discard(scale_set.revision)
        if scale_set.revision not in self._sets:
            self._sets[scale_set.revision] = scale_set
            self._used += scale_set.num_bytes
        self._sets.move_to_end(scale_set.revision)
