"""The page at `/`, the API's documentation at `/docs`, and the files that they are made of: public, static, whole.

No file comes from another host, and the Content-Security-Policy lets none. What the files show, they ask of the API,
with the caller's own key.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

_OURS = Path(__file__).parent
_SWAGGER = files("fastapi_offline") / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_POLICY = _POLICY + "; require-trusted-types-for 'script'; trusted-types 'none'"
_DOCS_POLICY = _POLICY.replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'"
)  # Swagger UI's own styles


@dataclass(frozen=True)
class Asset:
    """A file and the path under which it is served."""

    path: str
    file: Traversable
    policy: str = _PAGE_POLICY

    @property
    def media_type(self) -> str:
        """By the file's suffix."""
        return _TYPES["." + self.file.name.rpartition(".")[2]]


ASSETS: tuple[Asset, ...] = (
    Asset("/", _OURS / "index.html"),
    Asset("/docs", _OURS / "docs.html", _DOCS_POLICY),
    Asset("/docs/swagger-ui.css", _SWAGGER / "swagger-ui.css"),
    Asset("/docs/swagger-ui-bundle.js", _SWAGGER / "swagger-ui-bundle.js"),
    *(
        Asset(f"/page/{file.name}", file)
        for file in sorted(_OURS.iterdir())
        if file.suffix in _TYPES and file.suffix != ".html"
    ),
)
PUBLIC_PATHS = frozenset(asset.path for asset in ASSETS)
"""Paths that hold nothing secret and ask no key. Each is matched whole."""


def _reader(asset: Asset) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def read(request: Request) -> Response:
        data = await asyncio.to_thread(asset.file.read_bytes)
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        headers = {
            "ETag": tag,
            "Cache-Control": "no-cache",  # kept, but asked for again: a new version shows at once
            "Content-Security-Policy": asset.policy,
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=asset.media_type, headers=headers)

    return read


router = APIRouter(include_in_schema=False)
for _asset in ASSETS:
    router.add_api_route(_asset.path, _reader(_asset), methods=["GET"], name=_asset.path)
