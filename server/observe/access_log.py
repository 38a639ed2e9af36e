"""The outermost layer of the app: request ids, one log line, one count and one trace per request, and the last catch.

Prompts and answers are never logged.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peqa_runtime.sampling_params import SamplingParams
from peqa_server.access.caller import Caller
from peqa_server.http.errors import ApiError, to_api_error
from peqa_server.observe.log_format import event, shown
from peqa_server.observe.metrics import Metrics

log = logging.getLogger("peqa.access")

_SAFE_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


@dataclass
class RequestNote:
    """What becomes known of a request while it is served. Moments are `time.perf_counter`'s.

    `received`: its first byte; `submitted`: handed to the engine; `started`: its first choice runs; then its first
    and its last token so far. `key_id`: of the API key that it came with; `caller`: what that key may do (nothing,
    until it is known). `change`: what it does to a task.
    """

    request_id: str
    received: float = field(default_factory=time.perf_counter)
    key_id: str | None = None
    caller: Caller = field(default_factory=Caller)
    task: str | None = None
    revision: str | None = None
    change: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    generated_tokens: int | None = None
    model: str | None = None
    params: SamplingParams | None = None
    choices: int | None = None
    submitted: float | None = None
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finish_reasons: tuple[str, ...] = ()
    error_code: str | None = None
    error_param: str | None = None
    client_gone: bool = False


class Tracer(Protocol):
    """Makes the spans of a request that has ended."""

    def record(self, scope: Scope, note: RequestNote, status: int, route: str) -> None: ...


class Edge:
    """ASGI middleware: gives each request its note and its id, and turns what nobody caught into a 500.

    HEAD is GET from here on, its body left out on the way back, so that no route has to know of it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note = RequestNote(_request_id(scope))
        scope.setdefault("state", {})["note"] = note
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", note.request_id.encode()),
                ]
            elif method == "HEAD" and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log.exception("request %s failed", note.request_id)
            if status == 0:
                await to_api_error(error).response()(scope, receive, send_with_id)
        finally:
            self._account({**scope, "method": method}, note, status)

    def _account(self, scope: Scope, note: RequestNote, status: int) -> None:
        route = scope.get("route")
        # The pattern, not the path: a label that clients could choose freely would grow without bound.
        pattern = getattr(route, "path", None) or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        self._metrics.http_requests.labels(pattern, method, str(status)).inc()
        if note.error_code is not None and pattern not in _QUIET:
            self._metrics.rejections.labels(note.error_code).inc()
        if note.client_gone:
            self._metrics.disconnects.inc()
        level = logging.DEBUG if pattern in _QUIET else logging.INFO
        if log.isEnabledFor(level):
            _log_line(level, scope, note, status)
        if self._tracer is not None and pattern not in _QUIET:
            self._tracer.record(scope, note, status, pattern)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_QUIET = frozenset({"/health", "/ready", "/ping", "/metrics"})


def _log_line(level: int, scope: Scope, note: RequestNote, status: int) -> None:
    method, path = scope["method"][:16], scope["path"][:120]
    event(
        log,
        level,
        f"{shown(method)} {shown(path)} {status}",
        said={"method": method, "path": path, "status": status},
        id=note.request_id,
        ms=_ms(note.received, time.perf_counter()),
        client=scope["client"][0] if scope.get("client") else None,
        key=note.key_id,
        task=note.task,
        revision=note.revision[:12] if note.revision else None,
        change=note.change,
        prompt_tokens=note.prompt_tokens,
        cached_tokens=note.cached_tokens or None,
        tokens=note.generated_tokens,
        queue_ms=_ms(note.submitted, note.started),
        first_token_ms=_ms(note.received, note.first_token),
        finish=",".join(note.finish_reasons) or None,
        error=note.error_code,
        param=note.error_param,
        client_gone=note.client_gone or None,
    )


def refused_connection(metrics: Metrics, status: int, code: str, client: str | None) -> None:
    """The line and the counts of a connection that was answered before there was a request."""
    metrics.http_requests.labels("unmatched", "OTHER", str(status)).inc()
    metrics.rejections.labels(code).inc()
    event(log, logging.INFO, f"no request {status}", said={"status": status}, client=client, error=code)


def _ms(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else round(1000 * max(0.0, end - begin), 1)


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
