"""Who asks: a key with its rights and limits, or, on a server without keys, anybody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from peqa_runtime.core import BASE_TASK, MAX_CACHE_SALT, Blend, Lease
from peqa_runtime.errors import InvalidRequest, UnknownTask
from peqa_runtime.scales.revision_name import task_of
from peqa_server.access.allowance import Allowance, Clock
from peqa_server.access.api_key import ApiKey, Role
from peqa_server.access.key_metrics import KeyMetrics
from peqa_server.http.errors import ApiError


def names_of(choice: str | Blend) -> tuple[str, ...]:
    """Every task that a choice names, in whatever revision."""
    names = [choice] if isinstance(choice, str) else [name for name, _ in choice.shares]
    return tuple(task_of(name) for name in names)


def absent(task: str) -> UnknownTask:
    """What is said of a task that is not there and of one that the caller may not know of, word for word."""
    return UnknownTask(f"no task {task[:80]!r} is served here; GET /v1/tasks lists them")


class Work:
    """Work of one request that a key's limits count: its places, and the tokens that it spends."""

    def charge(self, kind: str, tokens: int) -> None:
        """Spend tokens; `kind` is "prompt" or "generated"."""

    def close(self) -> None:
        """Give the places back; safe to call twice."""


class Caller:
    """Nobody: may do nothing. What a request is until its key is known, and on routes that ask for none."""

    tenant: str = ""

    def may_use(self, task: str) -> bool:
        """Whether the caller may generate with the task, and know that it exists."""
        return False

    def check_change(self, task: str) -> None:
        """Raise 403 when the caller may not put, roll back or delete the task."""
        raise ApiError(403, "nobody may change tasks without a key", code="task_not_allowed", param="task")

    def salt(self, text: str) -> str:
        """The salt of the prefix cache for a request whose body says `text`."""
        return text

    def begin(self, lease: Lease, *, choices: int, prompt_tokens: int, priority: int) -> Work:
        """Begin a generation on what the request's task was resolved to. Raises what forbids it."""
        raise ApiError(403, "nobody may generate without a key", code="task_not_allowed")

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """Count an upload as work while it runs."""
        yield

    @property
    def disk_bytes(self) -> int | None:
        """How much the caller's tenant may keep on disk; None: as much as there is."""
        return None

    def headers(self) -> Mapping[str, str]:
        """Headers of every answer to this caller."""
        return {}


class Anybody(Caller):
    """Whoever reaches a server that asks for no key: may do everything, without limits."""

    def may_use(self, task: str) -> bool:
        """Always."""
        return True

    def check_change(self, task: str) -> None:
        """Never raises."""

    def begin(self, lease: Lease, *, choices: int, prompt_tokens: int, priority: int) -> Work:
        """Nothing is counted."""
        return Work()


class KeyHolder(Caller):
    """Somebody with a valid key."""

    def __init__(self, key: ApiKey, allowance: Allowance, metrics: KeyMetrics, clock: Clock) -> None:
        self.key = key
        self.tenant = key.tenant
        self._label = metrics.label(key.name)
        self._allowance = allowance
        self._metrics = metrics
        self._clock = clock

    def may_use(self, task: str) -> bool:
        """As the key's globs say."""
        return self.key.may_use(task)

    def check_change(self, task: str) -> None:
        """The same answer whether there is such a task or not."""
        if not (self.key.role >= Role.UPLOADER and task != BASE_TASK and self.key.may_use(task)):
            raise ApiError(
                403, f"this key may not change the task {task[:80]!r}; {self._tasks()}", code="task_not_allowed",
                param="task",
            )  # fmt: skip

    def salt(self, text: str) -> str:
        """The tenant's own, whatever the body says; the body's holds inside of the tenant."""
        if len(text) > MAX_CACHE_SALT:
            raise InvalidRequest(
                f"cache_salt must have at most {MAX_CACHE_SALT} characters, got {len(text)}",
                param="cache_salt",
            )
        return self.key.salt(text)

    def begin(self, lease: Lease, *, choices: int, prompt_tokens: int, priority: int) -> Work:
        """Check rights on the lease, priority and limits, in this order, and take the places."""
        for task in names_of(lease.blend or lease.task):
            self._check_use(task)
        lowest = self.key.limits.highest_priority
        if priority < lowest:
            raise ApiError(
                403, f"this key may not ask for the priority {priority}, only for {lowest} and up, which run later",
                code="priority_not_allowed", param="priority",
            )  # fmt: skip
        self._allowance.check_tokens(prompt_tokens, self._clock())
        return KeyWork(self, choices)

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """One place while the upload runs."""
        work = KeyWork(self, 1)
        try:
            yield
        finally:
            work.close()

    @property
    def disk_bytes(self) -> int | None:
        """As the key says."""
        return self.key.limits.disk_bytes

    def headers(self) -> Mapping[str, str]:
        """What is left of the rates."""
        return self._allowance.headers(self._clock())

    def admit(self) -> None:
        """Count one HTTP request; 429 when the key's rate is used up."""
        self._metrics.requests.labels(self._label).inc()
        self._allowance.take_request(self._clock())

    def refused(self, code: str) -> None:
        """Count an answer that was an error."""
        self._metrics.refused.labels(self._label, code).inc()

    def take_places(self, count: int) -> None:
        """Begin choices or uploads; 429 when they are too many at once."""
        self._allowance.take_places(count)
        self._metrics.running.labels(self._label).inc(count)

    def give_back(self, count: int) -> None:
        """End choices or uploads."""
        self._allowance.give_back(count)
        self._metrics.running.labels(self._label).dec(count)

    def charge(self, kind: str, tokens: int) -> None:
        """Take spent tokens from the rate."""
        self._allowance.charge(tokens, self._clock())
        self._metrics.tokens.labels(self._label, kind).inc(tokens)

    def _check_use(self, task: str) -> None:
        if self.key.may_use(task):
            return
        if task == BASE_TASK:
            raise ApiError(
                403, f"this key may not use the base; name a task: {self._tasks()}", code="task_not_allowed",
                param="task",
            )  # fmt: skip
        raise absent(task)

    def _tasks(self) -> str:
        globs = ", ".join(self.key.tasks[:20])
        return f"its tasks are {globs}" if globs else "it has no tasks"


class KeyWork(Work):
    """Work that a key pays for."""

    def __init__(self, holder: KeyHolder, places: int) -> None:
        holder.take_places(places)
        self._holder = holder
        self._places = places

    def charge(self, kind: str, tokens: int) -> None:
        """Spend tokens; the rate goes into debt where they are more than is left."""
        self._holder.charge(kind, tokens)

    def close(self) -> None:
        """Give the places back, once."""
        self._holder.give_back(self._places)
        self._places = 0
