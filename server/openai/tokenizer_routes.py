"""The tokenizer over HTTP: text or a conversation to token ids, ids to text, and what the tokenizer is."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from peqa_runtime.core import BASE_REVISION, BASE_TASK, Lease
from peqa_runtime.errors import InvalidRequest
from peqa_runtime.text import decode, encode, token_text
from peqa_server.fields.chat_schemas import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from peqa_server.fields.schemas import parse, parse_object
from peqa_server.http.api_document import json_body, refusals
from peqa_server.http.streaming import read_body
from peqa_server.openai.answer_shapes import DetokenizeAnswer, TokenizeAnswer, TokenizerAnswer
from peqa_server.openai.chat_prompt import chat_prompt
from peqa_server.openai.task_choice import acquire, chosen_task
from peqa_server.services import Gate, ServedModel, gate_of
from peqa_server.settings import ServerSettings
from peqa_server.tools.use import tool_use

router = APIRouter()

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@router.post(
    "/tokenize",
    openapi_extra=json_body(TokenizeRequest, TokenizeChatRequest),
    responses={200: {"model": TokenizeAnswer}, **refusals(404, 409, 507)},
)
async def tokenize(request: Request) -> JSONResponse:
    """Text, or a conversation written as a chat completion would write it, to token ids."""
    gate = gate_of(request)
    wanted = await read_body(request, gate.settings, _wanted)
    model = gate.services.model
    lease = await _known(gate, wanted)
    ids: tuple[int, ...]
    if isinstance(wanted, TokenizeChatRequest):
        ids = await asyncio.to_thread(_chat_ids, model, lease, wanted, gate.settings)
    else:
        special = wanted.add_special_tokens is not False
        ids = tuple(
            await asyncio.to_thread(encode, model.tokenizer, wanted.prompt, add_special_tokens=special)
        )
    strings = [token_text(model.tokenizer, i) for i in ids] if wanted.return_token_strs else None
    return JSONResponse(
        {"count": len(ids), "max_model_len": model.max_model_len, "tokens": list(ids), "token_strs": strings}
    )


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


@router.post(
    "/detokenize",
    openapi_extra=json_body(DetokenizeRequest),
    responses={200: {"model": DetokenizeAnswer}, **refusals(404, 409, 507)},
)
async def detokenize(request: Request) -> JSONResponse:
    """Token ids to text, special tokens included unless `skip_special_tokens` is true."""
    gate = gate_of(request)
    wanted = await read_body(request, gate.settings, partial(parse, DetokenizeRequest))
    await _known(gate, wanted)
    model = gate.services.model
    for token_id in wanted.tokens:
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequest(
                f"tokens holds the id {token_id}; ids go from 0 to {model.vocab_size - 1}", param="tokens"
            )
    skip = bool(wanted.skip_special_tokens)
    text = await asyncio.to_thread(decode, model.tokenizer, wanted.tokens, skip_special_tokens=skip)
    return JSONResponse({"prompt": text})


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
