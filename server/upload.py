"""An upload's way to a file: counted while it comes, off the event loop, gone when anything goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import Request

from peqa_server.settings import MIB, ServerSettings
from peqa_server.streaming import body_parts


@contextlib.asynccontextmanager
async def spooled_body(
    request: Request, settings: ServerSettings, limit: int, folder: Path
) -> AsyncIterator[Path]:
    """The request's body as a temporary file in `folder` (the store's volume), removed at the end.

    Raises what `body_parts` raises.
    """
    path = await asyncio.to_thread(_new_file, folder)
    try:
        with path.open("wb", buffering=0) as file:
            buffer = bytearray()
            async for part in body_parts(request, settings, limit):
                buffer += part
                if len(buffer) >= MIB:
                    await asyncio.to_thread(file.write, bytes(buffer))
                    buffer.clear()
            if buffer:
                await asyncio.to_thread(file.write, bytes(buffer))
        yield path
    finally:
        path.unlink(missing_ok=True)


def _new_file(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="upload-", suffix=".tmp", delete=False) as file:
        return Path(file.name)
