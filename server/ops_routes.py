"""Operating the server: health, readiness, metrics, version, and the tokenizer."""

from __future__ import annotations

import asyncio
from importlib import metadata

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from peqa_runtime.errors import InvalidRequest
from peqa_runtime.text import decode, encode, token_text
from peqa_server.api_document import refusals
from peqa_server.chat_schemas import DetokenizeRequest, TokenizeRequest
from peqa_server.errors import ApiError
from peqa_server.schemas import parse
from peqa_server.services import gate_of
from peqa_server.streaming import read_body
from peqa_server.task_answers import StatusAnswer
from peqa_server.task_choice import chosen_task

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


@router.get("/version")
async def version(request: Request) -> JSONResponse:
    """The server's version and what it serves."""
    gate = gate_of(request)
    answer = {"version": metadata.version("peqa-serve")}
    if gate.phase != "starting" and gate.healthy:
        model = gate.services.model
        answer |= {"model": model.model_id, "base_digest": model.manifest.base_digest, **model.description}
    return JSONResponse(answer)


@router.post("/tokenize")
async def tokenize(request: Request) -> JSONResponse:
    """Text to token ids."""
    gate = gate_of(request)
    wanted = parse(TokenizeRequest, await read_body(request, gate.settings))
    model = gate.services.model
    chosen_task(model, model_name=wanted.model, names=())
    special = wanted.add_special_tokens is not False
    ids = list(await asyncio.to_thread(encode, model.tokenizer, wanted.prompt, add_special_tokens=special))
    answer: dict[str, object] = {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids}
    if wanted.return_token_strs:
        answer["token_strs"] = [token_text(model.tokenizer, i) for i in ids]
    return JSONResponse(answer)


@router.post("/detokenize")
async def detokenize(request: Request) -> JSONResponse:
    """Token ids to text."""
    gate = gate_of(request)
    wanted = parse(DetokenizeRequest, await read_body(request, gate.settings))
    model = gate.services.model
    chosen_task(model, model_name=wanted.model, names=())
    for token_id in wanted.tokens:
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequest(
                f"tokens holds the id {token_id}; ids go from 0 to {model.vocab_size - 1}", param="tokens"
            )
    text = await asyncio.to_thread(decode, model.tokenizer, wanted.tokens)
    return JSONResponse({"prompt": text})
