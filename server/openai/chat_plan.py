"""What a chat request asks for: the conversation as a prompt, its functions, logprobs in chat's format."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from peqa_runtime.constraint import Constraint
from peqa_runtime.core import Lease
from peqa_runtime.errors import InvalidRequest
from peqa_server.fields.chat_schemas import ChatCompletionRequest
from peqa_server.openai.chat_json import ChatAnswer
from peqa_server.openai.chat_prompt import chat_prompt
from peqa_server.openai.choice import Prompt
from peqa_server.openai.plan import (
    Outline,
    Plan,
    answer_name,
    answer_style,
    checked_n,
    common_job,
    truncated,
)
from peqa_server.openai.structured import AnswerForm, compiled, form_of, wanted_form
from peqa_server.openai.task_choice import Admission
from peqa_server.services import ServedModel, Services
from peqa_server.settings import ServerSettings
from peqa_server.tools.parser import MARKERS, CallReader, NamedCall, ToolCallParser
from peqa_server.tools.use import ToolUse, tool_use


async def plan_chat(admission: Admission, wanted: ChatCompletionRequest, settings: ServerSettings) -> Plan:
    """Check and encode a chat request. Raises `InvalidRequest`, `ApiError`, `PromptTooLong`."""
    model = admission.services.model
    n = checked_n(wanted, 1, settings)
    logprobs = _logprobs(wanted)
    max_tokens = _max_tokens(wanted)
    use, prompt = await asyncio.to_thread(_tools_and_prompt, model, admission.lease, wanted, settings)
    prompt = truncated(model, prompt, wanted, 1 if max_tokens is None else max_tokens)
    if max_tokens is None:  # as long as fits: OpenAI's default for chats
        max_tokens = max(1, model.max_model_len - len(prompt.token_ids))
    outline = Outline(
        prompts=(prompt,),
        n=n,
        max_tokens=max_tokens,
        logprobs=logprobs,
        # Markers of calls are special tokens in some vocabularies: without their text no call would be found.
        skip_special_tokens=False if use is not None and _marks_by_special_token(model) else None,
        form=await _form(admission.services, wanted, use),
    )
    job = await common_job(model, wanted, outline)
    answer = ChatAnswer(
        model,
        admission.lease,
        answer_style(wanted, outline),
        answer_name(admission, wanted),
        wanted.request_id,
        reader=None if use is None else _reader(use),
        begun=_begun(wanted),
    )
    return Plan(job, answer, wanted)


def _tools_and_prompt(
    model: ServedModel, lease: Lease, wanted: ChatCompletionRequest, settings: ServerSettings
) -> tuple[ToolUse | None, Prompt]:
    use = tool_use(wanted, wanted.parallel_tool_calls)
    return use, chat_prompt(model, lease, wanted, use, settings)


async def _form(services: Services, wanted: ChatCompletionRequest, use: ToolUse | None) -> AnswerForm | None:
    """The form of the answer: the call of a function that must be called, or what the request's fields say."""
    form = await wanted_form(services, wanted)
    if use is None or not use.forced:
        return form
    if form is not None:
        raise InvalidRequest(
            f"{form.field} and tool_choice both say what form the answer has; send one of them",
            param="tool_choice",
        )
    return await compiled(services, await asyncio.to_thread(_call_form, use))  # tools may be megabytes


def _call_form(use: ToolUse) -> AnswerForm:
    return form_of("tools", Constraint.json_schema, use.answer_schema())


def _logprobs(wanted: ChatCompletionRequest) -> int | None:
    if wanted.top_logprobs and not wanted.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return (wanted.top_logprobs or 0) if wanted.logprobs else None


def _max_tokens(wanted: ChatCompletionRequest) -> int | None:
    given = {wanted.max_tokens, wanted.max_completion_tokens} - {None}
    if len(given) > 1:
        raise InvalidRequest(
            f"max_tokens is {wanted.max_tokens} and max_completion_tokens, its newer name, "
            f"{wanted.max_completion_tokens}; send one of them",
            param="max_completion_tokens",
        )
    return next(iter(given), None)


def _begun(wanted: ChatCompletionRequest) -> str:
    """With `echo`, the last message's text is shown before the answer, when it is the assistant's too."""
    last = wanted.messages[-1]
    return last.text if wanted.echo and last.role == "assistant" else ""


def _reader(use: ToolUse) -> Callable[[], CallReader]:
    if use.named is not None:
        return partial(NamedCall, use.named)
    return partial(ToolCallParser, use.names, parallel=use.parallel)


def _marks_by_special_token(model: ServedModel) -> bool:
    special = getattr(model.tokenizer, "all_special_tokens", ())
    return any(marker in special for marker in MARKERS)
