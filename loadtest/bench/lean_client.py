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
        self._host, self._port = parts.hostname or "", parts.port or 80

    async def complete(self, task: str, prompt: str, max_tokens: int, started: float | None = None) -> Answer:
        """One request, read to its end; as `CompletionClient.complete`."""
        answer = Answer(task, prompt, time.perf_counter() if started is None else started)
        body = json.dumps(self._like.body(task, prompt, max_tokens)).encode()
        head = f"POST /v1/completions HTTP/1.0\r\nHost: {self._host}\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            await asyncio.wait_for(self._exchange(head.encode() + body, answer), self._like.target.timeout)
        except (
            OSError,
            asyncio.TimeoutError,
            asyncio.IncompleteReadError,
            asyncio.LimitOverrunError,
        ) as error:
            answer.failure = Failure(None, f"{type(error).__name__}: {error}")
        answer.finished = time.perf_counter()
        return answer

    async def _exchange(self, request: bytes, answer: Answer) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            answer.sent = time.perf_counter()
            writer.write(request)
            await _read(reader, answer)
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader, answer: Answer) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if status != 200:
        answer.failure = failure_of(status, await reader.read())
        return
    parser = EventParser()
    while chunk := await reader.read(_CHUNK):
        now = time.perf_counter()
        for data in parser.feed(chunk):
            if data != "[DONE]":
                read_event(answer, data, now)
    if answer.failure is None and answer.finish_reason is None:
        answer.failure = Failure(None, "the stream ended without a finish_reason")
