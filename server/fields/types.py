"""Types of request fields that pydantic does not have: each takes the forms that clients send and gives one."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from peqa_runtime.core import MAX_BLEND
from peqa_runtime.sampling_params import MAX_LOGPROB_TOKENS, MAX_STOP_TOKENS

MAX_STOP_STRINGS = 64


class Strict(BaseModel):
    """Exact types, finite numbers, known fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, value: object) -> object:
        """Of many unknown fields the first is enough to refuse: each takes microseconds to describe."""
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        names = {field.alias or name for name, field in cls.model_fields.items()}
        first = next(name for name in value if name not in names)
        return {name: value[name] for name in value if name in names or name == first}


def _prompts(value: object) -> list[str] | list[list[int]]:
    """Normalise the four forms of `prompt` to a list of texts or id lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError(
            "prompt", "must be a string, a list of strings, a list of token ids or a list of such lists"
        )
    if not value:
        raise PydanticCustomError("prompt", "must not be an empty list")
    if _all_are(int, value):
        return [value]
    if _all_are(str, value) or (_all_are(list, value) and all(_all_are(int, ids) for ids in value)):
        return value
    raise PydanticCustomError(
        "prompt",
        "must be a string, a list of strings, a list of token ids or a list of such lists, not a mixture",
    )


def _all_are(kind: type, values: list[object]) -> bool:
    """Whether JSON values are all of one type. (true and false are no integers.)"""
    return all(type(value) is kind for value in values)


def _stops(value: object) -> tuple[str, ...]:
    """Normalise `stop` to a tuple of non-empty strings."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if isinstance(stops, list) and len(stops) > MAX_STOP_STRINGS:
        raise PydanticCustomError("stop", "must hold at most 64 strings")
    if not isinstance(stops, list) or not _all_are(str, stops):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
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
            if type(token_id) is not int:
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
    if len(value) > MAX_BLEND:
        raise PydanticCustomError("task", "must blend 1 to {most} tasks", {"most": MAX_BLEND})
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
# Not validated a second time as what it has become: pydantic takes a second for a million lists.
Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    BeforeValidator(valid_text),
]
StopStringList = Annotated[
    tuple[str, ...],
    BeforeValidator(_stops, json_schema_input_type=str | list[str] | None),
    BeforeValidator(valid_text),
]
Items = TypeVar("Items")
ListOf = Annotated[list[Items], Field(fail_fast=True)]
"""A list of which the first wrong item is told: a refusal tells no more, and a million of them take ten seconds."""

StopTokenList = Annotated[tuple[int, ...], id_list(MAX_STOP_TOKENS)]
LogprobTokenList = Annotated[tuple[int, ...], id_list(MAX_LOGPROB_TOKENS)]
