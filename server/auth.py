"""API keys: with any key set, every route but health and readiness asks for one."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from peqa_server.access_log import refused
from peqa_server.errors import ApiError
from peqa_server.page_routes import PUBLIC_PATHS

OPEN_PATHS = frozenset({"/health", "/ready"}) | PUBLIC_PATHS


def read_key_file(path: Path) -> tuple[str, ...]:
    """Keys, one per line; empty lines and lines that start with '#' are skipped. No key at all: `ValueError`."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{path} holds no key; write one per line")
    return keys


class ApiKeys:
    """ASGI middleware. Denies by default: only the exact paths in `OPEN_PATHS` are free."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        # Digests have one length, so the comparison's time says nothing about a key's.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer 401."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allowed(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "this server asks for an API key: send 'Authorization: Bearer <key>'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        refused(scope, error)
        await error.response()(scope, receive, send)

    def _allowed(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)
