"""Which role each route asks for: one table, and no other place that decides it. What is not listed is refused.

A route is found by the app's own routes and their own `matches`, on the scope that the router will get, so that there
is no second reading of a path (a Host header, `//`, `%2f` or `#`) which could differ from the first.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import Match
from starlette.types import Scope

from peqa_server.access.api_key import Role
from peqa_server.http.errors import ApiError
from peqa_server.page.routes import PUBLIC_PATHS

ANYONE = None
"""No key is asked for: what a probe needs, which says nothing but whether the server works, and the page's files, which
are the same on every server and show what the API gives to the key that is typed in there."""

ROLES: Mapping[str, Role | None] = {
    "GET /health": ANYONE,
    "GET /ready": ANYONE,
    "GET /ping": ANYONE,
    "POST /ping": ANYONE,
    **{f"GET {path}": ANYONE for path in PUBLIC_PATHS},
    "GET /openapi.json": Role.USER,
    "GET /version": Role.USER,
    "GET /v1/access": Role.USER,
    "GET /v1/models": Role.USER,
    "GET /v1/models/{model:path}": Role.USER,
    "POST /v1/completions": Role.USER,
    "POST /v1/chat/completions": Role.USER,
    "POST /tokenize": Role.USER,
    "POST /detokenize": Role.USER,
    "GET /tokenizer_info": Role.USER,
    "GET /load": Role.USER,
    "GET /v1/tasks": Role.USER,
    "GET /v1/tasks/{task:path}": Role.USER,
    "GET /v1/tasks/{task:path}/revisions": Role.USER,
    "GET /v1/tasks/{task:path}/content": Role.UPLOADER,
    "PUT /v1/tasks/{task:path}": Role.UPLOADER,
    "POST /v1/tasks/{task:path}/rollback": Role.UPLOADER,
    "DELETE /v1/tasks/{task:path}": Role.UPLOADER,
    "GET /metrics": Role.ADMIN,
}
"""Method and pattern, as the router has them, to the lowest role. A HEAD comes here as the GET that it is."""

METRICS = "GET /metrics"


class RouteRoles:
    """The table, applied to one app. `open_metrics`: /metrics asks for no key."""

    def __init__(self, app: FastAPI, *, open_metrics: bool = False) -> None:
        self._app = app
        self._roles = {**ROLES, METRICS: ANYONE} if open_metrics else ROLES

    def matched(self, scope: Scope) -> str | None:
        """The route that will answer, as the table spells it; None when none will but with a 404 or 405."""
        for context in iter_route_contexts(self._app.routes):
            match, _ = context.matches(scope)
            if match is Match.FULL:
                return f"{scope['method']} {context.path}"
        return None

    def is_open(self, route: str | None) -> bool:
        """Whether the route asks for no key."""
        return route is not None and route in self._roles and self._roles[route] is ANYONE

    def lowest(self, route: str) -> Role:
        """The lowest role that a route which is not open lets through. Not listed: 403."""
        role = self._roles.get(route)
        if role is None:
            raise ApiError(
                403, f"nobody has been given the right to use {route}; it is missing in the server's table of roles",
                code="route_not_listed",
            )  # fmt: skip
        return role
