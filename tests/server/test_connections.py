"""Connections that ask nothing, too much or too slowly, and clients that never read: bounded, then cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_stubs import MANIFEST, ByteTokenizer, Script, StubEngine, StubTasks, wait_until

from peqa_server.app import create_app
from peqa_server.http.connection import MAX_HEAD_BYTES, bounded_connection
from peqa_server.observe.access_log import refused_connection
from peqa_server.services import ServedModel
from peqa_server.settings import ServerSettings
from peqa_server.start.run import listen

HEAD_SECONDS = 0.3
LIMIT = 8


class Bounded:
    def __init__(self, run_app: Callable[..., Any], folder: Path, **settings: Any) -> None:
        self.engine = StubEngine()
        model = ServedModel(MANIFEST, ByteTokenizer(), max_model_len=200_000, vocab_size=257)
        self.app = create_app(
            self.engine, StubTasks(), model, ServerSettings(**settings), spool_folder=folder
        )
        refused = partial(refused_connection, self.app.state.gate.metrics)
        connection = bounded_connection(LIMIT, HEAD_SECONDS, refused=refused)
        self.url, _ = run_app(
            self.app, http=connection, ws="none", h11_max_incomplete_event_size=MAX_HEAD_BYTES
        )

    def connect(self, **options: int) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.socket()
        for name, value in options.items():
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        connection.settimeout(10)
        connection.connect((host, int(port)))
        return connection


@pytest.fixture
def server(run_app: Callable[..., Any], tmp_path: Path) -> Bounded:
    return Bounded(run_app, tmp_path, stalled_stream_seconds=0.3, discard_seconds=0.3)


def health(connection: socket.socket) -> None:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200 ")


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost:"], ids=["nothing", "half"])
def test_a_head_that_does_not_come(server: Bounded, sent: bytes) -> None:
    with server.connect() as connection:
        begin = time.monotonic()
        connection.sendall(sent)
        answer = read_all(connection)
        assert HEAD_SECONDS * 0.9 < time.monotonic() - begin < 5
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "head_timeout"


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str | None]]:
    """What the access log says of each, and the error it names."""
    records = [record for record in caplog.records if record.name == "peqa.access"]
    return [(record.getMessage(), record.fields.get("error")) for record in records]


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"NONSENSE\r\n\r\n", 400, "malformed_http"),
        (b"GET /health HTTP/1.1\r\nHost:", 408, "head_timeout"),
        (b"", 408, None),  # opened ahead, as browsers do
    ],
    ids=["nonsense", "half", "nothing"],
)
def test_a_refused_connection_has_its_line_and_its_count(
    server: Bounded, sent: bytes, status: int, code: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "peqa.access"), server.connect() as connection:
        connection.sendall(sent)
        assert read_all(connection).startswith(f"HTTP/1.1 {status} ".encode())
    assert lines(caplog) == ([] if code is None else [(f"no request {status}", code)])
    metrics = httpx.get(f"{server.url}/metrics").text
    assert (f'peqa_rejections_total{{code="{code}"}} 1.0' in metrics) == (code is not None)
    counted = f'peqa_http_requests_total{{method="OTHER",route="unmatched",status="{status}"}} 1.0'
    assert (counted in metrics) == (code is not None)


def test_a_request_whose_body_is_broken_has_one_line(
    server: Bounded, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with caplog.at_level("INFO", "peqa.access"), server.connect() as connection:
        connection.sendall(head + b"zz\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")
        wait_until(lambda: lines(caplog))
    assert [message for message, _ in lines(caplog)] == ["POST /tokenize 499"]


def test_a_second_head_that_does_not_come(server: Bounded) -> None:
    with server.connect() as connection:
        health(connection)
        time.sleep(HEAD_SECONDS * 1.5)  # idle between two requests: that is another, longer, time
        health(connection)
        connection.sendall(b"GET /health HT")
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_a_body_has_its_own_time(server: Bounded) -> None:
    body = b'{"prompt": "x", "max_tokens": 2}'
    with server.connect() as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + body[:5])
        time.sleep(HEAD_SECONDS * 1.5)
        connection.sendall(body[5:])
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent", [b"", b"SET"], ids=["nothing", "a little"])
def test_a_small_body_that_never_comes_keeps_no_connection(server: Bounded, sent: bytes) -> None:
    """Nobody's route, so that nothing waits for the body but what reads the rest away."""
    with server.connect() as connection:
        begin = time.monotonic()
        connection.sendall(b"POST /no/such HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + sent)
        with contextlib.suppress(ConnectionResetError):
            assert read_all(connection).startswith(b"HTTP/1.1 404 ")
        assert time.monotonic() - begin < 3
    assert not server.app.state.gate.running


def test_a_rest_that_trickles_in_keeps_no_connection(run_app: Callable[..., Any], tmp_path: Path) -> None:
    server = Bounded(run_app, tmp_path, discard_seconds=0.05)
    with server.connect() as connection:
        connection.sendall(b"POST /no/such HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n")
        begin = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < begin + 5:
                connection.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize("count", [1, 30_000], ids=["one long", "many"])
def test_headers_that_are_too_large(server: Bounded, count: int) -> None:
    header = (
        b"X-Long: " + b"x" * 600_000
        if count == 1
        else b"\r\n".join(b"X-%d: yyyyyyyyyyyy" % i for i in range(count))
    )
    with server.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"NONSENSE\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET /h\xc3 HTTP/1.1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["no request", "no host", "tls", "no ascii", "no number", "packed", "no chunk"],
)
def test_what_is_not_http_is_told_in_the_one_shape(
    server: Bounded, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with server.connect() as connection:
        connection.sendall(sent)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "malformed_http"
    assert "Traceback" not in caplog.text


def test_nonsense_behind_a_request_comes_after_its_answer(server: Bounded) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nNONSENSE\r\n\r\n")
        answer = read_all(connection)
    assert [answer.count(status) for status in (b"HTTP/1.1 200 ", b"HTTP/1.1 400 ")] == [1, 1]
    assert answer.index(b'{"status"') < answer.index(b"malformed_http")


def test_a_body_with_two_sizes(server: Bounded) -> None:
    """A proxy that believes the length passes on as one body what would be two requests here."""
    hidden = b"0\r\n\r\nGET /v1/tasks HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head % len(hidden) + hidden)
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"two_body_sizes" in answer
    assert b"x-request-id: " in answer


def test_an_upgrade_is_answered_without_and_without_a_word(
    server: Bounded, caplog: pytest.LogCaptureFixture
) -> None:
    with server.connect() as connection:
        connection.sendall(
            b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert "upgrade" not in caplog.text.lower()


def test_more_connections_than_places(server: Bounded, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "peqa.access"), contextlib.ExitStack() as stack:
        for _ in range(LIMIT):
            health(stack.enter_context(server.connect()))
        refused = httpx.get(f"{server.url}/health")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "too_many_connections"
    assert ("no request 503", "too_many_connections") in lines(caplog)
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200)


def test_a_stream_that_nobody_reads_is_cut(server: Bounded) -> None:
    server.engine.script = lambda request: Script([97] * 150_000)
    body = json.dumps({"prompt": "x", "max_tokens": 150_000, "stream": True}).encode()
    with server.connect(SO_RCVBUF=4096) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: len(server.engine.cancelled) == 1, 10)
        with contextlib.suppress(ConnectionError):
            assert b"[DONE]" not in read_all(connection)
    assert not server.engine.running
    wait_until(lambda: not server.app.state.gate._life.running)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_stream_that_is_read_slowly_is_not(server: Bounded) -> None:
    server.engine.script = lambda request: Script([97] * 8_000)
    body = {"prompt": "x", "max_tokens": 8_000, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
        parts = []
        for part in answer.iter_bytes(40_000):
            parts.append(part)
            time.sleep(0.02)
    assert b"".join(parts).endswith(b"data: [DONE]\n\n")
    assert not server.engine.cancelled


def test_small_answers_are_sent_at_once() -> None:
    """With Nagle's algorithm an answer's second part waits for the client's acknowledgement of the first: 40 ms."""
    listener = listen("127.0.0.1", 0)

    async def nodelay_of_a_connection() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(serve, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await found

    assert asyncio.run(nodelay_of_a_connection()) != 0
