"""What a store knows of its tasks in memory, and how that is kept in step with their folders."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peqa_runtime.core import BaseManifest
from peqa_runtime.errors import InvalidScaleSet, WrongBase
from peqa_runtime.scales.change_log import ChangeLog
from peqa_runtime.scales.task_folder import Stamp, TaskFolders
from peqa_runtime.scales.task_history import HistoryEntry, TaskHistory
from peqa_runtime.scales.task_index import TaskIndex, TaskRecord, read_index

logger = logging.getLogger(__name__)

_INDEX_WORTH = 64  # histories read anew at a start; more, and the index is written again


class TaskShelf:
    """Records by task, and why some tasks cannot be used. Reading these needs no lock; the methods need the store's.

    `unfinished` and `index_file` are of the store's folder; `log` tells its other processes. Methods raise `OSError`.
    """

    def __init__(
        self,
        folders: TaskFolders,
        log: ChangeLog,
        manifest: BaseManifest,
        *,
        unfinished: Path,
        index_file: Path,
    ) -> None:
        self.index = TaskIndex()
        self.unusable: dict[str, str] = {}
        self.changed: set[str] = set()  # by other processes, and not told to anybody yet
        self.index_stale = False
        self._folders = folders
        self._log = log
        self._manifest = manifest
        self._unfinished = unfinished
        self._index_file = index_file

    def open(self) -> None:
        """Bring the folders in order and read them."""
        self._log.news()
        known = read_index(self._index_file)
        records: dict[str, TaskRecord] = {}
        for task, stamp in self._folders.tasks():
            if stamp is None:
                self._folders.tidy(task, ())
                continue
            record = known.get(task)
            if record is None or record.stamp != stamp:
                record = self._read_record(task)
            if record is None:
                continue
            records[task] = record
            reason = self.fault(task, record.entry, read=False)
            if reason is not None:
                self.set_unusable(task, reason)
        self.index.fill(records)
        for leftover in self._unfinished.iterdir():
            task = leftover.name.removeprefix("change-")
            if task in records:
                history = self._folders.history(task)
                self._folders.tidy(task, history.revisions if history else ())
            leftover.unlink()
        if sum(known.get(task) is not record for task, record in records.items()) > _INDEX_WORTH:
            self.save_index()

    def _read_record(self, task: str) -> TaskRecord | None:
        """The task's record, from its history; None, and the task unusable, when that is damaged."""
        stamp = self._folders.stamp(task)
        try:
            history = self._folders.history(task)
        except ValueError as error:
            self.set_unusable(task, f"its record is damaged ({error}); upload it again or delete it")
            return None
        return None if history is None or stamp is None else TaskRecord.of(history, stamp)

    def catch_up(self) -> None:
        """Read anew what other processes changed since the last look."""
        names = self._log.news()
        if names is None:
            stamps = dict(self._folders.tasks())
            names = set(self.index.names()) | set(self.unusable) | stamps.keys()
            names = {task for task in names if self._is_behind(task, stamps.get(task))}
        self.changed |= names
        try:
            for task in names:
                self._look_again(task)
        except OSError:
            self._log.forget()  # else nobody would look at the rest of them again
            raise

    def _is_behind(self, task: str, stamp: Stamp | None) -> bool:
        record = self.index.get(task)
        return record is None or record.stamp != stamp

    def _look_again(self, task: str) -> None:
        """Take the task as it is on disk now."""
        self.unusable.pop(task, None)
        record = self._read_record(task)
        self.index.set(task, record)
        self.index_stale = True
        reason = None if record is None else self.fault(task, record.entry, read=False)
        if reason is not None:
            self.set_unusable(task, reason)

    def take(self, task: str, history: TaskHistory | None) -> None:
        """Make memory agree with a history that was written a moment ago."""
        stamp = self._folders.stamp(task)
        self.index.set(task, None if history is None or stamp is None else TaskRecord.of(history, stamp))
        self.index_stale = True
        self.unusable.pop(task, None)

    def fault(self, task: str, entry: HistoryEntry, *, read: bool = True) -> str | None:
        """Why the entry cannot be used (None: it can). A damaged file is moved aside. Not `read`: size only."""
        if entry.base_digest != self._manifest.base_digest:
            return (
                f"it belongs to base {entry.base_digest[:12]}…, this base is {self._manifest.base_digest[:12]}… "
                f"({self._manifest.model_id})"
            )
        try:
            if read or not self._folders.has_size(task, entry.revision, entry.num_bytes):
                self._folders.load(task, entry)
        except FileNotFoundError:
            return "its file is missing; upload it again or roll back"
        except WrongBase as error:
            return str(error)
        except InvalidScaleSet as error:
            self._folders.set_aside(task, entry.revision)
            return f"its file is damaged and was moved to quarantine ({error}); upload it again or roll back"
        return None

    @contextmanager
    def changing(self, task: str) -> Iterator[None]:
        """Tell the others, and the next start, that the task changes; remove afterwards what it does not need."""
        mark = self._unfinished / f"change-{task}"
        mark.touch()
        try:
            self._log.note(task)
            yield
        finally:
            try:
                history = self._folders.history(task)
                self._folders.tidy(task, history.revisions if history else ())
                mark.unlink()
            except (OSError, ValueError) as error:  # the mark stays, so the next start does it
                logger.warning("unused files of task %r stay until the next start: %s", task, error)

    def set_unusable(self, task: str, reason: str) -> None:
        logger.warning("task %r in the scale store cannot be used: %s", task, reason)
        self.unusable[task] = reason

    def save_index(self) -> None:
        self.index.save(self._index_file, unfinished=self._unfinished)
        self.index_stale = False
