"""What the store holds in memory of each task, a few hundred bytes, and the file that saves reading them all anew.

`index.json` is a cache of the histories' current entries: each record counts only while its stamp is the stamp of
the history file, so a stale, damaged or missing index costs time at the next start and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peqa_runtime.core import Lease, ScaleKind, TaskInfo
from peqa_runtime.scales.atomic_file import write_atomic
from peqa_runtime.scales.task_folder import Stamp
from peqa_runtime.scales.task_history import HistoryEntry, TaskHistory

FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task's current entry without its note, and the stamp of the history that it was read from."""

    stamp: Stamp
    revision: str
    kind: ScaleKind
    num_bytes: int
    created: float
    base_digest: str
    prompt_format: str
    file_digest: str
    num_revisions: int
    quarantined: bool

    @classmethod
    def of(cls, history: TaskHistory, stamp: Stamp) -> TaskRecord:
        """Return the record of a history."""
        e = history.current
        return cls(
            stamp=stamp,
            revision=e.revision,
            kind=e.kind,
            num_bytes=e.num_bytes,
            created=e.created,
            base_digest=e.base_digest,
            prompt_format=e.prompt_format,
            file_digest=e.file_digest,
            num_revisions=len(history.entries),
            quarantined=history.quarantined,
        )

    @property
    def entry(self) -> HistoryEntry:
        """The current entry, without its note."""
        return HistoryEntry(
            self.revision,
            self.kind,
            self.num_bytes,
            self.created,
            self.base_digest,
            self.prompt_format,
            file_digest=self.file_digest,
        )

    def lease(self, task: str) -> Lease:
        """What a request gets of the task."""
        return Lease(task, self.revision, self.kind, self.prompt_format)

    def info(self, task: str) -> TaskInfo:
        """What is told of the task in a list: everything but the note."""
        return TaskInfo(
            task=task,
            revision=self.revision,
            kind=self.kind,
            num_bytes=self.num_bytes,
            created=self.created,
            base_digest=self.base_digest,
            prompt_format=self.prompt_format,
            num_revisions=self.num_revisions,
        )


class TaskIndex:
    """Records by name, and the names in order. One writer at a time; readers need no lock."""

    def __init__(self) -> None:
        self._records: dict[str, TaskRecord] = {}
        self._names: list[str] = []

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, task: str) -> bool:
        return task in self._records

    def get(self, task: str) -> TaskRecord | None:
        """The task's record."""
        return self._records.get(task)

    def set(self, task: str, record: TaskRecord | None) -> None:
        """Put (None: remove) a record."""
        if record is not None:
            if task not in self._records:
                insort(self._names, task)
            self._records[task] = record
        elif self._records.pop(task, None) is not None:
            del self._names[bisect_left(self._names, task)]

    def fill(self, records: Mapping[str, TaskRecord]) -> None:
        """Take all records at once."""
        self._records = dict(records)
        self._names = sorted(records)

    def names(self, after: str = "", limit: int | None = None) -> list[str]:
        """Names greater than `after`, in order, at most `limit`."""
        start = bisect_right(self._names, after)
        return self._names[start:] if limit is None else self._names[start : start + limit]

    def save(self, path: Path, *, unfinished: Path) -> None:
        """Write the cache. Raises `OSError`."""
        rows = {task: _row(record) for task, record in self._records.copy().items()}
        body = json.dumps({"format_version": FORMAT_VERSION, "tasks": rows}, separators=(",", ":")).encode()
        write_atomic(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body, temporary=unfinished)


def read_index(path: Path) -> dict[str, TaskRecord]:
    """Return the records in the cache; none when it is missing, damaged or of another version."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return {}
        content = json.loads(body)
    except (OSError, ValueError):
        return {}
    if content["format_version"] != FORMAT_VERSION:
        return {}
    shared: dict[
        Any, Any
    ] = {}  # kinds, base digests and prompt formats are few, and need not be held per task
    return {task: _record(row, shared) for task, row in content["tasks"].items()}


def _row(r: TaskRecord) -> list[Any]:
    return [
        *r.stamp, r.revision, r.kind, r.num_bytes, r.created, r.base_digest, r.prompt_format, r.file_digest,
        r.num_revisions, r.quarantined,
    ]  # fmt: skip


def _record(row: list[Any], shared: dict[Any, Any]) -> TaskRecord:
    mtime, size, inode, revision, kind, num_bytes, created, base, prompt_format, file_digest, count, aside = (
        row
    )
    kind, base, prompt_format = (shared.setdefault(text, text) for text in (kind, base, prompt_format))
    stamp = (mtime, size, inode)
    return TaskRecord(
        stamp, revision, kind, num_bytes, created, base, prompt_format, file_digest, count, aside
    )
