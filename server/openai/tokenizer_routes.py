"""The tokenizer over HTTP: text or a conversation to token ids, ids to text, and what the tokenizer is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from peqa_runtime.core import BASE_REVISION, BASE_TASK, Lease
from peqa_runtime.errors import InvalidRequest
from peqa_runtime.text import decode, encode
from peqa_server.fields.chat_schemas import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from peqa_server.fields.schemas import parse, parse_object
from peqa_server.http.api_document import json_body, refusals
from peqa_server.http.json_text import json_response
from peqa_server.http.streaming import read_body
from peqa_server.openai.answer_shapes import DetokenizeAnswer, TokenizeAnswer, TokenizerAnswer
from peqa_server.openai.chat_prompt import chat_prompt
from peqa_server.openai.choice import LONG_PIECE
from peqa_server.openai.plan import check_ids
from peqa_server.openai.task_choice import acquire, chosen_task
from peqa_server.services import Gate, ServedModel, gate_of
from peqa_server.settings import ServerSettings
from peqa_server.threads import aside
from peqa_server.tools.use import tool_use

router = APIRouter()

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@router.post(
    "/tokenize",
    openapi_extra=json_body(TokenizeRequest, TokenizeChatRequest),
    responses={200: {"model": TokenizeAnswer}, **refusals(404, 409, 507)},
)
async def tokenize(request: Request) -> Response:
    """Text, or a conversation written as a chat completion would write it, to token ids."""
    gate = gate_of(request)
    wanted = await read_body(request, gate.settings, _wanted)
    model = gate.services.model
    lease = await _known(gate, wanted)
    ids: Sequence[int]
    if isinstance(wanted, TokenizeChatRequest):
        ids = await asyncio.to_thread(_chat_ids, model, lease, wanted, gate.settings)
    else:
        special = wanted.add_special_tokens is not False
        ids = await asyncio.to_thread(encode, model.tokenizer, wanted.prompt, add_special_tokens=special)
    return await aside(len(ids) > LONG_PIECE, _tokenized, model, ids, bool(wanted.return_token_strs))


def _wanted(body: bytes) -> TokenizeRequest | TokenizeChatRequest:
    value = parse_object(body)
    for name in ("prompt", "messages"):
        if name in value and value[name] is None:
            del value[name]
    if "messages" in value and "prompt" in value:
        raise InvalidRequest("send prompt or messages, not both", param="messages")
    return parse(TokenizeChatRequest, value) if "messages" in value else parse(TokenizeRequest, value)


def _chat_ids(
    model: ServedModel, lease: Lease, wanted: TokenizeChatRequest, settings: ServerSettings
) -> tuple[int, ...]:
    return chat_prompt(model, lease, wanted, tool_use(wanted), settings).token_ids


def _tokenized(model: ServedModel, ids: Sequence[int], with_texts: bool) -> Response:
    texts = [model.token_texts.text(token_id) for token_id in ids] if with_texts else None
    return json_response(
        {"count": len(ids), "max_model_len": model.max_model_len, "tokens": list(ids), "token_strs": texts}
    )


@router.post(
    "/detokenize",
    openapi_extra=json_body(DetokenizeRequest),
    responses={200: {"model": DetokenizeAnswer}, **refusals(404, 409, 507)},
)
async def detokenize(request: Request) -> Response:
    """Token ids to text, special tokens included unless `skip_special_tokens` is true."""
    gate = gate_of(request)
    wanted = await read_body(request, gate.settings, partial(parse, DetokenizeRequest))
    await _known(gate, wanted)
    return await aside(len(wanted.tokens) > LONG_PIECE, _detokenized, gate.services.model, wanted)


def _detokenized(model: ServedModel, wanted: DetokenizeRequest) -> Response:
    check_ids(model, wanted.tokens, "tokens")
    skip = bool(wanted.skip_special_tokens)
    return json_response({"prompt": decode(model.tokenizer, wanted.tokens, skip_special_tokens=skip)})


@router.get("/tokenizer_info", responses={200: {"model": TokenizerAnswer}})
async def tokenizer_info(request: Request) -> JSONResponse:
    """What clients that count tokens themselves ask for: special tokens, their ids, the chat template."""
    model = gate_of(request).services.model
    tokenizer = model.tokenizer
    info: dict[str, Any] = {"tokenizer_class": type(tokenizer).__name__}
    for name in _SPECIAL_TOKENS:
        token = getattr(tokenizer, name, None)
        info[name] = None if token is None else str(token)
        info[f"{name}_id"] = getattr(tokenizer, f"{name}_id", None)
    info["all_special_tokens"] = [str(token) for token in getattr(tokenizer, "all_special_tokens", ())]
    info["chat_template"] = getattr(tokenizer, "chat_template", None)
    info["vocab_size"] = model.vocab_size
    info["model_max_length"] = model.max_model_len
    return JSONResponse(info)


async def _known(gate: Gate, wanted: TokenizeRequest | TokenizeChatRequest | DetokenizeRequest) -> Lease:
    """What the request names, which must be there though all tasks have one tokenizer. The lease has ended."""
    services = gate.services
    names = (("task", wanted.task), ("adapter_id", wanted.adapter_id))
    choice = chosen_task(services.model, model_name=wanted.model, names=names)
    if choice == BASE_TASK:
        return Lease(BASE_TASK, BASE_REVISION)
    field = next((name for name, value in names if value is not None), "model")
    lease = await acquire(services.tasks, choice, field)
    services.tasks.release(lease)
    return lease
