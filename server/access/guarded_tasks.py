"""The tasks as one caller sees them: what its key does not name does not exist, and changes are checked and recorded.

The check stands where a task is used, whatever field or spelling of a request led there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from peqa_runtime.core import BASE_TASK, NO_TASK, Blend, Lease, RevisionInfo, TaskInfo
from peqa_runtime.errors import InvalidScaleSet, RevisionConflict, TaskUnusable, UnknownTask
from peqa_runtime.scales.set_file import MAX_HEADER_BYTES, content_digest, header_end, parse_header
from peqa_server.access.caller import Caller, absent, names_of
from peqa_server.access.upload_ledger import QuotaExceeded, UploadLedger
from peqa_server.http.errors import ApiError

if TYPE_CHECKING:
    from peqa_server.services import TaskService

_PAGE = 500  # names looked at in one go, where few of them can be seen

Result = TypeVar("Result")


class GuardedTasks:
    """`TaskService` for one caller with a key."""

    def __init__(self, tasks: TaskService, caller: Caller, ledger: UploadLedger) -> None:
        self._tasks = tasks
        self._caller = caller
        self._ledger = ledger

    def acquire_soon(self, choice: str | Blend) -> Future[Lease]:
        """As the service does, where every task of the choice may be used. (The base alone needs no lease.)"""
        names = [name for name in names_of(choice) if name != BASE_TASK]
        for name in names:
            self._check_seen(name)
        try:
            coming = self._tasks.acquire_soon(choice)
        except TaskUnusable:
            raise
        except UnknownTask:
            raise self._first_absent(names) from None
        return coming if isinstance(choice, str) else self._told(coming, names)

    def has(self, task: str) -> bool:
        """Whether there is such a task that the caller may use."""
        return self._caller.may_use(task) and self._tasks.has(task)

    def release(self, lease: Lease) -> None:
        """Give a lease back."""
        self._tasks.release(lease)

    def upload(self, task: str, data: bytes | Path, if_match: str | None = None) -> TaskInfo:
        """Upload within the tenant's share of the disk, and record whose it is.

        What the store keeps already takes no more of it, and is taken however full the share is.
        """
        self._caller.check_change(task)
        tenant = self._caller.tenant
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        try:
            entry = self._ledger.begin(tenant, task, size, self._caller.disk_bytes, self._tasks.revisions)
        except QuotaExceeded as error:
            kept = self._kept(task)
            check_match(task, kept, if_match)
            if not kept or revision_of(data) not in {row.revision for row in kept}:
                raise over_quota(error) from None
            entry = self._ledger.begin(tenant, task, size, None, self._tasks.revisions)
        try:
            info = self._tasks.upload(task, data, if_match)
        except BaseException:
            self._ledger.drop(tenant, entry)
            raise
        self._ledger.complete(tenant, entry, info.revision)
        return info

    def check_size(self, task: str, size: int, if_match: str | None) -> None:
        """Refuse an upload that cannot be taken, before its body is read: 403, or 413 for the disk.

        What does not fit is let through where it may be a kept revision once more: files of one revision differ by
        their headers alone. `RevisionConflict` where `if_match` fails.
        """
        self._caller.check_change(task)
        try:
            self._ledger.check(self._caller.tenant, size, self._caller.disk_bytes, self._tasks.revisions)
        except QuotaExceeded as error:
            kept = self._kept(task)
            check_match(task, kept, if_match)
            if all(abs(size - row.num_bytes) > MAX_HEADER_BYTES for row in kept):
                raise over_quota(error) from None

    def rollback(self, task: str, revision: str | None = None, if_match: str | None = None) -> TaskInfo:
        """Roll back, where the caller may change the task."""
        self._caller.check_change(task)
        return self._named(task, lambda: self._tasks.rollback(task, revision, if_match))

    def delete(self, task: str, if_match: str | None = None) -> None:
        """Delete, where the caller may change the task."""
        self._caller.check_change(task)
        self._named(task, lambda: self._tasks.delete(task, if_match))

    def info(self, task: str) -> TaskInfo:
        """What is known of a task that the caller may use."""
        return self._seen(task, lambda: self._tasks.info(task))

    def revisions(self, task: str) -> Sequence[RevisionInfo]:
        """The revisions of a task that the caller may use."""
        return self._seen(task, lambda: self._tasks.revisions(task))

    def content(self, task: str, revision: str | None = None) -> bytes:
        """The file of a task that the caller may use."""
        return self._seen(task, lambda: self._tasks.content(task, revision))

    def page(self, after: str = "", limit: int | None = None) -> Sequence[TaskInfo]:
        """The tasks that the caller may use: those after `after`, at most `limit`."""
        found: list[TaskInfo] = []
        while limit is None or len(found) < limit:
            size = None if limit is None else max(limit, _PAGE)
            rows = self._tasks.page(after, size)
            found += [row for row in rows if self._caller.may_use(row.task)]
            if size is None or len(rows) < size:
                break
            after = rows[-1].task
        return found[:limit]

    def unusable(self) -> Mapping[str, str]:
        """Of the tasks that cannot be used, those that the caller may know of."""
        return self._known(self._tasks.unusable())

    def quarantined(self) -> Mapping[str, str]:
        """Of the tasks set aside, those that the caller may know of."""
        return self._known(self._tasks.quarantined())

    def close(self) -> None:
        """Nothing: the service is the server's to close."""

    def _known(self, reasons: Mapping[str, str]) -> Mapping[str, str]:
        return {task: reason for task, reason in reasons.items() if self._caller.may_use(task)}

    def _kept(self, task: str) -> Sequence[RevisionInfo]:
        """The task's kept revisions; none where there is no such task."""
        try:
            return self._tasks.revisions(task)
        except UnknownTask:
            return ()

    def _check_seen(self, task: str) -> None:
        if not self._caller.may_use(task):
            raise absent(task)

    def _seen(self, task: str, call: Callable[[], Result]) -> Result:
        self._check_seen(task)
        return self._named(task, call)

    def _named(self, task: str, call: Callable[[], Result]) -> Result:
        """The call's result; a task that is not there is not told by naming those that are."""
        try:
            return call()
        except TaskUnusable:
            raise
        except UnknownTask:
            raise absent(task) from None

    def _told(self, coming: Future[Lease], names: Sequence[str]) -> Future[Lease]:
        """The blend's lease; that a member went away while it was read is told as above."""
        told: Future[Lease] = Future()

        def arrived(done: Future[Lease]) -> None:
            error = done.exception()
            if not told.set_running_or_notify_cancel():
                if error is None:
                    self._tasks.release(done.result())
            elif error is None:
                told.set_result(done.result())
            elif isinstance(error, UnknownTask) and not isinstance(error, TaskUnusable):
                told.set_exception(self._first_absent(names))
            else:
                told.set_exception(error)

        coming.add_done_callback(arrived)
        return told

    def _first_absent(self, names: Sequence[str]) -> UnknownTask:
        """Of names that are not all there, the first that is not."""
        return absent(next((name for name in names[:-1] if not self._tasks.has(name)), names[-1]))


def check_match(task: str, kept: Sequence[RevisionInfo], if_match: str | None) -> None:
    """Raise `RevisionConflict` unless the current one of the kept revisions is as an upload expects it."""
    current = next((row.revision for row in kept if row.current), None)
    if if_match == NO_TASK and kept:
        raise RevisionConflict(f"task {task!r} exists already; to replace it, name its revision in If-Match")
    if if_match not in (None, NO_TASK, current) and not (if_match == "*" and kept):
        found = f"is at revision {current}" if current else "does not exist"
        raise RevisionConflict(
            f"task {task!r} {found}, not at {if_match}: read it again, then repeat the change"
        )


def revision_of(data: bytes | Path) -> str | None:
    """The revision that a scale set file would be; None for what is no such file, which is looked into no further."""
    content = data if isinstance(data, bytes) else data.read_bytes()
    try:
        end = header_end(content[:8], len(content), MAX_HEADER_BYTES)
        return content_digest(parse_header(content[:end], len(content)), content)
    except InvalidScaleSet:
        return None


def over_quota(error: QuotaExceeded) -> ApiError:
    """413 with the bytes used and allowed."""
    return ApiError(413, str(error), code="disk_quota_exceeded")
