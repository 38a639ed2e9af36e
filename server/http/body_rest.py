"""What is left of a request's body when its answer is ready: the answer goes out at once, the rest is read away.

Closing right after an early answer would reset the connection while the client still sends, and it would never read
why; not closing would keep a connection for as long as somebody announces a body and sends none of it.
"""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peqa_server.http.connection import ABORT
from peqa_server.http.errors import ApiError
from peqa_server.settings import ServerSettings

SMALL_BYTES = 64 * 1024
"""A body of so many is read away as a matter of course, and its connection lives on."""

MOST_WAITS = 12
"""A rest that keeps coming has so many times as long as one that does not come: by default a minute, in which a client
on a slow line, that reads only after it has sent, gets through what the settings allow."""

_CLOSE = (b"connection", b"close")


class BodyRest:
    """ASGI middleware, the outermost: ends a response only after its request, or after what the settings allow.

    Of a large or unmeasured body the client is told with the answer that the connection ends.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        size = _announced(scope)
        if size == 0:
            await self._app(scope, receive, send)
            return
        whole = False
        held_back: Message | None = None

        async def receive_seen() -> Message:
            nonlocal whole
            message = await receive()
            whole = whole or not message.get("more_body", False)  # also when the client is gone
            return message

        async def send_first(message: Message) -> None:
            nonlocal held_back
            if not whole and message["type"] == "http.response.start" and not 0 < size <= SMALL_BYTES:
                others = [pair for pair in message.get("headers", []) if pair[0].lower() != b"connection"]
                message = {**message, "headers": [*others, _CLOSE]}
            if not whole and message["type"] == "http.response.body" and not message.get("more_body", False):
                held_back = {**message, "body": b""}
                message = {**message, "more_body": True}
            await send(message)

        await self._app(scope, receive_seen, send_first)
        if held_back is not None:
            ended = await self._read_away(receive)
            await send(held_back)
            if not ended and ABORT in scope.get("state", {}):
                scope["state"][ABORT]()

    async def _read_away(self, receive: Receive) -> bool:
        """Whether the body, or the connection, has come to its end."""
        left, idle = self._settings.discard_bytes, self._settings.discard_seconds
        deadline = time.monotonic() + MOST_WAITS * idle
        while left > 0 and (seconds := deadline - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(receive(), min(idle, seconds))
            except asyncio.TimeoutError:
                return False
            if message["type"] != "http.request" or not message.get("more_body", False):
                return True
            left -= len(message.get("body", b""))
        return False


def check_one_size(scope: Scope) -> None:
    """Raise 400 for a body with a length that also comes in chunks.

    A proxy in front may believe the other one, and take what one client hides in a body for the request of the next.
    """
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers and "content-length" in headers:
        raise ApiError(
            400,
            "a body comes with a Content-Length or in chunks, not both; send one of them",
            code="two_body_sizes",
        )


def _announced(scope: Scope) -> int:
    """Bytes of the request's body; 0 where there is none, -1 where nobody said how many."""
    if scope["type"] != "http":
        return 0
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers:
        return -1
    text = headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
