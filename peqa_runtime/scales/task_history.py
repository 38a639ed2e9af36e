"""A task's history as a value: entries in the order of upload, and which of them is the current one.

    entries   A   B   C   D          newest last; the oldest fall off beyond `keep`
    position          ^              after one rollback from D

An upload is appended after the newest entry and becomes current; a rollback only moves the position.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from peqa_runtime.core import NO_TASK, SCALE_KINDS, RevisionInfo, ScaleKind, TaskInfo
from peqa_runtime.errors import NoSuchRevision, RevisionConflict
from peqa_runtime.scales.revision_name import matching

FORMAT_VERSION = 1
_REVISION = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HistoryEntry:
    """One upload of a task: which content, and what came with it. `created` is Unix time in seconds.

    `file_digest`: SHA-256 of the file when its tensors lie in the order of their names, so that a load need check
    nothing else; "" when unknown.
    """

    revision: str
    kind: ScaleKind
    num_bytes: int
    created: float
    base_digest: str
    prompt_format: str = ""
    note: Mapping[str, Any] = field(default_factory=dict)
    file_digest: str = ""


@dataclass(frozen=True)
class TaskHistory:
    """The entries of one task; `entries[position]` is current.

    `quarantined`: the current one made NaN or infinity, see `TaskRegistry`; an upload or a rollback ends that.
    """

    task: str
    entries: tuple[HistoryEntry, ...]
    position: int
    quarantined: bool = False

    @property
    def current(self) -> HistoryEntry:
        """The entry that requests get."""
        return self.entries[self.position]

    @property
    def revisions(self) -> set[str]:
        """Every revision that is kept."""
        return {entry.revision for entry in self.entries}

    def with_upload(self, entry: HistoryEntry, keep: int) -> TaskHistory:
        """Return the history after an upload, with the newest `keep` entries."""
        entries = (*self.entries, entry)[-keep:]
        return replace(self, entries=entries, position=len(entries) - 1, quarantined=False)

    def with_current(self, entry: HistoryEntry) -> TaskHistory:
        """Return the history with the current entry replaced."""
        entries = list(self.entries)
        entries[self.position] = entry
        return replace(self, entries=tuple(entries), quarantined=False)

    def rolled_back(self, revision: str | None = None) -> TaskHistory:
        """Return the history with an earlier entry current: the nearest of another revision, or the one named.

        Raises `NoSuchRevision`. A named revision may also be a later one (to undo a rollback); its newest entry counts.
        """
        if revision is None:
            position = self.position - 1
            while position >= 0 and self.entries[position].revision == self.current.revision:
                position -= 1
            if position < 0:
                raise NoSuchRevision(
                    f"task {self.task!r} has no revision before {self.current.revision[:12]}"
                )
            return replace(self, position=position, quarantined=False)
        for position in reversed(range(len(self.entries))):
            if self.entries[position].revision == revision:
                return replace(self, position=position, quarantined=False)
        kept = ", ".join(dict.fromkeys(entry.revision[:12] for entry in reversed(self.entries)))
        raise NoSuchRevision(f"task {self.task!r} has no revision {str(revision)[:80]!r}; kept: {kept}")

    def beginning_with(self, prefix: str) -> HistoryEntry:
        """Return the newest entry of the one revision that begins so. Raises `NoSuchRevision`, `InvalidRequest`."""
        newest_first = self.entries[::-1]
        revision = matching(self.task, [entry.revision for entry in newest_first], prefix)
        return next(entry for entry in newest_first if entry.revision == revision)

    def info(self) -> TaskInfo:
        """Return what is told of the current entry."""
        e = self.current
        return TaskInfo(
            task=self.task,
            revision=e.revision,
            kind=e.kind,
            num_bytes=e.num_bytes,
            created=e.created,
            base_digest=e.base_digest,
            prompt_format=e.prompt_format,
            note=e.note,
            num_revisions=len(self.entries),
        )

    def revision_infos(self) -> tuple[RevisionInfo, ...]:
        """Return all entries, newest first."""
        return tuple(
            RevisionInfo(e.revision, e.kind, e.num_bytes, e.created, current=i == self.position)
            for i, e in reversed(list(enumerate(self.entries)))
        )

    def to_json(self) -> bytes:
        """Return the file that keeps this history."""
        content = {
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "position": self.position,
            **({"quarantined": True} if self.quarantined else {}),
            "history": [{**asdict(replace(e, note={})), "note": dict(e.note)} for e in self.entries],
        }
        return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, task: str) -> TaskHistory:
        """Return the history in `data`, the file of `task`. Raises `ValueError` when it is damaged."""
        try:
            content = json.loads(data)
            if content["format_version"] != FORMAT_VERSION or content["task"] != task:
                raise ValueError("not the history of this task, or of another format version")
            entries = tuple(_entry(raw) for raw in content["history"])
            history = cls(task, entries, content["position"], bool(content.get("quarantined", False)))
            history.entries[history.position]
        except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise ValueError(f"damaged: {type(error).__name__} {error}") from None
        if history.position < 0:
            raise ValueError("damaged: the position is negative")
        return history


def after_upload(task: str, before: TaskHistory | None, entry: HistoryEntry, keep: int) -> TaskHistory:
    """Return the history after an upload, with the newest `keep` entries; `before` itself when nothing is new.

    What is current already makes no new entry: another prompt format or note replaces the entry's, and a quarantine
    ends.
    """
    if before is None:
        return TaskHistory(task, (entry,), 0)
    current = before.current
    if (current.revision, current.base_digest) != (entry.revision, entry.base_digest):
        return before.with_upload(entry, keep)
    if (current.prompt_format, current.note) != (entry.prompt_format, entry.note):
        return before.with_current(entry)
    return replace(before, quarantined=False) if before.quarantined else before


def check_match(task: str, history: TaskHistory | None, if_match: str | None) -> None:
    """Raise `RevisionConflict` unless the current revision is `if_match`.

    "*": any; `NO_TASK`: there must be none; None: nothing is expected.
    """
    if if_match is None or (history is not None and if_match in ("*", history.current.revision)):
        return
    if if_match == NO_TASK:
        if history is None:
            return
        raise RevisionConflict(
            f"task {task!r} exists already, at revision {history.current.revision}; to replace it, name that revision"
        )
    found = f"is at revision {history.current.revision}" if history else "does not exist"
    raise RevisionConflict(
        f"task {task!r} {found}, not at {if_match[:80]!r}: read it again, then repeat the change"
    )


def _entry(raw: dict[str, Any]) -> HistoryEntry:
    entry = HistoryEntry(**raw)
    if (
        not _REVISION.fullmatch(entry.revision) or entry.kind not in SCALE_KINDS
    ):  # a revision becomes a file name
        raise ValueError(f"damaged: entry {str(raw)[:80]}")
    texts = (entry.base_digest, entry.prompt_format, entry.file_digest)
    numbers = (entry.created, entry.num_bytes)
    if not (
        isinstance(entry.note, dict)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(number, int | float) for number in numbers)
    ):
        raise ValueError(f"damaged: entry {str(raw)[:80]}")
    return entry
