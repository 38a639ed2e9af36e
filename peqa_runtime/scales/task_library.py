"""The one door to tasks: store (disk), host memory and registry (policy), kept in step.

Changes to a task happen one after the other: check the content (outside every lock), commit to disk, then tell the
registry. So an upload that has returned is on disk *and* what the next `acquire` gives, and one that was killed in
between is, at the next start, wholly there or not at all.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from peqa_runtime.core import (
    BASE_REVISION,
    Lease,
    RevisionInfo,
    ScaleKind,
    TaskInfo,
    check_task_name,
)
from peqa_runtime.errors import InvalidScaleSet, InvalidTaskName, NoSuchRevision, StoreError, UnknownTask
from peqa_runtime.scales.scale_set import DEFAULT_MAX_RATIO, ScaleSet, read_set_file
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.task_registry import TaskRegistry

logger = logging.getLogger(__name__)


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
        host_bytes: int = 1 << 30,
        max_ratio: float = DEFAULT_MAX_RATIO,
        check: Callable[[ScaleSet], None] | None = None,
    ) -> None:
        self.store = store
        self.registry = registry
        self.check = check
        self._host_bytes = host_bytes
        self._max_ratio = max_ratio
        self._change_lock = threading.Lock()  # held while a change goes to disk and registry
        self._host_lock = threading.Lock()  # never held while the disk is read
        self._host: OrderedDict[str, ScaleSet] = OrderedDict()  # least recently used first
        self._host_used = 0
        self._unplaceable: dict[str, str] = {}
        for task in store.tasks():
            info = store.info(task)
            try:
                self._check_kind(info.kind)
            except InvalidScaleSet as error:
                logger.warning("task %r in the scale store cannot be used: %s", task, error)
                self._unplaceable[task] = str(error)
            else:
                self._publish(info)

    def upload(self, task: str, data: bytes | Path, if_match: str | None = None) -> TaskInfo:
        """Check the scale set file `data` (bytes or path) and make it the task's current revision, live on return.

        Uploading what is current already changes nothing. Raises `InvalidTaskName`, `InvalidScaleSet`, `WrongBase`,
        `RevisionConflict` (the current revision is not `if_match`), `StoreError`; the old state is then intact.
        """
        self._check_name(task)
        if isinstance(data, Path):
            try:
                data, _ = read_set_file(data, self.store.manifest)
            except OSError as error:
                raise InvalidScaleSet(f"the file cannot be read: {error.strerror or error}") from None
        scale_set = ScaleSet.parse(data, self.store.manifest, max_ratio=self._max_ratio)
        self._check_kind(scale_set.kind)
        if self.check is not None:
            self.check(scale_set)
        with self._change_lock:
            info = self.store.put(task, scale_set, data, if_match=if_match)
            self._keep(scale_set)  # so that the first request need not read it
            self._publish(info)
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
            self._publish(info)
        return info

    def delete(self, task: str, if_match: str | None = None) -> None:
        """Remove the task: no new request gets it, running ones finish. Raises `UnknownTask`, `RevisionConflict`."""
        with self._change_lock:
            self.store.delete(task, if_match=if_match)
            self._unplaceable.pop(task, None)
            if self.registry.current(task) is not None:
                self.registry.delete(task)

    def info(self, task: str) -> TaskInfo:
        """Return what is known of the task's current revision. Raises `UnknownTask`."""
        if task in self._unplaceable:
            raise UnknownTask(f"task {task!r} cannot be used: {self._unplaceable[task]}")
        return self.store.info(task)

    def list(self) -> list[TaskInfo]:
        """Return all tasks that can be used, by name."""
        infos = []
        for task in self.registry.tasks():
            try:
                infos.append(self.info(task))
            except UnknownTask:  # deleted a moment ago
                continue
        return infos

    def unusable(self) -> dict[str, str]:
        """Tasks in the store that cannot be used, each with the reason."""
        return {**self.store.unusable(), **self._unplaceable}

    def revisions(self, task: str) -> tuple[RevisionInfo, ...]:
        """Return the task's kept revisions, newest first. Raises `UnknownTask`."""
        return self.store.revisions(task)

    def content(self, task: str, revision: str | None = None) -> bytes:
        """Return the scale set file of the current (or named) revision. Raises `UnknownTask`, `NoSuchRevision`."""
        return self.store.content(task, revision)

    def acquire(self, task: str) -> Lease:
        """Pin the task's current revision; `scale_set` then gives it from memory until `release`.

        May read the disk when the set was not used for long. Raises `UnknownTask`, `StoreError`.
        """
        while True:
            try:
                lease = self.registry.acquire(task)
            except UnknownTask:
                reason = self.unusable().get(task)
                if reason is None:
                    raise
                raise UnknownTask(f"task {task!r} cannot be used: {reason}") from None
            try:
                if lease.revision != BASE_REVISION:
                    self.scale_set(lease.revision, task=task)
            except (StoreError, NoSuchRevision, UnknownTask):
                self.registry.release(lease)
                if not self._dropped(task, lease):
                    raise
            except BaseException:
                self.registry.release(lease)
                raise
            else:
                return lease

    def in_memory(self, task: str) -> bool:
        """True when `acquire` of this task would not read the disk at this moment."""
        revision = self.registry.current(task)
        with self._host_lock:
            return revision is None or revision in self._host

    def release(self, lease: Lease) -> None:
        """Give a lease back, exactly once."""
        self.registry.release(lease)
        if lease.revision != BASE_REVISION:
            self._shrink()

    def scale_set(self, revision: str, *, task: str | None = None) -> ScaleSet:
        """Return a revision's tensors: always from memory while it is leased, else perhaps from disk.

        `task` says where to look on disk. Raises `NoSuchRevision` when it is neither in memory nor known to the
        store, `StoreError`, `UnknownTask`.
        """
        with self._host_lock:
            if revision in self._host:
                self._host.move_to_end(revision)
                return self._host[revision]
        if task is None:
            raise NoSuchRevision(f"revision {revision[:12]} is not in memory: acquire its task first")
        scale_set = self.store.load(self.store.entry(task, revision))
        return self._keep(scale_set)

    def host_counts(self) -> tuple[int, int]:
        """Number of sets in host memory and their bytes."""
        with self._host_lock:
            return len(self._host), self._host_used

    def _publish(self, info: TaskInfo) -> None:
        self._unplaceable.pop(info.task, None)
        self.registry.set_current(info.task, info.revision, info.kind, info.prompt_format)

    def _keep(self, scale_set: ScaleSet) -> ScaleSet:
        with self._host_lock:
            kept = self._host.setdefault(scale_set.revision, scale_set)
            if kept is scale_set:
                self._host_used += scale_set.num_bytes
            self._host.move_to_end(scale_set.revision)
        self._shrink()
        return kept

    def _shrink(self) -> None:
        """Drop the least recently used sets that nobody leases, down to the limit."""
        with self._host_lock:
            if self._host_used <= self._host_bytes:
                return
            for revision in list(self._host):
                if self._host_used <= self._host_bytes:
                    return
                if not self.registry.holders(revision):  # an acquire pins before it looks here
                    self._host_used -= self._host.pop(revision).num_bytes

    def _dropped(self, task: str, lease: Lease) -> bool:
        """After a failed load: true when `acquire` should look again, because the task changed or left meanwhile."""
        with self._change_lock:
            if self.registry.current(task) != lease.revision:
                return True
            if task in self.store.unusable() or task not in self.store.tasks():
                self.registry.delete(task)
                return True
            return False

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
