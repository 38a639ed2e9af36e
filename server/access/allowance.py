"""What one key has left: requests and tokens per minute, and places for work at once. Clocks are monotonic seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from peqa_server.access.api_key import ApiKey, Limits
from peqa_server.http.errors import ApiError

Clock = Callable[[], float]


class TokenBucket:
    """Fills by `per_minute` a minute up to a minute's worth. It may be in debt: the next taker waits longer."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """What is in it; below 0: owed."""
        filled = self._level + max(0.0, now - self._at) * self.per_minute / 60
        self._level, self._at = min(float(self.per_minute), filled), max(now, self._at)
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, whether it is there or not."""
        self._level = self.level(now) - amount

    def seconds_until(self, amount: float, now: float) -> float:
        """Until `amount` is in it, or until it is full where it never holds so much."""
        missing = min(amount, self.per_minute) - self.level(now)
        return max(0.0, missing * 60 / self.per_minute)

    def refitted(self, per_minute: int, now: float) -> TokenBucket:
        """The bucket under another rate: no fuller than it was, and never beyond the new minute's worth."""
        if per_minute == self.per_minute:
            return self
        other = TokenBucket(per_minute, now)
        other._level = min(self.level(now), float(per_minute))
        return other


@dataclass
class Allowance:
    """The state of one key's limits."""

    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    concurrent: int | None = None
    running: int = 0

    def fit(self, limits: Limits, now: float) -> None:
        """Take on the limits that the key has now; what is used up stays used up."""
        self.requests = _fitted(self.requests, limits.requests_per_minute, now)
        self.tokens = _fitted(self.tokens, limits.tokens_per_minute, now)
        self.concurrent = limits.concurrent

    def take_request(self, now: float) -> None:
        """Count one HTTP request. 429 when the rate is used up."""
        bucket = self.requests
        if bucket is None:
            return
        wait = bucket.seconds_until(1, now)
        if wait > 0:
            raise _too_many(f"this key may send {bucket.per_minute} requests a minute", "request_rate", wait)
        bucket.take(1, now)

    def take_places(self, count: int) -> None:
        """Begin `count` choices or uploads; pair with `give_back`.

        429 when they are too many at once; 400, which no client tries again, when they always would be.
        """
        if self.concurrent is not None and self.running + count > self.concurrent:
            message = f"this key may have {self.concurrent} choices and uploads in work at once; "
            if count > self.concurrent:
                message += f"this request alone asks for {count}: send fewer prompts, or a smaller n"
                raise ApiError(400, message, code="concurrency_limit", param="n")
            message += f"{self.running} are, and this request asks for {count} more"
            raise _too_many(message, "concurrency", 1)
        self.running += count

    def give_back(self, count: int) -> None:
        """End `count` choices or uploads."""
        self.running -= count
        assert self.running >= 0

    def check_tokens(self, prompt_tokens: int, now: float) -> None:
        """429 while the bucket lacks the prompt's tokens. What is generated is charged as it comes, into debt."""
        if self.tokens is None:
            return
        wait = self.tokens.seconds_until(max(1, prompt_tokens), now)
        if wait > 0:
            message = (
                f"this key may use {self.tokens.per_minute} tokens a minute, has {math.floor(self.tokens.level(now))} "
                f"left, and the prompt has {prompt_tokens}"
            )
            raise _too_many(message, "token_rate", wait)

    def charge(self, tokens: int, now: float) -> None:
        """Take tokens that are spent."""
        if self.tokens is not None:
            self.tokens.take(tokens, now)

    def headers(self, now: float) -> Mapping[str, str]:
        """What OpenAI's clients read: limit, rest, and time until all is there again."""
        found: dict[str, str] = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now))))
                found[f"x-ratelimit-reset-{name}"] = _span(bucket.seconds_until(bucket.per_minute, now))
        return found


def _fitted(bucket: TokenBucket | None, per_minute: int | None, now: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    return TokenBucket(per_minute, now) if bucket is None else bucket.refitted(per_minute, now)


def _too_many(message: str, what: str, wait: float) -> ApiError:
    seconds = max(1, math.ceil(wait))
    return ApiError(
        429,
        f"{message}; ask again in {seconds} s",
        code=f"{what}_limit",
        headers={"Retry-After": str(seconds)},
    )


def _span(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 6s, 1m30s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"


@dataclass
class Allowances:
    """The allowance of every key that has been used since the start."""

    clock: Clock = time.monotonic
    _by_id: dict[str, Allowance] = field(default_factory=dict)

    def of(self, key: ApiKey) -> Allowance:
        """The key's allowance, under the limits that it has now."""
        allowance = self._by_id.setdefault(key.id, Allowance())
        allowance.fit(key.limits, self.clock())
        return allowance
