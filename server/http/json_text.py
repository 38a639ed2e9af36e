"""JSON of any size, written in parts: Python's encoder lets no other thread run before it is done with a value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from starlette.responses import Response

PART = 4096  # values, or 16 times as many characters: about a millisecond


def json_response(value: Any) -> Response:
    """An answer whose body is the value. For large ones, to be made in a thread."""
    return Response("".join(json_parts(value)).encode(), media_type="application/json")


def json_parts(value: Any, *, ascii_only: bool = False) -> Iterator[str]:
    """The JSON text of a value, the same as of `json.dumps`, in parts that are small where its strings are."""
    write = _ASCII if ascii_only else _UNICODE
    if _weight(value) < PART:
        yield write(value)
    elif isinstance(value, dict):
        for i, (key, item) in enumerate(value.items()):
            yield ("," if i else "{") + write(key) + ":"
            yield from json_parts(item, ascii_only=ascii_only)
        yield "}"
    elif isinstance(value, str):
        yield '"'
        for start in range(0, len(value), 16 * PART):
            yield write(value[start : start + 16 * PART])[1:-1]
        yield '"'
    else:
        for i, items in enumerate(_groups(value)):
            yield "," if i else "["
            if len(items) > 1:
                yield write(items)[1:-1]
            else:
                yield from json_parts(items[0], ascii_only=ascii_only)
        yield "]"


_UNICODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_ASCII = json.JSONEncoder(separators=(",", ":")).encode


def _groups(items: list[Any]) -> Iterator[list[Any]]:
    """The items in order, as many in a group as are light enough together; heavy ones by themselves."""
    group: list[Any] = []
    weight = 0
    for item in items:
        weight += (own := _weight(item))
        if group and weight >= PART:
            yield group
            group, weight = [], own
        group.append(item)
    yield group


def _weight(value: Any) -> int:
    """How many values a value is made of, sixteen characters counting as one; counted up to `PART`."""
    if isinstance(value, str):
        return 1 + len(value) // 16
    if not isinstance(value, dict | list) or not value:
        return 1
    if len(value) >= PART:
        return PART
    total = 1
    for item in value.values() if isinstance(value, dict) else value:
        total += _weight(item)
        if total >= PART:
            break
    return total
