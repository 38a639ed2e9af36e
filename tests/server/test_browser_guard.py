"""What pages of other sites make a browser send to a server without keys: no change, and no name of theirs."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from server_stubs import check_error

from peqa_server.access.browser_guard import is_loopback
from peqa_server.settings import ServerSettings
from peqa_server.start.entrance import Entrance

ROLLBACK = "/v1/tasks/sql/rollback"


@pytest.fixture
def server(start: Any) -> Any:
    server = start()
    for content in (b"SET one", b"SET two"):
        server.tasks.upload("sql", content)
    return server


@pytest.mark.parametrize(
    "site", ["cross-site", "same-site", "Cross-Site", "none, cross-site", "nonsense", ""]
)
def test_the_browser_says_that_it_was_another_site(server: Any, site: str) -> None:
    headers = {"Origin": server.url, "Sec-Fetch-Site": site}  # whatever the Origin looks like
    for method, path in (("POST", ROLLBACK), ("PUT", "/v1/tasks/sql"), ("DELETE", "/v1/tasks/sql")):
        error = check_error(server.client.request(method, path, headers=headers), 403)
        assert error["code"] == "cross_site"
    assert len(server.tasks.history["sql"]) == 2
    assert server.client.get("/v1/tasks", headers=headers).status_code == 200


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_the_own_page_works_behind_a_proxy_that_rewrites_host(server: Any, site: str) -> None:
    headers = {"Origin": "https://peqa.example", "Sec-Fetch-Site": site}
    assert server.client.post(ROLLBACK, headers=headers).status_code == 200


def test_what_a_proxy_forwards_is_not_believed(server: Any) -> None:
    """Whoever reaches the server can write these headers, a page's script too."""
    headers = {
        "Origin": "https://evil.example",
        "X-Forwarded-Host": "evil.example",
        "Forwarded": "host=evil.example",
    }
    assert check_error(server.client.post(ROLLBACK, headers=headers), 403)["code"] == "cross_site"


def test_an_older_browser_is_told_by_its_origin(server: Any) -> None:
    assert server.client.post(ROLLBACK, headers={"Origin": server.url}).status_code == 200
    assert server.client.post(ROLLBACK, headers={"Origin": "http://localhost:1"}).status_code == 403


HOSTS = {
    "localhost": True, "LOCALHOST:8000": True, "peqa.localhost": True, "localhost.": True, "127.0.0.1:80": True,
    "127.9.9.9": True, "[::1]:8000": True, "[::1]": True, "[::ffff:127.0.0.1]": True, "here.lan:8000": True,
    "evil.example": False, "evil.example:8000": False, "127.0.0.1.evil.example": False, "localhost.evil.example": False,
    "evil-localhost": False, "192.168.1.5": False, "0x7f.1": False, "[fe80::1]": False, "0.0.0.0": False,
    "evil.example:127.0.0.1": False, "::1": False,
}  # fmt: skip


@pytest.mark.parametrize(("host", "answers"), HOSTS.items())
def test_a_name_that_a_site_pointed_here(start: Any, host: str, answers: bool) -> None:
    server = start(settings=ServerSettings(own_host="here.lan"))
    server.tasks.upload("sql", b"SET one")
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    for method, path in (("GET", "/v1/tasks"), ("GET", "/v1/tasks/sql/content"), ("DELETE", "/v1/tasks/sql")):
        answer = server.client.request(method, path, headers=headers)
        if answers:
            assert answer.status_code == 200
            continue
        error = check_error(answer, 403)
        assert error["code"] == "unknown_host"
        assert all(part in error["message"] for part in ("here.lan", "localhost", "--api-key-file"))
    assert ("sql" in server.tasks.history) is not answers
    assert server.client.get("/health", headers=headers).status_code == 200, "a probe names hosts as it likes"


def test_a_server_that_is_open_by_choice_answers_to_any_name(server: Any) -> None:
    assert server.client.get("/v1/tasks", headers={"Host": "peqa.example"}).status_code == 200


def test_which_servers_keep_to_their_name(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    with socket.create_server(("127.0.0.1", 0)) as loopback:
        assert Entrance("localhost").own_host(loopback) == "localhost"
        assert Entrance("127.0.0.1", key_file=keys).own_host(loopback) is None
        assert Entrance("127.0.0.1", insecure_open_to_network=True).own_host(loopback) is None
    with socket.create_server(("0.0.0.0", 0)) as wide:
        assert Entrance("0.0.0.0", insecure_open_to_network=True).own_host(wide) is None


@pytest.mark.parametrize("host", ["", "example.com", "0.0.0.0", "::", "10.0.0.1", "localhost.lan"])
def test_what_other_machines_reach(host: str) -> None:
    assert not is_loopback(host)
