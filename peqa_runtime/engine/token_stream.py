"""What a request's submitter holds: its outputs as they come, and before that its place in the count."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from peqa_runtime.core import Request, TokenOutput
from peqa_runtime.errors import EngineDead


class TokenStream:
    """The outputs of one request, in order: iterate it in the event loop that submitted the request.

    The last output has a `finish_reason` ("abort" after `cancel`). Raises `EngineDead` when the engine died.
    """

    def __init__(
        self, request: Request, loop: asyncio.AbstractEventLoop, abort: Callable[[str], None]
    ) -> None:
        self.request_id = request.request_id
        self.task = request.task
        self.num_generated = 0  # counted by the engine's thread
        self.loop = loop
        self._abort = abort
        self._outputs: deque[TokenOutput] = deque()
        self._error: EngineDead | None = None
        self._closed = False  # the last output has arrived
        self._reader: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self

    async def __anext__(self) -> TokenOutput:
        """The next output; waits for it."""
        while not self._outputs:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise StopAsyncIteration
            self._reader = self.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._outputs.popleft()

    def cancel(self) -> None:
        """End the request; its blocks are free at the next step. Wakes a waiting reader. Safe to call twice."""
        if not self._closed:
            self._abort(self.request_id)
            self.deliver(TokenOutput(self.request_id, finish_reason="abort"))

    def deliver(self, item: TokenOutput | EngineDead) -> None:
        """Take an output, or the engine's death (called in the stream's loop). After the last one: nothing."""
        if self._closed:
            return
        if isinstance(item, EngineDead):
            self._error, self._closed = item, True
        else:
            self._outputs.append(item)
            self._closed = item.finished
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Reservation:
    """A request's place in the count of what waits, while it is prepared."""

    def __init__(self, give_up: Callable[[], None]) -> None:
        self._give_up: Callable[[], None] | None = give_up

    def release(self) -> None:
        """It was submitted, or will not be. Safe to call twice."""
        give_up, self._give_up = self._give_up, None
        if give_up is not None:
            give_up()


def deliver_all(items: Iterable[tuple[TokenStream, TokenOutput | EngineDead]]) -> None:
    """Hand each stream its output; in the streams' event loop."""
    for stream, item in items:
        stream.deliver(item)
