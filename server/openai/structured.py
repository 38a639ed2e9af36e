"""The form that a request asks its answers to have: found among the fields, checked, and compiled off the event loop.

form = await wanted_form(services, wanted)               # response_format, structured_outputs, guided_*
form = await compiled(services, form_of("tools", Constraint.json_schema, schema))      # any other reason for one
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from peqa_runtime.constraint import Constraint
from peqa_runtime.errors import InvalidRequest
from peqa_runtime.json_schema import closed
from peqa_server.fields.forms import ResponseFormat, StructuredOutputs
from peqa_server.fields.schemas import GenerationFields
from peqa_server.services import Services

_T = TypeVar("_T")


@dataclass(frozen=True)
class AnswerForm:
    """What every answer of a request keeps to, and the field that asked for it, which refusals name."""

    constraint: Constraint
    field: str


def form_of(field: str, make: Callable[[_T], Constraint], source: _T) -> AnswerForm:
    """The form that `make` (a constructor of `Constraint`) makes of what `field` holds. Raises `InvalidRequest`."""
    try:
        return AnswerForm(make(source), field)
    except InvalidRequest as error:
        raise InvalidRequest(f"{field}: {error}", param=field) from None


async def compiled(services: Services, form: AnswerForm) -> AnswerForm:
    """The form, once the engine has it at hand. Raises `InvalidRequest` with the field's name, `Overloaded`."""
    try:
        await asyncio.wrap_future(services.engine.prepare(form.constraint))
    except InvalidRequest as error:
        raise InvalidRequest(f"{form.field}: {error}", param=form.field) from None
    return form


_FIELDS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


async def wanted_form(services: Services, wanted: GenerationFields) -> AnswerForm | None:
    """The form that the request's own fields ask for; None: it is free. Raises `InvalidRequest`, `Overloaded`."""
    if all(getattr(wanted, field) is None for field in _FIELDS):
        return None
    form = await asyncio.to_thread(_the_form, wanted)  # schemas may be megabytes
    return await compiled(services, form) if form is not None else None


def _the_form(wanted: GenerationFields) -> AnswerForm | None:
    forms = list(_forms(wanted))
    if len(forms) > 1:
        raise InvalidRequest(
            f"{forms[0].field} and {forms[1].field} both say what form the answer has; send one of them",
            param=forms[1].field,
        )
    return forms[0] if forms else None


def _forms(wanted: GenerationFields) -> Iterator[AnswerForm]:
    if wanted.response_format is not None:
        yield from _of_response_format(wanted.response_format)
    if wanted.structured_outputs is not None:
        yield from _of_structured_outputs(wanted.structured_outputs)
    yield from _given(
        ("guided_json", Constraint.json_schema, wanted.guided_json),
        ("guided_regex", Constraint.regex, wanted.guided_regex),
        ("guided_choice", Constraint.choice, wanted.guided_choice),
        ("guided_grammar", Constraint.grammar, wanted.guided_grammar),
    )


def _of_response_format(wanted: ResponseFormat) -> Iterator[AnswerForm]:
    if wanted.json_schema is not None and wanted.type != "json_schema":
        raise InvalidRequest(
            f'response_format.json_schema needs the type "json_schema", not {wanted.type!r}',
            param="response_format",
        )
    if wanted.type == "json_object":
        yield AnswerForm(Constraint.json_object(), "response_format")
    elif wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise InvalidRequest(
                "response_format.json_schema is missing; it holds a name and the schema",
                param="response_format",
            )
        yield form_of("response_format", Constraint.json_schema, wanted.json_schema.schema_)


_NOT_OFFERED: Mapping[str, str] = {
    "structural_tag": "forms of parts of an answer are not enforced; grammar can say what stands around a part, with "
    "%json for its schema",
    "whitespace_pattern": "JSON is written with a space, or a line break and its indentation, between its parts, or, "
    "with disable_any_whitespace, without",
}


def _of_structured_outputs(wanted: StructuredOutputs) -> Iterator[AnswerForm]:
    for name, reason in _NOT_OFFERED.items():
        if getattr(wanted, name) is not None:
            raise InvalidRequest(
                f"structured_outputs.{name} is not offered: {reason}; leave it out",
                param=f"structured_outputs.{name}",
            )
    compact, no_more = bool(wanted.disable_any_whitespace), bool(wanted.disable_additional_properties)

    def schema(source: dict[str, Any] | bool | str) -> Constraint:
        form = Constraint.json_schema(source, compact=compact)
        return Constraint.json_schema(closed(json.loads(form.source)), compact=compact) if no_more else form

    found = list(
        _given(
            ("structured_outputs.json", schema, wanted.json_),
            ("structured_outputs.regex", Constraint.regex, wanted.regex),
            ("structured_outputs.choice", Constraint.choice, wanted.choice),
            ("structured_outputs.grammar", Constraint.grammar, wanted.grammar),
        )
    )
    if wanted.json_object:
        found.append(AnswerForm(Constraint.json_object(compact=compact), "structured_outputs.json_object"))
    if len(found) != 1:
        raise InvalidRequest(
            "structured_outputs must have exactly one of json, regex, choice, grammar and json_object",
            param="structured_outputs",
        )
    for name, asked, has_place in (
        ("disable_any_whitespace", compact, wanted.json_ is not None or wanted.json_object),
        ("disable_additional_properties", no_more, wanted.json_ is not None),
    ):
        if asked and not has_place:
            raise InvalidRequest(
                f"structured_outputs.{name} is about JSON by a schema, which this form is not; leave it out",
                param=f"structured_outputs.{name}",
            )
    yield from found


def _given(*candidates: tuple[str, Callable[[Any], Constraint], object]) -> Iterator[AnswerForm]:
    """A form for each candidate (field, constructor, value) that has a value."""
    for field, make, source in candidates:
        if source is not None:
            yield form_of(field, make, source)
