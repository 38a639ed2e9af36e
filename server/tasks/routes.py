"""Tasks over HTTP: upload, list, read, roll back, download, delete. Raw bytes in, never a path, never a pickle."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from peqa_runtime.core import BASE_TASK, NO_TASK, RevisionInfo, TaskInfo, check_task_name
from peqa_runtime.errors import InvalidRequest, NoSuchRevision
from peqa_runtime.scales.revision_name import SHORTEST_REVISION, matching
from peqa_server.access.upload_admission import admitted_upload
from peqa_server.fields.schemas import RollbackRequest, parse
from peqa_server.http.api_document import bytes_body, json_body, parameter, refusals
from peqa_server.http.errors import ApiError
from peqa_server.http.listing import PAGE_PARAMETERS, list_response
from peqa_server.http.streaming import read_body
from peqa_server.observe.access_log import note_of
from peqa_server.services import Gate, ServedModel, Services, TaskService, gate_of
from peqa_server.tasks.answer_shapes import (
    DeletedAnswer,
    RevisionListAnswer,
    TaskAnswer,
    TaskListAnswer,
    TaskName,
)
from peqa_server.tasks.upload import spooled_body

# `:path` lets a name hold slashes as far as the check of names, which refuses it with a 422 instead of a bare 404.
router = APIRouter(prefix="/v1/tasks")

_REVISION = re.compile(r"[0-9a-f]{1,64}|\*")

_IF_MATCH = parameter(
    "If-Match", "header", "The revision that must be current, quoted, or *.", {"type": "string"}
)
_REVISION_PARAMETER = parameter(
    "revision",
    "query",
    f"A kept revision, by {SHORTEST_REVISION} or more of its first digits; default: the current one.",
    {"type": "string"},
)
_IF_NONE_MATCH = parameter(
    "If-None-Match", "header", "*: only if there is no such task yet.", {"type": "string", "const": "*"}
)


@router.get(
    "",
    responses={200: {"model": TaskListAnswer}},
    openapi_extra={"parameters": PAGE_PARAMETERS},
)
async def list_tasks(request: Request) -> Response:
    """Every task, without its note, and the sets in the store that this base cannot use.

    `?limit=` and `?after=` give a page.
    """
    tasks = gate_of(request).services.tasks
    unusable, quarantined = tasks.unusable(), tasks.quarantined()

    def row(info: TaskInfo) -> dict[str, Any]:
        return _row_json(info, quarantined)

    rows = [{"task": task, "reason": unusable[task]} for task in sorted(unusable)]
    return await list_response(request, tasks, row, more={"unusable": rows})


@router.get(
    "/{task:path}/revisions", responses={200: {"model": RevisionListAnswer}, **refusals(404, 409, 422)}
)
async def list_revisions(request: Request, task: TaskName) -> JSONResponse:
    """The kept revisions of a task, newest first."""
    gate = gate_of(request)
    services = _services(request, task)
    rows = await gate.store.run(services.tasks.revisions, task)
    return JSONResponse({"object": "list", "task": task, "data": [_revision_json(row) for row in rows]})


@router.get(
    "/{task:path}/content",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        **refusals(404, 409, 422),
    },
    openapi_extra={"parameters": [_REVISION_PARAMETER]},
)
async def get_content(request: Request, task: TaskName) -> Response:
    """The scale set file of a task, byte for byte as uploaded; `?revision=` for a kept one that begins so."""
    gate = gate_of(request)
    services = _services(request, task)
    revision = request.query_params.get("revision")
    info = await gate.store.run(services.tasks.info, task)
    wanted = info.revision
    try:
        if revision is not None:
            wanted = await gate.store.run(_kept, services.tasks, task, revision)
        data = await gate.store.run(services.tasks.content, task, wanted)
    except NoSuchRevision as error:
        raise ApiError(404, str(error), code="no_such_revision", param="revision") from None
    headers = {"ETag": f'"{wanted}"', "Content-Disposition": f'attachment; filename="{task}.safetensors"'}
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.post(
    "/{task:path}/rollback",
    responses={200: {"model": TaskAnswer}, **refusals(404, 409, 412, 422, 507)},
    openapi_extra={**json_body(RollbackRequest, required=False), "parameters": [_IF_MATCH]},
)
async def rollback(request: Request, task: TaskName) -> JSONResponse:
    """Make the previous revision current, or the kept one that begins with the body's `revision`."""
    gate = gate_of(request)
    services = _services(request, task)
    wanted = await read_body(request, gate.settings, _rollback_wanted)
    with _counted(request, gate, "rollback", task):
        revision = wanted.revision
        if revision is not None:
            revision = await gate.store.run(_kept, services.tasks, task, revision)
        info = await gate.store.run(services.tasks.rollback, task, revision, _if_match(request))
    return _changed(request, services.tasks, info)


@router.get("/{task:path}", responses={200: {"model": TaskAnswer}, **refusals(404, 409, 422)})
async def get_task(request: Request, task: TaskName) -> JSONResponse:
    """One task's current revision and what is known about it."""
    gate = gate_of(request)
    services = _services(request, task)
    info = await gate.store.run(services.tasks.info, task)
    return _task_response(services.tasks, info)


@router.put(
    "/{task:path}",
    responses={200: {"model": TaskAnswer}, **refusals(409, 412, 422, 507)},
    openapi_extra={
        **bytes_body("A scale set: one .safetensors file."),
        "parameters": [_IF_MATCH, _IF_NONE_MATCH],
    },
)
async def put_task(request: Request, task: TaskName) -> JSONResponse:
    """Upload a scale set: the body is the file's bytes. Live for every request that starts after the 200."""
    gate = gate_of(request)
    services = _services(request, task)
    if request.headers.get("content-type", "").strip().lower().startswith("multipart/"):
        raise ApiError(
            415, "the body is a form with a file in it; send the file's bytes alone, as curl -T FILE or "
            "--data-binary @FILE does", code="unsupported_content_type",
        )  # fmt: skip
    if_match = _if_match_or_absent(request)
    limit = gate.settings.max_upload_bytes or largest_set(services.model)
    with _counted(request, gate, "upload", task), gate.entered():
        async with (
            admitted_upload(request, services.tasks, gate.store, task, if_match),
            gate.uploads.place(note_of(request.scope).caller.tenant),
            spooled_body(request, gate.settings, limit, services.spool_folder, gate.uploads.writers) as file,
        ):
            received = time.perf_counter()
            info = await gate.uploads.checkers.run(services.tasks.upload, task, file, if_match)
            gate.metrics.upload_seconds.observe(time.perf_counter() - received)
    return _changed(request, services.tasks, info)


@router.delete(
    "/{task:path}",
    responses={200: {"model": DeletedAnswer}, **refusals(400, 404, 409, 412, 422, 507)},
    openapi_extra={"parameters": [_IF_MATCH]},
)
async def delete_task(request: Request, task: TaskName) -> JSONResponse:
    """Remove a task. Requests that already run on it finish; new ones get a 404."""
    gate = gate_of(request)
    services = _services(request, task)
    with _counted(request, gate, "delete", task):
        await gate.store.run(services.tasks.delete, task, _if_match(request))
    return JSONResponse({"task": task, "deleted": True})


def _rollback_wanted(body: bytes) -> RollbackRequest:
    return parse(RollbackRequest, body) if body.strip() else RollbackRequest()


def largest_set(model: ServedModel) -> int:
    """Bytes of the largest file that can be valid: every linear's largest kind in fp32, and a generous header."""
    shapes = model.manifest.linears.values()
    rows_and_columns = sum(4 * (s.out_features + s.in_features) for s in shapes)
    groups = sum(4 * s.out_features * s.groups for s in shapes)
    return max(rows_and_columns, groups) + (1 << 20) + 512 * len(model.manifest.linears)


def _services(request: Request, task: str) -> Services:
    """The services, after the name's check: a name that cannot name a task is a 422 on every route.

    The base is there, but no task: 404 that says so. Only an upload asks for a name, and is told that it is taken.
    """
    services = gate_of(request).services
    model_id = services.model.model_id
    if request.method != "PUT" and task in (BASE_TASK, model_id, model_id.lower()):
        raise ApiError(
            404, f"{task!r} is the model itself, not a task: it has no revisions, and nothing can change it; see "
            f"GET /v1/models/{model_id}", code="task_not_found", param="task",
        )  # fmt: skip
    # The `$` of a route's pattern also matches before a last line break, which would be lost from the name.
    check_task_name(task + "\n" if request.scope["path"].endswith("\n") else task)
    return services


def _kept(tasks: TaskService, task: str, beginning: str) -> str:
    """The kept revision that begins so, as after the "@" of a task's name: messages and lists show 12 digits.

    Raises `UnknownTask`, `NoSuchRevision`, and a 400 where several begin so.
    """
    revisions = [row.revision for row in tasks.revisions(task)]
    if len(beginning) < SHORTEST_REVISION:
        raise NoSuchRevision(
            f"a revision is named by at least {SHORTEST_REVISION} of its digits, got {beginning!r}"
        )
    try:
        return matching(task, revisions, beginning)
    except InvalidRequest as error:
        raise ApiError(400, str(error), code="invalid_value", param="revision") from None


@contextlib.contextmanager
def _counted(request: Request, gate: Gate, action: str, task: str) -> Iterator[None]:
    """Around a change: who asked for what stands in the log, whatever comes of it."""
    note = note_of(request.scope)
    note.task, note.change = task, action
    outcome = "refused"
    try:
        yield
        outcome = "done"
    finally:
        gate.metrics.task_changes.labels(action, outcome).inc()


def _if_match_or_absent(request: Request) -> str | None:
    """What an upload expects to find: as `_if_match`, or `NO_TASK` for "If-None-Match: *"."""
    header = request.headers.get("if-none-match")
    if header is None:
        return _if_match(request)
    if header.strip() != "*" or "if-match" in request.headers:
        raise ApiError(
            400,
            "If-None-Match can be * on an upload, for a task that is not there yet; a revision goes into If-Match",
            code="unsupported_header",
        )
    return NO_TASK


def _if_match(request: Request) -> str | None:
    """The revision that must be current: the If-Match header, quoted, weak, bare or "*"."""
    if request.method != "PUT" and "if-none-match" in request.headers:
        raise ApiError(400, "If-None-Match is for uploads; use If-Match", code="unsupported_header")
    header = request.headers.get("if-match")
    if header is None:
        return None
    value = header.strip().removeprefix("W/").strip('"')
    if not _REVISION.fullmatch(value):
        raise ApiError(400, "If-Match must hold one revision, or *", code="invalid_if_match")
    return value


def _changed(request: Request, tasks: TaskService, info: TaskInfo) -> JSONResponse:
    note = note_of(request.scope)
    note.task, note.revision = info.task, info.revision
    return _task_response(tasks, info)


def _task_response(tasks: TaskService, info: TaskInfo) -> JSONResponse:
    body = _row_json(info, tasks.quarantined()) | {"note": dict(info.note)}
    return JSONResponse(body, headers={"ETag": f'"{info.revision}"'})


def _row_json(info: TaskInfo, quarantined: Mapping[str, str]) -> dict[str, Any]:
    """`status` is "ready", or "quarantined" with a `status_reason` that says why and what ends it."""
    reason = quarantined.get(info.task)
    return {
        "object": "task",
        "task": info.task,
        "revision": info.revision,
        "kind": info.kind,
        "bytes": info.num_bytes,
        "created": info.created,
        "base_digest": info.base_digest,
        "prompt_format": info.prompt_format,
        "num_revisions": info.num_revisions,
        "status": "ready" if reason is None else "quarantined",
        "status_reason": reason,
    }


def _revision_json(row: RevisionInfo) -> dict[str, Any]:
    return {
        "revision": row.revision,
        "kind": row.kind,
        "bytes": row.num_bytes,
        "created": row.created,
        "current": row.current,
    }
