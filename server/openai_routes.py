"""OpenAI's routes: completions, chat completions and models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from peqa_runtime.core import BASE_TASK, TaskInfo
from peqa_runtime.errors import InvalidRequest, TaskUnusable, UnknownTask
from peqa_runtime.text import encode
from peqa_server.access_log import note_of
from peqa_server.answers import Answer, AnswerStyle, ChatAnswer, Gathered
from peqa_server.chat_prompt import chat_prompt
from peqa_server.chat_schemas import ChatCompletionRequest
from peqa_server.choice import Prompt, TextRules
from peqa_server.generation import Generation, Job, check_length
from peqa_server.listing import list_response
from peqa_server.schemas import (
    CompletionRequest,
    GenerationFields,
    StreamOptions,
    parse,
)
from peqa_server.services import ServedModel, gate_of
from peqa_server.settings import ServerSettings
from peqa_server.streaming import ClientGone, EventStream, event, read_body, unless_gone
from peqa_server.task_choice import Admission, chosen_task, unknown

router = APIRouter()

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for completions
MAX_N = 128
LONG_TEXT = 8192  # characters; a longer prompt is encoded in a thread, so that the event loop stays free


def _json_body(schema: type[GenerationFields]) -> dict[str, Any]:
    """The OpenAPI entry of a body that the route parses itself."""
    content = {
        "application/json": {"schema": schema.model_json_schema(ref_template="#/components/schemas/{model}")}
    }
    return {"requestBody": {"required": True, "content": content}}


@dataclass(frozen=True)
class Plan:
    """A checked request: what to generate and how to write the answer."""

    job: Job
    answer: Answer
    wanted: GenerationFields


@router.post("/v1/completions", openapi_extra=_json_body(CompletionRequest))
async def completions(request: Request) -> Response:
    """Continue one or several prompts."""
    gate = gate_of(request)
    wanted = parse(CompletionRequest, await read_body(request, gate.settings))
    admission = Admission(gate)
    try:
        await _pin(request, admission, wanted)
        plan = await _plan_completion(admission, wanted, gate.settings)
        return await _answer(request, admission, plan)
    except BaseException:
        admission.close()
        raise


@router.post("/v1/chat/completions", openapi_extra=_json_body(ChatCompletionRequest))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, written as the task's prompt format or the model's chat template says."""
    gate = gate_of(request)
    wanted = parse(ChatCompletionRequest, await read_body(request, gate.settings))
    admission = Admission(gate)
    try:
        await _pin(request, admission, wanted)
        plan = await _plan_chat(admission, wanted, gate.settings)
        return await _answer(request, admission, plan)
    except BaseException:
        admission.close()
        raise


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The base and every task, as models; `?limit=` and `?after=` give a page."""
    services = gate_of(request).services
    model = services.model
    return await list_response(
        request, services.tasks, lambda info: _task_row(model, info), first=[_base_row(model)]
    )


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> JSONResponse:
    """The base, or one task, by any name that `model` of a completion may have."""
    services = gate_of(request).services
    try:
        task = chosen_task(services.model, model_name=model, names=())
        if task == BASE_TASK:
            return JSONResponse(_base_row(services.model))
        assert isinstance(task, str), "a model's name is no blend"
        info = await asyncio.to_thread(services.tasks.info, task)
    except TaskUnusable:
        raise
    except UnknownTask:
        raise unknown("model", model) from None
    return JSONResponse(_task_row(services.model, info))


def _base_row(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.model_id,
        "object": "model",
        "created": model.created,
        "owned_by": "peqa",
        "root": model.model_id,
        "parent": None,
        "max_model_len": model.max_model_len,
    }


def _task_row(model: ServedModel, info: TaskInfo) -> dict[str, Any]:
    return _base_row(model) | {
        "id": info.task,
        "created": int(info.created),
        "parent": model.model_id,
        "revision": info.revision,
    }


async def _pin(request: Request, admission: Admission, wanted: GenerationFields) -> None:
    """Fix task and revision before anything else is done for this request."""
    names = (("task", wanted.task), ("adapter_id", wanted.adapter_id))
    choice = chosen_task(admission.services.model, model_name=wanted.model, names=names)
    field = next((name for name, value in names if value is not None), "model")
    note = note_of(request.scope)
    name = choice if isinstance(choice, str) else choice.name
    note.task = name[:80]  # known to the log also when there is no such task
    lease = await admission.pin(choice, field)
    note.revision = lease.revision


async def _plan_completion(admission: Admission, wanted: CompletionRequest, settings: ServerSettings) -> Plan:
    model = admission.services.model
    n = _checked_n(wanted, len(wanted.prompt), settings)
    if wanted.best_of is not None and wanted.best_of != n:
        raise InvalidRequest(f"best_of must equal n ({n}): choices are not ranked here", param="best_of")
    max_tokens = DEFAULT_MAX_TOKENS if wanted.max_tokens is None else wanted.max_tokens
    echo = bool(wanted.echo)
    special = wanted.add_special_tokens is not False
    prompts = tuple([await _encode_prompt(model, p, special) for p in wanted.prompt])
    prompts = tuple(_truncated(model, p, wanted.truncate_prompt_tokens, max_tokens) for p in prompts)
    return _plan(
        admission,
        wanted,
        prompts,
        n,
        max_tokens,
        logprobs=wanted.logprobs,
        echo=echo,
        answer=Answer,
    )


async def _plan_chat(admission: Admission, wanted: ChatCompletionRequest, settings: ServerSettings) -> Plan:
    model = admission.services.model
    n = _checked_n(wanted, 1, settings)
    logprobs = wanted.top_logprobs
    if logprobs is not None and not wanted.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if wanted.logprobs and logprobs is None:
        logprobs = 0
    prompt = await asyncio.to_thread(chat_prompt, admission, wanted)
    if None not in (wanted.max_tokens, wanted.max_completion_tokens):
        raise InvalidRequest(
            "max_tokens and max_completion_tokens are the same; send one", param="max_completion_tokens"
        )
    max_tokens = wanted.max_completion_tokens if wanted.max_tokens is None else wanted.max_tokens
    prompt = _truncated(model, prompt, wanted.truncate_prompt_tokens, 1 if max_tokens is None else max_tokens)
    if max_tokens is None:
        max_tokens = max(
            1, model.max_model_len - len(prompt.token_ids)
        )  # as long as fits: OpenAI's chat default
    return _plan(
        admission, wanted, (prompt,), n, max_tokens, logprobs=logprobs, echo=False, answer=ChatAnswer
    )


def _plan(
    admission: Admission,
    wanted: GenerationFields,
    prompts: tuple[Prompt, ...],
    n: int,
    max_tokens: int,
    *,
    logprobs: int | None,
    echo: bool,
    answer: type[Answer],
) -> Plan:
    """What both routes check in the same way."""
    model = admission.services.model
    if wanted.stream_options is not None and not wanted.stream:
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
    params = wanted.sampling_params(
        max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=logprobs if echo else None
    )
    _check_ids(model, params.stop_token_ids, "stop_token_ids")
    for prompt in prompts:
        check_length(model, len(prompt.token_ids), max_tokens)
    rules = TextRules(
        stop=wanted.stop,
        include_stop=bool(wanted.include_stop_str_in_output),
        skip_special_tokens=wanted.skip_special_tokens is not False,
        echo=echo,
        min_tokens=params.min_tokens,
    )
    style = AnswerStyle(logprobs, bool(wanted.return_token_ids), bool(wanted.return_tokens_as_token_ids))
    writer = answer(model, admission.lease, style, wanted.model, wanted.request_id)
    job = Job(prompts, n, params, rules, wanted.priority or 0, wanted.cache_salt or "")
    return Plan(job, writer, wanted)


def _checked_n(wanted: GenerationFields, num_prompts: int, settings: ServerSettings) -> int:
    n = 1 if wanted.n is None else wanted.n
    if not 1 <= n <= MAX_N:
        raise InvalidRequest(f"n must be between 1 and {MAX_N}, got {n}", param="n")
    if n * num_prompts > settings.max_choices:
        raise InvalidRequest(
            f"{num_prompts} prompts × n = {n} are more than {settings.max_choices} choices; send several requests",
            param="prompt",
        )
    return n


async def _encode_prompt(model: ServedModel, prompt: str | list[int], special: bool) -> Prompt:
    if isinstance(prompt, list):
        _check_ids(model, prompt, "prompt")
        encoded = Prompt(tuple(prompt))
    elif len(prompt) > LONG_TEXT:
        ids = await asyncio.to_thread(encode, model.tokenizer, prompt, add_special_tokens=special)
        encoded = Prompt(tuple(ids), prompt)
    else:
        encoded = Prompt(tuple(encode(model.tokenizer, prompt, add_special_tokens=special)), prompt)
    if not encoded.token_ids:
        raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
    return encoded


def _check_ids(model: ServedModel, ids: Sequence[int], field: str) -> None:
    for token_id in ids:
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequest(
                f"{field} holds the id {token_id}, which is not in the vocabulary: ids go from 0 to "
                f"{model.vocab_size - 1}",
                param=field,
            )


def _truncated(model: ServedModel, prompt: Prompt, keep: int | None, max_tokens: int) -> Prompt:
    """The last `keep` tokens of a prompt (-1: as many as the context holds besides `max_tokens`)."""
    if keep is None:
        return prompt
    if keep == -1:
        keep = max(1, model.max_model_len - max_tokens)  # none left: the check of the length says so
    if keep < 1:
        raise InvalidRequest(
            "truncate_prompt_tokens must be -1 or at least 1", param="truncate_prompt_tokens"
        )
    return prompt if len(prompt.token_ids) <= keep else Prompt(prompt.token_ids[-keep:])


async def _answer(request: Request, admission: Admission, plan: Plan) -> Response:
    """Generate and answer, in one piece or as a stream. The admission ends with the response."""
    note = note_of(request.scope)
    generation = Generation(admission.services, admission.lease, plan.job, note, admission.gate.metrics)
    generation.submit()

    def close() -> None:
        generation.cancel()  # also when the client was gone before the first event was asked for
        admission.close()

    if plan.wanted.stream:
        return EventStream(_events(generation, plan), close)
    try:
        body = await unless_gone(request.receive, _gather(generation, plan))
        return JSONResponse(body)
    except ClientGone:
        note.client_gone = True
        return Response(status_code=499)  # nobody reads it; the log and the metrics do
    finally:
        close()


async def _gather(generation: Generation, plan: Plan) -> dict[str, Any]:
    gathered = [Gathered() for _ in range(plan.job.num_choices)]
    async with aclosing(generation.pieces()) as pieces:
        async for index, piece in pieces:
            gathered[index].add(piece)
    prompts = [p.token_ids for p in plan.job.prompts for _ in range(plan.job.n)]
    return plan.answer.whole(gathered, prompts, generation.usage)


async def _events(generation: Generation, plan: Plan) -> AsyncGenerator[bytes, None]:
    """The chunks of a stream, without the final [DONE]."""
    options = plan.wanted.stream_options or StreamOptions()
    begun: set[int] = set()
    async with aclosing(generation.pieces()) as pieces:
        async for index, piece in pieces:
            if not options.continuous_usage_stats and not plan.answer.shows(piece):
                continue
            prompt = None
            if index not in begun:
                begun.add(index)
                prompt = plan.job.prompts[index // plan.job.n].token_ids
                opening = plan.answer.opening(index)
                if opening is not None:
                    yield event(opening)
            chunk = plan.answer.chunk(index, piece, prompt)
            if options.continuous_usage_stats:
                chunk["usage"] = generation.usage.json()
            elif options.include_usage:
                chunk["usage"] = None
            yield event(chunk)
    if options.include_usage:
        yield event(plan.answer.last(generation.usage))
