"""Clients of every manner at once, on connections that live on: each request is answered or refused, none hangs.

Streams and whole answers, clients that leave, requests behind one another in one packet, bodies in pieces or only after
"100 Continue", refusals in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from server_stubs import wait_until

from peqa_runtime.model import read_manifest
from peqa_runtime.scales.synthetic import synthetic_sets
from peqa_server.app import create_loading_app
from peqa_server.http.connection import MAX_HEAD_BYTES, bounded_connection
from peqa_server.settings import ServerSettings
from peqa_server.start.loading import ServeOptions, load_services

REQUESTS = int(os.environ.get("PEQA_CLIENT_REQUESTS", "2000"))
SEED = int(os.environ.get("PEQA_CLIENT_SEED", "0"))
AT_ONCE = 24
SECONDS = 30
TASKS = [f"task{i}" for i in range(6)]  # more than there are rows


@pytest.fixture(scope="module")
def sets(tiny_base: Path) -> list[bytes]:
    return [content for _, _, content in synthetic_sets(read_manifest(tiny_base), 6)]


@pytest.fixture(scope="module")
def app(
    run_app: Any, tiny_base: Path, sets: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Any]]:
    store = tmp_path_factory.mktemp("clients") / "store"
    engine = {"num_blocks": 200, "max_sequences": 8, "task_rows": 4}
    options = ServeOptions(tiny_base, home=store.parent, store=store, engine=engine)
    services, _ = load_services(options, lambda line: None)
    app = create_loading_app(ServerSettings(max_request_bytes=20_000))
    url, loop = run_app(
        app, http=bounded_connection(256), ws="none", h11_max_incomplete_event_size=MAX_HEAD_BYTES
    )
    for task in TASKS:
        services.tasks.upload(task, sets[0])
    loop.call_soon_threadsafe(app.state.gate.open, services)
    wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200)
    yield url, app
    services.engine.stop()
    services.tasks.close()


class Connection:
    """One client's, as raw as it gets; opened again when the server has ended it."""

    def __init__(self, url: str, rng: random.Random, sets: list[bytes]) -> None:
        self.url, self.rng, self.sets = url, rng, sets
        self.host, port = urlsplit(url).netloc.split(":")
        self.port = int(port)
        self.writer: asyncio.StreamWriter | None = None

    async def send(self, *parts: bytes) -> None:
        """On the open connection, or on a new one."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            if len(parts) > 1:
                await asyncio.sleep(self.rng.random() * 0.01)

    def leave(self) -> None:
        """Be gone, with or without a word."""
        if self.writer is not None:
            if self.rng.random() < 0.5:
                self.writer.transport.abort()
            self.writer.close()
            self.writer = None

    async def answer(self, method: str = "POST") -> int:
        """Read one answer to its end; its status. 100 is one, too."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        fields = dict(line.lower().split(b": ", 1) for line in head.strip().split(b"\r\n")[1:])
        if status != 100 and method != "HEAD":
            if b"content-length" in fields:
                await self.reader.readexactly(int(fields[b"content-length"]))
            else:
                assert fields[b"transfer-encoding"] == b"chunked", head
                while size := int(await self.reader.readline(), 16):
                    await self.reader.readexactly(size + 2)
                await self.reader.readline()
        if fields.get(b"connection") == b"close":
            self.leave()
        return status


def completion(rng: random.Random, *headers: str, **more: Any) -> bytes:
    body: dict[str, Any] = {
        "prompt": [rng.randrange(3, 300) for _ in range(rng.randrange(1, 12))],
        "max_tokens": rng.randrange(0, 12),
        "temperature": rng.choice([0, 1]),
        "ignore_eos": True,
    }
    if rng.random() < 0.6:
        body["task"] = rng.choice(TASKS)
    elif rng.random() < 0.2:
        body["task"] = dict.fromkeys(rng.sample(TASKS, 2), 0.5)
    if rng.random() < 0.2:
        body["n"] = 2
        body["max_tokens"] = 3
    if rng.random() < 0.1:
        body["guided_regex"] = "[a-f]{6}"
    body |= more
    if body.get("stream") and rng.random() < 0.5:
        body["stream_options"] = {"include_usage": True}
    data = json.dumps(body).encode()
    return head("POST /v1/completions", f"Content-Length: {len(data)}", *headers) + data


def head(line: str, *headers: str) -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


async def whole(c: Connection) -> list[int]:
    await c.send(completion(c.rng))
    return [await c.answer()]


async def stream(c: Connection) -> list[int]:
    await c.send(completion(c.rng, stream=True))
    return [await c.answer()]


async def leaves(c: Connection) -> list[int]:
    await c.send(completion(c.rng, stream=c.rng.random() < 0.6, max_tokens=200))
    for _ in range(c.rng.randrange(3)):
        await c.reader.read(c.rng.randrange(1, 200)) if c.rng.random() < 0.5 else await asyncio.sleep(0.005)
    c.leave()
    return []


async def leaves_in_its_body(c: Connection) -> list[int]:
    data = completion(c.rng)
    await c.send(data[: c.rng.randrange(1, len(data))])
    c.leave()
    return []


async def in_pieces(c: Connection) -> list[int]:
    data = completion(c.rng)
    cuts = sorted(c.rng.randrange(len(data)) for _ in range(3))
    await c.send(*(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)))
    return [await c.answer()]


async def chunked(c: Connection) -> list[int]:
    body = completion(c.rng).partition(b"\r\n\r\n")[2]
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:9], body[9:])]
    await c.send(head("POST /v1/completions", "Transfer-Encoding: chunked"), *chunks, b"0\r\n\r\n")
    return [await c.answer()]


async def asks_first(c: Connection) -> list[int]:
    """Expect: 100-continue; some wait for the word, some do not, some are refused instead."""
    refused = c.rng.random() < 0.3
    data = completion(c.rng, "Expect: 100-continue")
    front, _, body = data.partition(b"\r\n\r\n")
    if refused:
        await c.send(head("POST /v1/completions", "Expect: 100-continue", "Content-Length: 9000000"))
        return [await c.answer()]
    await c.send(front + b"\r\n\r\n")
    if c.rng.random() < 0.5:
        assert await c.answer() == 100
        await c.send(body)
        return [await c.answer()]
    await c.send(body)
    first = await c.answer()
    return [await c.answer() if first == 100 else first]


async def pipelined(c: Connection) -> list[int]:
    """Several requests in one packet, answered in their order."""
    kinds = c.rng.choices(
        ["stream", "whole", "head", "get", "missing", "bad", "unread"], k=c.rng.randrange(2, 6)
    )
    requests = {
        "stream": lambda: completion(c.rng, stream=True),
        "whole": lambda: completion(c.rng),
        "head": lambda: head("HEAD /v1/models"),
        "get": lambda: head("GET /v1/tasks"),
        "missing": lambda: completion(c.rng, task="nope"),
        "bad": lambda: completion(c.rng, temperature="x"),
        "unread": lambda: head("POST /v1/models", "Content-Length: 4") + b"GET ",
    }
    await c.send(b"".join(requests[kind]() for kind in kinds))
    found = [await c.answer("HEAD" if kind == "head" else "") for kind in kinds]
    wanted = {"missing": (404,), "bad": (400,), "unread": (405,)}
    assert all(s in wanted.get(kind, (200, 429)) for kind, s in zip(kinds, found, strict=True)), (
        kinds,
        found,
    )
    return found


async def pipelined_and_leaves(c: Connection) -> list[int]:
    await c.send(completion(c.rng, stream=True, max_tokens=100) + completion(c.rng, stream=True))
    await asyncio.sleep(c.rng.random() * 0.02)
    c.leave()
    return []


async def upload(c: Connection) -> list[int]:
    data = c.rng.choice(c.sets)
    front = head(f"PUT /v1/tasks/{c.rng.choice(TASKS)}", f"Content-Length: {len(data)}")
    await c.send(front, data[:500], data[500:])
    return [await c.answer()]


async def too_large(c: Connection) -> list[int]:
    size = c.rng.choice([20_001, 70_000, 300_000])
    await c.send(head("POST /v1/completions", f"Content-Length: {size}"))
    with contextlib.suppress(ConnectionError):
        await c.send(bytes(size))
    found = [await c.answer()]
    c.leave()
    return found


async def small(c: Connection) -> list[int]:
    line = c.rng.choice(
        ["GET /health", "HEAD /", "GET /v1/models", "GET /metrics", "GET /no", "HEAD /v1/tasks/no"]
    )
    await c.send(head(line))
    return [await c.answer(line.split()[0])]


KINDS: list[Callable[[Connection], Awaitable[list[int]]]] = [
    whole, whole, stream, stream, leaves, leaves_in_its_body, in_pieces, chunked, asks_first, pipelined,
    pipelined_and_leaves, upload, too_large, small,
]  # fmt: skip


@pytest.mark.slow
def test_every_request_is_answered_or_refused(app: tuple[str, Any], sets: list[bytes]) -> None:
    url, served = app
    statuses: Counter[tuple[str, int]] = Counter()
    left = iter(range(REQUESTS))

    async def client(number: int) -> None:
        rng = random.Random(1000 * SEED + number)
        connection = Connection(url, rng, sets)
        for _ in left:
            kind = rng.choice(KINDS)
            try:
                found = await asyncio.wait_for(kind(connection), SECONDS)
            except asyncio.TimeoutError:
                raise AssertionError(f"{kind.__name__} was not answered, client {number}") from None
            statuses.update((kind.__name__, status) for status in found)
            if rng.random() < 0.1:
                connection.leave()
        connection.leave()

    async def everybody() -> None:
        await asyncio.gather(*(client(number) for number in range(AT_ONCE)))

    asyncio.run(everybody())
    print(dict(sorted(statuses.items())))
    assert sum(statuses.values()) > REQUESTS * 0.7
    assert {status for _, status in statuses} <= {200, 400, 404, 405, 413, 429}
    gate = served.state.gate
    wait_until(lambda: gate.running == 0, 10)
    stats = gate.services.engine.stats()
    assert (stats["requests_running"], stats["requests_waiting"]) == (0, 0)
    assert httpx.get(f"{url}/health").status_code == 200
