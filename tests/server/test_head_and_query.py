"""HEAD is GET without a body, on every route; a query parameter that a route does not know is refused, not ignored."""

from __future__ import annotations

import re
import socket
from typing import Any

import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from key_stubs import EVERYBODY, bearer, write_keys
from server_stubs import check_error, wait_until

from peqa_server.access.route_roles import ROLES
from peqa_server.app import create_loading_app
from peqa_server.http.query import TOLERANT_PATHS
from peqa_server.page.routes import PUBLIC_PATHS
from peqa_server.settings import ServerSettings

GETS = sorted(route.partition(" ")[2] for route in ROLES if route.startswith("GET "))
VOLATILE = {"date", "x-request-id", "content-length"}


def filled(pattern: str) -> str:
    return re.sub(r"\{[^}]*\}", "sql", pattern)


@pytest.mark.parametrize("pattern", GETS)
def test_head_is_get_without_a_body(server: Any, pattern: str) -> None:
    path = filled(pattern)
    for query in ("", "?nonsense=1"):
        get, head = server.client.get(path + query), server.client.head(path + query)
        assert (head.status_code, head.content) == (get.status_code, b"")
        same = [{k: v for k, v in answer.headers.items() if k not in VOLATILE} for answer in (get, head)]
        assert same[0] == same[1]
        if pattern not in ("/metrics", "/load"):  # their bodies change from call to call
            assert head.headers.get("content-length") == get.headers.get("content-length")


def test_a_head_s_connection_lives_on(server: Any) -> None:
    """No byte of a body is sent that the next answer would begin with."""
    host, port = server.url.removeprefix("http://").split(":")
    lines = b"".join(b"HEAD %s HTTP/1.1\r\nHost: x\r\n\r\n" % p for p in (b"/health", b"/v1/tasks/no", b"/"))
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(lines + b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"404", b"200", b"200"]
    assert answer.count(b"\r\n\r\n") == 4
    assert answer.endswith(b'\r\n\r\n{"status":"ready"}')


def test_head_asks_for_get_s_role(start: Any, tmp_path: Any) -> None:
    server = start(settings=ServerSettings(key_file=write_keys(tmp_path / "keys.json", *EVERYBODY)))
    server.tasks.upload("sql", b"SET one")
    for pattern in GETS:
        for headers in ({}, bearer("revoked"), bearer("user"), bearer("uploader"), bearer("admin")):
            get, head = (server.client.request(m, filled(pattern), headers=headers) for m in ("GET", "HEAD"))
            assert head.status_code == get.status_code, (pattern, headers)


def test_where_get_is_allowed_head_is(server: Any) -> None:
    allowed = {
        p: server.client.request("BREW", p).headers["allow"] for p in ("/", "/v1/models", "/v1/tasks/sql")
    }
    assert allowed == {"/": "GET, HEAD", "/v1/models": "GET, HEAD", "/v1/tasks/sql": "DELETE, GET, HEAD, PUT"}
    answer = server.client.head("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_the_log_and_the_metrics_say_head(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "peqa.access"):
        server.client.head("/v1/models")
        wait_until(lambda: "HEAD /v1/models 200" in caplog.text)  # written once the answer is on its way
    line = 'peqa_http_requests_total{method="HEAD",route="/v1/models",status="200"}'
    assert line in server.client.get("/metrics").text


def described() -> dict[str, list[str]]:
    """ "METHOD /pattern" to the query parameters that /openapi.json names."""
    document = create_loading_app().openapi()
    return {
        f"{method.upper()} {path}": [p["name"] for p in operation.get("parameters", []) if p["in"] == "query"]
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }


def test_only_lists_and_contents_have_parameters() -> None:
    assert {route: names for route, names in described().items() if names} == {
        "GET /v1/models": ["limit", "after"],
        "GET /v1/tasks": ["limit", "after"],
        "GET /v1/tasks/{task}/content": ["revision"],
    }


@pytest.mark.parametrize("route", sorted(described()))
def test_an_unknown_parameter_is_refused(server: Any, route: str) -> None:
    method, _, path = route.partition(" ")
    body = {"PUT": b"SET x", "POST": b'{"prompt": "x"}'}.get(method)
    before = dict(server.tasks.history)
    answer = server.client.request(method, filled(path) + "?tsak=sql", content=body)
    if path in TOLERANT_PATHS:
        assert answer.status_code == 200
        return
    error = check_error(answer, 400)
    assert (error["code"], error["param"]) == ("unknown_field", "tsak")
    assert all(name in error["message"] for name in described()[route] or ["takes none"])
    assert server.tasks.history == before, "nothing was done"
    assert not server.engine.requests


def test_every_route_is_tolerant_or_described() -> None:
    """A route that neither the document nor the table of tolerant ones has would take anything."""
    paths = {route.partition(" ")[2] for route in described()}
    for context in iter_route_contexts(create_loading_app().routes):
        if isinstance(context.original_route, APIRoute) and context.path not in PUBLIC_PATHS:
            assert context.path.replace(":path", "") in paths
            assert not context.original_route.dependant.query_params, (
                "read by FastAPI: the check knows nothing of it"
            )


@pytest.mark.parametrize("path", ["/", "/docs", "/page/icon.svg", *sorted(TOLERANT_PATHS)])
def test_probes_scrapers_and_links_may_add_their_own(server: Any, path: str) -> None:
    assert server.client.get(path + "?utm=1&utm=2").status_code == 200


def test_a_parameter_twice_is_refused(server: Any) -> None:
    error = check_error(server.client.get("/v1/tasks?limit=1&limit=2"), 400)
    assert error["param"] == "limit"
    assert "once" in error["message"]


def test_an_empty_query_is_none(server: Any) -> None:
    assert server.client.get("/v1/tasks/sql?").status_code == 200
