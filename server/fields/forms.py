"""Fields that say what form an answer has, and which tokens it may have: OpenAI's, vLLM's and its older ones."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from peqa_runtime.sampling_params import MAX_BIASES
from peqa_server.fields.types import ListOf, Strict, one_of, valid_text

Text = Annotated[str, BeforeValidator(valid_text)]
Texts = Annotated[ListOf[str], BeforeValidator(valid_text)]


def _biases(value: object) -> object:
    """OpenAI's object of numbers by token id, as pairs. JSON's keys are strings."""
    if value is None or value == []:
        return ()
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "must be an object of numbers by token id")
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("logit_bias", "must name at most {most} tokens", {"most": MAX_BIASES})
    pairs = []
    for key, number in value.items():
        if not isinstance(key, str) or not (key.isascii() and key.isdigit()) or len(key) > 10:
            raise PydanticCustomError("logit_bias", "must have token ids as keys (digits only)")
        if isinstance(number, bool) or not isinstance(number, int | float) or not -100 <= number <= 100:
            raise PydanticCustomError("logit_bias", "must have numbers between -100 and 100 as values")
        pairs.append((int(key), float(number)))
    return tuple(pairs)


def _schema(value: object) -> object:
    """A JSON schema: an object, true or false, or the text of one. (A union of types would describe all failures.)"""
    if value is None or isinstance(value, dict | bool | str):
        return value
    raise PydanticCustomError("schema", "must be a JSON schema: an object, or its text")


LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    BeforeValidator(_biases, json_schema_input_type=dict[str, float]),
]
Schema = Annotated[dict[str, Any] | bool | str, BeforeValidator(_schema), BeforeValidator(valid_text)]


class JsonSchemaFormat(Strict):
    """`response_format.json_schema` of OpenAI. The schema is enforced whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """`response_format` of OpenAI."""

    type: Annotated[str, one_of("text", "json_object", "json_schema")]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Strict):
    """`structured_outputs` of vLLM: exactly one kind. `disable_fallback` may be set: nothing to fall back to."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Texts | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None
    disable_fallback: bool | None = None
