"""The layer that every request passes before any route: who asks, and may they use this route at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peqa_server.access.allowance import Allowances, Clock
from peqa_server.access.api_key import ApiKey, Role
from peqa_server.access.browser_guard import check_host, check_same_site
from peqa_server.access.caller import Anybody, Caller, KeyHolder
from peqa_server.access.key_metrics import KeyMetrics
from peqa_server.access.key_ring import KeyRing
from peqa_server.access.route_roles import RouteRoles
from peqa_server.http.body_rest import check_one_size
from peqa_server.http.errors import ApiError
from peqa_server.observe.access_log import note_of, refused

_NEEDS = {Role.UPLOADER: "uploader or admin", Role.ADMIN: "admin"}


class Access:
    """The keys of one app, what is used of them, and the table of roles. `key_file` None: no key is asked for.

    `own_host`: the one name, beside loopback's, that a server without keys answers to; None: to any.
    Raises `KeyFileError` for a file that cannot be used.
    """

    def __init__(
        self,
        key_file: Path | None,
        roles: RouteRoles,
        registry: CollectorRegistry,
        *,
        own_host: str | None = None,
        clock: Clock = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.ring = None if key_file is None else KeyRing(key_file, clock=clock)
        self._own_host = own_host
        self._roles = roles
        self._allowances = Allowances(clock)
        self._metrics = KeyMetrics(registry)
        self._metrics.damaged.set_function(lambda: self.ring is not None and self.ring.damaged)
        self._clock = clock
        self._now = now

    def caller(self, scope: Scope) -> Caller:
        """Who asks, when the request may go on to the router. Raises the 401, 403 or 429 that it gets instead."""
        route = self._roles.matched(scope)
        if self.ring is None:
            headers = Headers(scope=scope)
            if not self._roles.is_open(route):
                if route is not None:
                    self._roles.lowest(route)
                if self._own_host is not None:
                    check_host(headers, self._own_host)
            check_same_site(headers, scope["method"])
            return Anybody()
        if self._roles.is_open(route):
            return Caller()
        key = self._key(self.ring, scope)
        holder = KeyHolder(key, self._allowances.of(key), self._metrics, self._clock)
        note_of(scope).caller = holder  # also while it is refused: metrics and headers are this key's
        holder.admit()
        lowest = Role.USER if route is None else self._roles.lowest(route)
        if key.role < lowest:
            shown = str(route).replace(":path}", "}")  # as /openapi.json spells it
            raise ApiError(
                403, f"{shown} needs the role {_NEEDS[lowest]}; this key's role is {key.role.word}",
                code="role_not_allowed",
            )  # fmt: skip
        return holder

    def _key(self, ring: KeyRing, scope: Scope) -> ApiKey:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given:
            raise _unauthorized(
                "this server asks for an API key: send 'Authorization: Bearer <key>'", "missing_api_key"
            )
        scheme, _, text = given[0].partition(b" ")
        key = ring.find(text.strip()) if len(given) == 1 and scheme.lower() == b"bearer" else None
        if key is None:
            raise _unauthorized(
                "this is no key of this server; send one 'Authorization: Bearer <key>'", "invalid_api_key"
            )
        note_of(scope).key_id = key.id
        state = key.state(self._now())
        if state != "valid":
            raise _unauthorized(
                f"this key is {state}; ask the server's admin for another", f"api_key_{state}"
            )
        return key


def _unauthorized(message: str, code: str) -> ApiError:
    challenge = "Bearer" if code == "missing_api_key" else 'Bearer error="invalid_token"'
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": challenge})


class Door:
    """ASGI middleware that lets a request through with its `Caller` in the note, or answers it at once, unread."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no route speaks WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        note = note_of(scope)

        async def send_with_rates(message: Message) -> None:
            if message["type"] == "http.response.start":
                rates = note.caller.headers()
                pairs = [(name.encode(), value.encode()) for name, value in rates.items()]
                message["headers"] = [*message.get("headers", []), *pairs]
            await send(message)

        try:
            check_one_size(scope)
            note.caller = self._access.caller(scope)
        except ApiError as error:
            refused(scope, error)
            await error.response()(scope, receive, send_with_rates)
        else:
            await self._app(scope, receive, send_with_rates)
        if isinstance(note.caller, KeyHolder) and note.error_code is not None:
            note.caller.refused(note.error_code)
