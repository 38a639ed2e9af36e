"""OpenAI's generating routes: completions and chat completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from peqa_server.fields.chat_schemas import ChatCompletionRequest
from peqa_server.fields.schemas import CompletionRequest, GenerationFields, StreamOptions, parse
from peqa_server.http.api_document import json_body, refusals
from peqa_server.http.json_text import json_response
from peqa_server.http.streaming import ClientGone, EventStream, event, long_event, read_body, unless_gone
from peqa_server.observe.access_log import note_of
from peqa_server.openai.answer_shapes import ChatAnswerWhole, ChatChunk, CompletionAnswer, stream_of
from peqa_server.openai.chat_plan import plan_chat
from peqa_server.openai.choice import Piece
from peqa_server.openai.completion_json import Gathered, Usage
from peqa_server.openai.completion_plan import plan_completion
from peqa_server.openai.generation import Generation
from peqa_server.openai.plan import Plan
from peqa_server.openai.task_choice import Admission, chosen_task
from peqa_server.services import gate_of
from peqa_server.threads import aside

router = APIRouter()


_REFUSALS = refusals(404, 409, 429, 507)


@router.post(
    "/v1/completions",
    openapi_extra=json_body(CompletionRequest),
    responses={200: {"model": CompletionAnswer, "content": stream_of(CompletionAnswer)}, **_REFUSALS},
)
async def completions(request: Request) -> Response:
    """Continue one or several prompts."""
    gate = gate_of(request)
    wanted = await read_body(request, gate.settings, partial(parse, CompletionRequest))
    admission = Admission(gate)
    try:
        await _pin(request, admission, wanted, len(wanted.prompt))
        plan = await plan_completion(admission, wanted, gate.settings)
        return await _answer(request, admission, plan)
    except BaseException:
        admission.close()
        raise


@router.post(
    "/v1/chat/completions",
    openapi_extra=json_body(ChatCompletionRequest),
    responses={200: {"model": ChatAnswerWhole, "content": stream_of(ChatChunk)}, **_REFUSALS},
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, written as the task's prompt format or the model's chat template says."""
    gate = gate_of(request)
    wanted = await read_body(request, gate.settings, partial(parse, ChatCompletionRequest))
    admission = Admission(gate)
    try:
        await _pin(request, admission, wanted, 1)
        plan = await plan_chat(admission, wanted, gate.settings)
        return await _answer(request, admission, plan)
    except BaseException:
        admission.close()
        raise


async def _pin(request: Request, admission: Admission, wanted: GenerationFields, num_prompts: int) -> None:
    """Fix task and revision before anything else is done for this request."""
    names = (("task", wanted.task), ("adapter_id", wanted.adapter_id))
    choice = chosen_task(admission.services.model, model_name=wanted.model, names=names)
    field = next((name for name, value in names if value is not None), "model")
    note = note_of(request.scope)
    name = choice if isinstance(choice, str) else choice.name
    note.task = name[:80]  # known to the log also when there is no such task
    asked = num_prompts * (1 if wanted.n is None else wanted.n)
    lease = await admission.pin(choice, field, max(1, min(asked, admission.gate.settings.max_choices)))
    note.revision = lease.revision


async def _answer(request: Request, admission: Admission, plan: Plan) -> Response:
    """Generate and answer, in one piece or as a stream. The admission ends with the response."""
    note = note_of(request.scope)
    generation = Generation(admission.services, admission.lease, plan.job, note, admission.gate.metrics)
    await generation.submit()
    admission.submitted()

    def close() -> None:
        generation.cancel()  # also when the client was gone before the first event was asked for
        admission.close()

    if plan.wanted.stream:
        return EventStream(_events(generation, plan), close, admission.gate.settings.stalled_stream_seconds)
    try:
        return await unless_gone(request.receive, _gather(generation, plan))
    except ClientGone:
        note.client_gone = True
        return Response(status_code=499)  # nobody reads it; the log and the metrics do
    finally:
        close()


async def _gather(generation: Generation, plan: Plan) -> Response:
    gathered = [Gathered() for _ in range(plan.job.num_choices)]
    async with aclosing(generation.pieces()) as pieces:
        async for index, piece in pieces:
            gathered[index].add(piece)
    prompts = [p.token_ids for p in plan.job.prompts for _ in range(plan.job.n)]
    num_tokens = sum(len(g.tokens) + len(g.prompt_logprobs or ()) for g in gathered)
    num_tokens += sum(map(len, prompts)) if plan.wanted.return_token_ids else 0
    return await aside(plan.answer.is_long(num_tokens), _whole, plan, gathered, prompts, generation.usage)


def _whole(plan: Plan, gathered: list[Gathered], prompts: list[tuple[int, ...]], usage: Usage) -> Response:
    return json_response(plan.answer.whole(gathered, prompts, usage))


async def _events(generation: Generation, plan: Plan) -> AsyncGenerator[bytes, None]:
    """The chunks of a stream, without the final [DONE]."""
    options = plan.wanted.stream_options or StreamOptions()
    always = bool(options.continuous_usage_stats)
    begun: set[int] = set()
    interval = plan.wanted.stream_interval or 1
    source = generation.pieces() if interval == 1 else _spaced(generation, interval)
    async with aclosing(source) as pieces:
        async for index, piece in pieces:
            first = index not in begun
            prompt = plan.job.prompts[index // plan.job.n].token_ids if first else None
            long = plan.answer.is_long(len(piece.tokens))
            chunk = await aside(long, plan.answer.chunk, index, piece, prompt, always=always)
            if chunk is None:
                continue
            begun.add(index)
            opening = plan.answer.opening(index) if first else None
            for data in (opening, chunk):
                if data is None:
                    continue
                if data is chunk and always:
                    data["usage"] = generation.usage.json()
                elif options.include_usage:
                    data["usage"] = None
                yield await aside(long, long_event if long else event, data)
    if options.include_usage:
        yield event(plan.answer.last(generation.usage))


async def _spaced(generation: Generation, interval: int) -> AsyncGenerator[tuple[int, Piece], None]:
    """A choice's first piece at once, then its pieces of `interval` tokens in one, and what is left at its end."""
    waiting: dict[int, Piece] = {}
    begun: set[int] = set()
    async with aclosing(generation.pieces()) as pieces:
        async for index, piece in pieces:
            if piece.is_prompt:
                yield index, piece
                continue
            piece = waiting.pop(index).then(piece) if index in waiting else piece
            if index in begun and piece.finish_reason is None and len(piece.tokens) < interval:
                waiting[index] = piece
                continue
            begun.add(index)
            yield index, piece
