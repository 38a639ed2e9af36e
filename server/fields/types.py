"""Types of request fields that pydantic does not have: each takes the forms that clients send and gives one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from peqa_runtime.sampling_params import MAX_LOGPROB_TOKENS, MAX_STOP_TOKENS

MAX_STOP_STRINGS = 64


class Strict(BaseModel):
    """Exact types, finite numbers, known fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


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


def valid_text(value: object) -> object:
    """Refuse lone surrogates, which JSON can spell and no tokenizer can read."""
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if isinstance(text, str):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise PydanticCustomError("unicode", "must be valid Unicode (lone surrogate found)") from None
    return value


def id_list(most: int) -> BeforeValidator:
    """A check that a value is a list of token ids; it becomes a tuple with each of them once, `most` at most."""

    def check(value: object) -> tuple[int, ...]:
        if value is not None and not isinstance(value, list):
            raise PydanticCustomError("ids", "must be a list of token ids")
        found: dict[int, None] = {}
        for token_id in value or ():
            if not _is_id(token_id):
                raise PydanticCustomError("ids", "must be a list of token ids")
            found[token_id] = None
            if len(found) > most:
                raise PydanticCustomError("ids", "must hold at most {most} token ids", {"most": most})
        return tuple(found)

    return BeforeValidator(check, json_schema_input_type=Annotated[list[int], Field(max_length=most)] | None)


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


def one_of(*allowed: str) -> BeforeValidator:
    """A check that a value is one of these words. (A `Literal` of pydantic refuses in words of Python's.)"""

    def check(value: object) -> object:
        if value is not None and (not isinstance(value, str) or value not in allowed):
            raise PydanticCustomError("one_of", "must be {words}", {"words": " or ".join(map(repr, allowed))})
        return value

    return BeforeValidator(check, json_schema_input_type=Literal[allowed])


def between(least: float | None = None, most: float | None = None) -> FieldInfo:
    """A range as /openapi.json tells it. (What is out of it is refused by the runtime, which knows the reasons.)"""
    limits = {"minimum": least, "maximum": most}
    found: FieldInfo = Field(json_schema_extra={k: v for k, v in limits.items() if v is not None})
    return found


Side = Annotated[str, one_of("left", "right")]
TaskChoice = Annotated[str | dict[str, float], BeforeValidator(_task_choice), BeforeValidator(valid_text)]
Prompts = Annotated[
    list[str | list[int]],
    BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    BeforeValidator(valid_text),
]
StopStringList = Annotated[
    tuple[str, ...],
    BeforeValidator(_stops, json_schema_input_type=str | list[str] | None),
    BeforeValidator(valid_text),
]
StopTokenList = Annotated[tuple[int, ...], id_list(MAX_STOP_TOKENS)]
LogprobTokenList = Annotated[tuple[int, ...], id_list(MAX_LOGPROB_TOKENS)]
