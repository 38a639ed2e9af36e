"""Operating the server: health, readiness, load, metrics and version."""

from __future__ import annotations

import asyncio
from importlib import metadata

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from peqa_server.http.api_document import refusals
from peqa_server.http.errors import ApiError
from peqa_server.openai.answer_shapes import LoadAnswer, VersionAnswer
from peqa_server.services import gate_of
from peqa_server.tasks.answer_shapes import StatusAnswer

router = APIRouter()


@router.get("/health", responses={200: {"model": StatusAnswer}, **refusals(503)})
async def health(request: Request) -> JSONResponse:
    """200 while the process can work: loading, serving or draining. 503 when the engine is dead."""
    gate = gate_of(request)
    if not gate.healthy:
        reason = gate.failure or "the engine has stopped; restart the server"
        raise ApiError(503, reason, code="engine_dead")
    return JSONResponse({"status": gate.phase})


@router.get("/ready", responses={200: {"model": StatusAnswer}, **refusals(503)})
async def ready(request: Request) -> JSONResponse:
    """200 once the model is loaded and until the server drains."""
    gate = gate_of(request)
    if gate.phase != "ready" or not gate.healthy:
        state = gate.phase if gate.healthy else "failed"
        raise ApiError(503, f"not ready: {state}", code="not_ready", headers={"Retry-After": "2"})
    return JSONResponse({"status": "ready"})


_PING = {
    200: {"description": "As /health, without a body.", "content": {}},
    **refusals(503),
}


@router.get("/ping", response_class=Response, responses=_PING)
@router.post("/ping", response_class=Response, responses=_PING)
async def ping(request: Request) -> Response:
    """/health for probes that want an empty body."""
    await health(request)
    return Response()


@router.get("/load", responses={200: {"model": LoadAnswer}})
async def load(request: Request) -> JSONResponse:
    """Generations and uploads in work."""
    return JSONResponse({"server_load": gate_of(request).running})


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    # Thousands of lines where many tasks are served: written in a thread, so that no token waits for them.
    text = await asyncio.to_thread(gate_of(request).metrics.render)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/version", responses={200: {"model": VersionAnswer}})
async def version(request: Request) -> JSONResponse:
    """The server's version and what it serves."""
    gate = gate_of(request)
    answer = {"version": metadata.version("peqa-serve")}
    if gate.phase != "starting" and gate.healthy:
        model = gate.services.model
        answer |= {"model": model.model_id, "base_digest": model.manifest.base_digest, **model.description}
    return JSONResponse(answer)
