"""Every route, for everybody: no key, wrong key, user, uploader, admin, revoked key, expired key. None is forgotten."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from key_stubs import EVERYBODY, bearer, text_of, write_keys
from server_stubs import check_error, wait_until

from peqa_server.access.api_key import Role
from peqa_server.access.route_roles import ANYONE, ROLES
from peqa_server.app import create_loading_app
from peqa_server.page.routes import PUBLIC_PATHS
from peqa_server.settings import ServerSettings

PROBES = {"GET /health", "GET /ready", "GET /ping", "POST /ping"}


def routes_of(app: Any) -> list[str]:
    """ "METHOD /pattern" of every route that the app answers, HEAD left out where GET is."""
    found: set[str] = set()
    for context in iter_route_contexts(app.routes):
        methods = set(context.methods or {"ANY"})
        found |= {
            f"{method} {context.path}" for method in methods - ({"HEAD"} if "GET" in methods else set())
        }
    return sorted(found)


ROUTES = routes_of(create_loading_app())


@pytest.fixture(scope="module")
def guarded(start: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_keys(tmp_path_factory.mktemp("keys") / "keys.json", *EVERYBODY)
    return start(settings=ServerSettings(key_file=path))


@pytest.fixture
def server(guarded: Any) -> Iterator[Any]:
    guarded.tasks.__init__()
    guarded.engine.__init__()
    for _ in range(2):
        guarded.tasks.upload("acme-sql", b"SET one")
        guarded.tasks.upload("acme-sql", b"SET two")
    yield guarded
    assert guarded.idle


def path_of(route: str) -> str:
    return re.sub(r"\{[^}]*\}", "acme-sql", route.partition(" ")[2])


def ask(server: Any, route: str, headers: dict[str, str]) -> httpx.Response:
    method = route.partition(" ")[0]
    body = {"content": b"SET three"} if method == "PUT" else {}
    answer: httpx.Response = server.client.request(method, path_of(route), headers=headers, **body)
    return answer


def test_no_route_is_forgotten() -> None:
    assert len(ROUTES) > 18
    assert sorted(ROLES) == ROUTES


def test_the_table_says_what_it_should() -> None:
    by_role = {role: {route for route, lowest in ROLES.items() if lowest is role} for role in (ANYONE, *Role)}
    assert by_role[ANYONE] == PROBES | {f"GET {path}" for path in PUBLIC_PATHS}
    assert by_role[Role.ADMIN] == {"GET /metrics"}
    task = "/v1/tasks/{task:path}"
    assert by_role[Role.UPLOADER] == {
        f"PUT {task}", f"DELETE {task}", f"POST {task}/rollback", f"GET {task}/content"
    }  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_for_everybody(server: Any, route: str) -> None:
    lowest = ROLES[route]
    for who, headers in {
        "nobody": {},
        "wrong": {"Authorization": "Bearer peqa_wrong"},
        "prefix": {"Authorization": f"Bearer {text_of('admin')[:-1]}"},
        "empty": {"Authorization": "Bearer"},
        "basic": {"Authorization": f"Basic {text_of('admin')}"},
        "bare": {"Authorization": text_of("admin")},
        "revoked": bearer("revoked"),
        "expired": bearer("expired"),
    }.items():
        answer = ask(server, route, headers)
        if lowest is ANYONE:
            assert answer.status_code not in (401, 403), who
        else:
            code = check_error(answer, 401)["code"]
            assert code == {"nobody": "missing_api_key", "revoked": "api_key_revoked",
                            "expired": "api_key_expired"}.get(who, "invalid_api_key")  # fmt: skip
            assert answer.headers["www-authenticate"].startswith("Bearer")
    for role in Role:
        answer = ask(server, route, bearer(role.word))
        if lowest is ANYONE or role >= lowest:
            assert answer.status_code not in (401, 403, 405), (role, answer.text)
        else:
            error = check_error(answer, 403)
            assert error["code"] == "role_not_allowed"
            assert lowest.word in error["message"]
            assert ":path" not in error["message"], "the route as /openapi.json spells it"


def test_refusals_reach_no_task_and_no_engine(server: Any) -> None:
    before = {name: list(rows) for name, rows in server.tasks.history.items()}
    for route in ROUTES:
        for who in ("user", "revoked"):
            if ROLES[route] not in (ANYONE, Role.USER):
                ask(server, route, bearer(who))
    assert server.tasks.history == before
    assert not server.engine.requests


def test_a_route_that_is_not_listed_is_refused(start: Any, tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.json", *EVERYBODY)
    for settings in (ServerSettings(key_file=path), ServerSettings()):
        server = start(settings=settings)

        @server.app.get("/v1/forgotten")
        async def forgotten() -> dict[str, str]:
            return {"secret": "yes"}

        answer = server.client.get("/v1/forgotten", headers=bearer("admin"))
        assert check_error(answer, 403)["code"] == "route_not_listed"
        assert "/v1/forgotten" not in {route.partition(" ")[2] for route in ROLES}


def test_what_does_not_exist_tells_strangers_nothing(server: Any) -> None:
    for method, path in [("GET", "/no/such"), ("GET", "/v1/tasks/nope"), ("OPTIONS", "/v1/tasks"),
                         ("HEAD", "/v1/models"), ("PATCH", "/v1/tasks/acme-sql"), ("BREW", "/health/x"),
                         ("POST", "/v1/models"),
                         ("TRACE", "/metrics"), ("HEAD", "/openapi.json")]:  # fmt: skip
        assert server.client.request(method, path).status_code == 401, (method, path)
        assert server.client.request(method, path, headers=bearer("user")).status_code != 401
    assert check_error(server.client.get("/no/such", headers=bearer("user")), 404)
    assert check_error(server.client.request("PATCH", "/v1/tasks", headers=bearer("user")), 405)


TRICKS = [
    ("GET /v1/models", "127.0.0.1/health?"),
    ("GET /v1/models", "x/?"),
    ("GET /v1/models", "x/#"),
    ("GET /v1/models", "x/health#"),
    ("GET /v1/models", "@/health"),
    ("GET /health/../v1/models", "x"),
    ("GET /health/%2e%2e/v1/models", "x"),
    ("GET /health%2f..%2fv1/models", "x"),
    ("GET /health;/v1/models", "x"),
    ("GET /health#/v1/models", "x"),
    ("GET //health", "x"),
    ("GET /health/", "x"),
    ("GET //v1/models", "x"),
    ("GET /v1//models", "x"),
    ("GET /v1%2fmodels", "x"),
    ("GET /HEALTH", "x"),
    ("GET /ready/../metrics", "x"),
    ("GET http://x/health/../metrics", "x"),
    ("GET http://health/v1/models", "health"),
    ("GET /metrics?/health", "x"),
    ("GET /metrics%00/health", "x"),
    ("GET /page/../metrics", "x"),
    ("GET /docs/../openapi.json", "x"),
    ("PUT /v1/tasks/acme-sql/../../../health", "x"),
    ("PUT /v1/tasks/..%2f..%2fhealth", "x"),
]


@pytest.mark.parametrize(("line", "host"), TRICKS)
def test_no_spelling_of_a_path_or_host_opens_a_door(server: Any, line: str, host: str) -> None:
    method, target = line.split(" ", 1)
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 80), timeout=5) as connection:
        request = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nX-Original-URL: /health\r\n"
        connection.sendall(
            (
                request + "X-Forwarded-Prefix: /health\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            ).encode()
        )
        answer = b""
        while part := connection.recv(65536):
            answer += part
    status = int(answer.split(b" ", 2)[1])
    assert status in (400, 401), answer[:200]
    assert b'"object"' not in answer
    assert b"peqa_http" not in answer


def test_two_keys_at_once_are_refused(server: Any) -> None:
    both = [("Authorization", f"Bearer {text_of('admin')}"), ("Authorization", "Bearer wrong")]
    for pairs in (both, both[::-1]):
        assert check_error(server.client.get("/v1/models", headers=pairs), 401)["code"] == "invalid_api_key"


def test_the_scheme_is_read_as_http_says(server: Any) -> None:
    for value in (f"bearer {text_of('user')}", f"BEARER   {text_of('user')}"):
        assert server.client.get("/v1/models", headers={"Authorization": value}).status_code == 200


def test_a_refused_upload_is_told_why_not_reset(server: Any) -> None:
    """A client that sends all of its body before it reads would see a broken pipe, were the connection just closed."""
    address = httpx.URL(server.url)
    body = bytes(24 << 20)
    for who, status in ((None, b"401"), ("user", b"403")):
        key = "" if who is None else f"Authorization: Bearer {text_of(who)}\r\n"
        head = f"PUT /v1/tasks/acme-sql HTTP/1.1\r\nHost: x\r\n{key}Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((address.host, address.port or 80), timeout=10) as connection:
            connection.sendall(head.encode())
            connection.sendall(body)
            assert connection.recv(4096).split(b" ", 2)[1] == status


def test_metrics_may_be_opened(start: Any, tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.json", *EVERYBODY)
    server = start(settings=ServerSettings(key_file=path, open_metrics=True))
    assert "peqa_" in server.client.get("/metrics").text
    assert server.client.get("/v1/models").status_code == 401


def test_websockets_are_closed(server: Any) -> None:
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 80), timeout=5) as connection:
        connection.sendall(
            b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert b" 101 " not in connection.recv(4096).split(b"\r\n")[0]


def test_without_keys_everything_is_allowed(start: Any) -> None:
    server = start()
    server.tasks.upload("acme-sql", b"SET one")
    for route in ROUTES:
        answer = ask(server, route, {})
        assert answer.status_code not in (401, 403), route
        wait_until(lambda: server.idle)


def test_pages_of_other_sites_change_nothing_where_no_key_is_asked_for(start: Any) -> None:
    server = start()
    server.tasks.upload("acme-sql", b"SET one")
    server.tasks.upload("acme-sql", b"SET two")
    host = server.url.removeprefix("http://")
    for origin in ("http://evil.example", "null", f"http://{host}0", "https://localhost", ""):
        answer = server.client.post("/v1/tasks/acme-sql/rollback", headers={"Origin": origin})
        assert check_error(answer, 403)["code"] == "cross_site"
    assert len(server.tasks.history["acme-sql"]) == 2
    answer = server.client.post("/v1/tasks/acme-sql/rollback", headers={"Origin": server.url})
    assert answer.status_code == 200
    assert server.client.get("/v1/tasks", headers={"Origin": "http://evil.example"}).status_code == 200
