"""What can be said of an upload before its body is read: whether the key may make it, and whether it can fit."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from starlette.requests import Request

from peqa_server.access.guarded_tasks import GuardedTasks
from peqa_server.observe.access_log import note_of
from peqa_server.threads import Threads

if TYPE_CHECKING:
    from peqa_server.services import TaskService


@contextlib.asynccontextmanager
async def admitted_upload(
    request: Request, tasks: TaskService, store: Threads, task: str, if_match: str | None
) -> AsyncIterator[None]:
    """Around an upload of `task`: one of the places that its key has. `store`: threads that may wait for the disk.

    Raises 403 where the key may not change the task, 413 where the announced size does not fit its quota (412 where
    `if_match` fails besides), 429 where too much of the key's work runs already.
    """
    caller = note_of(request.scope).caller
    with caller.uploading():
        if isinstance(tasks, GuardedTasks):
            await store.run(tasks.check_size, task, _announced(request), if_match)
        yield


def _announced(request: Request) -> int:
    """Content-Length; 0 where there is none, or nonsense, which is refused where the body is read."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
