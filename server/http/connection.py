"""One connection: uvicorn's, with bounds on what a client may hold open without asking anything.

uvicorn ends an idle connection between two requests. One that never sends a request, or never ends its head, it would
keep for ever, and any number of them; and a response that nobody reads cannot be cut from within an app.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

ABORT = "abort_connection"
"""Key in a request's `state`: a call that ends its connection at once, whatever is still to be sent."""

MAX_HEAD_BYTES = 32 * 1024
"""Of a request line with its headers, as far as they do not come in one piece; more is answered with 400."""
HEAD_SECONDS = 30.0

Refused = Callable[[int, str, str | None], None]
"""Told of each refusal: status, error code, and the client's address."""

_FULL = {
    "message": "this server has as many connections as it takes; try again shortly",
    "type": "server_error",
    "param": None,
    "code": "too_many_connections",
}
_LATE = {
    "message": "the head of the request did not come in time; send the request again",
    "type": "timeout_error",
    "param": None,
    "code": "head_timeout",
}
_MALFORMED = {
    "message": "this is not HTTP/1.1 as it has to be, or its head is larger than 32 KiB",
    "type": "invalid_request_error",
    "param": None,
    "code": "malformed_http",
}
_SHORTLY = b"retry-after: 1\r\n"


def bounded_connection(
    limit: int, head_seconds: float = HEAD_SECONDS, *, refused: Refused | None = None
) -> type[H11Protocol]:
    """The class of a server's connections: at most `limit` at once, each request's head within `head_seconds`.

    What is refused here never reaches the app; `refused` hears of it.
    """

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.app_state = {**self.app_state, ABORT: self._abort}
            self._head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Take the connection, or say that there are too many."""
            super().connection_made(transport)
            if len(self.connections) > limit:
                self._refuse(503, _FULL, _SHORTLY)
            else:
                self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            """Forget the timer with the connection."""
            self._head_is_there()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Watch whether a request's head is under way."""
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._head_is_there()
            elif self._head_timer is None:
                self._await_head()

        def _await_head(self) -> None:
            self._head_timer = self.loop.call_later(head_seconds, self._refuse_late)

        def _head_is_there(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def send_400_response(self, msg: str) -> None:
            """What cannot be parsed is told as any refusal is; in the middle of an answer the connection just ends."""
            if self.conn.our_state is h11.IDLE:
                self._refuse(400, _MALFORMED)
            elif (
                self.conn.our_state is h11.SEND_RESPONSE
            ):  # the body is at fault: the app tells of this request
                self._refuse(400, _MALFORMED, told=False)
            else:
                self.transport.close()

        def _unsupported_upgrade_warning(self) -> None:
            """Nobody speaks WebSocket here; a client that asks for it is answered without, and no news for the log."""

        def _refuse(
            self, status: int, error: Mapping[str, object], more: bytes = b"", *, told: bool = True
        ) -> None:
            if self.transport.is_closing():
                return
            body = json.dumps({"error": error}).encode()
            head = b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % (
                status,
                HTTPStatus(status).phrase.encode(),
                len(body),
            )
            self.transport.write(head + more + b"connection: close\r\n\r\n" + body)
            self.transport.close()
            if told and refused is not None:
                refused(status, str(error["code"]), self.client[0] if self.client else None)

        def _refuse_late(self) -> None:
            began = bool(self.conn.trailing_data[0])  # else it was opened ahead, as browsers do
            self._refuse(408, _LATE, _SHORTLY, told=began)

        def _abort(self) -> None:
            self.transport.abort()

    return Connection
