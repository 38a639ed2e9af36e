"""Which task a request means: `task` (a name or a blend), `adapter_id`, `model="task"`, `model="base:task"`.

A name may go on with a revision, "sql@1a2b": the kept one that begins so, whatever is current.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from concurrent.futures import Future

from peqa_runtime.core import BASE_REVISION, BASE_TASK, Blend, Lease, check_task_name
from peqa_runtime.errors import InvalidRequest, InvalidTaskName, NoSuchRevision, TaskUnusable, UnknownTask
from peqa_runtime.scales.revision_name import split_revision
from peqa_server.http.errors import ApiError
from peqa_server.services import Gate, Reservation, ServedModel, Services, TaskService


def chosen_task(
    model: ServedModel,
    *,
    model_name: str | None,
    names: Iterable[tuple[str, str | Mapping[str, float] | None]],
) -> str | Blend:
    """The task, or blend of tasks, that the fields agree on. Contradiction: 400; a name that cannot exist: 404.

    `names` are (field, value) of the fields that name a task directly. The base's own id as `model` says nothing
    about the task, because existing clients must always send it. Raises `InvalidRequest` for a blend's weights and for
    what cannot be a revision.
    """
    found = {field: value for field, value in names if value is not None}
    if model_name is not None and model_name != model.model_id:
        found["model"] = _task_of_model(model, model_name)
    first = next(iter(found.values()), BASE_TASK)
    if any(value != first for value in found.values()):
        said = ", ".join(f"{field}={value!r}" for field, value in found.items())
        raise ApiError(
            400, f"the fields name different tasks: {said}; send one, or the same in all", code="task_conflict",
            param=next(iter(found)),
        )  # fmt: skip
    for name in [first] if isinstance(first, str) else first:
        if name != BASE_TASK:
            field = next(iter(found))
            try:
                check_task_name(split_revision(name)[0])
            except InvalidTaskName:
                raise unknown(field, name) from None
            except InvalidRequest as error:
                raise InvalidRequest(str(error), param=field) from None
    return first if isinstance(first, str) else Blend.of(first)


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


async def acquire(tasks: TaskService, choice: str | Blend, field: str) -> Lease:
    """Pin the revision that the choice means; wait where the disk must be read first, for that alone.

    No such task or revision: 404. Several revisions with the same beginning: 400.
    """
    if choice == BASE_TASK:
        return Lease(BASE_TASK, BASE_REVISION)
    try:
        coming = tasks.acquire_soon(choice)
        return coming.result() if coming.done() else await _arrived(tasks, coming)
    except TaskUnusable:
        raise
    except UnknownTask as error:
        raise _not_found(choice, field, error) from None
    except NoSuchRevision as error:
        raise ApiError(404, str(error), code="revision_not_found", param=field) from None
    except InvalidRequest as error:
        raise InvalidRequest(str(error), param=field) from None


async def _arrived(tasks: TaskService, coming: Future[Lease]) -> Lease:
    """The lease, when its set is there. Whoever stops waiting leaves no lease behind."""

    def give_back(done: Future[Lease]) -> None:
        if done.exception() is None:
            tasks.release(done.result())

    try:
        return await asyncio.wrap_future(coming)
    except asyncio.CancelledError:
        if not coming.cancel():
            coming.add_done_callback(give_back)
        raise


def _not_found(choice: str | Blend, field: str, error: UnknownTask) -> ApiError:
    if isinstance(choice, str):
        return unknown(field, choice)
    return ApiError(404, f"in this blend, {error}", code="task_not_found", param=field)


class Admission:
    """One HTTP request's place: counted as running, with its revision pinned until `close`."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.services: Services = gate.enter()
        self._lease: Lease | None = None
        self._reservation: Reservation | None = None
        self._open = True

    async def pin(self, choice: str | Blend, field: str, num_choices: int) -> Lease:
        """Acquire the choice's current revision for the whole request, which is to have so many answers. 429 while too
        much waits: nothing that takes longer is done before."""
        name = choice if isinstance(choice, str) else choice.name
        self._reservation = self.services.engine.reserve(name, num_choices)
        self._lease = await acquire(self.services.tasks, choice, field)
        return self._lease

    @property
    def lease(self) -> Lease:
        """The pinned revision; `pin` comes first."""
        assert self._lease is not None
        return self._lease

    def submitted(self) -> None:
        """The engine has the request, and counts it itself."""
        if self._reservation is not None:
            self._reservation.release()

    def close(self) -> None:
        """Release everything; safe to call twice."""
        if not self._open:
            return
        self._open = False
        self.submitted()
        if self._lease is not None and self._lease.task != BASE_TASK:
            self.services.tasks.release(self._lease)
        self.gate.leave()
