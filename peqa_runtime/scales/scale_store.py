"""Where scale sets rest: a folder that holds the old or the new revision, whole, whatever happens meanwhile.

    <store>/tasks/                 a folder per task: its history, which commits a change, and its sets (task_folder)
    <store>/quarantine/            damaged files, moved aside
    <store>/unfinished/            files being written, and names of tasks being changed; emptied at every start
    <store>/incoming/              uploads on their way, in a folder of each process that takes any (incoming)
    <store>/index.json             cache of what the histories say, for a quick start (task_index)
    <store>/changes                names of changed tasks, for the other processes (change_log)
    <store>/lock                   one writer at a time, across threads and processes

A put writes and syncs the set first, then replaces the task's history: before that rename the old revision is
current, after it the new one. Sets that the history does not refer to are removed afterwards, or at the next start.
No change looks at another task. File names come from digests that we computed and from checked task names only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from peqa_runtime.core import BaseManifest, RevisionInfo, TaskInfo, check_task_name
from peqa_runtime.errors import (
    InvalidScaleSet,
    NoSuchRevision,
    StoreError,
    TaskUnusable,
    UnknownTask,
    WrongBase,
)
from peqa_runtime.scales.atomic_file import sync_folder
from peqa_runtime.scales.change_log import ChangeLog
from peqa_runtime.scales.earlier_layout import adopt
from peqa_runtime.scales.incoming import Incoming
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.set_layout import SetLayouts
from peqa_runtime.scales.store_lock import StoreLock
from peqa_runtime.scales.task_folder import TaskFolders
from peqa_runtime.scales.task_history import HistoryEntry, TaskHistory, after_upload, check_match
from peqa_runtime.scales.task_index import TaskRecord
from peqa_runtime.scales.task_shelf import TaskShelf


def default_store(home: Path, base_digest: str) -> Path:
    """Where the tasks of a base rest when nobody says otherwise."""
    return home / "stores" / base_digest[:16]


class ScaleStore:
    """The tasks of one base on disk. Thread-safe; several processes may share the folder.

    `keep`: entries kept per task. Not `durable`: nothing is synced, so a power cut may take what was written last (a
    killed process does not); to fill a store at once. Of a set nothing but its file's size is looked at before it is
    loaded; `load` checks its digest. Raises `StoreError` when the folder cannot be used.
    """

    def __init__(
        self,
        directory: Path | str,
        manifest: BaseManifest,
        *,
        keep: int = 16,
        lock_timeout: float = 60.0,
        durable: bool = True,
    ) -> None:
        assert keep >= 1
        self.directory = Path(directory)
        self.manifest = manifest
        self._keep = keep
        tasks, quarantine, unfinished = (self.directory / n for n in ("tasks", "quarantine", "unfinished"))
        self.layouts = SetLayouts(manifest)
        self._folders = TaskFolders(
            tasks,
            self.layouts,
            unfinished=unfinished,
            quarantine=quarantine,
            manifest=manifest,
            durable=durable,
        )
        incoming = self.directory / "incoming"
        self._incoming = Incoming(incoming)
        self._log = ChangeLog(self.directory / "changes", unfinished=unfinished)
        self._shelf = TaskShelf(
            self._folders,
            self._log,
            manifest,
            unfinished=unfinished,
            index_file=self.directory / "index.json",
        )
        self._lock = StoreLock(self.directory, lock_timeout)
        with self._lock.faults("opened"):
            for folder in (tasks, quarantine, unfinished, incoming):
                folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.directory)
        with self._lock.held("opened"):
            adopt(self.directory, self._folders)
            self._incoming.sweep()
            self._shelf.open()

    def close(self) -> None:
        """Write the index, if it is behind, and remove the folder for uploads. The store may be used on."""
        if not (self._incoming.in_use or self._shelf.index_stale):
            return
        with suppress(StoreError), self._lock.held("written"):
            self._incoming.leave()
            if self._shelf.index_stale:
                self._shelf.save_index()

    def spool_folder(self) -> Path:
        """A folder on the store's volume for what is uploaded to this process, until `close`, or the process's end.

        Raises `StoreError`.
        """
        with self._lock.held("written"):
            return self._incoming.own()

    def __len__(self) -> int:
        """Tasks found here, those that cannot be used included."""
        return len(self._shelf.index)

    def tasks(self, after: str = "", limit: int | None = None) -> list[str]:
        """Names of the tasks that can be used, in order: those greater than `after`, at most `limit`."""
        found: list[str] = []
        while limit is None or len(found) < limit:
            names = self._shelf.index.names(after, limit)
            found += [name for name in names if name not in self._shelf.unusable]
            if limit is None or len(names) < limit:
                break
            after = names[-1]
        return found[:limit]

    def unusable(self) -> dict[str, str]:
        """Tasks found here that cannot be used on this base, each with the reason."""
        return dict(self._shelf.unusable)

    def record(self, task: str) -> TaskRecord | None:
        """What is known of a task that can be used, from memory; None when there is no such task."""
        return None if task in self._shelf.unusable else self._shelf.index.get(task)

    def info(self, task: str) -> TaskInfo:
        """Return what is known of the current revision. Raises `UnknownTask`, `TaskUnusable`, `StoreError`."""
        reason = self._shelf.unusable.get(task)
        if reason is not None:
            raise unusable(task, reason)
        return self._history(task).info()

    def revisions(self, task: str) -> tuple[RevisionInfo, ...]:
        """Return the kept history, newest first. Raises `UnknownTask`, `StoreError`."""
        return self._history(task).revision_infos()

    def put(
        self, task: str, scale_set: ScaleSet, data: bytes | None = None, *, if_match: str | None = None
    ) -> TaskInfo:
        """Make `scale_set` the task's current revision, durably; `data` is the file it was parsed from, kept as it is.

        Content that is current already makes no new entry (another prompt format or note replaces the entry's).
        `if_match`: the revision that must be current, or "*" for any; else `RevisionConflict`. Raises
        `InvalidTaskName`, `WrongBase`, and `StoreError` with the old state intact.
        """
        check_task_name(task)
        if scale_set.base_digest != self.manifest.base_digest:
            raise WrongBase(f"the set belongs to base {scale_set.base_digest[:12]}…, not to this one")
        data = scale_set.to_bytes() if data is None else data
        entry = HistoryEntry(
            revision=scale_set.revision,
            kind=scale_set.kind,
            num_bytes=len(data),
            created=time.time(),
            base_digest=scale_set.base_digest,
            prompt_format=scale_set.prompt_format,
            note=dict(scale_set.note),
        )
        with self._writing("written"):
            before = self._reread(task)
            check_match(task, before, if_match)
            after = after_upload(task, before, entry, self._keep)
            if after is before and self._shelf.fault(task, after.current) is None:
                self._shelf.unusable.pop(task, None)
                return after.info()
            with self._shelf.changing(task):
                digest = self._folders.write(task, entry.revision, data)
                after = after.with_current(replace(after.current, file_digest=digest))
                self._folders.commit(task, after)
                self._shelf.take(task, after)
            return after.info()

    def rollback(self, task: str, revision: str | None = None, *, if_match: str | None = None) -> TaskInfo:
        """Make an earlier (or the named) revision current, durably, after reading it to see that it is whole.

        Raises `UnknownTask`, `NoSuchRevision`, `RevisionConflict`, `StoreError`.
        """
        with self._writing("written"):
            before = self._reread(task)
            if before is None:
                raise self._unknown(task)
            check_match(task, before, if_match)
            after = before.rolled_back(revision)
            reason = self._shelf.fault(task, after.current)
            if reason is not None:
                raise NoSuchRevision(
                    f"revision {after.current.revision[:12]} of task {task!r} cannot be used: {reason}"
                )
            if after != before:
                with self._shelf.changing(task):
                    self._folders.commit(task, after)
                    self._shelf.take(task, after)
            self._shelf.unusable.pop(task, None)
            return after.info()

    def delete(self, task: str, *, if_match: str | None = None) -> None:
        """Remove the task and its history, durably. Raises `UnknownTask`, `RevisionConflict`, `StoreError`."""
        with self._writing("written"):
            known = task in self._shelf.unusable
            before = self._reread(task)
            if before is None and not known:
                raise self._unknown(task)
            check_match(task, before, if_match)
            with self._shelf.changing(task):
                self._folders.commit(task, None)
                self._shelf.take(task, None)

    def quarantine(self, task: str, revision: str) -> None:
        """Note, durably, that the task's current revision is set aside, until an upload or a rollback.

        Nothing happens when another revision is current by now. Raises `StoreError`.
        """
        with self._writing("written"):
            before = self._reread(task)
            if before is not None and before.current.revision == revision and not before.quarantined:
                with self._shelf.changing(task):
                    after = replace(before, quarantined=True)
                    self._folders.commit(task, after)
                    self._shelf.take(task, after)

    def rollback_target(self, task: str, revision: str | None = None) -> HistoryEntry:
        """Return the entry that `rollback` would make current. Raises `UnknownTask`, `NoSuchRevision`."""
        return self._history(task).rolled_back(revision).current

    def kept(self, task: str, prefix: str) -> HistoryEntry:
        """Return the kept revision that begins with `prefix`.

        Raises `UnknownTask`, `NoSuchRevision`, `InvalidRequest` (several do), `StoreError`.
        """
        return self._history(task).beginning_with(prefix)

    def load(self, task: str, revision: str | None = None) -> ScaleSet:
        """Read the task's current (or named) set and check it against its digest.

        Raises `UnknownTask`, `NoSuchRevision`, `StoreError`; a damaged file is moved aside first, and a task whose
        current one it is becomes unusable.
        """
        record = self.record(task)
        if record is not None and revision in (None, record.revision):
            entry = record.entry
        else:
            entry = self._entry(task, revision)
        with self._lock.faults("read"), suppress(FileNotFoundError, InvalidScaleSet):
            return self._folders.load(task, entry)
        self._examine(task, entry)
        with self._lock.faults("read"):
            return self._folders.load(task, entry)

    def content(self, task: str, revision: str | None = None) -> bytes:
        """Return the file of the task's current (or named) revision: the bytes that were uploaded.

        When the same content was also uploaded with another prompt format or note, the file is written anew with
        this entry's. Raises `UnknownTask`, `NoSuchRevision`, `WrongBase`, `StoreError`.
        """
        entry = self._entry(task, revision)
        if entry.base_digest != self.manifest.base_digest:
            raise WrongBase(f"revision {entry.revision[:12]} of task {task!r} belongs to another base")
        with self._lock.faults("read"):
            try:
                data, stored = self._folders.content(task, entry)
            except (FileNotFoundError, InvalidScaleSet):
                self._examine(task, entry)
                data, stored = self._folders.content(task, entry)
        if (stored.prompt_format, dict(stored.note)) == (entry.prompt_format, entry.note):
            return data
        return replace(stored, task=task, prompt_format=entry.prompt_format, note=entry.note).to_bytes()

    def refresh(self) -> set[str]:
        """Take in what other processes changed; return the tasks concerned. Nothing new: one `stat`.

        Raises `StoreError`.
        """
        with self._lock.faults("read"):
            if not self._shelf.changed and not self._log.moved():
                return set()
        with self._writing("read"):
            changed, self._shelf.changed = self._shelf.changed, set()
            return changed

    def _examine(self, task: str, entry: HistoryEntry) -> None:
        """After a failed read, look again while nobody writes. Still damaged or missing: `StoreError`."""
        with self._writing("read"):
            reason = self._shelf.fault(task, entry)
            if reason is None:
                return
            record = self._shelf.index.get(task)
            if record is not None and record.revision == entry.revision:
                self._shelf.set_unusable(task, reason)
        raise StoreError(f"revision {entry.revision[:12]} of task {task!r} cannot be read: {reason}")

    def _reread(self, task: str) -> TaskHistory | None:
        """The task's history as it is on disk now; None when there is none. A damaged one is moved aside."""
        try:
            return self._folders.history(task)
        except ValueError:
            self._folders.set_aside(task, None)
            return None

    def _history(self, task: str) -> TaskHistory:
        """The history from disk. Raises `UnknownTask`, `StoreError`."""
        if task not in self._shelf.index:
            raise self._unknown(task)
        with self._lock.faults("read"):
            try:
                history = self._folders.history(task)
            except ValueError as error:
                raise StoreError(f"the record of task {task!r} is damaged: {error}") from None
        if history is None:
            raise self._unknown(task)
        return history

    def _entry(self, task: str, revision: str | None) -> HistoryEntry:
        history = self._history(task)
        return history.current if revision is None else history.rolled_back(revision).current

    def _unknown(self, task: str) -> UnknownTask:
        known, more = self._shelf.index.names(limit=5), len(self._shelf.index) - 5
        listed = ", ".join(known) + (f" and {more} more" if more > 0 else "")
        return UnknownTask(f"there is no task {str(task)[:80]!r} in the store; known: {listed or 'none'}")

    @contextmanager
    def _writing(self, done: str) -> Iterator[None]:
        """Nobody else writes, and what others wrote is known."""
        with self._lock.held(done):
            self._shelf.catch_up()
            yield


def unusable(task: str, reason: str) -> TaskUnusable:
    """The error for a task that is there but cannot be used."""
    return TaskUnusable(f"task {task!r} cannot be used: {reason}")
