"""A client that costs next to nothing: on the server's own machine, others would take its cores."""

from __future__ import annotations

import asyncio
import json
import time
from urllib.parse import urlsplit

from peqa_loadtest.client import Answer, CompletionClient, EventParser, Failure, failure_of, read_event

_CHUNK = 65536


class LeanClient:
    """Sends what `like` would send: a connection for each request, HTTP/1.0, so that nothing needs unpacking."""

    def __init__(self, like: CompletionClient) -> None:
        self._like = like
        parts = urlsplit(like.target.url)
        assert parts.scheme == "http", "the servers of the bench are on this machine"
        self._buffer = memoryview(bytearray(_CHUNK))  # for all: what is read is taken out at once
        self._host, self._port = parts.hostname or "", parts.port or 80

    async def complete(self, task: str, prompt: str, max_tokens: int, started: float | None = None) -> Answer:
        """One request, read to its end; as `CompletionClient.complete`."""
        answer = Answer(task, prompt, time.perf_counter() if started is None else started)
        body = json.dumps(self._like.body(task, prompt, max_tokens)).encode()
        head = f"POST /v1/completions HTTP/1.0\r\nHost: {self._host}\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            await asyncio.wait_for(self._exchange(head.encode() + body, answer), self._like.target.timeout)
        except (OSError, asyncio.TimeoutError) as error:
            answer.failure = Failure(None, f"{type(error).__name__}: {error}")
        answer.finished = time.perf_counter()
        return answer

    async def _exchange(self, request: bytes, answer: Answer) -> None:
        loop = asyncio.get_running_loop()
        exchange = _Exchange(request, answer, loop.create_future(), self._buffer)
        transport, _ = await loop.create_connection(lambda: exchange, self._host, self._port)
        try:
            await exchange.ended
        finally:
            transport.close()


class _Exchange(asyncio.BufferedProtocol):
    """One request and its answer; no task is woken for what comes in between."""

    def __init__(
        self, request: bytes, answer: Answer, ended: asyncio.Future[None], buffer: memoryview
    ) -> None:
        self.ended = ended
        self._request = request
        self._buffer = buffer
        self._answer = answer
        self._parser = EventParser()
        self._status = 0  # 0: the head is not complete
        self._held = b""  # the head so far, or the body of a refusal

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.Transport)
        self._answer.sent = time.perf_counter()
        transport.write(self._request)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Enter what the events say."""
        now, data = time.perf_counter(), bytes(self._buffer[:nbytes])
        if not self._status:
            head, end, data = (self._held + data).partition(b"\r\n\r\n")
            if not end:
                self._held = head
                return
            self._status, self._held = int(head.split(b" ", 2)[1]), b""
        if self._status != 200:
            self._held += data
            return
        for event in self._parser.feed(data):
            if event != "[DONE]":
                read_event(self._answer, event, now)

    def connection_lost(self, exc: Exception | None) -> None:
        """The answer is complete, or will never be."""
        if self.ended.done():  # nobody waits any more
            return
        answer = self._answer
        if self._status not in (0, 200):
            answer.failure = failure_of(self._status, self._held)
        elif exc is not None:
            answer.failure = Failure(None, f"{type(exc).__name__}: {exc}")
        elif answer.failure is None and answer.finish_reason is None:
            answer.failure = Failure(None, "the stream ended without a finish_reason")
        self.ended.set_result(None)
