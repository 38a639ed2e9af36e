"""An upload's way to a file: counted while it comes, off the event loop, gone when anything goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from starlette.requests import Request

from peqa_runtime.errors import StoreError
from peqa_server.http.errors import ApiError
from peqa_server.http.streaming import body_parts
from peqa_server.settings import MIB, ServerSettings

log = logging.getLogger("peqa.server")

CHECKERS = 2  # threads; a third upload at once would only take time from those that generate

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class UploadLane:
    """Few uploads at once, checked and committed in threads of their own: no other request waits for one of these."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._count = 0
        self._by_tenant: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(CHECKERS, thread_name_prefix="peqa-upload")

    @contextlib.asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """One upload's place. 503 when all are taken; 429 when half of them are, by the tenant ("": nobody's) alone."""
        most = self._settings.max_uploads
        if self._count >= most:
            raise _too_many(503, f"{self._count} uploads are under way")
        if tenant and self._by_tenant[tenant] >= max(1, most // 2):
            raise _too_many(429, f"{self._by_tenant[tenant]} uploads of this key's tenant are under way")
        self._count += 1
        self._by_tenant[tenant] += 1
        try:
            yield
        finally:
            self._count -= 1
            self._by_tenant[tenant] -= 1
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]

    async def run(
        self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Await the call in one of the lane's threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: call(*args, **kwargs))


def _too_many(status: int, what: str) -> ApiError:
    message = f"{what}; send this one again shortly"
    return ApiError(status, message, code="too_many_uploads", headers={"Retry-After": "1"})


@contextlib.asynccontextmanager
async def spooled_body(
    request: Request, settings: ServerSettings, limit: int, folder: Path
) -> AsyncIterator[Path]:
    """The request's body as a temporary file in `folder` (the store's volume), removed at the end.

    Raises what `body_parts` raises, and `StoreError` when the disk does not take it.
    """
    try:
        path = await asyncio.to_thread(_new_file, folder)
    except OSError as error:
        raise _not_written(error) from error
    try:
        try:
            await _receive(request, settings, limit, path)
        except OSError as error:
            raise _not_written(error) from error
        yield path
    finally:
        path.unlink(missing_ok=True)


async def _receive(request: Request, settings: ServerSettings, limit: int, path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        buffer = bytearray()
        async for part in body_parts(request, settings, limit):
            buffer += part
            if len(buffer) >= MIB:
                await asyncio.to_thread(_write_all, file, bytes(buffer))
                buffer.clear()
        await asyncio.to_thread(_write_all, file, bytes(buffer))


def _write_all(file: io.RawIOBase, data: bytes) -> None:
    """An unbuffered file may take less than it is given, as the last bytes of a disk."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _not_written(error: OSError) -> StoreError:
    log.error("an upload cannot be written: %s", error)
    reason = error.strerror or type(error).__name__
    return StoreError(f"the upload cannot be written ({reason}); nothing was changed")


def _new_file(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="upload-", suffix=".tmp", delete=False) as file:
        return Path(file.name)
