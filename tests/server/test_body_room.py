"""Bodies and uploads that are long on their way: bounded for all, and no tenant takes the room of the others."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from key_stubs import bearer, key, write_keys
from server_stubs import Live, check_error, wait_until

from peqa_server.http.body_room import BodyRoom
from peqa_server.http.errors import ApiError
from peqa_server.settings import ServerSettings


def refused(take: Callable[[int], None], size: int) -> int:
    with pytest.raises(ApiError) as caught:
        take(size)
    assert caught.value.code == "too_many_bodies"
    assert caught.value.headers["Retry-After"]
    return caught.value.status


def test_the_room_and_a_tenants_part() -> None:
    room = BodyRoom(100)
    with room.one("a") as a, room.one("a") as again, room.one("b") as b, room.one("") as anybody:
        a(20)
        again(5)
        assert refused(again, 1) == 429, "a quarter for both"
        b(25)
        anybody(50)
        assert refused(anybody, 1) == 503
        assert refused(b, 1) == 503, "what is full for all is no fault of this tenant"
        assert room.taken == 100
    assert room.taken == 0
    with room.one("a") as a:
        a(25)


def test_a_body_that_is_given_up_leaves_its_room() -> None:
    room = BodyRoom(100)
    body = room.one("a")
    body.__enter__()(20)
    assert room.taken == 20
    assert not body.__exit__(RuntimeError, RuntimeError(), None)
    assert room.taken == 0
    assert not room._by_tenant


def connect(server: Live) -> socket.socket:
    address = httpx.URL(server.url)
    return socket.create_connection((address.host, address.port or 80), timeout=10)


@pytest.fixture
def keyed(start: Callable[..., Live], tmp_path: Path) -> Live:
    keys = write_keys(
        tmp_path / "keys.json",
        key("slow", "uploader", "*", tenant="one"),
        key("same", "uploader", "*", tenant="one"),
        key("other", "uploader", "*"),
    )
    return start(settings=ServerSettings(key_file=keys, max_bodies_bytes=40_000, max_uploads=4))


@contextlib.contextmanager
def held_up(server: Live, line: str, count: int, sent: int) -> Iterator[None]:
    """Requests of one tenant that have sent so much of their bodies, and then no more."""
    key_line = f"Authorization: {bearer('slow')['Authorization']}"
    head = f"{line} HTTP/1.1\r\nHost: x\r\n{key_line}\r\nContent-Length: 9000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for number in range(count):
            connection = stack.enter_context(connect(server))
            connection.sendall(head.replace("NUMBER", str(number)).encode() + bytes(sent))
        yield


def test_one_tenants_slow_bodies_are_not_the_others_concern(keyed: Live) -> None:
    body = json.dumps({"prompt": "x" * 3000, "max_tokens": 1}).encode()[:3100]

    def ask(who: str) -> httpx.Response:
        return keyed.client.post("/v1/completions", content=body, headers=bearer(who))

    room = keyed.app.state.gate.bodies
    assert ask("same").status_code == 400, (
        "as long as there is room, it is looked at: 3000 tokens are too many"
    )
    with held_up(keyed, "POST /v1/completions", 2, 4000):
        wait_until(lambda: room.taken == 8000)
        assert check_error(ask("same"), 429)["code"] == "too_many_bodies"
        assert ask("other").status_code == 400
    wait_until(lambda: room.taken == 0)
    assert ask("same").status_code == 400


def test_one_tenant_takes_half_of_the_places_for_uploads(keyed: Live) -> None:
    def put(who: str) -> httpx.Response:
        return keyed.client.put("/v1/tasks/t", content=b"SET", headers=bearer(who))

    with held_up(keyed, "PUT /v1/tasks/tNUMBER", 2, 100):
        wait_until(lambda: len(list(keyed.spool.glob("upload-*"))) == 2)
        answer = put("same")
        assert check_error(answer, 429)["code"] == "too_many_uploads"
        assert answer.headers["retry-after"] == "1"
        assert put("other").status_code == 200
    wait_until(lambda: put("same").status_code == 200)
