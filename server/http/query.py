"""Query parameters: each is one that its route's description names. An option that is not known is never ignored."""

from __future__ import annotations

from fastapi import Request
from fastapi.routing import APIRoute

from peqa_server.http.errors import ApiError

TOLERANT_PATHS = frozenset({"/health", "/ready", "/ping", "/metrics"})
"""Probes and scrapers add parameters of their own; so do links to the page's files, which no description names."""


async def known_query(request: Request) -> None:
    """Dependency of every route. Raises 400 for a parameter that the route does not name, or that comes twice."""
    if not request.scope["query_string"]:
        return
    route = request.scope["route"]
    if not isinstance(route, APIRoute) or not route.include_in_schema or route.path in TOLERANT_PATHS:
        return
    described = (route.openapi_extra or {}).get("parameters", [])
    known = [parameter["name"] for parameter in described if parameter["in"] == "query"]
    for name in request.query_params:
        if name not in known:
            there = f"known: {', '.join(known)}" if known else "this route takes none"
            raise ApiError(
                400, f"unknown query parameter {name[:80]!r}; {there}", code="unknown_field", param=name[:80]
            )
        if len(request.query_params.getlist(name)) > 1:
            raise ApiError(
                400, f"the query parameter {name!r} comes more than once; give it once", code="invalid_value",
                param=name,
            )  # fmt: skip
