"""How much of request bodies is in memory until they are read: bounded for all, and for each tenant a part of that.

A body within its own limit may take long to come, and nobody is asked for a place before it is there.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from peqa_server.http.errors import ApiError

TENANTS_PART = 4  # of the room a tenant gets one in so many, so that one alone cannot keep out the others


class BodyRoom:
    """Room for `limit` bytes. Not thread-safe: for the event loop's thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._by_tenant: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        """Bytes of bodies that are on their way, or wait to be read."""
        return self._taken

    @contextlib.contextmanager
    def one(self, tenant: str) -> Iterator[Callable[[int], None]]:
        """Around one body: call the result with the size of each part that has come.

        `tenant` "": nobody's in particular. The call raises 503 where there is no room, 429 where the tenant has none.
        """
        size = 0

        def take(part: int) -> None:
            nonlocal size
            if self._taken + part > self._limit:
                raise _no_room(503, "of all clients")
            if tenant and (self._by_tenant[tenant] + part) * TENANTS_PART > self._limit:
                raise _no_room(429, "of this key's tenant")
            size += part
            self._taken += part
            self._by_tenant[tenant] += part

        try:
            yield take
        finally:
            self._taken -= size
            self._by_tenant[tenant] -= size
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]


def _no_room(status: int, whose: str) -> ApiError:
    return ApiError(
        status,
        f"too much of request bodies {whose} is under way at this moment; send this one again shortly",
        code="too_many_bodies",
        headers={"Retry-After": "1"},
    )
