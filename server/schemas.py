"""What clients may send. Strict: a wrong type, a NaN or an unknown field is refused by name, never guessed.

Fields of other servers that change nothing here (or that hold the value at which they change nothing) are
accepted; the same fields with any other value are refused, because ignoring them would be a silent lie.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError, from_json

from peqa_runtime.core import SamplingParams
from peqa_server.errors import ApiError, show

MAX_STOP_STRINGS = 64

NEUTRAL_FIELDS: Mapping[str, tuple[object, ...] | None] = {
    # labels and storage of OpenAI's own service
    "store": None,
    "metadata": None,
    "service_tier": None,
    "safety_identifier": None,
    "session_id": None,
    "prompt_cache_key": None,
    # options of other servers at the value that switches them off
    "logit_bias": ({}, []),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "truncation_side": ("left",),
    "spaces_between_special_tokens": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "prompt_embeds": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "top_a": (0, 0.0),
    "typical_p": (1, 1.0),
    "early_stopping": (False,),
    "detokenize": (True,),
}
"""Field -> the values at which it changes nothing (null always is one); None: no value changes anything."""

_REASONS: Mapping[str, str] = {
    "suffix": "the model continues text and cannot fill in before a suffix",
    "use_beam_search": "only sampling and greedy decoding are offered",
}


def _prompts(value: object) -> list[str | list[int]]:
    """Normalise the four forms of `prompt` to a list of texts or id lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError(
            "prompt", "must be a string, a list of strings, a list of token ids or a list of such lists"
        )
    if not value:
        raise PydanticCustomError("prompt", "must not be an empty list")
    if all(_is_id(v) for v in value):
        return [value]
    if all(isinstance(v, str) for v in value):
        return value
    if all(isinstance(v, list) and all(_is_id(t) for t in v) for v in value):
        return value
    raise PydanticCustomError(
        "prompt",
        "must be a string, a list of strings, a list of token ids or a list of such lists, not a mixture",
    )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stops(value: object) -> tuple[str, ...]:
    """Normalise `stop` to a tuple of non-empty strings."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise PydanticCustomError("stop", "must hold at most 64 strings")
    if "" in stops:
        raise PydanticCustomError("stop", "must not hold an empty string")
    return tuple(stops)


def _valid_text(value: object) -> object:
    """Refuse lone surrogates, which JSON can spell and no tokenizer can read."""
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if isinstance(text, str):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise PydanticCustomError("unicode", "must be valid Unicode (lone surrogate found)") from None
    return value


def _id_list(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(_is_id(v) for v in value):
        raise PydanticCustomError("ids", "must be a list of token ids")
    return tuple(value)


def _task_choice(value: object) -> object:
    """A name, or names with their weights. (A union of types would describe its two failures at once.)"""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise PydanticCustomError("task", "must be a task's name, or an object of names and weights")
    for weight in value.values():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise PydanticCustomError("task", "must have numbers as weights")
    try:
        return {name: float(weight) for name, weight in value.items()}
    except OverflowError:
        raise PydanticCustomError("task", "must have weights that sum to 1") from None


TaskChoice = Annotated[str | dict[str, float], BeforeValidator(_task_choice), BeforeValidator(_valid_text)]
Prompts = Annotated[list[str | list[int]], BeforeValidator(_prompts), BeforeValidator(_valid_text)]
StopStringList = Annotated[tuple[str, ...], BeforeValidator(_stops), BeforeValidator(_valid_text)]
TokenIdList = Annotated[tuple[int, ...], BeforeValidator(_id_list)]


class Strict(BaseModel):
    """Exact types, finite numbers, known fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    """`stream_options` of OpenAI, and vLLM's usage in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


_SAMPLING_FIELDS = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
"""Fields that `SamplingParams` has under the same name."""


class GenerationFields(Strict):
    """What completions and chat completions share. A null is the same as leaving the field out."""

    model: str | None = None
    task: TaskChoice | None = None
    adapter_id: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: StopStringList = ()
    stop_token_ids: TokenIdList = ()
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = None
    user: str | None = None
    priority: int | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:/+=-]{1,128}$")] | None = None

    def sampling_params(
        self, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """The runtime's parameters; values out of range raise `InvalidRequest` there, by field name."""
        given: dict[str, Any] = {
            name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None
        }
        return SamplingParams(
            max_tokens=max_tokens,
            stop_token_ids=self.stop_token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **given,
        )


class CompletionRequest(GenerationFields):
    """Body of POST /v1/completions."""

    prompt: Prompts
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None


class ChatMessage(Strict):
    """One message; `content` is text, or a list of text parts."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The message's text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class TextPart(Strict):
    """One part of a message's content; only text is understood."""

    type: str
    text: str


class ChatCompletionRequest(GenerationFields):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class TokenizeRequest(Strict):
    """Body of POST /tokenize."""

    prompt: Annotated[str, BeforeValidator(_valid_text)]
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None


class RollbackRequest(Strict):
    """Body of POST /v1/tasks/{task}/rollback; without it, one revision back."""

    revision: str | None = None


ChatMessage.model_rebuild()
ChatCompletionRequest.model_rebuild()

Model = TypeVar("Model", bound=Strict)


def parse(schema: type[Model], body: bytes) -> Model:
    """Read a JSON body as `schema`; everything wrong with it is an `ApiError` 400 (or pydantic's, with the field)."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        detail = str(error)
        raise ApiError(400, f"the body is not valid JSON: {detail[:200]}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {show(value)}", code="invalid_json")
    fields = schema.model_fields
    if issubclass(schema, GenerationFields):
        value = {name: v for name, v in value.items() if name in fields or not _is_neutral(name, v)}
    for name in value:
        if name not in fields:
            near = difflib.get_close_matches(name[:80], fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ApiError(400, f"unknown field {name[:80]!r}{hint}", code="unknown_field", param=name[:80])
    return schema.model_validate(value)


def _is_neutral(name: str, value: object) -> bool:
    """True for a known field of other servers that changes nothing; refuse it when it would change something."""
    if name not in NEUTRAL_FIELDS:
        return False
    allowed = NEUTRAL_FIELDS[name]
    if value is None or allowed is None:
        return True
    if any(value == a and type(value) is type(a) for a in allowed):
        return True
    reason = _REASONS.get(name, "this server does not offer it")
    raise ApiError(
        400, f"{name} is not supported: {reason}; leave it out", code="unsupported_field", param=name
    )
