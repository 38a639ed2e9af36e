"""The client: events and errors as servers send them, and connections that close."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from peqa_loadtest.client import Answer, CompletionClient, EventParser, Target, failure_of, read_event


def test_events_may_be_cut_anywhere() -> None:
    stream = 'data: {"a":"é"}\r\n\r\n: ping\n\nevent: x\ndata: one\ndata: two\n\ndata:[DONE]\n\n'.encode()
    want = ['{"a":"é"}', "one\ntwo", "[DONE]"]
    for size in (1, 2, 3, 7, len(stream)):
        parser = EventParser()
        got = [e for i in range(0, len(stream), size) for e in parser.feed(stream[i : i + size])]
        assert got == want, size


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": {"message": "no such task", "code": 404}}', "no such task"),
        ('{"object": "error", "message": "flat"}', "flat"),
        ('{"error": "Unauthorized"}', "Unauthorized"),
        ('{"detail": "Not Found"}', "Not Found"),
        ("<html>bad gateway", "<html>bad gateway"),
    ],
)
def test_error_bodies_of_many_servers(body: str, message: str) -> None:
    assert failure_of(400, body.encode()).message == message


def test_an_error_event_is_a_failure() -> None:
    answer = Answer("t", "p", 0.0)
    read_event(answer, '{"error": {"message": "engine died"}}', 1.0)
    assert answer.failure is not None
    assert answer.failure.message == "engine died"


def serve_by_hand(listener: socket.socket, script: list[list[bytes]]) -> None:
    """On connection i read one request before each of script[i]'s responses; then close. An empty one says nothing."""
    for responses in script:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as reader:
            for response in responses:
                length = 0
                while (line := reader.readline().strip()) != b"":
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                reader.read(length)
                connection.sendall(response)


EVENT = b'data: {"choices": [{"text": "hi", "finish_reason": "stop"}]}\n\n'
FULL = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(EVENT), EVENT)


def complete_twice(script: list[list[bytes]]) -> list[Answer]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve_by_hand, args=(listener, script), daemon=True)
        thread.start()

        async def both() -> list[Answer]:
            async with CompletionClient(Target(f"http://127.0.0.1:{listener.getsockname()[1]}")) as client:
                return [await client.complete("t", "p", 4) for _ in range(2)]

        done = asyncio.run(both())
        thread.join(10)
        return done


def test_a_reused_connection_that_closes_is_tried_once_more() -> None:
    first, second = complete_twice([[FULL, b""], [FULL]])
    assert (first.failure, second.failure) == (None, None)
    assert (first.retried, second.retried) == (False, True)
    assert second.text == "hi"


def test_a_new_connection_that_closes_is_an_error() -> None:
    first, second = complete_twice([[b""], [FULL]])
    assert first.failure is not None
    assert "disconnected" in first.failure.message
    assert not first.retried
    assert second.failure is None


def test_a_response_that_breaks_off_is_not_tried_again() -> None:
    first, second = complete_twice([[FULL, FULL[:-20]]])
    assert first.failure is None
    assert second.failure is not None
    assert not second.retried
