"""Walking through JSON schemas: which of a schema's values are schemas themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ONE = ("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def with_parts(schema: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy of a schema with `change` applied to the schemas that it is made of, and to no other value."""
    new = dict(schema)
    for key in _ONE:
        if isinstance(schema.get(key), dict | bool):
            new[key] = change(schema[key])
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            new[key] = [change(part) for part in schema[key]]
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            new[key] = {name: change(part) for name, part in schema[key].items()}
    return new


def closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` in each object of it that names properties and does not say."""
    if not isinstance(schema, dict):
        return schema
    new = with_parts(schema, closed)
    if "properties" in schema or "patternProperties" in schema:
        new.setdefault("additionalProperties", False)
    return new
