"""The base and its tasks as OpenAI's list of models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from peqa_runtime.core import BASE_TASK, TaskInfo
from peqa_runtime.errors import NoSuchRevision, TaskUnusable, UnknownTask
from peqa_runtime.scales.revision_name import matching, split_revision
from peqa_server.http.api_document import refusals
from peqa_server.http.errors import ApiError
from peqa_server.http.listing import PAGE_PARAMETERS, list_response
from peqa_server.observe.access_log import note_of
from peqa_server.openai.answer_shapes import ModelAnswer, ModelListAnswer
from peqa_server.openai.task_choice import chosen_task, unknown
from peqa_server.services import ServedModel, TaskService, gate_of

router = APIRouter()


@router.get(
    "/v1/models",
    openapi_extra={"parameters": PAGE_PARAMETERS},
    responses={200: {"model": ModelListAnswer}, **refusals(400)},
)
async def list_models(request: Request) -> Response:
    """The base and every task, as models; `?limit=` and `?after=` give a page."""
    services = gate_of(request).services
    model = services.model
    base = [_base_row(model)] if note_of(request.scope).caller.may_use(BASE_TASK) else []
    return await list_response(request, services.tasks, lambda info: _task_row(model, info), first=base)


@router.get(
    "/v1/models/{model:path}", responses={200: {"model": ModelAnswer}, **refusals(400, 404, 409, 507)}
)
async def get_model(request: Request, model: str) -> JSONResponse:
    """The base, or one task, by any name that `model` of a completion may have."""
    gate = gate_of(request)
    services = gate.services
    try:
        task = chosen_task(services.model, model_name=model, names=())
        if task == BASE_TASK:
            return JSONResponse(_base_row(services.model))
        assert isinstance(task, str), "a model's name is no blend"
        name, prefix = split_revision(task)
        info = await gate.store.run(services.tasks.info, name)
        if prefix is not None:
            info = await gate.store.run(_kept, services.tasks, info, prefix)
    except NoSuchRevision as error:
        raise ApiError(404, str(error), code="revision_not_found", param="model") from None
    except TaskUnusable:
        raise
    except UnknownTask:
        raise unknown("model", model) from None
    return JSONResponse(_task_row(services.model, info))


def _kept(tasks: TaskService, info: TaskInfo, prefix: str) -> TaskInfo:
    """The kept revision that begins so, by the name that asks for it."""
    rows = tasks.revisions(info.task)
    revision = matching(info.task, [row.revision for row in rows], prefix)
    row = next(row for row in rows if row.revision == revision)
    return replace(info, task=f"{info.task}@{prefix}", revision=revision, created=row.created)


def _base_row(model: ServedModel) -> dict[str, Any]:
    return _row(model, model.model_id, model.created) | {"parent": None}


def _task_row(model: ServedModel, info: TaskInfo) -> dict[str, Any]:
    row = _row(model, info.task, int(info.created))
    return row | {"parent": model.model_id, "revision": info.revision}


def _row(model: ServedModel, name: str, created: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "peqa",
        "root": model.model_id,
        "max_model_len": model.max_model_len,
        "permission": [_permission(name, created)],
    }


def _permission(name: str, created: int) -> dict[str, Any]:
    """What old clients of OpenAI's list read: it says what can be done with the model, to everybody alike."""
    return {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
