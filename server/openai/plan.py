"""From a checked body to what is generated and how it is answered: what completions and chats have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peqa_runtime.errors import InvalidRequest
from peqa_runtime.text import encode
from peqa_server.fields.schemas import MAX_N, GenerationFields
from peqa_server.fields.tokens import with_controls
from peqa_server.openai.choice import Prompt, TextRules
from peqa_server.openai.completion_json import Answer, AnswerStyle
from peqa_server.openai.generation import Job, check_length
from peqa_server.openai.structured import AnswerForm
from peqa_server.openai.task_choice import Admission
from peqa_server.services import ServedModel
from peqa_server.settings import ServerSettings
from peqa_server.threads import aside

LONG_TEXT = 8192  # characters or token ids of all prompts, some milliseconds of encoding and checking
PER_PROMPT = 128  # characters whose encoding takes as long as beginning with a prompt
_LOOKED_AT = 1 << 16  # token ids looked at in one go, a millisecond in which nothing else runs


@dataclass(frozen=True)
class Plan:
    """A checked request: what to generate and how to write the answer."""

    job: Job
    answer: Answer
    wanted: GenerationFields


@dataclass(frozen=True)
class Outline:
    """What a route has found out by itself: prompts, choices for each, length, and what is told of the tokens.

    `logprobs`: alternatives to show for each token (None: nothing is shown). `shown_prompt`: the prompt is part of
    the answer's text. `skip_special_tokens` None: as the request says. `form`: what every answer keeps to.
    """

    prompts: tuple[Prompt, ...]
    n: int
    max_tokens: int
    logprobs: int | None
    shown_prompt: bool = False
    skip_special_tokens: bool | None = None
    form: AnswerForm | None = None


async def common_job(model: ServedModel, wanted: GenerationFields, outline: Outline) -> Job:
    """The job of a request. Raises `InvalidRequest`, `PromptTooLong`."""
    long = bool(wanted.bad_words) or len(wanted.allowed_token_ids or ()) > LONG_TEXT
    return await aside(long, _common_job, model, wanted, outline)


def _common_job(model: ServedModel, wanted: GenerationFields, outline: Outline) -> Job:
    _check_stream(wanted)
    params = wanted.sampling_params(
        max_tokens=outline.max_tokens,
        logprobs=outline.logprobs,
        prompt_logprobs=_prompt_width(wanted, outline),
    )
    params = with_controls(model, wanted, outline.form, params)
    check_ids(model, params.stop_token_ids, "stop_token_ids")
    check_ids(model, params.logprob_token_ids, "logprob_token_ids")
    for prompt in outline.prompts:
        check_length(model, len(prompt.token_ids), outline.max_tokens)
    skip = outline.skip_special_tokens
    rules = TextRules(
        stop=wanted.stop,
        include_stop=bool(wanted.include_stop_str_in_output),
        skip_special_tokens=wanted.skip_special_tokens is not False if skip is None else skip,
        spaces_between_special_tokens=wanted.spaces_between_special_tokens,
        echo=outline.shown_prompt,
        min_tokens=params.min_tokens,
    )
    return Job(outline.prompts, outline.n, params, rules, wanted.priority or 0, wanted.cache_salt or "")


def answer_style(wanted: GenerationFields, outline: Outline) -> AnswerStyle:
    """What the answer shows besides the text."""
    return AnswerStyle(
        logprobs=outline.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
        token_ids=bool(wanted.return_token_ids),
        tokens_as_ids=bool(wanted.return_tokens_as_token_ids),
    )


def checked_n(wanted: GenerationFields, num_prompts: int, settings: ServerSettings) -> int:
    """Choices of each prompt. Raises `InvalidRequest` when there are too many in all."""
    n = 1 if wanted.n is None else wanted.n
    if not 1 <= n <= MAX_N:
        raise InvalidRequest(f"n must be between 1 and {MAX_N}, got {n}", param="n")
    if n * num_prompts > settings.max_choices:
        raise InvalidRequest(
            f"{num_prompts} prompts × n = {n} are more than {settings.max_choices} choices; send several requests",
            param="prompt",
        )
    return n


def encoded(model: ServedModel, text: str, special: bool) -> Prompt:
    """The prompt of a text, `special` with the begin-of-text token where the model has one."""
    return Prompt(tuple(encode(model.tokenizer, text, add_special_tokens=special)), text)


def check_ids(model: ServedModel, ids: Sequence[int], field: str) -> None:
    """Raise `InvalidRequest` unless all ids are in the vocabulary."""
    for start in range(0, len(ids), _LOOKED_AT):
        part = ids[start : start + _LOOKED_AT]
        if not 0 <= min(part) <= max(part) < model.vocab_size:
            wrong = next(token_id for token_id in part if not 0 <= token_id < model.vocab_size)
            raise InvalidRequest(
                f"{field} holds the id {wrong}, which is not in the vocabulary: ids go from 0 to "
                f"{model.vocab_size - 1}",
                param=field,
            )


def truncated(model: ServedModel, prompt: Prompt, wanted: GenerationFields, max_tokens: int) -> Prompt:
    """The last (`truncation_side` "right": first) `truncate_prompt_tokens` tokens of a prompt.

    -1: as many as the context holds besides `max_tokens`. Raises `InvalidRequest`.
    """
    keep = wanted.truncate_prompt_tokens
    if keep is None:
        return prompt
    if keep == -1:
        keep = max(1, model.max_model_len - max_tokens)  # none left: the check of the length says so
    if keep < 1:
        raise InvalidRequest(
            "truncate_prompt_tokens must be -1 or at least 1", param="truncate_prompt_tokens"
        )
    if len(prompt.token_ids) <= keep:
        return prompt
    right = wanted.truncation_side == "right"
    return Prompt(prompt.token_ids[:keep] if right else prompt.token_ids[-keep:])


def answer_name(admission: Admission, wanted: GenerationFields) -> str:
    """The `model` of the answer: what the client called it, else the base's id."""
    return wanted.model or admission.services.model.model_id


def _prompt_width(wanted: GenerationFields, outline: Outline) -> int | None:
    """Alternatives to compute for each prompt token: the wider of what echo and prompt_logprobs show."""
    asked, echoed = wanted.prompt_logprobs, outline.logprobs if outline.shown_prompt else None
    if asked is None or echoed is None or asked < 0:  # below 0: to be refused, not outdone
        return echoed if asked is None else asked
    return max(asked, echoed)


def _check_stream(wanted: GenerationFields) -> None:
    """Raise `InvalidRequest` where an option and the stream do not go together."""
    if wanted.stream:
        if wanted.prompt_logprobs is not None:
            raise InvalidRequest(
                "prompt_logprobs cannot be streamed; leave stream out, or use echo with logprobs",
                param="prompt_logprobs",
            )
        if wanted.stream_interval is not None and wanted.stream_interval < 1:
            raise InvalidRequest("stream_interval must be at least 1", param="stream_interval")
        options = wanted.stream_options
        if options is not None and options.include_obfuscation:
            raise InvalidRequest(
                "stream_options.include_obfuscation is not offered; leave it out", param="stream_options"
            )
        return
    for field in ("stream_options", "stream_interval"):
        if getattr(wanted, field) is not None:
            raise InvalidRequest(f"{field} needs stream to be true", param=field)
