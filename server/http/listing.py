"""Lists of all tasks: whole, as clients expect, but made and sent piece by piece; or a page, where one is asked for.

?limit=100&after=NAME     at most 100 rows, those after NAME in the order of names; `has_more` says if others follow
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from peqa_runtime.core import TaskInfo
from peqa_server.http.api_document import parameter
from peqa_server.http.errors import ApiError
from peqa_server.services import TaskService

Json = Mapping[str, Any]

MAX_LIMIT = 10_000
PAGE_PARAMETERS = [
    parameter(
        "limit", "query", "At most so many rows.", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT}
    ),
    parameter("after", "query", "Rows whose names come after this one.", {"type": "string"}),
]
"""The queries, for /openapi.json."""

_PIECE = 250  # rows: a few milliseconds of work, between which other requests get their turn


async def list_response(
    request: Request,
    tasks: TaskService,
    row: Callable[[TaskInfo], Json],
    *,
    first: Sequence[Json] = (),
    more: Json | None = None,
) -> Response:
    """`{"object": "list", "data": [first…, a row per task…], "has_more", **more}`, as `limit` and `after` say.

    `first` are the rows of a list that starts at its beginning. A wrong query: 400.
    """
    limit, after = _limit(request), request.query_params.get("after", "")
    head = list(first) if not after else []
    if after in [row.get("id") for row in first]:
        after = ""  # these rows come before all tasks, whatever their names
    size = _PIECE if limit is None else max(0, limit - len(head))
    infos = await asyncio.to_thread(tasks.page, after, size + 1)
    rows = head + [row(info) for info in infos[:size]]
    if limit is not None or len(infos) <= size:
        has_more = len(infos) > size
        return JSONResponse({"object": "list", "data": rows[:limit], "has_more": has_more, **(more or {})})
    return StreamingResponse(
        _pieces(tasks, row, rows, infos[size - 1].task, more or {}), media_type="application/json"
    )


async def _pieces(
    tasks: TaskService, row: Callable[[TaskInfo], Json], rows: list[Json], last: str, more: Json
) -> AsyncIterator[str]:
    """The JSON text of the whole list, whose beginning is `rows`, up to task `last`."""
    yield '{"object":"list","data":[' + _joined(rows)
    while infos := await asyncio.to_thread(tasks.page, last, _PIECE):
        last = infos[-1].task
        yield "," + _joined([row(info) for info in infos])
    yield "]," + _dumped({"has_more": False, **more})[1:]


def _joined(rows: Sequence[Json]) -> str:
    return ",".join(map(_dumped, rows))


def _dumped(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _limit(request: Request) -> int | None:
    text = request.query_params.get("limit")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_LIMIT):
        raise ApiError(
            400, f"limit must be a whole number from 1 to {MAX_LIMIT}, got {text[:40]!r}", code="invalid_value",
            param="limit",
        )  # fmt: skip
    return int(text)
