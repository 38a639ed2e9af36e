"""/openapi.json, whole: what FastAPI finds in the routes, and what it cannot see because routes read their own bodies.

A route says what it answers with `responses={200: {"model": …}, **refusals(404, 409)}`; refusals that any route can
give, and those of every body, are added here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from peqa_server.http.query import TOLERANT_PATHS
from peqa_server.tasks.answer_shapes import ErrorAnswer

Json = dict[str, Any]

_MEANINGS: Mapping[int, str] = {
    400: "A field or query parameter is wrong, unknown or contradicts another one; `param` names it.",
    401: "No key was sent, or one that is not known here.",
    403: "The key may not do this.",
    404: "No such task, model or revision.",
    408: "The body stopped coming.",
    409: "The task cannot be used or changed as it is; `code` says why.",
    412: "If-Match names a revision that is not the current one.",
    413: "The body is larger than this server accepts.",
    415: "The body is packed (Content-Encoding), or the file of an upload is wrapped in a form.",
    422: "The task's name, or the scale set, is not valid.",
    429: "Too much waits already, or the key's limit is reached; Retry-After says for how long.",
    500: "The server failed on this request; its log says why.",
    503: "The server is loading, draining or broken; Retry-After says when to ask again.",
    507: "The store cannot be written, or is full.",
}
_OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})


def refusals(*statuses: int) -> dict[int | str, Json]:
    """Entries of `responses` for refusals: each has the one shape of errors."""
    return {s: {"model": ErrorAnswer, "description": _MEANINGS[s]} for s in statuses}


def json_body(*schemas: type[BaseModel], required: bool = True) -> Json:
    """`openapi_extra` of a route that reads a JSON body by itself, as one of `schemas`."""
    forms = [schema.model_json_schema() for schema in schemas]
    content = {"application/json": {"schema": forms[0] if len(forms) == 1 else {"anyOf": forms}}}
    return {"requestBody": {"required": required, "content": content}}


def bytes_body(description: str) -> Json:
    """`openapi_extra` of a route whose body is a file's bytes."""
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {"requestBody": {"required": True, "description": description, "content": content}}


def parameter(name: str, place: str, description: str, schema: Json) -> Json:
    """An entry of `openapi_extra`'s "parameters" for what a route reads by itself; `place`: "query" or "header"."""
    return {"name": name, "in": place, "required": False, "description": description, "schema": schema}


class DescribedApp(FastAPI):
    """FastAPI with the whole document."""

    def openapi(self) -> Json:
        """The document of /openapi.json, made once."""
        if self.openapi_schema is None:
            self.openapi_schema = _completed(super().openapi())
        return self.openapi_schema


def _completed(document: Json) -> Json:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    _hoist(document["paths"], schemas)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    error = ErrorAnswer.model_json_schema(ref_template="#/components/schemas/{model}")
    for name, schema in error.pop("$defs", {}).items():
        schemas.setdefault(name, schema)
    schemas.setdefault("ErrorAnswer", error)
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "Asked for where the server has keys."}
    }
    document["security"] = [{}, {"key": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["tags"] = [_tag(path)]
            _add_refusals(path, operation)
    document["tags"] = [{"name": name} for name in ("Generation", "Tasks", "Operation")]
    return document


def _tag(path: str) -> str:
    if path.startswith("/v1/tasks"):
        return "Tasks"
    return "Generation" if path.startswith("/v1/") and path != "/v1/access" else "Operation"


def _add_refusals(path: str, operation: Json) -> None:
    responses = operation["responses"]
    found = responses.get("422", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if found.get("$ref", "").endswith("/HTTPValidationError"):
        del responses["422"]  # FastAPI's default; parameters are checked by the routes themselves
    statuses = [] if path in _OPEN_PATHS else [401, 403, 429, 500, 503]
    if path not in TOLERANT_PATHS:
        statuses.append(400)
    if "requestBody" in operation:
        statuses += [408, 413, 415]
    for status in statuses:
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
        responses.setdefault(str(status), {"description": _MEANINGS[status], "content": content})
    operation["responses"] = dict(sorted(responses.items()))


def _hoist(node: Any, schemas: Json) -> None:
    """Move `$defs` of schemas that routes wrote themselves to the components, and point to them there."""
    for part in _objects(node):
        if isinstance(reference := part.get("$ref"), str) and reference.startswith("#/$defs/"):
            part["$ref"] = "#/components/schemas/" + reference.removeprefix("#/$defs/")
        for name, schema in part.pop("$defs", {}).items():
            _hoist(schema, schemas)
            assert schemas.get(name, schema) == schema, f"two schemas have the name {name}"
            schemas[name] = schema


def _objects(node: Any) -> Iterator[Json]:
    """Every JSON object in `node`, itself included."""
    if isinstance(node, dict):
        yield node
        for value in list(node.values()):
            yield from _objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from _objects(value)
