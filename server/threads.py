"""Work beside the event loop, so that one request's does not hold up the others'.

What computes goes to the loop's own threads, by `aside`. What may wait, for a disk or for a lock of another process,
goes to `Threads` of its kind: else a few calls that hang would take every thread from what computes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


async def aside(
    long: bool, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """The call's result: at once, or where it takes `long` (some milliseconds) from a thread."""
    return await asyncio.to_thread(call, *args, **kwargs) if long else call(*args, **kwargs)


class Threads:
    """`count` threads for one kind of work."""

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def run(
        self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Await the call in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(*args, **kwargs))


async def ended_in_time(call: Callable[[], None], seconds: float, name: str) -> bool:
    """Await the call in a thread of its own, for so long at most; whether it returned. If not, it is left to itself."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def work() -> None:
        try:
            call()
        finally:
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(done.set)

    threading.Thread(target=work, name=name, daemon=True).start()
    try:
        await asyncio.wait_for(done.wait(), seconds)
    except asyncio.TimeoutError:
        return False
    return True
