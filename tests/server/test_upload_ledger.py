"""Whose uploads take how much of the disk: counted durably, never too little, and refused before the body is read."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from key_stubs import bearer, key, write_keys
from server_stubs import StubEngine, StubTasks, check_error

from peqa_runtime.core import RevisionInfo
from peqa_runtime.errors import StoreError, UnknownTask
from peqa_server.access.upload_ledger import ABANDONED_SECONDS, QuotaExceeded, UploadLedger
from peqa_server.settings import ServerSettings

Kept = dict[str, dict[str, int]]


def kept_in(store: Kept) -> Any:
    def kept(task: str) -> Sequence[RevisionInfo]:
        if task not in store:
            raise UnknownTask("gone")
        return [RevisionInfo(revision, "channel", size, 1.0, False) for revision, size in store[task].items()]

    return kept


def put(
    ledger: UploadLedger, store: Kept, task: str, revision: str, size: int, quota: int | None = None
) -> None:
    """What an upload that succeeds does."""
    entry = ledger.begin("acme", task, size, quota, kept_in(store))
    store.setdefault(task, {})[revision] = size
    ledger.complete("acme", entry, revision)


def test_a_restart_finds_what_was_written(tmp_path: Path) -> None:
    store: Kept = {}
    put(UploadLedger(tmp_path), store, "sql", "r1", 100)
    put(UploadLedger(tmp_path), store, "qa", "r2", 50)
    assert UploadLedger(tmp_path).used("acme") == 150
    assert UploadLedger(tmp_path).used("other") == 0


def test_what_does_not_fit_is_refused_with_its_numbers(tmp_path: Path) -> None:
    ledger, store = UploadLedger(tmp_path), {}
    put(ledger, store, "sql", "r1", 100, 150)
    for refused in (
        lambda: ledger.begin("acme", "qa", 51, 150, kept_in(store)),
        lambda: ledger.check("acme", 51, 150, kept_in(store)),
    ):
        with pytest.raises(QuotaExceeded, match="51 bytes does not fit: 100 of the 150 bytes"):
            refused()
    ledger.check("acme", 50, 150, kept_in(store))
    put(ledger, store, "qa", "r2", 50, 150)
    assert ledger.used("acme") == 150
    ledger.begin("acme", "qa", 10**9, None, kept_in(store))
    ledger.begin("other", "qa", 150, 150, kept_in(store))


def test_what_the_store_no_longer_has_is_not_counted(tmp_path: Path) -> None:
    ledger, store = UploadLedger(tmp_path), {}
    for i in range(4):
        put(ledger, store, "sql", f"r{i}", 100, 400)
    del store["sql"]["r0"]  # pushed out by newer ones
    put(ledger, store, "qa", "q", 100, 400)
    assert ledger.used("acme") == 400
    del store["sql"]
    put(ledger, store, "qa", "q2", 300, 400)
    assert ledger.used("acme") == 400


def test_the_same_bytes_again_count_once(tmp_path: Path) -> None:
    ledger, store = UploadLedger(tmp_path), {}
    for _ in range(3):
        put(ledger, store, "sql", "r1", 100, 1000)
    assert ledger.used("acme") == 100


def test_a_refused_upload_counts_nothing(tmp_path: Path) -> None:
    ledger, store = UploadLedger(tmp_path), {}
    entry = ledger.begin("acme", "sql", 100, 150, kept_in(store))
    with pytest.raises(QuotaExceeded):
        ledger.begin("acme", "qa", 100, 150, kept_in(store))
    ledger.drop("acme", entry)
    assert ledger.used("acme") == 0


@pytest.mark.parametrize("committed", [True, False])
def test_a_crash_in_between_loses_nothing(tmp_path: Path, committed: bool) -> None:
    """The upload was written down; whether the store got it shows in the store."""
    now, store = [0.0], {"sql": {"old": 100, "r0": 70}}
    ledger = UploadLedger(tmp_path, now=lambda: now[0])
    ledger.begin("acme", "sql", 100, None, kept_in({}))
    put(ledger, store, "sql", "old", 100)
    if committed:
        store["sql"]["new"] = 100
    later = UploadLedger(tmp_path, now=lambda: now[0])
    with pytest.raises(QuotaExceeded):  # it may still be on its way, in another process
        later.begin("acme", "qa", 50, 240, kept_in(store))
    now[0] += ABANDONED_SECONDS
    if committed:
        with pytest.raises(QuotaExceeded, match="200 of the 240"):
            later.begin("acme", "qa", 50, 240, kept_in(store))
    else:
        later.begin("acme", "qa", 50, 240, kept_in(store))
    assert later.used("acme") == (200 if committed else 150)


def test_uploads_at_once_do_not_share_the_last_bytes(tmp_path: Path) -> None:
    store: Kept = {}
    done: list[str] = []

    def upload(number: int) -> None:
        try:
            UploadLedger(tmp_path).begin("acme", f"t{number}", 100, 350, kept_in(store))
            done.append("taken")
        except QuotaExceeded:
            done.append("refused")

    threads = [threading.Thread(target=upload, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (done.count("taken"), done.count("refused")) == (3, 5)


def test_a_damaged_record_refuses_instead_of_forgetting(tmp_path: Path) -> None:
    ledger, store = UploadLedger(tmp_path), {}
    put(ledger, store, "sql", "r1", 100)
    (path,) = tmp_path.glob("*.json")
    for damage in (b"", b"{", b'{"uploads": [{}]}', b'{"uploads": 5}'):
        path.write_bytes(damage)
        with pytest.raises(StoreError, match="cannot be read"):
            ledger.begin("acme", "qa", 1, 10, kept_in(store))
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError):
        ledger.used("acme")


class CountingTasks(StubTasks):
    """Counts the uploads that reach it."""

    def upload(self, task: str, data: Any, if_match: str | None = None) -> Any:
        self.uploads = getattr(self, "uploads", 0) + 1
        return super().upload(task, data, if_match)


@pytest.fixture
def server(start: Any, tmp_path: Path) -> Any:
    keys = write_keys(
        tmp_path / "keys.json",
        key("small", "uploader", "acme-*", tenant="acme", disk_bytes=1000),
        key("same", "uploader", "acme-*", tenant="acme", disk_bytes=1000),
        key("other", "uploader", "acme-*", disk_bytes=1000),
        key("free", "uploader", "acme-*"),
    )
    return start(StubEngine(), CountingTasks(), ServerSettings(key_file=keys))


def upload(server: Any, who: str, task: str, size: int, mark: bytes = b"") -> httpx.Response:
    content = (b"SET" + mark).ljust(size, b".")
    answer: httpx.Response = server.client.put(f"/v1/tasks/{task}", content=content, headers=bearer(who))
    return answer


def test_the_quota_of_a_tenant(server: Any) -> None:
    assert upload(server, "small", "acme-a", 600).status_code == 200
    error = check_error(upload(server, "same", "acme-b", 401), 413)
    assert error["code"] == "disk_quota_exceeded"
    assert "600 of the 1000 bytes" in error["message"]
    assert server.tasks.uploads == 1
    assert upload(server, "other", "acme-b", 1000).status_code == 200
    assert upload(server, "free", "acme-c", 5000).status_code == 200
    assert upload(server, "same", "acme-d", 400).status_code == 200
    check_error(upload(server, "small", "acme-a", 4, b"x"), 413)
    assert server.client.delete("/v1/tasks/acme-a", headers=bearer("other")).status_code == 200
    assert upload(server, "small", "acme-e", 600).status_code == 200


@pytest.mark.parametrize(("who", "task", "status"), [("small", "acme-b", b"413"), ("small", "zeta", b"403")])
def test_what_cannot_be_taken_is_refused_before_the_body(
    server: Any, who: str, task: str, status: bytes
) -> None:
    """The client waits to be asked for its body ("100 Continue"), and never is."""
    upload(server, "small", "acme-a", 600)
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 80), timeout=5) as connection:
        head = (
            f"PUT /v1/tasks/{task} HTTP/1.1\r\nHost: x\r\nAuthorization: {bearer(who)['Authorization']}\r\n"
        )
        connection.sendall((head + "Content-Length: 401\r\nExpect: 100-continue\r\n\r\n").encode())
        assert connection.recv(4096).split(b" ", 2)[1] == status
    assert server.tasks.uploads == 1


def test_without_an_announced_size_the_file_is_weighed(server: Any) -> None:
    upload(server, "small", "acme-a", 600)

    def body() -> Any:
        yield b"SET"
        yield b"." * 500

    answer = server.client.put("/v1/tasks/acme-b", content=body(), headers=bearer("small"))
    assert check_error(answer, 413)["code"] == "disk_quota_exceeded"
    assert "acme-b" not in server.tasks.history


def test_uploads_that_are_refused_or_repeated_take_no_disk(server: Any) -> None:
    for _ in range(3):
        check_error(server.client.put("/v1/tasks/acme-a", content=b"BAD" * 200, headers=bearer("small")), 422)
        assert upload(server, "small", "acme-b", 400).status_code == 200
    assert upload(server, "small", "acme-c", 600).status_code == 200
