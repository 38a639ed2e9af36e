"""/openapi.json names every route, body, answer and refusal, and leads nowhere else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.routing import APIRoute, iter_route_contexts

from peqa_server.app import create_loading_app
from peqa_server.page.routes import PUBLIC_PATHS

BODIES = {
    ("post", "/v1/completions"),
    ("post", "/v1/chat/completions"),
    ("post", "/tokenize"),
    ("post", "/detokenize"),
    ("put", "/v1/tasks/{task}"),
    ("post", "/v1/tasks/{task}/rollback"),
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return dict(json.loads(json.dumps(create_loading_app().openapi())))


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(m, path): o for path, methods in document["paths"].items() for m, o in methods.items()}


def test_every_route_is_in_it(document: dict[str, Any]) -> None:
    routes = set()
    for context in iter_route_contexts(create_loading_app().routes):
        if isinstance(context.original_route, APIRoute) and context.path not in PUBLIC_PATHS:
            routes |= {(m.lower(), context.path.replace(":path", "")) for m in context.methods}
    assert set(operations(document)) == routes
    assert len(routes) > 15


def test_every_operation_is_described(document: dict[str, Any]) -> None:
    ids = set()
    for (method, path), operation in operations(document).items():
        where = f"{method} {path}"
        assert operation["description"], where
        assert (("requestBody" in operation), where) == ((method, path) in BODIES, where)
        ids.add(operation["operationId"])
        for status, answer in operation["responses"].items():
            assert answer["description"], where
            if status != "200":
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}, (where, status)
            elif path != "/ping":
                assert all(part.get("schema") or part["itemSchema"] for part in answer["content"].values()), (
                    where
                )
                assert answer["content"], where
        keyed = path not in ("/health", "/ready", "/ping")
        assert ({"401", "403", "429"} <= set(operation["responses"])) is keyed, where
        if "requestBody" in operation:
            assert {"400", "408", "413"} <= set(operation["responses"]), where
    assert len(ids) == len(operations(document))


def test_every_reference_leads_to_a_schema(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    found: list[str] = []

    def walk(node: Any) -> None:
        for value in node.values() if isinstance(node, dict) else node:
            if isinstance(value, dict | list):
                walk(value)
        if isinstance(node, dict):
            assert "$defs" not in node
            found.append(str(node.get("$ref", "")))

    walk(document)
    prefix = "#/components/schemas/"
    names = {reference.removeprefix(prefix) for reference in found if reference}
    assert all(reference.startswith(prefix) for reference in found if reference)
    assert names == set(schemas), "a schema that nothing uses, or a use of one that is not there"
