"""Server-sent events, request bodies within a limit, and noticing that the client is gone."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from peqa_server.http.body_room import BodyRoom
from peqa_server.http.connection import ABORT
from peqa_server.http.errors import ApiError, to_api_error
from peqa_server.http.json_text import json_parts
from peqa_server.observe.access_log import log, note_of, refused
from peqa_server.settings import ServerSettings
from peqa_server.threads import Threads

SMALL_BODY = 32768  # bytes; to read a larger one may take more than a few milliseconds

DONE = b"data: [DONE]\n\n"

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


def event(data: Mapping[str, object]) -> bytes:
    """One server-sent event. ASCII only: some clients split lines at U+2028 or U+0085."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"


def long_event(data: Mapping[str, object]) -> bytes:
    """One server-sent event of many values, to be made in a thread."""
    return b"data: " + "".join(json_parts(data, ascii_only=True)).encode("ascii") + b"\n\n"


async def disconnected(receive: Receive) -> None:
    """Return when the client is gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(
    receive: Receive, work: Coroutine[Any, Any, Result], stalled: Coroutine[Any, Any, None] | None = None
) -> Result:
    """Await `work`, or cancel it and raise `ClientGone` when the client leaves first, or `stalled` returns."""
    task = asyncio.ensure_future(work)
    watchers: set[asyncio.Future[None]] = {asyncio.ensure_future(disconnected(receive))}
    if stalled is not None:
        watchers.add(asyncio.ensure_future(stalled))
    try:
        everyone: set[asyncio.Future[Any]] = {task, *watchers}
        await asyncio.wait(everyone, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            raise ClientGone
        return task.result()
    finally:
        for watcher in watchers:
            watcher.cancel()
        task.cancel()


class EventStream(Response):
    """Sends events as they come; a client that leaves cancels the generator at once.

    An error in the middle is sent as `data: {"error": …}`, because the status is already out. `on_close` runs
    once, whatever ends the stream. A client that takes nothing for `patience` seconds loses its connection: its
    generation would hold blocks and a row for nobody.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], on_close: Callable[[], None], patience: float
    ) -> None:
        super().__init__(
            content=b"",
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._events = events
        self._on_close = on_close
        self._patience = patience
        self._sending: float | None = None  # since when, on the monotonic clock, a part waits to be taken
        self._cut = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream to its end or to the client's."""

        async def send_watched(message: Message) -> None:
            self._sending = time.monotonic()
            await send(message)
            self._sending = None

        try:
            await unless_gone(receive, self._send_all(scope, send_watched), self._stalled())
        except ClientGone:
            note_of(scope).client_gone = True
            if self._cut and ABORT in scope["state"]:
                log.warning("request %s is cut: its client reads nothing", note_of(scope).request_id)
                scope["state"][ABORT]()
                await asyncio.sleep(0)  # the connection is gone before the server looks after it
        finally:
            self._on_close()

    async def _stalled(self) -> None:
        """Return when a part has waited to be taken for as long as there is patience."""
        while True:
            waited = 0.0 if self._sending is None else time.monotonic() - self._sending
            if waited >= self._patience:
                self._cut = True
                return
            await asyncio.sleep(self._patience - waited)

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            try:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Exception as error:  # noqa: BLE001 - the HTTP edge of a stream
                refusal = to_api_error(error)
                refused(scope, refusal)
                if refusal.status == 500:
                    log.error("request %s failed", note_of(scope).request_id, exc_info=error)
                await send({"type": "http.response.body", "body": event(refusal.body()), "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def check_encoding(request: Request) -> None:
    """Raise 415 for a body that would have to be unpacked first: its size, which is bounded, would say nothing."""
    encoding = request.headers.get("content-encoding", "")
    if encoding.strip().lower() not in ("", "identity"):
        raise ApiError(
            415,
            f"the body comes as Content-Encoding {encoding[:40]!r}; this server takes bodies as they are: send it "
            "without a Content-Encoding",
            code="unsupported_encoding",
            headers={"Accept-Encoding": "identity"},
        )


def check_declared_length(request: Request, limit: int) -> None:
    """Raise 413 when Content-Length says more than `limit` bytes, 400 when it says nonsense."""
    declared = request.headers.get("content-length")
    if declared is None:
        return
    if not declared.isascii() or not declared.isdigit():
        raise ApiError(400, "Content-Length must be a whole number of bytes", code="invalid_content_length")
    if int(declared[:20]) > limit:
        raise too_large(limit)


def too_large(limit: int) -> ApiError:
    """The refusal of a body over `limit` bytes."""
    return ApiError(
        413, f"the body is larger than this server accepts: at most {limit} bytes", code="too_large"
    )


async def body_parts(request: Request, settings: ServerSettings, limit: int) -> AsyncGenerator[bytes, None]:
    """The body in parts as they come, at most `limit` bytes of them. What is left after a refusal is `BodyRest`'s.

    A packed body: 415. More bytes (or a Content-Length that says more): 413. No byte for `settings.body_idle_seconds`,
    or after these fewer than `settings.body_bytes_per_second`: 408. A client that goes away raises `ClientDisconnect`.
    """
    check_encoding(request)
    check_declared_length(request, limit)
    size, more = 0, True
    begin = time.monotonic()
    while more:
        due = begin + settings.body_idle_seconds + size / settings.body_bytes_per_second
        patience = min(settings.body_idle_seconds, due - time.monotonic())
        try:
            message = await asyncio.wait_for(request.receive(), patience)
        except asyncio.TimeoutError:
            raise _too_slow(settings) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise too_large(limit)
        yield part


async def read_body(request: Request, settings: ServerSettings, read: Callable[[bytes], Result]) -> Result:
    """What `read` makes of the whole body of a JSON request, at most `settings.max_request_bytes`.

    A long one is read in a thread, and takes its place in memory until that is done. Raises what `BodyRoom` does, too.
    """
    gate = request.app.state.gate
    room: BodyRoom = gate.bodies
    readers: Threads = gate.readers
    parts = []
    with room.one(note_of(request.scope).caller.tenant) as take:
        async for part in body_parts(request, settings, settings.max_request_bytes):
            take(len(part))
            parts.append(part)
        body = b"".join(parts)
        return await readers.run(read, body) if len(body) > SMALL_BODY else read(body)


def _too_slow(settings: ServerSettings) -> ApiError:
    message = (
        f"the body comes too slowly: there must be a byte every {settings.body_idle_seconds:g} seconds, and "
        f"{settings.body_bytes_per_second} a second after the first of these; send the request again"
    )
    return ApiError(408, message, code="body_timeout", headers={"Connection": "close"})
