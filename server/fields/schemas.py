"""What clients may send. Strict: a wrong type, a NaN or an unknown field is refused by name, never guessed.

Fields of other servers that change nothing here (or that hold the value at which they change nothing) are
accepted; the same fields with any other value are refused, because ignoring them would be a silent lie.
"""

from __future__ import annotations

import difflib
import gc
from typing import Annotated, Any, TypeVar

from pydantic import Field
from pydantic_core import from_json

from peqa_runtime.sampling_params import MAX_LOGPROBS, SamplingParams
from peqa_server.fields.foreign import is_neutral
from peqa_server.fields.forms import LogitBias, ResponseFormat, Schema, StructuredOutputs, Text, Texts
from peqa_server.fields.types import (
    ListOf,
    LogprobTokenList,
    Prompts,
    Side,
    StopStringList,
    StopTokenList,
    Strict,
    TaskChoice,
    between,
)
from peqa_server.http.errors import ApiError, show

MAX_N = 128


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
    max_tokens: Annotated[int | None, between(0)] = None
    min_tokens: Annotated[int | None, between(0)] = None
    temperature: Annotated[float | None, between(0, 100)] = None
    top_p: Annotated[float | None, between(0, 1)] = None
    top_k: Annotated[int | None, between(-1)] = None
    min_p: Annotated[float | None, between(0, 1)] = None
    seed: Annotated[int | None, between(-(2**63), 2**63 - 1)] = None
    presence_penalty: Annotated[float | None, between(-2, 2)] = None
    frequency_penalty: Annotated[float | None, between(-2, 2)] = None
    repetition_penalty: Annotated[float | None, between(0.01, 100)] = None
    logit_bias: LogitBias = ()
    allowed_token_ids: ListOf[int] | None = None
    bad_words: Texts | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Texts | None = None
    guided_grammar: Text | None = None
    stop: StopStringList = ()
    stop_token_ids: StopTokenList = ()
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    n: Annotated[int | None, between(1, MAX_N)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int | None, between(1)] = None
    prompt_logprobs: Annotated[int | None, between(0, MAX_LOGPROBS)] = None
    logprob_token_ids: LogprobTokenList = ()
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int | None, between(-1)] = None
    truncation_side: Side | None = None
    user: str | None = None
    priority: Annotated[int | None, between(-(2**31), 2**31 - 1)] = None
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
            logprob_token_ids=self.logprob_token_ids,
            **given,
        )


class CompletionRequest(GenerationFields):
    """Body of POST /v1/completions."""

    prompt: Prompts
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int | None, between(0, MAX_LOGPROBS)] = None
    add_special_tokens: bool | None = None


class RollbackRequest(Strict):
    """Body of POST /v1/tasks/{task}/rollback; without it, one revision back."""

    revision: str | None = None


Model = TypeVar("Model", bound=Strict)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Anything else: `ApiError` 400."""
    try:
        value = _from_json(body)
    except ValueError as error:
        detail = str(error)
        raise ApiError(400, f"the body is not valid JSON: {detail[:200]}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {show(value)}", code="invalid_json")
    return value


def parse(schema: type[Model], body: bytes | dict[str, Any]) -> Model:
    """Read a JSON body as `schema`; everything wrong with it is an `ApiError` 400 (or pydantic's, with the field)."""
    value = parse_object(body) if isinstance(body, bytes) else body
    fields = schema.model_fields
    if "model" in fields:  # a route of OpenAI's or vLLM's
        value = {name: v for name, v in value.items() if name in fields or not is_neutral(name, v)}
    for name in value:
        if name not in fields:
            near = difflib.get_close_matches(name[:80], fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ApiError(400, f"unknown field {name[:80]!r}{hint}", code="unknown_field", param=name[:80])
    return schema.model_validate(value)


def _from_json(body: bytes) -> Any:
    """The value of a body. Nothing else runs meanwhile, so it takes no time for looking through what it makes:
    three quarters of a second, of one, where eight megabytes are nothing but lists."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return from_json(body, allow_inf_nan=False)
    finally:
        if collects:
            gc.enable()
