"""An upload's way to a file: counted while it comes, off the event loop, gone when anything goes wrong."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import Request

from peqa_runtime.errors import StoreError
from peqa_server.http.errors import ApiError
from peqa_server.http.streaming import body_parts
from peqa_server.settings import MIB, ServerSettings
from peqa_server.threads import Threads

log = logging.getLogger("peqa.server")

CHECKERS = 2  # threads; a third upload at once would only take time from those that generate
WRITERS = 4  # threads; a part of a body is written in a millisecond or two


class UploadLane:
    """Few uploads at once, in threads of their own: no other request waits for one of these.

    `writers` write the bodies as they come, `checkers` check and commit them.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._count = 0
        self._by_tenant: Counter[str] = Counter()
        self.writers = Threads(WRITERS, "peqa-spool")
        self.checkers = Threads(CHECKERS, "peqa-upload")

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


def _too_many(status: int, what: str) -> ApiError:
    message = f"{what}; send this one again shortly"
    return ApiError(status, message, code="too_many_uploads", headers={"Retry-After": "1"})


@contextlib.asynccontextmanager
async def spooled_body(
    request: Request, settings: ServerSettings, limit: int, folder: Path, writers: Threads
) -> AsyncIterator[Path]:
    """The request's body as a temporary file in `folder` (the store's volume), removed at the end.

    Only `writers` touch the disk. Raises what `body_parts` raises, and `StoreError` when the disk does not take it.
    """
    try:
        file, path = await writers.run(_new_file, folder)
    except OSError as error:
        raise _not_written(error) from error
    try:
        try:
            await _receive(request, settings, limit, file, writers)
        except OSError as error:
            raise _not_written(error) from error
        yield path
    finally:
        await writers.run(_remove, file, path)


async def _receive(
    request: Request, settings: ServerSettings, limit: int, file: io.RawIOBase, writers: Threads
) -> None:
    buffer = bytearray()
    async for part in body_parts(request, settings, limit):
        buffer += part
        if len(buffer) >= MIB:
            await writers.run(_write_all, file, bytes(buffer))
            buffer.clear()
    await writers.run(_write_all, file, bytes(buffer))
    await writers.run(file.close)


def _write_all(file: io.RawIOBase, data: bytes) -> None:
    """An unbuffered file may take less than it is given, as the last bytes of a disk."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _not_written(error: OSError) -> StoreError:
    log.error("an upload cannot be written: %s", error)
    reason = error.strerror or type(error).__name__
    return StoreError(f"the upload cannot be written ({reason}); nothing was changed")


def _new_file(folder: Path) -> tuple[io.RawIOBase, Path]:
    """A file that is open for writing, and its path."""
    folder.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=folder, prefix="upload-", suffix=".tmp")
    return open(number, "wb", buffering=0), Path(name)


def _remove(file: io.RawIOBase, path: Path) -> None:
    try:
        file.close()
    finally:
        path.unlink(missing_ok=True)
