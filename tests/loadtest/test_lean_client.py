"""The bench's own client against servers that cut, refuse and go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest

from peqa_loadtest.bench.lean_client import LeanClient
from peqa_loadtest.client import Answer, CompletionClient, Target

OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def token(text: str, reason: str | None = None) -> bytes:
    event = {"revision": "r1", "choices": [{"text": text, "finish_reason": reason}]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def ask(parts: Sequence[bytes | None], timeout: float = 5.0) -> Answer:
    """What the client makes of these parts, each written by itself; None: the server says nothing more."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
        assert json.loads(await reader.readexactly(length))["prompt"] == "p"
        for part in parts:
            if part is None:
                await asyncio.sleep(60)
            else:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.close()

    async def work() -> Answer:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = LeanClient(CompletionClient(Target(f"http://127.0.0.1:{port}", timeout=timeout)))
        try:
            return await client.complete("sql", "p", 8)
        finally:
            server.close()

    return asyncio.run(work())


@pytest.mark.parametrize(
    "parts",
    [
        [OK, token("a"), token("b", "length"), DONE],
        [OK + token("a") + token("b", "length") + DONE],
        [OK[:10], OK[10:30], OK[30:] + token("a")[:9], token("a")[9:] + token("b", "length"), DONE],
    ],
)
def test_an_answer_however_it_is_cut(parts: list[bytes]) -> None:
    answer = ask(parts)
    assert answer.failure is None
    assert (answer.text, answer.finish_reason, answer.revisions) == ("ab", "length", {"r1"})
    assert len(answer.text_times) == 2
    assert answer.sent <= answer.text_times[0] <= answer.finished


def test_a_refusal_with_its_status_and_message() -> None:
    answer = ask([b"HTTP/1.1 429 Too Many\r\n\r\n", b'{"error": {"mess', b'age": "too much waits"}}'])
    assert answer.failure is not None
    assert (answer.failure.status, answer.failure.message) == (429, "too much waits")


@pytest.mark.parametrize("parts", [[], [OK], [OK, token("a")], [OK, token("a"), DONE]])
def test_a_stream_that_ends_too_soon_is_a_failure(parts: list[bytes]) -> None:
    answer = ask(parts)
    assert answer.failure is not None
    assert "finish_reason" in answer.failure.message


def test_a_server_that_says_nothing_more_is_given_up() -> None:
    answer = ask([OK, token("a"), None], timeout=0.3)
    assert answer.failure is not None
    assert "TimeoutError" in answer.failure.message
    assert answer.text == "a"


def test_nobody_there_is_a_failure() -> None:
    client = LeanClient(
        CompletionClient(Target("http://127.0.0.1:9"))
    )  # the port of a service that nobody runs
    answer = asyncio.run(client.complete("sql", "p", 8))
    assert answer.failure is not None
    assert "ConnectionRefusedError" in answer.failure.message
