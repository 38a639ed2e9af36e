"""The task routes: uploads by raw body, names, revisions, and what a failed upload leaves behind (nothing)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from server_stubs import StubEngine, check_error, revision_of, wait_until

from peqa_server.settings import ServerSettings
from peqa_server.tasks import upload as upload_module


def names(server: Any) -> set[str]:
    return {t["task"] for t in server.client.get("/v1/tasks").json()["data"]}


def test_upload_read_list_download_delete(server: Any) -> None:
    put = server.client.put("/v1/tasks/new.task-1", content=b"SET new")
    assert put.status_code == 200, put.text
    revision = revision_of(b"SET new")
    assert put.json() == {
        "object": "task", "task": "new.task-1", "revision": revision, "kind": "channel", "bytes": 7, "created": 1.5,
        "base_digest": server.tasks.info("sql").base_digest, "prompt_format": "Q: {prompt}\nA:", "note": {},
        "num_revisions": 1, "status": "ready", "status_reason": None,
    }  # fmt: skip
    assert put.headers["etag"] == f'"{revision}"'
    assert server.client.get("/v1/tasks/new.task-1").json() == put.json()
    assert names(server) == {"sql", "qa", "new.task-1"}
    listed = server.client.get("/v1/tasks").json()
    assert listed["unusable"] == [{"task": "foreign", "reason": "belongs to another base"}]
    content = server.client.get("/v1/tasks/new.task-1/content")
    assert (content.content, content.headers["etag"]) == (b"SET new", f'"{revision}"')
    assert server.client.delete("/v1/tasks/new.task-1").json() == {"task": "new.task-1", "deleted": True}
    check_error(server.client.get("/v1/tasks/new.task-1"), 404)
    assert not list(server.spool.iterdir()), "no temporary file is left"


def test_revisions_and_rollback(server: Any) -> None:
    first, second = revision_of(b"SET sql one"), revision_of(b"SET two")
    server.client.put("/v1/tasks/sql", content=b"SET two")
    rows = server.client.get("/v1/tasks/sql/revisions").json()["data"]
    assert [r["revision"] for r in rows] == [second, first]
    assert server.complete(task="sql")["revision"] == second
    old = server.client.get("/v1/tasks/sql/content", params={"revision": first})
    assert old.content == b"SET sql one"
    for unknown in ("f" * 64, ""):
        error = check_error(server.client.get("/v1/tasks/sql/content", params={"revision": unknown}), 404)
        assert (error["code"], error["param"]) == ("no_such_revision", "revision")
    back = server.client.post("/v1/tasks/sql/rollback")
    assert back.json()["revision"] == first
    assert server.complete(task="sql")["revision"] == first
    check_error(server.client.post("/v1/tasks/sql/rollback"), 409)
    check_error(server.client.post("/v1/tasks/sql/rollback", json={"revison": "x"}), 400)
    check_error(server.client.post("/v1/tasks/sql/rollback", content=b"[]"), 400)


def test_the_digits_that_lists_and_messages_show_name_a_revision(server: Any) -> None:
    first = revision_of(b"SET sql one")
    for content in (b"SET two", b"SET three"):
        server.client.put("/v1/tasks/sql", content=content)
    old = server.client.get("/v1/tasks/sql/content", params={"revision": first[:12]})
    assert (old.content, old.headers["etag"]) == (b"SET sql one", f'"{first}"')
    for unknown in ("f" * 12, first[:3], ""):
        answer = server.client.post("/v1/tasks/sql/rollback", json={"revision": unknown})
        assert check_error(answer, 409)["code"] == "no_such_revision"
    back = server.client.post("/v1/tasks/sql/rollback", json={"revision": first[:4]})
    assert back.json()["revision"] == first


def test_a_beginning_of_several_revisions_is_not_guessed_at(server: Any) -> None:
    beginnings: dict[str, bytes] = {}
    for number in range(100_000):
        content = b"SET %d" % number
        twin = beginnings.setdefault(revision_of(content)[:4], content)
        if twin is not content:
            break
    for upload in (twin, content):
        server.client.put("/v1/tasks/sql", content=upload)
    body = {"revision": revision_of(content)[:4]}
    error = check_error(server.client.post("/v1/tasks/sql/rollback", json=body), 400)
    assert error["param"] == "revision"
    assert "give more digits" in error["message"]
    check_error(server.client.get("/v1/tasks/sql/content", params=body), 400)


def test_if_match(server: Any) -> None:
    now = revision_of(b"SET sql one")
    url = "/v1/tasks/sql"
    check_error(server.client.put(url, content=b"SET b", headers={"If-Match": '"0000"'}), 412)
    check_error(server.client.put("/v1/tasks/x", content=b"SET b", headers={"If-Match": '"0000"'}), 412)
    check_error(server.client.put(url, content=b"SET b", headers={"If-Match": '"a", "b"'}), 400)
    check_error(server.client.delete(url, headers={"If-Match": '"0000"'}), 412)
    check_error(server.client.put(url, content=b"SET b", headers={"If-Match": "none"}), 400)
    assert server.client.put(url, content=b"SET b", headers={"If-Match": f'"{now}"'}).status_code == 200
    now = revision_of(b"SET b")
    assert server.client.put(url, content=b"SET c", headers={"If-Match": now}).status_code == 200


def test_if_none_match(server: Any) -> None:
    def put(task: str, **headers: str) -> Any:
        return server.client.put(f"/v1/tasks/{task}", content=b"SET b", headers=headers)

    new = {"If-None-Match": "*"}
    assert check_error(put("sql", **new), 412)["code"] == "revision_conflict"
    assert put("fresh", **new).status_code == 200
    check_error(put("fresh", **new), 412)
    check_error(put("sql", **{"If-None-Match": '"ab"'}), 400)
    check_error(put("sql", **new, **{"If-Match": "*"}), 400)
    check_error(server.client.delete("/v1/tasks/sql", headers=new), 400)
    assert server.tasks.info("sql").revision == revision_of(b"SET sql one")


@pytest.mark.parametrize("path", ["", "/content", "/revisions"])
def test_unknown_tasks(server: Any, path: str) -> None:
    error = check_error(server.client.get(f"/v1/tasks/nope{path}"), 404)
    assert error["code"] == "task_not_found"


def test_unknown_task_cannot_be_changed(server: Any) -> None:
    check_error(server.client.delete("/v1/tasks/nope"), 404)
    check_error(server.client.post("/v1/tasks/nope/rollback"), 404)


BAD_NAMES = [
    "../x", "..%2fx", "%2e%2e%2fx", "%2e%2e", "a%00b", "UPPER", "-x", ".hidden", "caf%C3%A9", "%ff", "x" * 65,
    "x" * 10_000, "a%20b", "a%5Cb", "a/b", "/etc/passwd", "", "a%0d%0ab", "a%3Fb", "sql/", "sql/x",
    "sql%0a", "new%0a", "sql%0d",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda n: n[:16])
@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
def test_names_that_cannot_be(server: Any, name: str, method: str) -> None:
    """Sent as they are: a client library would tidy the path."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"{method} /v1/tasks/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nConnection: close\r\n\r\nSET x"
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 422 "), answer[:200]
    assert b'"invalid_task_name"' in answer
    assert names(server) == {"sql", "qa"}


def test_a_form_is_told_from_a_file(server: Any) -> None:
    answer = server.client.put("/v1/tasks/sql", files={"file": ("sql.safetensors", b"SET new")})
    error = check_error(answer, 415)
    assert error["code"] == "unsupported_content_type"
    assert "--data-binary" in error["message"]
    for kind in ("application/x-www-form-urlencoded", "application/octet-stream", "text/plain"):
        content = b"SET as " + kind.encode()  # what curl --data-binary says of any file, and others
        assert (
            server.client.put("/v1/tasks/sql", content=content, headers={"Content-Type": kind}).status_code
            == 200
        )


@pytest.mark.parametrize("name", ["base", "tiny-base"])
def test_the_base_is_no_task(server: Any, name: str) -> None:
    task = f"/v1/tasks/{name}"
    for answer in (
        server.client.get(task),
        server.client.get(f"{task}/revisions"),
        server.client.get(f"{task}/content"),
        server.client.post(f"{task}/rollback"),
        server.client.delete(task),
    ):
        error = check_error(answer, 404)
        assert error["code"] == "task_not_found"
        assert "the model itself, not a task" in error["message"]
        assert "GET /v1/models/tiny-base" in error["message"]
    assert server.client.get("/v1/models/tiny-base").status_code == 200
    assert names(server) == {"sql", "qa"}


def test_the_base_s_name_is_taken(server: Any) -> None:
    error = check_error(server.client.put("/v1/tasks/base", content=b"SET x"), 422)
    assert "choose another name" in error["message"]


def test_a_file_that_is_no_set(server: Any) -> None:
    assert (
        check_error(server.client.put("/v1/tasks/sql", content=b"junk"), 422)["code"] == "invalid_scale_set"
    )
    check_error(server.client.put("/v1/tasks/sql", content=b""), 422)
    assert server.tasks.info("sql").revision == revision_of(b"SET sql one")
    assert not list(server.spool.iterdir())


def test_too_large_by_length_and_by_count(live: Any) -> None:
    server = live(settings=ServerSettings(max_upload_bytes=100_000, discard_bytes=1 << 20))

    def endless() -> Iterator[bytes]:
        for _ in range(30):
            yield b"SET" + b"x" * 99_997

    for content in (b"SET" + b"x" * 100_000, b"x" * 3_000_000, endless()):
        assert check_error(server.client.put("/v1/tasks/t", content=content), 413)["code"] == "too_large"
    assert server.client.put("/v1/tasks/t", content=b"SET" + b"x" * 99_997).status_code == 200
    assert server.client.put("/v1/tasks/t", content=iter([b"SET", b"x" * 70_000])).status_code == 200
    assert not list(server.spool.iterdir())


def test_the_default_limit_is_the_largest_set_of_the_base(server: Any) -> None:
    assert check_error(server.client.put("/v1/tasks/t", content=b"SET" + b"x" * 2_000_000), 413)
    assert server.client.put("/v1/tasks/t", content=b"SET" + b"x" * 100).status_code == 200


def test_a_request_body_that_is_too_large(live: Any) -> None:
    server = live(settings=ServerSettings(max_request_bytes=1000))
    check_error(server.post(prompt="x" * 2000), 413)
    check_error(server.client.post("/v1/completions", content=iter([b"x" * 600] * 2)), 413)


def test_a_client_that_dies_while_uploading_leaves_nothing(live: Any) -> None:
    server = live()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(b"PUT /v1/tasks/t HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nSET half")
    wait_until(lambda: len(list(server.spool.iterdir())) == 1)
    connection.close()
    wait_until(lambda: not list(server.spool.iterdir()))
    assert names(server) == set()


def test_a_stalled_upload_is_ended(live: Any) -> None:
    server = live(settings=ServerSettings(body_idle_seconds=0.1, discard_seconds=0.1))
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"PUT /v1/tasks/t HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nSET half")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
    assert not list(server.spool.iterdir())


def test_a_trickling_upload_is_ended(live: Any) -> None:
    server = live(settings=ServerSettings(body_idle_seconds=0.2, body_bytes_per_second=1000))
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"PUT /v1/tasks/t HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        connection.settimeout(0.02)
        begin = time.monotonic()
        answer = b""
        while not answer:
            assert time.monotonic() < begin + 5
            connection.sendall(b"x")  # a byte comes often enough, but at this rate there is no end
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - begin >= 0.2
    assert not list(server.spool.iterdir())


def test_more_uploads_than_places(live: Any) -> None:
    server = live(settings=ServerSettings(max_uploads=2))
    host, port = server.url.removeprefix("http://").split(":")
    head = b"PUT /v1/tasks/t%d HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nConnection: close\r\n\r\nSET"
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(2)]
        for i, connection in enumerate(slow):
            connection.sendall(head % i)
        wait_until(lambda: len(list(server.spool.iterdir())) == 2)
        refused = server.client.put("/v1/tasks/t", content=b"SET" + b"x" * 100_000)
        assert check_error(refused, 503)["code"] == "too_many_uploads"
        assert refused.headers["retry-after"] == "1"
        for connection in slow:
            connection.sendall(b" x")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    wait_until(lambda: server.client.put("/v1/tasks/t", content=b"SET").status_code == 200)


def test_a_full_disk(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = live()

    def full(file: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("peqa_server.tasks.upload._write_all", full)
        error = check_error(server.client.put("/v1/tasks/t", content=b"SET" + b"x" * 2_000), 507)
        assert "No space left" in error["message"]
    assert not list(server.spool.iterdir())
    assert names(server) == set()


def test_a_slow_commit_does_not_hold_up_others(live: Any) -> None:
    server = live(StubEngine())
    server.tasks.upload_seconds = 0.5
    uploading = threading.Thread(
        target=lambda: httpx.put(server.url + "/v1/tasks/t", content=b"SET", timeout=10)
    )
    uploading.start()
    time.sleep(0.1)
    begin = time.monotonic()
    server.complete()
    assert time.monotonic() - begin < 0.3
    uploading.join()
    assert names(server) == {"t"}


@pytest.mark.parametrize("what", ["reading", "spooling"])
def test_a_disk_that_hangs_holds_up_nobody_else(
    live: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More wait for the store's disk than there are threads of any kind; who needs nothing of it is served."""
    server = live(settings=ServerSettings(max_uploads=60))
    server.tasks.upload("t", b"SET")
    back = threading.Event()
    hanging: list[str] = []

    def hang(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def wait(*args: Any) -> Any:
            hanging.append(name)
            back.wait(20)
            return call(*args)

        monkeypatch.setattr(owner, name, wait)

    hang(server.tasks, "info") if what == "reading" else hang(upload_module, "_new_file")
    reads = [("GET", "/v1/tasks/t"), ("GET", "/v1/models/t"), ("GET", "/v1/tasks/t/content")]
    calls = reads if what == "reading" else [("PUT", "/v1/tasks/new")] * 3
    with ThreadPoolExecutor(60) as pool, httpx.Client(base_url=server.url, timeout=30) as client:
        asking = [pool.submit(client.request, *call, content=b"SET new") for call in calls * 20]
        try:
            wait_until(lambda: len(hanging) >= 4)
            time.sleep(0.3)  # for the rest of them
            chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
            assert server.client.post("/v1/chat/completions", json=chat, timeout=5).status_code == 200
            assert (
                server.client.post("/tokenize", json={"prompt": "x" * 20_000}, timeout=5).status_code == 200
            )
            assert server.client.get("/metrics", timeout=5).status_code == 200
        finally:
            back.set()
        assert {answer.result().status_code for answer in asking} == {200}


def test_uploads_do_not_block_the_loop(live: Any) -> None:
    """The event loop's longest pause while 8 MB come in."""
    server = live(settings=ServerSettings(max_upload_bytes=10_000_000))
    pauses: list[float] = []

    async def watch() -> None:
        for _ in range(100):
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            pauses.append(time.perf_counter() - before)

    watching = asyncio.run_coroutine_threadsafe(watch(), server.loop)
    assert server.client.put("/v1/tasks/t", content=b"SET" + b"x" * 8_000_000).status_code == 200
    watching.result(10)
    assert max(pauses) < 0.25
