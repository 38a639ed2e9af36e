"""Which task a request means: `task`, `adapter_id`, `model="task"`, `model="base:task"` or the base's id."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from peqa_runtime.core import BASE_REVISION, BASE_TASK, Lease, check_task_name
from peqa_runtime.errors import InvalidTaskName, UnknownTask
from peqa_server.errors import ApiError
from peqa_server.services import Gate, ServedModel, Services, TaskService


def chosen_task(
    model: ServedModel, *, model_name: str | None, names: Iterable[tuple[str, str | None]]
) -> str:
    """The task that the fields agree on. Contradiction: 400; a name that cannot exist: 404.

    `names` are (field, value) of the fields that name a task directly. The base's own id as `model` says nothing
    about the task, because existing clients must always send it.
    """
    found: dict[str, str] = {field: value for field, value in names if value is not None}
    if model_name is not None and model_name != model.model_id:
        found["model"] = _task_of_model(model, model_name)
    if len(set(found.values())) > 1:
        said = ", ".join(f"{field}={value!r}" for field, value in found.items())
        raise ApiError(
            400, f"the fields name different tasks: {said}; send one, or the same in all", code="task_conflict",
            param=next(iter(found)),
        )  # fmt: skip
    for field, task in found.items():
        if task != BASE_TASK:
            try:
                check_task_name(task)
            except InvalidTaskName:
                raise unknown(field, task) from None
        return task
    return BASE_TASK


def _task_of_model(model: ServedModel, name: str) -> str:
    for base in (model.model_id, BASE_TASK):
        if name.startswith(base + ":"):
            return name[len(base) + 1 :]
    return name


def unknown(field: str, name: str) -> ApiError:
    """404 for a task or model that is not served."""
    if field == "model":
        message = f"no model or task {name[:80]!r} is served here; GET /v1/models lists them"
        return ApiError(404, message, code="model_not_found", param="model")
    message = f"no task {name[:80]!r} is served here; GET /v1/tasks lists them"
    return ApiError(404, message, code="task_not_found", param=field)


async def acquire(tasks: TaskService, task: str, field: str) -> Lease:
    """Pin the task's current revision; in a thread where its set must be read from disk first."""
    if task == BASE_TASK:
        return Lease(BASE_TASK, BASE_REVISION)
    try:
        if tasks.in_memory(task):
            return tasks.acquire(task)
        return await asyncio.to_thread(tasks.acquire, task)
    except UnknownTask:
        raise unknown(field, task) from None


class Admission:
    """One HTTP request's place: counted as running, with its revision pinned until `close`."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.services: Services = gate.enter()
        self._lease: Lease | None = None
        self._open = True

    async def pin(self, task: str, field: str) -> Lease:
        """Acquire the task's current revision for the whole request."""
        self._lease = await acquire(self.services.tasks, task, field)
        return self._lease

    @property
    def lease(self) -> Lease:
        """The pinned revision; `pin` comes first."""
        assert self._lease is not None
        return self._lease

    def close(self) -> None:
        """Release everything; safe to call twice."""
        if not self._open:
            return
        self._open = False
        if self._lease is not None and self._lease.task != BASE_TASK:
            self.services.tasks.release(self._lease)
        self.gate.leave()
