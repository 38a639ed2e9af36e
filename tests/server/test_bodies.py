"""Bodies that are refused, packed, announced and not sent: answered at once, and no connection is kept by them."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from server_stubs import Live, check_error, wait_until

from peqa_server.http.body_rest import SMALL_BYTES
from peqa_server.settings import MIB, ServerSettings

PROMPT = b'{"prompt": "x", "max_tokens": 2}'


@pytest.fixture(scope="module")
def strict(start: Callable[..., Live]) -> Live:
    """Gives a refused body 0.3 s and 1 MiB."""
    server = start(settings=ServerSettings(max_request_bytes=100_000, discard_seconds=0.3, discard_bytes=MIB))
    server.tasks.upload("sql", b"SET one")
    return server


def connect(server: Live) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def head(line: str, *headers: str) -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def one_answer(connection: socket.socket) -> bytes:
    """Up to the end of its JSON."""
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(65536)
        assert part, answer
        answer += part
    return answer


@pytest.fixture(scope="module")
def patient(start: Callable[..., Live]) -> Live:
    """Gives a refused body so long that no test would wait for it."""
    return start(settings=ServerSettings(max_request_bytes=100_000, discard_seconds=60))


@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)], ids=["plain", "expect"])
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/v1/tasks/sql/rollback", "/no/such/route"])
def test_an_announced_body_that_is_too_large_is_refused_at_once(
    patient: Live, path: str, expect: tuple[str, ...]
) -> None:
    with connect(patient) as connection:
        connection.sendall(head(f"POST {path}", f"Content-Length: {99 * MIB}", *expect))
        answer = one_answer(connection)
        assert answer.startswith(b"HTTP/1.1 404 " if "such" in path else b"HTTP/1.1 413 ")
        assert b"connection: close" in answer.lower()
        assert b"100 Continue" not in answer


def test_an_upload_that_is_too_large_is_refused_at_once(patient: Live) -> None:
    with connect(patient) as connection:
        connection.sendall(head("PUT /v1/tasks/sql", f"Content-Length: {99 * MIB}"))
        assert one_answer(connection).startswith(b"HTTP/1.1 413 ")
    assert not list(patient.spool.iterdir())


def test_a_client_that_sends_all_before_it_reads_sees_the_answer(strict: Live) -> None:
    body = bytes(900_000)
    with connect(strict) as connection:
        connection.sendall(head("POST /v1/completions", f"Content-Length: {len(body)}"))
        connection.sendall(body)
        assert one_answer(connection).startswith(b"HTTP/1.1 413 ")


def test_a_slow_line_is_given_its_time(strict: Live) -> None:
    """It takes longer than one that sends nothing may; what it could not send would end in a reset."""
    with connect(strict) as connection:
        connection.sendall(head("POST /v1/completions", "Content-Length: 500000"))
        for _ in range(5):
            time.sleep(0.1)
            connection.sendall(bytes(100_000))
        assert one_answer(connection).startswith(b"HTTP/1.1 413 ")


def test_after_a_small_body_the_connection_lives_on(patient: Live) -> None:
    with connect(patient) as connection:
        for size in (10, SMALL_BYTES):
            connection.sendall(head("POST /no/such/route", f"Content-Length: {size}"))
            assert one_answer(connection).startswith(b"HTTP/1.1 404 ")
            connection.sendall(bytes(size))
            connection.sendall(head("GET /health"))
            assert one_answer(connection).startswith(b"HTTP/1.1 200 ")


def test_requests_behind_a_refused_one_are_answered(strict: Live) -> None:
    """Pipelined: the second is not taken for the first one's body."""
    refused = head("POST /v1/models", "Content-Length: 5") + b"GET /"
    with connect(strict) as connection:
        connection.sendall(refused + head("GET /health", "Connection: close"))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 405 " in answer
    assert b'{"status":"ready"}' in answer


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "GZIP", "nonsense"])
def test_a_packed_body_is_refused(strict: Live, encoding: str) -> None:
    before = strict.tasks.info("sql").revision
    for method, path in (
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/v1/tasks/sql/rollback"),
        ("PUT", "/v1/tasks/sql"),
    ):
        answer = strict.client.request(
            method, path, content=b"SET packed", headers={"Content-Encoding": encoding}
        )
        error = check_error(answer, 415)
        assert error["code"] == "unsupported_encoding"
        assert encoding in error["message"]
        assert answer.headers["accept-encoding"] == "identity"
    assert strict.tasks.info("sql").revision == before
    assert not list(strict.spool.iterdir())


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_a_body_as_it_is_may_say_so(strict: Live, encoding: str) -> None:
    answer = strict.client.post("/v1/completions", content=PROMPT, headers={"Content-Encoding": encoding})
    assert answer.status_code == 200


def test_a_body_without_a_size_that_is_refused_is_read_within_bounds(strict: Live) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(400):
            yield bytes(100_000)

    begin = time.monotonic()
    with contextlib.suppress(httpx.TransportError):  # it may send on long after the answer, and is cut
        assert httpx.post(f"{strict.url}/v1/completions", content=endless(), timeout=10).status_code == 413
    assert time.monotonic() - begin < 5


def test_a_refused_body_is_no_work(live: Any) -> None:
    """While the rest of a refused upload is awaited, no place and no draining server waits for it."""
    server = live(settings=ServerSettings(max_upload_bytes=1000, discard_seconds=3))
    with connect(server) as connection:
        connection.sendall(head("PUT /v1/tasks/t", "Content-Length: 2000"))
        assert one_answer(connection).startswith(b"HTTP/1.1 413 ")
        wait_until(lambda: server.client.get("/load").json() == {"server_load": 0}, 1)
