"""Where scale sets rest: a folder that holds the old or the new revision, whole, whatever happens meanwhile.

    <store>/blobs/<revision>.safetensors    one file per content, named by its digest, written once
    <store>/tasks/<task>.json               the task's history; this small file is what commits a change
    <store>/quarantine/                     damaged files, moved aside
    <store>/unfinished/                     files being written; emptied at every start
    <store>/lock                            one writer at a time, across threads and processes

A put writes and syncs the blob first, then replaces the task's file: before that rename the old revision is
current, after it the new one. Blobs that no task refers to are removed afterwards, or at the next start. File names
come from digests that we computed and from checked task names only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path

import filelock

from peqa_runtime.core import BaseManifest, RevisionInfo, TaskInfo, check_task_name
from peqa_runtime.errors import (
    InvalidScaleSet,
    InvalidTaskName,
    NoSuchRevision,
    StoreError,
    UnknownTask,
    WrongBase,
)
from peqa_runtime.scales.atomic_file import sync_folder, write_atomic
from peqa_runtime.scales.blob_folder import BlobFolder
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.task_history import HistoryEntry, TaskHistory, check_match

logger = logging.getLogger(__name__)


class ScaleStore:
    """The tasks of one base on disk. Thread-safe; several processes may share the folder.

    `keep`: entries kept per task. `verify_bytes`: at the start, current sets are read and checked against their
    digest until this many bytes are read; the rest are checked when they are first used.
    Raises `StoreError` when the folder cannot be used.
    """

    def __init__(
        self,
        directory: Path | str,
        manifest: BaseManifest,
        *,
        keep: int = 16,
        verify_bytes: int = 256 << 20,
        lock_timeout: float = 60.0,
    ) -> None:
        assert keep >= 1
        self.directory = Path(directory)
        self.manifest = manifest
        self._keep = keep
        self._tasks = self.directory / "tasks"
        self._unfinished = self.directory / "unfinished"
        blobs, quarantine = self.directory / "blobs", self.directory / "quarantine"
        self._blobs = BlobFolder(blobs, unfinished=self._unfinished, quarantine=quarantine, manifest=manifest)
        self._histories: dict[str, TaskHistory] = {}
        self._unusable: dict[str, str] = {}
        self._write_lock = threading.Lock()  # readers take none: both dicts are replaced, never changed
        self._file_lock = filelock.FileLock(self.directory / "lock", timeout=lock_timeout, thread_local=False)
        with self._storing("opened"):
            for folder in (blobs, self._tasks, quarantine, self._unfinished):
                folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.directory)
        with self._writing("opened"):
            for leftover in self._unfinished.iterdir():
                leftover.unlink()
            self._read_tasks(verify_bytes)
            self._collect(self._blobs.revisions())

    def tasks(self) -> list[str]:
        """Names of the tasks that can be used, sorted."""
        return sorted(set(self._histories) - set(self._unusable))

    def unusable(self) -> dict[str, str]:
        """Tasks found here that cannot be used on this base, each with the reason."""
        return dict(self._unusable)

    def info(self, task: str) -> TaskInfo:
        """Return what is known of the current revision. Raises `UnknownTask`, also for an unusable task."""
        reason = self._unusable.get(task)
        if reason is not None:
            raise UnknownTask(f"task {task!r} cannot be used: {reason}")
        return self._history(task).info()

    def revisions(self, task: str) -> tuple[RevisionInfo, ...]:
        """Return the kept history, newest first. Raises `UnknownTask`."""
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
            if before is None:
                after = TaskHistory(task, (entry,), 0)
            elif before.current.revision != entry.revision or before.current.base_digest != entry.base_digest:
                after = before.with_upload(entry, self._keep)
            elif (before.current.prompt_format, before.current.note) != (entry.prompt_format, entry.note):
                after = before.with_current(entry)
            else:
                after = before
            try:
                self._blobs.write(entry.revision, data)
                if after is not before:
                    self._commit(task, after)
            except OSError:
                self._collect([entry.revision])
                raise
            self._set_usable(task)
            self._collect((before.revisions if before else set()) - after.revisions)
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
            reason = self._fault(after.current)
            if reason is not None:
                raise NoSuchRevision(
                    f"revision {after.current.revision[:12]} of task {task!r} cannot be used: {reason}"
                )
            if after != before:
                self._commit(task, after)
            self._set_usable(task)
            return after.info()

    def delete(self, task: str, *, if_match: str | None = None) -> None:
        """Remove the task and its history, durably. Raises `UnknownTask`, `RevisionConflict`, `StoreError`."""
        with self._writing("written"):
            before = self._reread(task)
            if before is None and task not in self._unusable:
                raise self._unknown(task)
            check_match(task, before, if_match)
            self._commit(task, None)
            self._set_usable(task)
            self._collect(before.revisions if before else ())

    def entry(self, task: str, revision: str | None = None) -> HistoryEntry:
        """Return the current entry, or the newest of `revision`. Raises `UnknownTask`, `NoSuchRevision`."""
        history = self._history(task)
        return history.current if revision is None else history.rolled_back(revision).current

    def rollback_target(self, task: str, revision: str | None = None) -> HistoryEntry:
        """Return the entry that `rollback` would make current. Raises `UnknownTask`, `NoSuchRevision`."""
        return self._history(task).rolled_back(revision).current

    def load(self, entry: HistoryEntry) -> ScaleSet:
        """Read a kept set and check it against its digest.

        Raises `StoreError`; a damaged file is moved aside first, and the tasks that need it become unusable.
        """
        return self._parse(self._read(entry))

    def content(self, task: str, revision: str | None = None) -> bytes:
        """Return the file of the task's current (or named) revision: the bytes that were uploaded.

        When the same content was also uploaded with another prompt format or note, the file is written anew with
        this task's. Raises `UnknownTask`, `NoSuchRevision`, `WrongBase`, `StoreError`.
        """
        entry = self.entry(task, revision)
        if entry.base_digest != self.manifest.base_digest:
            raise WrongBase(f"revision {entry.revision[:12]} of task {task!r} belongs to another base")
        data = self._read(entry)
        stored = self._parse(data)
        if (stored.prompt_format, dict(stored.note)) == (entry.prompt_format, entry.note):
            return data
        return replace(stored, task=task, prompt_format=entry.prompt_format, note=entry.note).to_bytes()

    def _parse(self, data: bytes) -> ScaleSet:
        return ScaleSet.parse(data, self.manifest, max_ratio=inf)  # the ratio was checked at the upload

    def _read_tasks(self, verify_bytes: int) -> None:
        for path in sorted(self._tasks.iterdir()):
            task = path.name.removesuffix(".json")
            try:
                check_task_name(task if path.suffix == ".json" else "")
                history = TaskHistory.from_json(path.read_bytes(), task)
            except InvalidTaskName:
                logger.warning("%s is not the file of a task; ignored", path)
                continue
            except ValueError as error:
                self._set_unusable(task, f"its record is damaged ({error}); upload it again or delete it")
                continue
            self._set_history(task, history)
            reason = self._fault(history.current, read=verify_bytes > 0)
            verify_bytes -= history.current.num_bytes
            if reason is not None:
                self._set_unusable(task, reason)

    def _fault(self, entry: HistoryEntry, *, read: bool = True) -> str | None:
        """Why the entry cannot be used (None: it can). A damaged file is moved aside. Not `read`: size only."""
        if entry.base_digest != self.manifest.base_digest:
            return (
                f"it belongs to base {entry.base_digest[:12]}…, this base is {self.manifest.base_digest[:12]}… "
                f"({self.manifest.model_id})"
            )
        try:
            if read or not self._blobs.has_size(entry.revision, entry.num_bytes):
                self._blobs.read(entry.revision)
        except FileNotFoundError:
            return "its file is missing; upload it again or roll back"
        except WrongBase as error:
            return str(error)
        except InvalidScaleSet as error:
            self._blobs.set_aside(entry.revision)
            return f"its file is damaged and was moved to quarantine ({error}); upload it again or roll back"
        return None

    def _read(self, entry: HistoryEntry) -> bytes:
        """The entry's file. When it is missing or damaged, the tasks that need it become unusable: `StoreError`."""
        with self._storing("read"):
            try:
                return self._blobs.read(entry.revision)
            except (FileNotFoundError, InvalidScaleSet):
                pass  # looked at again below, alone: the file may be on its way
        with self._writing("read"):
            reason = self._fault(entry)
            if reason is None:
                return self._blobs.read(entry.revision)
            for task, history in self._histories.items():
                if history.current.revision == entry.revision:
                    self._set_unusable(task, reason)
        raise StoreError(f"revision {entry.revision[:12]} cannot be read: {reason}")

    def _reread(self, task: str) -> TaskHistory | None:
        """The task's history as it is on disk now (another process may have changed it); None when there is none."""
        path = self._task_file(task)
        history = None
        try:
            history = TaskHistory.from_json(path.read_bytes(), task)
        except FileNotFoundError:
            pass
        except ValueError:
            self._blobs.quarantine(path)
        self._set_history(task, history)
        return history

    def _commit(self, task: str, history: TaskHistory | None) -> None:
        """Replace (None: remove) the task's file. On an `OSError` the file is as it was before."""
        path = self._task_file(task)
        before = path.read_bytes() if path.exists() else None
        try:
            if history is None:
                path.unlink(missing_ok=True)
                sync_folder(path.parent)
            else:
                write_atomic(path, history.to_json(), temporary=self._unfinished)
        except OSError:
            self._restore(path, before)
            raise
        self._set_history(task, history)

    def _restore(self, path: Path, before: bytes | None) -> None:
        """Undo a rename or removal whose sync failed, so that disk and memory agree on the old state."""
        try:
            if before is None:
                path.unlink(missing_ok=True)
            elif not path.exists() or path.read_bytes() != before:
                write_atomic(path, before, temporary=self._unfinished)
        except OSError as error:
            logger.error("%s may hold the change that was refused: %s", path, error)

    def _collect(self, candidates: Iterable[str]) -> None:
        """Remove the candidates' blobs unless some task refers to them. Who holds a lease has its copy in memory."""
        left = set(candidates)
        if not left:
            return
        try:
            for path in self._tasks.glob("*.json"):
                left -= TaskHistory.from_json(path.read_bytes(), path.name.removesuffix(".json")).revisions
            self._blobs.remove(left)
        except (OSError, ValueError) as error:  # a record that cannot be read might refer to any of them
            logger.warning("unused scale sets stay in the store until its next start: %s", error)

    def _set_unusable(self, task: str, reason: str) -> None:
        logger.warning("task %r in the scale store cannot be used: %s", task, reason)
        self._unusable = {**self._unusable, task: reason}

    def _set_usable(self, task: str) -> None:
        self._unusable = {t: reason for t, reason in self._unusable.items() if t != task}

    def _set_history(self, task: str, history: TaskHistory | None) -> None:
        others = {t: h for t, h in self._histories.items() if t != task}
        self._histories = others if history is None else {**others, task: history}

    def _history(self, task: str) -> TaskHistory:
        if task not in self._histories:
            raise self._unknown(task)
        return self._histories[task]

    def _unknown(self, task: str) -> UnknownTask:
        known = sorted(self._histories)
        listed = ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
        return UnknownTask(f"there is no task {str(task)[:80]!r} in the store; known: {listed or 'none'}")

    def _task_file(self, task: str) -> Path:
        return self._tasks / f"{check_task_name(task)}.json"

    @contextmanager
    def _writing(self, done: str) -> Iterator[None]:
        with self._write_lock, self._storing(done), self._file_lock:
            yield

    @contextmanager
    def _storing(self, done: str) -> Iterator[None]:
        """Turn a fault of the disk into the named error; the folder's path is for the log, not for a client."""
        try:
            yield
        except filelock.Timeout:
            raise StoreError("the scale store is in use by another process; try again") from None
        except OSError as error:
            logger.error("scale store %s: %s", self.directory, error)
            reason = error.strerror or type(error).__name__
            raise StoreError(f"the scale store cannot be {done} ({reason}); nothing was changed") from error
