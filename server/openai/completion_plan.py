"""What a completion request asks for: its prompts in their four forms, echo, logprobs."""

from __future__ import annotations

from collections.abc import Sequence

from peqa_runtime.errors import InvalidRequest
from peqa_server.fields.schemas import CompletionRequest
from peqa_server.openai.choice import Prompt
from peqa_server.openai.completion_json import Answer
from peqa_server.openai.plan import (
    LONG_TEXT,
    PER_PROMPT,
    Outline,
    Plan,
    answer_name,
    answer_style,
    check_ids,
    checked_n,
    common_job,
    encoded,
    truncated,
)
from peqa_server.openai.structured import wanted_form
from peqa_server.openai.task_choice import Admission
from peqa_server.services import ServedModel
from peqa_server.settings import ServerSettings
from peqa_server.threads import aside

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def plan_completion(admission: Admission, wanted: CompletionRequest, settings: ServerSettings) -> Plan:
    """Check and encode a completion request. Raises `InvalidRequest`, `PromptTooLong`."""
    model = admission.services.model
    n = checked_n(wanted, len(wanted.prompt), settings)
    if wanted.best_of is not None and wanted.best_of != n:
        raise InvalidRequest(f"best_of must equal n ({n}): choices are not ranked here", param="best_of")
    max_tokens = DEFAULT_MAX_TOKENS if wanted.max_tokens is None else wanted.max_tokens
    special = wanted.add_special_tokens is not False
    long = sum(PER_PROMPT + len(prompt) for prompt in wanted.prompt) > LONG_TEXT
    prompts = await aside(long, _all_encoded, model, wanted.prompt, special)
    outline = Outline(
        prompts=tuple(truncated(model, p, wanted, max_tokens) for p in prompts),
        n=n,
        max_tokens=max_tokens,
        logprobs=wanted.logprobs,
        shown_prompt=bool(wanted.echo),
        form=await wanted_form(admission.services, wanted),
    )
    job = await common_job(model, wanted, outline)
    style = answer_style(wanted, outline)
    name = answer_name(admission, wanted)
    return Plan(job, Answer(model, admission.lease, style, name, wanted.request_id), wanted)


def _all_encoded(model: ServedModel, prompts: Sequence[str | list[int]], special: bool) -> list[Prompt]:
    return [_encoded(model, prompt, special) for prompt in prompts]


def _encoded(model: ServedModel, prompt: str | list[int], special: bool) -> Prompt:
    if isinstance(prompt, list):
        check_ids(model, prompt, "prompt")
        found = Prompt(tuple(prompt))
    else:
        found = encoded(model, prompt, special)
    if not found.token_ids:
        raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
    return found
