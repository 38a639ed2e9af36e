"""Every named error of the runtime. Each message says what was wrong and what would be right.

PeqaError
├── InvalidRequest            a request's value or combination of values (HTTP 400); `param` names the field
│   └── PromptTooLong         prompt plus output do not fit the model's context
├── UnknownTask               no such task or model (404)
│   └── TaskUnusable          ... or it is there, but its scale set is damaged, of another base or finds no row (409)
├── TaskQuarantined           the task's revision was set aside because its answers were NaN or infinite (409)
├── InvalidTaskName           a name that cannot name a task (422)
├── InvalidScaleSet           a scale set file that does not fit (422)
│   └── WrongBase             ... because it was tuned on another base (409)
├── RevisionConflict          If-Match failed: the task has another current revision (412)
├── NoSuchRevision            rollback to something that is not kept (409)
├── Overloaded                too much waits already (429); `retry_after` in seconds
├── EngineDead                the engine stopped; nothing can be generated (503)
├── StoreError                the scale store cannot be read or written (507)
├── DiskFull                  no room for what a long run writes: bases, exports, tuning, answers
├── InvalidCheckpoint         a model file or base folder that cannot be used
├── UnsupportedModel          a model that this runtime would compute wrongly
├── InvalidData               a training or evaluation file that cannot be used
└── TrainingDiverged          the loss of a tuning run became NaN or infinite
"""

from __future__ import annotations


class PeqaError(Exception):
    """Root of all errors that are raised on purpose; `str(error)` is fit for a user."""


class InvalidRequest(PeqaError):
    """A request cannot be served as it stands; `param` names the field that is wrong."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(InvalidRequest):
    """The prompt, or prompt plus requested output, exceeds the model's context."""


class UnknownTask(PeqaError):
    """No task of this name is loaded."""


class TaskUnusable(UnknownTask):
    """The task is in the store but cannot be used; the message says why."""


class TaskQuarantined(PeqaError):
    """The task's revision, or the blend, has been set aside; the message says why and what makes it usable again."""


class InvalidTaskName(PeqaError):
    """The name cannot name a task."""


class InvalidScaleSet(PeqaError):
    """The file is not a scale set for this base."""


class WrongBase(InvalidScaleSet):
    """The scale set belongs to another base."""


class RevisionConflict(PeqaError):
    """The task's current revision is not the one that the client expected."""


class NoSuchRevision(PeqaError):
    """The task has no such (or no earlier) revision."""


class Overloaded(PeqaError):
    """Too many requests wait; try again after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDead(PeqaError):
    """The engine's thread has ended."""


class StoreError(PeqaError):
    """The scale store cannot be read or written."""


class DiskFull(PeqaError):
    """There is no room for the files of a long run; what it has done so far is kept."""


class InvalidCheckpoint(PeqaError):
    """A model file or folder is damaged, incomplete or of a kind that cannot be used."""


class UnsupportedModel(PeqaError):
    """The model would not be computed correctly here."""


class InvalidData(PeqaError):
    """A data file for training or evaluation cannot be used."""


class TrainingDiverged(PeqaError):
    """The loss or its gradient is no number any more; the run has ended before the scales were touched."""
