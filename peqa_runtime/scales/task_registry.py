"""Who may use which revision, and which revision has which device row. Pure policy: no torch, no I/O.

One registry is the single source of truth. Three rules, each under one lock:

- `acquire` looks a task up *and* pins its revision in one step, so that no upload or delete comes between.
- A revision keeps its row while anybody holds a lease on it; rows of leased revisions are never given away (except
  by `place(..., in_use=...)`, whose caller says which leased revisions it is not about to read).
- Deleting a task (or replacing its revision) is two-phase: the name changes at once, the old revision's row is
  free when its last lease is released.

A task whose current revision made NaN or infinity `STRIKES` times is in quarantine, and so is every other that has this
revision: nobody acquires it any more, those who hold it go on. Making it, or another one, the task's current revision
(upload, rollback) ends that, for this task. Blends and revisions that are not current fare likewise, each by itself,
until one of their tasks gets a current revision.

A revision is the digest of its content, so a name that is used again can never meet another version's row, and
two tasks with equal content share one.
"""

from __future__ import annotations

import heapq
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

from peqa_runtime.core import BASE_REVISION, BASE_TASK, Lease, Placement, ScaleKind
from peqa_runtime.errors import TaskQuarantined, UnknownTask
from peqa_runtime.scales.strike_book import StrikeBook, tasks_of

STRIKES = 3
"""Requests that must end with NaN or infinity before their revision is set aside: one may be the machine's fault."""


@dataclass(frozen=True)
class RegistryCounts:
    """Sizes at one moment, for metrics. `rows` and `group_rows` do not count the base's row 0."""

    tasks: int
    leases: int
    rows: int
    rows_used: int
    group_rows: int
    group_rows_used: int


@dataclass(frozen=True)
class BorrowedRow:
    """A row to write to for a moment. `owner`: the revision whose row it is, to be put back; None: nobody's.

    `owner_group_row`: the owner's, which is not always the borrowed one.
    """

    row: int
    group_row: int = 0
    owner: str | None = None
    owner_group_row: int = 0


class TaskRegistry:
    """Names, leases and rows. `rows` and `group_rows` count row 0, which is the base and never given away."""

    def __init__(self, *, rows: int, group_rows: int = 1) -> None:
        assert rows >= 1
        assert group_rows >= 1
        self._lock = threading.Lock()
        self._rows = rows
        self._group_rows = group_rows
        self._current: dict[str, Lease] = {}  # what acquire gives, prepared
        self._names: Counter[str] = Counter()  # revision -> tasks that have it as their current one
        self._holders: Counter[str] = Counter()  # revision -> leases
        self._blends: dict[
            str, Lease
        ] = {}  # by revision, those without a name that are leased or resident: `hold`
        self._resident: OrderedDict[str, tuple[int, int]] = OrderedDict()  # least recently used first
        self._unwritten: set[str] = set()  # resident, but the content of the row is not known to be right
        self._strikes: Counter[str] = Counter()  # revision -> requests that ended with NaN or infinity
        self._aside: set[str] = set()  # tasks in quarantine
        self._unnamed = StrikeBook(STRIKES)
        self._free = list(range(rows - 1, 0, -1))
        self._free_group = list(range(group_rows - 1, 0, -1))

    def set_current(
        self, task: str, revision: str, kind: ScaleKind, prompt_format: str = "", *, quarantined: bool = False
    ) -> None:
        """Make `revision` what `acquire(task)` gives from now on. Leases on the one before stay valid.

        `quarantined`: it is known to have made NaN or infinity.
        """
        assert task != BASE_TASK
        assert revision != BASE_REVISION
        with self._lock:
            before = self._current.get(task)
            self._current[task] = Lease(task, revision, kind, prompt_format)
            self._names[revision] += 1
            self._strikes.pop(revision, None)
            self._unnamed.forgive(task)
            if quarantined:
                self._aside.add(task)
            else:
                self._aside.discard(task)
            if before is not None:
                self._forget_name(before.revision)

    def strike(self, revision: str) -> list[str]:
        """Count a request on this leased revision that ended with NaN or infinity; return what this puts in
        quarantine: tasks, a blend's name, or a kept revision as "sql@1a2b"."""
        assert revision != BASE_REVISION
        with self._lock:
            return self._strike_current(revision) + self._strike_unnamed(revision)

    def _strike_current(self, revision: str) -> list[str]:
        if self._names.get(revision):  # else it is nobody's current one any more
            self._strikes[revision] += 1
        if self._strikes[revision] < STRIKES:
            return []
        del self._strikes[revision]
        tasks = [t for t, lease in self._current.items() if lease.revision == revision]
        new = sorted(set(tasks) - self._aside)
        self._aside.update(new)
        return new

    def _strike_unnamed(self, revision: str) -> list[str]:
        lease = self._blends.get(revision)
        if lease is None or not tasks_of(lease) <= self._current.keys():
            return []  # nobody can ask for it by a name
        if not self._unnamed.strike(lease):
            return []
        return [lease.task if lease.blend else f"{lease.task}@{revision[:12]}"]

    def quarantined(self) -> dict[str, str]:
        """Tasks in quarantine, each with the reason."""
        with self._lock:
            return {task: _why(self._current[task]) for task in sorted(self._aside)}

    def is_quarantined(self, task: str) -> bool:
        """True for a task in quarantine."""
        with self._lock:
            return task in self._aside

    def is_current(self, revision: str) -> bool:
        """True when a task has this revision as its current one."""
        with self._lock:
            return revision in self._names

    def delete(self, task: str) -> None:
        """Remove the name; who holds a lease keeps it. Raises `UnknownTask`."""
        with self._lock:
            if task not in self._current:
                raise self._unknown(task)
            self._aside.discard(task)
            self._unnamed.forgive(task)
            self._forget_name(self._current.pop(task).revision)

    def acquire(self, task: str) -> Lease:
        """Pin and return the task's current revision (the base: `BASE_REVISION`).

        Raises `UnknownTask`, `TaskQuarantined`.
        """
        with self._lock:
            if task == BASE_TASK:
                lease = Lease(task, BASE_REVISION)
            elif task in self._current:
                lease = self._current[task]
                if task in self._aside:
                    raise TaskQuarantined(_why(lease))
            else:
                raise self._unknown(task)
            self._holders[lease.revision] += 1
            return lease

    def hold(self, lease: Lease) -> Lease:
        """Pin a revision that no task has as its current one: a blend's, a kept one. To be released as any other.

        When nobody leases it any more it keeps its row, as a task's revision does, until the row is wanted. Raises
        `TaskQuarantined`.
        """
        with self._lock:
            if self._unnamed.is_aside(lease.revision):
                raise TaskQuarantined(_why_unnamed(lease))
            self._holders[lease.revision] += 1
            self._blends[lease.revision] = lease
            return lease

    def retain(self, lease: Lease) -> Lease:
        """Count one more holder of a revision that somebody holds already; to be released on its own."""
        with self._lock:
            assert self._holders[lease.revision] > 0, f"retained, but held by nobody: {lease}"
            self._holders[lease.revision] += 1
            return lease

    def release(self, lease: Lease) -> None:
        """Give a lease back, exactly once. The row stays warm while a task still has this revision."""
        with self._lock:
            assert self._holders[lease.revision] > 0, f"released more often than acquired: {lease}"
            self._holders[lease.revision] -= 1
            if not self._holders[lease.revision]:
                del self._holders[lease.revision]
                self._free_if_stale(lease.revision)

    def place(
        self, revision: str, kind: ScaleKind, *, in_use: Collection[str] | None = None
    ) -> Placement | None:
        """Return the row of a leased revision, giving it a free or the least recently used unpinned one if need be.

        A lease pins a row. With `in_use` (the revisions that the next forward may read) it does so only weakly: when
        nothing else is left, the row of a leased revision that is not among them is taken, and that revision is
        placed and written anew when it is its turn. So requests that only wait do not keep others from running.

        None: every row that could serve is pinned; try again when a lease was released. `write` is true exactly
        once per placement: the caller copies the set into the row before the next forward, whatever else happens
        to the sequence it asked for (or calls `mark_unwritten`). A "group" set gets a row of both banks.
        """
        if revision == BASE_REVISION:
            return Placement(row=0)
        with self._lock:
            assert self._holders[revision] > 0, "place() needs a lease: acquire the task first"
            if revision in self._resident:
                self._resident.move_to_end(revision)
                row, group_row = self._resident[revision]
                write = revision in self._unwritten
                self._unwritten.discard(revision)
                return Placement(row, group_row, write)
            if kind == "group" and not self._free_group and not self._evict(True, in_use):
                return None
            if not self._free and not self._evict(False, in_use):
                return None
            group_row = self._free_group.pop() if kind == "group" else 0
            row = self._free.pop()
            self._resident[revision] = (row, group_row)
            return Placement(row, group_row, write=True)

    def mark_unwritten(self, revision: str | None = None) -> None:
        """Have the next `place` of this revision (None: of every one) ask for the write again, into the same row."""
        with self._lock:
            self._unwritten.update(r for r in self._resident if revision in (None, r))

    def borrow(self, kind: ScaleKind) -> BorrowedRow:
        """A row for a set of a kind that can be placed at all: a free one, or the least recently used of those that
        nobody leases, or of all. The caller's for a moment, in the thread that calls `place`."""
        with self._lock:
            assert self._rows > 1
            assert kind != "group" or self._group_rows > 1
            group_row = self._free_group[-1] if kind == "group" and self._free_group else 0
            wants_group_row = kind == "group" and not group_row
            if self._free and not wants_group_row:
                return BorrowedRow(self._free[-1], group_row)
            candidates = [r for r, (_, own) in self._resident.items() if own or not wants_group_row]
            owner = next((r for r in candidates if not self._holders.get(r)), candidates[0])
            row, owner_group_row = self._resident[owner]
            return BorrowedRow(row, owner_group_row if wants_group_row else group_row, owner, owner_group_row)

    def can_ever_place(self, kind: ScaleKind) -> bool:
        """True when a set of this kind gets a row once nobody else holds one."""
        return self._rows > 1 and (kind != "group" or self._group_rows > 1)

    def current(self, task: str) -> str | None:
        """The task's current revision; None when there is no such task."""
        with self._lock:
            lease = self._current.get(task)
            return None if lease is None else lease.revision

    def peek(self, task: str) -> Lease | None:
        """What `acquire` of the task would give, not pinned; None when there is no such task."""
        with self._lock:
            return self._current.get(task)

    def tasks(self) -> list[str]:
        """All names, sorted."""
        with self._lock:
            return sorted(self._current)

    def holders(self, revision: str) -> int:
        """Leases on this revision."""
        with self._lock:
            return self._holders.get(revision, 0)

    def resident(self) -> dict[str, Placement]:
        """Revisions that have a row, least recently used first."""
        with self._lock:
            return {revision: Placement(*rows) for revision, rows in self._resident.items()}

    def counts(self) -> RegistryCounts:
        """Numbers for metrics, all of one moment."""
        with self._lock:
            return RegistryCounts(
                tasks=len(self._current),
                leases=sum(self._holders.values()),
                rows=self._rows - 1,
                rows_used=len(self._resident),
                group_rows=self._group_rows - 1,
                group_rows_used=self._group_rows - 1 - len(self._free_group),
            )

    def _evict(self, with_group_row: bool, in_use: Collection[str] | None) -> bool:
        """Free the least recently used row that may be taken: of revisions nobody leases, then of idle ones."""
        idle = None
        for revision, (_, group_row) in self._resident.items():
            if with_group_row and not group_row:
                continue
            if not self._holders.get(revision):
                self._free_rows(revision)
                return True
            if idle is None and in_use is not None and revision not in in_use:
                idle = revision
        if idle is not None:
            self._free_rows(idle)
        return idle is not None

    def _forget_name(self, revision: str) -> None:
        self._names[revision] -= 1
        if not self._names[revision]:
            del self._names[revision]
            self._strikes.pop(revision, None)
            self._free_if_stale(revision)

    def _free_if_stale(self, revision: str) -> None:
        """Second phase of delete and replace: nobody can ask for this revision any more, nobody runs on it."""
        if self._names.get(revision) or self._holders.get(revision):
            return
        if revision not in self._resident:
            self._blends.pop(revision, None)
        elif revision not in self._blends:
            self._free_rows(revision)

    def _free_rows(self, revision: str) -> None:
        row, group_row = self._resident.pop(revision)
        self._unwritten.discard(revision)
        self._free.append(row)
        if group_row:
            self._free_group.append(group_row)
        if not self._holders.get(revision):
            self._blends.pop(revision, None)

    def _unknown(self, task: str) -> UnknownTask:
        known = [BASE_TASK, *heapq.nsmallest(5, self._current)]
        more = len(self._current) + 1 - len(known)
        listed = ", ".join(known) + (f" and {more} more" if more else "")
        return UnknownTask(f"there is no task {str(task)[:80]!r}; known: {listed}")


def _why(lease: Lease) -> str:
    return (
        f"task {lease.task!r} is in quarantine: {STRIKES} requests on its revision {lease.revision[:12]} ended with "
        "NaN or infinity. Roll the task back or upload a sound scale set; uploading the same one again also ends this"
    )


def _why_unnamed(lease: Lease) -> str:
    if lease.blend is not None:
        what, instead = (
            f"the blend {lease.task}",
            "Blend with other weights; an upload or rollback of one of its tasks",
        )
    else:
        what = f"revision {lease.revision[:12]} of task {lease.task!r}"
        instead = "Ask for another revision; an upload or rollback of the task"
    return (
        f"{what} is in quarantine: {STRIKES} requests on it ended with NaN or infinity. {instead} ends this"
    )
