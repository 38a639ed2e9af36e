"""A task's name with a revision, as "sql@1a2b": of the kept revisions the one whose digest begins so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from peqa_runtime.core import Blend
from peqa_runtime.errors import InvalidRequest, NoSuchRevision

SHORTEST_REVISION = 4
"""Digits that name a revision at least."""

_PREFIX = re.compile(rf"[0-9a-f]{{{SHORTEST_REVISION},64}}")


def split_revision(name: str) -> tuple[str, str | None]:
    """Return the task's name and the revision's beginning; None when `name` names no revision.

    Raises `InvalidRequest` for what cannot begin a revision.
    """
    task, at, prefix = name.partition("@")
    if not at:
        return name, None
    if not _PREFIX.fullmatch(prefix):
        raise InvalidRequest(
            f"{name[:80]!r}: after '@' stands a revision, by at least {SHORTEST_REVISION} of its hexadecimal "
            "digits (0-9, a-f)",
            param="task",
        )
    return task, prefix


def task_of(name: str) -> str:
    """Return the task's name, whatever follows it."""
    return name.partition("@")[0]


def names_revision(choice: str | Blend | Mapping[str, float]) -> bool:
    """Whether a task, or a member of a blend, is asked for in a revision of its own."""
    if isinstance(choice, str):
        return "@" in choice
    return any("@" in name for name, _ in (choice.shares if isinstance(choice, Blend) else choice.items()))


def matching(task: str, revisions: Iterable[str], prefix: str) -> str:
    """Return the one of `revisions` that begins with `prefix`.

    Raises `NoSuchRevision` when none does, `InvalidRequest` when several do; both list them.
    """
    kept = list(dict.fromkeys(revisions))
    found = [revision for revision in kept if revision.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    if not found:
        listed = ", ".join(revision[:12] for revision in kept)
        raise NoSuchRevision(
            f"task {task!r} keeps no revision that begins with {prefix[:64]!r}; kept: {listed}"
        )
    listed = ", ".join(revision[:16] for revision in found)
    raise InvalidRequest(
        f"{len(found)} revisions of task {task!r} begin with {prefix!r}: {listed}; give more digits",
        param="task",
    )
