"""Whose uploads take how much of the disk: a small file per tenant beside the store, which a restart finds again.

An upload is written down before the store gets it and completed afterwards, so that a crash in between loses nothing:
what it left is matched with the store's own history later. The history also says what is gone (deleted, or pushed out
by newer revisions); it is asked when a tenant would otherwise be refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import filelock

from peqa_runtime.core import RevisionInfo
from peqa_runtime.errors import StoreError, UnknownTask
from peqa_runtime.scales.atomic_file import write_atomic

Kept = Callable[[str], Sequence[RevisionInfo]]
"""The kept revisions of a task; raises `UnknownTask`."""

LOCK_SECONDS = 10.0
ABANDONED_SECONDS = (
    3600.0  # longer than any upload takes: an entry still open then belongs to a process that died
)


@dataclass(frozen=True)
class Entry:
    """One uploaded revision of a task; `revision` "" while it is on its way."""

    task: str
    revision: str
    bytes: int
    begun: float


class QuotaExceeded(Exception):
    """The upload does not fit the tenant's share of the disk."""

    def __init__(self, used: int, size: int, quota: int) -> None:
        super().__init__(
            f"this upload of {size} bytes does not fit: {used} of the {quota} bytes that this key's tenant may keep on "
            "the server's disk are used; delete tasks that are no longer needed"
        )


class UploadLedger:
    """The records of all tenants in one folder. Thread-safe, and safe between processes. Raises `StoreError`."""

    def __init__(self, folder: Path, *, now: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._now = now

    def used(self, tenant: str) -> int:
        """Bytes that the tenant's uploads take, those on their way included; never less than they do."""
        return _total(self._read(tenant))

    def begin(self, tenant: str, task: str, size: int, quota: int | None, kept: Kept) -> Entry:
        """Write down an upload that is about to be made; pair with `complete` or `drop`. Raises `QuotaExceeded`."""
        entry = Entry(task, "", size, self._now())
        with self._changing(tenant) as entries:
            if quota is not None and _total(entries) + size > quota:
                entries[:] = self._recounted(entries, kept)
                if _total(entries) + size > quota:
                    raise QuotaExceeded(_total(entries), size, quota)
            entries.append(entry)
        return entry

    def check(self, tenant: str, size: int, quota: int | None, kept: Kept) -> None:
        """Refuse an upload whose size is announced, before its body is read. Raises `QuotaExceeded`."""
        if quota is not None and self.used(tenant) + size > quota:
            with self._changing(tenant) as entries:
                entries[:] = self._recounted(entries, kept)
            if _total(entries) + size > quota:
                raise QuotaExceeded(_total(entries), size, quota)

    def complete(self, tenant: str, entry: Entry, revision: str) -> None:
        """The upload is in the store as `revision`; what the tenant uploaded before to the same end counts once."""
        with self._changing(tenant) as entries:
            _remove(entries, entry)
            if not any(e.task == entry.task and e.revision == revision for e in entries):
                entries.append(replace(entry, revision=revision))

    def drop(self, tenant: str, entry: Entry) -> None:
        """The upload was refused."""
        with self._changing(tenant) as entries:
            _remove(entries, entry)

    def _recounted(self, entries: list[Entry], kept: Kept) -> list[Entry]:
        """The entries that the store still has, and those on their way; abandoned ones are looked for by size."""
        found: list[Entry] = []
        for task in sorted({e.task for e in entries}):
            try:
                rows = {row.revision: row.num_bytes for row in kept(task)}
            except UnknownTask:
                rows = {}
            own = [e for e in entries if e.task == task]
            found += [e for e in own if e.revision in rows]
            known = {e.revision for e in own}
            for entry in own:
                if entry.revision:
                    continue
                if self._now() - entry.begun < ABANDONED_SECONDS:
                    found.append(entry)
                    continue
                revision = next(
                    (r for r, size in rows.items() if size == entry.bytes and r not in known), None
                )
                if revision is not None:
                    known.add(revision)
                    found.append(replace(entry, revision=revision))
        return found

    def _path(self, tenant: str) -> Path:
        return self._folder / f"{hashlib.sha256(tenant.encode()).hexdigest()[:32]}.json"

    def _read(self, tenant: str) -> list[Entry]:
        path = self._path(tenant)
        try:
            rows = json.loads(path.read_bytes())["uploads"]
            return [
                Entry(str(r["task"]), str(r["revision"]), int(r["bytes"]), float(r["begun"])) for r in rows
            ]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path}, which says what a tenant has uploaded, cannot be read: {error}"
            ) from None

    @contextmanager
    def _changing(self, tenant: str) -> Iterator[list[Entry]]:
        """The tenant's entries, written back when the block ends, also when it raises `QuotaExceeded`."""
        path = self._path(tenant)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS):
                entries = self._read(tenant)
                before = list(entries)
                try:
                    yield entries
                finally:
                    if entries != before:
                        rows = [asdict(e) for e in entries]
                        document = {"format": "peqa-uploads", "tenant": tenant, "uploads": rows}
                        write_atomic(path, json.dumps(document, indent=0).encode())
        except (OSError, filelock.Timeout) as error:
            raise StoreError(f"what a tenant has uploaded cannot be written to {path}: {error}") from None


def _total(entries: Sequence[Entry]) -> int:
    return sum(e.bytes for e in entries)


def _remove(entries: list[Entry], entry: Entry) -> None:
    if entry in entries:
        entries.remove(entry)
