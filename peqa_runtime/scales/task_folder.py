"""The files of the tasks: a folder for each, spread over 256 folders so that none grows long.

    <root>/<xx>/<task>/history.json               what commits a change
    <root>/<xx>/<task>/<revision>.safetensors     one file per kept content; written once

`xx` starts the SHA-256 of the task's name. A task's files are its own: what an upload may drop is known from its own
history, whatever else the store holds. A folder without a history is no task, only what a change left behind.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
from collections.abc import Collection, Iterator
from pathlib import Path

from peqa_runtime.core import BaseManifest, check_task_name
from peqa_runtime.errors import InvalidScaleSet, InvalidTaskName
from peqa_runtime.scales.atomic_file import sync_folder, write_atomic
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.set_file import parse_header
from peqa_runtime.scales.set_layout import SetLayouts
from peqa_runtime.scales.task_history import HistoryEntry, TaskHistory

logger = logging.getLogger(__name__)

HISTORY = "history.json"
_SHARD = re.compile(r"[0-9a-f]{2}")

Stamp = tuple[int, int, int]
"""(mtime in ns, size, inode) of a history file: another stamp, another content."""


class TaskFolders:
    """Its owner sees to it that one writer works at a time. Methods raise `OSError` as it comes.

    `unfinished` and `quarantine` are folders on the same volume. Not `durable`: nothing is synced.
    """

    def __init__(
        self,
        root: Path,
        layouts: SetLayouts,
        *,
        unfinished: Path,
        quarantine: Path,
        manifest: BaseManifest,
        durable: bool,
    ) -> None:
        self.root = root
        self._unfinished = unfinished
        self._quarantine = quarantine
        self._manifest = manifest
        self._layouts = layouts
        self._durable = durable

    def tasks(self) -> Iterator[tuple[str, Stamp | None]]:
        """Every task's folder with its history's stamp; None: it has no history."""
        for shard in sorted(os.scandir(self.root), key=lambda entry: entry.name):
            if not _SHARD.fullmatch(shard.name) or not shard.is_dir():
                logger.warning("%s is no folder of tasks; ignored", shard.path)
                continue
            for entry in os.scandir(shard.path):
                try:
                    at_home = self.folder(entry.name).parent.name == shard.name
                except InvalidTaskName:
                    at_home = False
                if at_home:
                    yield entry.name, self.stamp(entry.name)
                else:
                    logger.warning("%s is not the folder of a task; ignored", entry.path)

    def folder(self, task: str) -> Path:
        """The task's folder. Raises `InvalidTaskName`."""
        return self.root / hashlib.sha256(check_task_name(task).encode()).hexdigest()[:2] / task

    def stamp(self, task: str) -> Stamp | None:
        """The stamp of the task's history; None when there is none."""
        try:
            found = os.stat(self.folder(task) / HISTORY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def history(self, task: str) -> TaskHistory | None:
        """The history as it is on disk now; None when there is none. Raises `ValueError` when it is damaged."""
        try:
            return TaskHistory.from_json((self.folder(task) / HISTORY).read_bytes(), task)
        except FileNotFoundError:
            return None

    def commit(self, task: str, history: TaskHistory | None) -> None:
        """Replace (None: remove) the task's history. On an `OSError` it is as it was before."""
        path = self.folder(task) / HISTORY
        before = path.read_bytes() if path.exists() else None
        try:
            if history is not None:
                write_atomic(path, history.to_json(), temporary=self._unfinished, durable=self._durable)
            elif before is not None:
                path.unlink()
                if self._durable:
                    sync_folder(path.parent)
        except OSError:
            self._restore(path, before)
            raise

    def load(self, task: str, entry: HistoryEntry) -> ScaleSet:
        """Read a kept set. Raises `InvalidScaleSet` unless it fits the base and the digest that it is named by."""
        data = _read(self._path(task, entry.revision))
        if entry.file_digest and hashlib.sha256(data).hexdigest() == entry.file_digest:
            return ScaleSet.from_checked_file(data, entry.kind, self._manifest, self._layouts, entry.revision)
        return self._parse(entry.revision, bytes(data))

    def content(self, task: str, entry: HistoryEntry) -> tuple[bytes, ScaleSet]:
        """The file of a kept set, and the set with the metadata that are in the file. Raises as `load` does."""
        data = self._path(task, entry.revision).read_bytes()
        return data, self._parse(entry.revision, data)

    def has_size(self, task: str, revision: str, num_bytes: int) -> bool:
        """Return whether the set's file has this size, without reading it. Raises `FileNotFoundError`."""
        return self._path(task, revision).stat().st_size == num_bytes

    def write(self, task: str, revision: str, data: bytes) -> str:
        """Put a set's file there, durably, unless a sound one is there. Return its digest, see `HistoryEntry`."""
        path = self._path(task, revision)
        try:
            found = path.read_bytes()
            if found != data:  # of the same content, but for the metadata
                self._parse(revision, found)
            data = found
        except (FileNotFoundError, InvalidScaleSet):
            self._make_folder(path.parent)
            write_atomic(path, data, temporary=self._unfinished, durable=self._durable)
        return file_digest(data)

    def tidy(self, task: str, keep: Collection[str]) -> None:
        """Remove the task's files but the history and the revisions to keep; without these, the folder too."""
        folder = self.folder(task)
        if not folder.is_dir():
            return
        wanted = {f"{revision}.safetensors" for revision in keep} | ({HISTORY} if keep else set())
        for path in folder.iterdir():
            if path.name not in wanted:
                path.unlink()
        if not keep:
            folder.rmdir()

    def set_aside(self, task: str, revision: str | None) -> None:
        """Move a damaged set's file (None: the damaged history) to quarantine."""
        path = self.folder(task) / HISTORY if revision is None else self._path(task, revision)
        logger.warning("%s is damaged; moved to quarantine", path)
        os.replace(path, self._quarantine / f"{task}.{path.name}.{secrets.token_hex(4)}")

    def _parse(self, revision: str, data: bytes) -> ScaleSet:
        # The ratio was checked at the upload, by the server's setting of that time.
        parsed = ScaleSet.parse(data, self._manifest, max_ratio=float("inf"), layouts=self._layouts)
        if parsed.revision != revision:
            raise InvalidScaleSet("the content does not have the digest that it is named by")
        return parsed

    def _make_folder(self, folder: Path) -> None:
        """Make the task's folder, durably. Deepest last, and each parent synced after its child is there."""
        for path in (folder.parent, folder):
            if not path.is_dir():
                path.mkdir()
                if self._durable:
                    sync_folder(path.parent)

    def _restore(self, path: Path, before: bytes | None) -> None:
        """Undo a rename or removal whose sync failed, so that disk and memory agree on the old state."""
        try:
            if before is None:
                path.unlink(missing_ok=True)
            elif not path.exists() or path.read_bytes() != before:
                write_atomic(path, before, temporary=self._unfinished, durable=self._durable)
        except OSError as error:
            logger.error("%s may hold the change that was refused: %s", path, error)

    def _path(self, task: str, revision: str) -> Path:
        assert re.fullmatch(r"[0-9a-f]{64}", revision), revision
        return self.folder(task) / f"{revision}.safetensors"


def file_digest(data: bytes) -> str:
    """The SHA-256 of a sound set file whose tensors lie aligned, in the order of their names; "" for any other."""
    header = parse_header(data[: 8 + int.from_bytes(data[:8], "little")], len(data))
    by_place = sorted(header.tensors, key=lambda name: header.tensors[name].start)
    plain = header.data_start % 8 == 0 and by_place == sorted(by_place)
    return hashlib.sha256(data).hexdigest() if plain else ""


def _read(path: Path) -> bytearray:
    """A file of a set. (A tensor on a `bytearray` needs no copy; on `bytes`, which are constant, it may not be.)"""
    with open(path, "rb", buffering=0) as file:
        data = bytearray(os.fstat(file.fileno()).st_size)
        view, filled = memoryview(data), 0
        while filled < len(data) and (count := file.readinto(view[filled:])):
            filled += count
    return data
