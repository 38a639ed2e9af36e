"""Shapes of what the task and operating routes answer, for /openapi.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict

TaskName = Annotated[
    str,
    Path(
        description="Name of a task.",
        json_schema_extra={"pattern": "^[a-z0-9][a-z0-9._-]{0,63}$"},  # for readers: the route checks it
    ),
]


class Answer(BaseModel):
    """These fields and no others."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    """`code` is for programs, `message` for people; `param` names the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(Answer):
    """Every refusal, whatever its status."""

    error: ErrorDetail


class TaskRow(Answer):
    """A task in a list."""

    object: Literal["task"]
    task: str
    revision: str
    kind: Literal["channel", "channel+input", "group"]
    bytes: int
    created: float
    base_digest: str
    prompt_format: str
    num_revisions: int
    status: Literal["ready", "quarantined"]
    status_reason: str | None


class TaskAnswer(TaskRow):
    """A task; `note` is what its set says about how it was made."""

    note: dict[str, Any]


class UnusableSet(Answer):
    """A set in the store that this base cannot use."""

    task: str
    reason: str


class TaskListAnswer(Answer):
    """Tasks in the order of their names."""

    object: Literal["list"]
    data: list[TaskRow]
    has_more: bool
    unusable: list[UnusableSet]


class RevisionRow(Answer):
    """A kept revision of a task."""

    revision: str
    kind: Literal["channel", "channel+input", "group"]
    bytes: int
    created: float
    current: bool


class RevisionListAnswer(Answer):
    """The kept revisions of a task, newest first."""

    object: Literal["list"]
    task: str
    data: list[RevisionRow]


class DeletedAnswer(Answer):
    """The task is gone."""

    task: str
    deleted: Literal[True]


class StatusAnswer(Answer):
    """Where the server stands."""

    status: Literal["starting", "ready", "draining", "failed"]
