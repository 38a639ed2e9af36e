"""Blends and kept revisions that make NaN or infinity: counted as a task's current revision is, and set aside likewise.

Clients make such revisions up, so only the latest to fail are remembered, in this process alone.
"""

from __future__ import annotations

from collections import OrderedDict

from peqa_runtime.core import BASE_TASK, Lease

REMEMBERED = 1024
"""Revisions; another one takes the place of the one whose last failure is longest ago."""


class StrikeBook:
    """Failures by revision. Its owner has a lock."""

    def __init__(self, strikes: int) -> None:
        """`strikes`: after how many failures a revision is set aside."""
        self._limit = strikes
        # By revision: how many, and the tasks concerned.
        self._failures: OrderedDict[str, tuple[int, frozenset[str]]] = OrderedDict()

    def strike(self, lease: Lease) -> bool:
        """Count a failure; True when it is the one that sets the revision aside."""
        count = self._failures.pop(lease.revision, (0, frozenset()))[0] + 1
        self._failures[lease.revision] = count, tasks_of(lease)
        if len(self._failures) > REMEMBERED:
            self._failures.popitem(last=False)
        return count == self._limit

    def is_aside(self, revision: str) -> bool:
        """Whether nobody may have it any more."""
        return self._failures.get(revision, (0, None))[0] >= self._limit

    def forgive(self, task: str) -> None:
        """The task has changed: begin anew with all that is made of it."""
        for revision in [r for r, (_, tasks) in self._failures.items() if task in tasks]:
            del self._failures[revision]


def tasks_of(lease: Lease) -> frozenset[str]:
    """Names of the tasks that a lease on a blend or a kept revision is made of, but for the base."""
    names = (
        [lease.task] if lease.blend is None else [name.partition("@")[0] for name, _ in lease.blend.shares]
    )
    return frozenset(names) - {BASE_TASK}
