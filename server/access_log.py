"""The outermost layer of the app: request ids, one log line and one count per request, and the last catch.

Prompts and answers are never logged.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peqa_server.errors import ApiError, to_api_error
from peqa_server.metrics import Metrics

log = logging.getLogger("peqa.access")

_SAFE_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


@dataclass
class RequestNote:
    """What becomes known of a request while it is served; times of `received` are `time.perf_counter`'s."""

    request_id: str
    received: float = field(default_factory=time.perf_counter)
    task: str | None = None
    revision: str | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    first_token_seconds: float | None = None
    error_code: str | None = None
    error_param: str | None = None
    client_gone: bool = False


class Edge:
    """ASGI middleware: gives each request its note and its id, and turns what nobody caught into a 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note = RequestNote(_request_id(scope))
        scope.setdefault("state", {})["note"] = note
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", note.request_id.encode()),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log.exception("request %s failed", note.request_id)
            if status == 0:
                await to_api_error(error).response()(scope, receive, send_with_id)
        finally:
            self._account(scope, note, status)

    def _account(self, scope: Scope, note: RequestNote, status: int) -> None:
        route = scope.get("route")
        # The pattern, not the path: a label that clients could choose freely would grow without bound.
        pattern = getattr(route, "path", None) or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        self._metrics.http_requests.labels(pattern, method, str(status)).inc()
        if note.error_code is not None:
            self._metrics.rejections.labels(note.error_code).inc()
        if note.client_gone:
            self._metrics.disconnects.inc()
        level = logging.DEBUG if pattern in _QUIET else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, _line(scope, note, status))


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_QUIET = frozenset({"/health", "/ready", "/metrics"})


def _line(scope: Scope, note: RequestNote, status: int) -> str:
    line = {
        "id": note.request_id,
        "method": scope["method"],
        "path": scope["path"][:120],
        "status": status,
        "ms": round(1000 * (time.perf_counter() - note.received), 1),
        "task": note.task,
        "revision": note.revision[:12] if note.revision else None,
        "prompt_tokens": note.prompt_tokens,
        "tokens": note.generated_tokens,
        "first_token_ms": round(1000 * note.first_token_seconds, 1) if note.first_token_seconds else None,
        "error": note.error_code,
        "param": note.error_param,
        "client_gone": note.client_gone or None,
    }
    return json.dumps({name: value for name, value in line.items() if value is not None})


def _request_id(scope: Scope) -> str:
    """The client's X-Request-Id when it is harmless, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SAFE_ID.fullmatch(value):
            return bytes(value).decode("ascii")
    return uuid.uuid4().hex


def note_of(scope: Scope) -> RequestNote:
    """The note that `Edge` gave to this request."""
    note: RequestNote = scope["state"]["note"]
    return note


def refused(scope: Scope, error: ApiError) -> None:
    """Remember why a request was refused, for log and metrics."""
    note = note_of(scope)
    note.error_code, note.error_param = error.code, error.param
