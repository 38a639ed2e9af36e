"""The one door to tasks: store (disk), host memory and registry (policy), kept in step.

Changes to a task happen one after the other: check the content (outside every lock), commit to disk, then tell the
registry. So an upload that has returned is on disk *and* what the next `acquire` gives, and one that was killed in
between is, at the next start, wholly there or not at all.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

from peqa_runtime.core import (
    BASE_REVISION,
    Blend,
    Lease,
    RevisionInfo,
    ScaleKind,
    TaskInfo,
    check_task_name,
)
from peqa_runtime.errors import (
    InvalidScaleSet,
    InvalidTaskName,
    NoSuchRevision,
    StoreError,
)
from peqa_runtime.prompt_format import prompt_format_fault
from peqa_runtime.scales.host_cache import HostCache
from peqa_runtime.scales.lease_desk import LeaseDesk
from peqa_runtime.scales.scale_set import DEFAULT_MAX_RATIO, ScaleSet, read_set_file
from peqa_runtime.scales.scale_store import ScaleStore, unusable
from peqa_runtime.scales.store_watch import StoreWatch
from peqa_runtime.scales.task_registry import TaskRegistry

logger = logging.getLogger(__name__)

DEFAULT_HOST_BYTES = 1 << 30


class TaskLibrary:
    """All tasks of one base. Thread-safe; `acquire` never waits for an upload.

    `host_bytes`: scale sets kept in host memory beyond those in use. `check`: called with every uploaded set before
    it is committed; raises `InvalidScaleSet` to refuse it (a trial forward, say). `max_ratio`: how far from the
    base a scale may be.
    """

    def __init__(
        self,
        store: ScaleStore,
        registry: TaskRegistry,
        *,
        host_bytes: int = DEFAULT_HOST_BYTES,
        max_ratio: float = DEFAULT_MAX_RATIO,
        check: Callable[[ScaleSet], None] | None = None,
    ) -> None:
        self.store = store
        self.registry = registry
        self.check = check
        self.arrange: Callable[[ScaleSet], ScaleSet] | None = None
        """How a set is held in host memory, when the bank wants it otherwise than in the file."""
        self._max_ratio = max_ratio
        self._change_lock = threading.Lock()  # held while a change goes to disk and registry
        self._host = HostCache(host_bytes, registry.holders)
        self._desk = LeaseDesk(
            store,
            registry,
            self._host,
            arranged=self._arranged,
            moved=self._has_moved,
            unusable=self.unusable,
        )
        self._watch: StoreWatch | None = None
        self._unplaceable: dict[str, str] = {}
        self._notes: list[Future[None]] = []  # quarantines on their way to the disk
        for task in store.tasks():
            self._publish(task)

    def upload(self, task: str, data: bytes | Path, if_match: str | None = None) -> TaskInfo:
        """Check the scale set file `data` (bytes or path) and make it the task's current revision, live on return.

        Uploading what is current already changes nothing. `if_match`: the revision that must be current, "*" for any,
        or `NO_TASK`. Raises `InvalidTaskName`, `InvalidScaleSet`, `WrongBase`, `RevisionConflict` (it is not as
        `if_match` says), `StoreError`, and what `check` raises; the old state is then intact.
        """
        self._check_name(task)
        data = self._bytes_of(data)
        scale_set = self._parsed(data)
        if (fault := prompt_format_fault(scale_set.prompt_format)) is not None:
            raise InvalidScaleSet(f"the metadata's prompt_format {fault}")
        if self.check is not None:
            self.check(scale_set)
        with self._change_lock:
            info = self.store.put(task, scale_set, data, if_match=if_match)
            self._host.put(self._arranged(scale_set))  # so that the first request need not read it
            self._publish(task)
        return info

    def rollback(self, task: str, revision: str | None = None, if_match: str | None = None) -> TaskInfo:
        """Make the revision before the current one, or the one named, current again.

        Raises `UnknownTask`, `NoSuchRevision`, `RevisionConflict`, `StoreError`.
        """
        with self._change_lock:
            target = self.store.rollback_target(task, revision)
            if not self.registry.can_ever_place(target.kind):
                raise NoSuchRevision(
                    f"revision {target.revision[:12]} is of kind {target.kind!r}, for which this server has no rows"
                )
            info = self.store.rollback(task, revision, if_match=if_match)
            self._publish(task)
        return info

    def delete(self, task: str, if_match: str | None = None) -> None:
        """Remove the task: no new request gets it, running ones finish. Raises `UnknownTask`, `RevisionConflict`."""
        with self._change_lock:
            self.store.delete(task, if_match=if_match)
            self._publish(task)

    def refresh(self) -> None:
        """Take in what other processes changed in the store. Raises `StoreError`."""
        with self._change_lock:
            for task in self.store.refresh():
                record, known = self.store.record(task), self.registry.peek(task)
                if (
                    record is None
                    or known != record.lease(task)
                    or record.quarantined != self.registry.is_quarantined(task)
                ):
                    self._publish(task)

    def watch(self, seconds: float) -> None:
        """From now on `refresh` every so often, in a thread, until `close`."""
        assert self._watch is None
        self._watch = StoreWatch(self.refresh, seconds)

    def close(self) -> None:
        """End the watch, and leave the store ready for a quick start. The library may be used on."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        wait(self._notes)
        self.store.close()

    def info(self, task: str) -> TaskInfo:
        """Return what is known of the task's current revision. Raises `UnknownTask`, `TaskUnusable`, `StoreError`."""
        if task in self._unplaceable:
            raise unusable(task, self._unplaceable[task])
        info = self.store.info(task)
        if info.revision != self.registry.current(task):  # another process was here
            self.refresh()
        return info

    def page(self, after: str = "", limit: int | None = None) -> list[TaskInfo]:
        """Return the tasks that can be used, by name, without their notes: those after `after`, at most `limit`."""
        infos: list[TaskInfo] = []
        while limit is None or len(infos) < limit:
            names = self.store.tasks(after, limit)
            records = [(name, self.store.record(name)) for name in names if name not in self._unplaceable]
            infos += [record.info(name) for name, record in records if record is not None]
            if limit is None or len(names) < limit:
                break
            after = names[-1]
        return infos[:limit]

    def unusable(self) -> dict[str, str]:
        """Return the tasks that are in the store but cannot be used here, each with the reason."""
        return {**self.store.unusable(), **self._unplaceable}

    def quarantined(self) -> dict[str, str]:
        """Return the tasks whose current revision is set aside, each with the reason; see `strike`."""
        return self.registry.quarantined()

    def strike(self, revision: str) -> list[str]:
        """Count a request on this leased revision that ended with NaN or infinity; return what this puts in quarantine,
        see `TaskRegistry.strike`. Tasks stay there until their next upload or rollback, after a restart and in every
        process on the store too; the disk is written by another thread."""
        tasks = self.registry.strike(revision)
        self._notes = [note for note in self._notes if not note.done()]
        self._notes += [
            self._host.later(functools.partial(self._note_quarantine, task, revision)) for task in tasks
        ]
        return tasks

    def revisions(self, task: str) -> tuple[RevisionInfo, ...]:
        """Return the task's kept revisions, newest first. Raises `UnknownTask`."""
        return self.store.revisions(task)

    def content(self, task: str, revision: str | None = None) -> bytes:
        """Return the scale set file of the current (or named) revision. Raises `UnknownTask`, `NoSuchRevision`."""
        return self.store.content(task, revision)

    def acquire(self, choice: str | Blend) -> Lease:
        """Pin a task's or blend's current revision, or the kept one that "task@1a2b" names.

        `scale_set` then gives it from memory until `release`. May read the disk when the set was not used for long.
        Raises as `acquire_soon` does, and what its future may fail with.
        """
        return self.acquire_soon(choice).result()

    def acquire_soon(self, choice: str | Blend) -> Future[Lease]:
        """Pin a revision now; the result is there once its set is in memory, often at once. See `LeaseDesk`."""
        return self._desk.acquire_soon(choice)

    def read_file(self, path: Path) -> ScaleSet:
        """A scale set file that is not to become a task. Raises `InvalidScaleSet`, `WrongBase`."""
        return self._parsed(self._bytes_of(path))

    def hold(self, name: str, scale_set: ScaleSet) -> Lease:
        """Pin a set that is no task's, under a name of the caller's, as `acquire` pins a task's."""
        lease = self.registry.hold(Lease(name, scale_set.revision, scale_set.kind))
        self._host.put(self._arranged(scale_set))
        return lease

    def release(self, lease: Lease) -> None:
        """Give a lease back, exactly once."""
        self.registry.release(lease)
        if lease.revision != BASE_REVISION:
            self._host.shrink()

    def scale_set(self, revision: str) -> ScaleSet:
        """Return the tensors of a leased revision, from memory: never from the disk, as the engine's step asks.

        Raises `NoSuchRevision` when it is not there, as nobody leases it.
        """
        found = self._host.get(revision)
        if found is None:
            raise NoSuchRevision(f"revision {revision[:12]} is not in memory: acquire its task first")
        return found

    def has(self, task: str) -> bool:
        """True when there is such a task, as far as this process knows: a look into memory."""
        return self.registry.peek(task) is not None

    def in_memory(self, task: str) -> bool:
        """True when `acquire` of this task would not read the disk at this moment."""
        revision = self.registry.current(task)
        return revision is None or self._host.get(revision) is not None

    def host_counts(self) -> tuple[int, int]:
        """Number of sets in host memory and their bytes."""
        return self._host.counts()

    def stats(self) -> dict[str, float]:
        """Numbers for metrics, by name; counters end in `_total`."""
        return {"tasks": self.registry.counts().tasks, **self._host.stats()}

    def _bytes_of(self, data: bytes | Path) -> bytes:
        if not isinstance(data, Path):
            return data
        try:
            return read_set_file(data, self.store.manifest)[0]
        except OSError as error:
            raise InvalidScaleSet(f"{data} cannot be read: {error.strerror or error}") from None

    def _parsed(self, data: bytes) -> ScaleSet:
        manifest, layouts = self.store.manifest, self.store.layouts
        scale_set = ScaleSet.parse(data, manifest, max_ratio=self._max_ratio, layouts=layouts)
        self._check_kind(scale_set.kind)
        return scale_set

    def _arranged(self, scale_set: ScaleSet) -> ScaleSet:
        return scale_set if self.arrange is None else self.arrange(scale_set)

    def _note_quarantine(self, task: str, revision: str) -> None:
        with self._change_lock:
            if not (self.registry.is_quarantined(task) and self.registry.current(task) == revision):
                return  # uploaded or rolled back meanwhile
            try:
                self.store.quarantine(task, revision)
            except StoreError as error:
                logger.warning("the quarantine of task %r is forgotten at a restart: %s", task, error)

    def _has_moved(self, lease: Lease) -> bool:
        """True when the task has another revision, or none that can be used, since the lease."""
        if lease.revision == BASE_REVISION:
            return False
        with self._change_lock:
            if self.registry.current(lease.task) == lease.revision and self.store.record(lease.task) is None:
                self._publish(lease.task)
            return self.registry.current(lease.task) != lease.revision

    def _publish(self, task: str) -> None:
        """Make the registry agree with the store."""
        record = self.store.record(task)
        before = self.registry.current(task)
        self._unplaceable.pop(task, None)
        if record is not None:
            try:
                self._check_kind(record.kind)
            except InvalidScaleSet as error:
                logger.warning("task %r in the scale store cannot be used: %s", task, error)
                self._unplaceable[task] = str(error)
                record = None
        if record is not None:
            self.registry.set_current(
                task, record.revision, record.kind, record.prompt_format, quarantined=record.quarantined
            )
            self._host.keep(record.revision)
        elif before is not None:
            self.registry.delete(task)
        if before is not None and not self.registry.is_current(before):
            self._host.retire(before)

    def _check_name(self, task: str) -> None:
        check_task_name(task)
        model_id = self.store.manifest.model_id
        if task == model_id.lower():
            raise InvalidTaskName(f"{task!r} is the id of the base model; choose another name")

    def _check_kind(self, kind: ScaleKind) -> None:
        if not self.registry.can_ever_place(kind):
            counts = self.registry.counts()
            raise InvalidScaleSet(
                f"a set of kind {kind!r} finds no place here: this server has {counts.rows} task rows and "
                f"{counts.group_rows} for kind 'group'; start it with more"
            )
