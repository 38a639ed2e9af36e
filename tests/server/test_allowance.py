"""Rates and places of one key, on a clock that a test moves."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from key_stubs import key
from prometheus_client import CollectorRegistry, generate_latest

from peqa_runtime.core import Lease
from peqa_server.access.allowance import Allowance, Allowances, TokenBucket
from peqa_server.access.api_key import Limits
from peqa_server.access.caller import Caller, KeyHolder
from peqa_server.access.key_metrics import KeyMetrics
from peqa_server.http.errors import ApiError


def allowance(**limits: int) -> Allowance:
    found = Allowance()
    found.fit(Limits(**limits), 0.0)
    return found


def refusal(call: object, *arguments: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert caught.value.status == 429
    return caught.value


def test_requests_refill_evenly() -> None:
    a = allowance(requests_per_minute=6)
    for _ in range(6):
        a.take_request(0.0)
    error = refusal(a.take_request, 0.0)
    assert (error.code, error.headers["Retry-After"]) == ("request_rate_limit", "10")
    refusal(a.take_request, 9.9)
    a.take_request(10.0)
    refusal(a.take_request, 10.1)
    for _ in range(6):
        a.take_request(1000.0)  # a minute's worth is the most that is saved up
    refusal(a.take_request, 1000.0)


def test_generated_tokens_are_charged_into_debt() -> None:
    a = allowance(tokens_per_minute=600)
    a.check_tokens(100, 0.0)
    a.charge(100, 0.0)
    for _ in range(800):
        a.charge(1, 0.0)
    assert a.headers(0.0) == {
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m30s",
    }
    error = refusal(a.check_tokens, 50, 0.0)
    assert (error.code, error.headers["Retry-After"]) == ("token_rate_limit", "35")
    assert "600 tokens a minute" in error.message
    refusal(a.check_tokens, 50, 34.9)
    a.check_tokens(50, 35.0)


def test_a_prompt_beyond_the_rate_waits_for_a_full_bucket() -> None:
    a = allowance(tokens_per_minute=60)
    a.check_tokens(500, 0.0)
    a.charge(500, 0.0)
    assert refusal(a.check_tokens, 1, 0.0).headers["Retry-After"] == str(441)
    a.check_tokens(1, 441.0)
    refusal(a.check_tokens, 500, 441.0)
    a.check_tokens(500, 500.0)


def test_an_empty_prompt_needs_a_token_too() -> None:
    a = allowance(tokens_per_minute=60)
    a.charge(60, 0.0)
    refusal(a.check_tokens, 0, 0.0)


def test_places() -> None:
    a = allowance(concurrent=3)
    a.take_places(2)
    error = refusal(a.take_places, 2)
    assert (error.code, error.headers["Retry-After"]) == ("concurrency_limit", "1")
    with pytest.raises(ApiError, match="alone asks for 4") as never:
        a.take_places(4)
    assert (never.value.status, never.value.headers) == (400, {}), "asking again would not help"
    a.take_places(1)
    a.give_back(2)
    a.take_places(2)
    assert a.running == 3


def test_headers_name_what_is_limited_alone() -> None:
    assert allowance(concurrent=3).headers(0.0) == {}
    a = allowance(requests_per_minute=120, tokens_per_minute=60_000)
    a.take_request(0.0)
    found = a.headers(0.25)
    assert found["x-ratelimit-remaining-requests"] == "119"
    assert found["x-ratelimit-reset-requests"] == "250ms"
    assert found["x-ratelimit-reset-tokens"] == "0ms"


def test_new_limits_hold_at_once_and_nothing_is_forgiven() -> None:
    now = [0.0]
    book = Allowances(lambda: now[0])
    one = key("one", requests_per_minute=10, concurrent=2)
    a = book.of(one)
    a.take_places(2)
    for _ in range(10):
        a.take_request(0.0)
    more = book.of(replace(one, limits=Limits(requests_per_minute=600, concurrent=3)))
    assert more is a
    refusal(a.take_request, 0.0)
    a.take_request(0.1)
    a.take_places(1)
    book.of(replace(one, limits=Limits(requests_per_minute=1, concurrent=1)))
    refusal(a.take_places, 1)
    now[0] = 60.0
    a.take_request(60.0)
    refusal(a.take_request, 60.0)
    book.of(replace(one, limits=Limits()))
    for _ in range(1000):
        a.take_request(60.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**6), st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10**6)), max_size=30))
def test_a_bucket_gives_no_more_than_it_gets(per_minute: int, steps: list[tuple[float, int]]) -> None:
    """Whoever keeps to `seconds_until` takes at most a full bucket and what flows in, plus one overdraft."""
    bucket, now, taken, largest = TokenBucket(per_minute, 0.0), 0.0, 0, 0
    for seconds, amount in steps:
        now += seconds
        wait = bucket.seconds_until(amount, now)
        assert wait >= 0
        if wait == 0:
            bucket.take(amount, now)
            taken += amount
            largest = max(largest, amount)
        assert taken <= per_minute + now * per_minute / 60 + largest + 1e-3
        later = copy.copy(bucket).level(now + wait)
        assert later >= min(amount, per_minute) * (1 - 1e-6) - 1e-3 or wait == 0


def test_a_clock_that_jumps_back_gives_and_takes_nothing() -> None:
    bucket = TokenBucket(60, 100.0)
    bucket.take(60, 100.0)
    assert bucket.level(50.0) == 0.0
    assert bucket.level(100.0) == 0.0
    assert bucket.level(101.0) == 1.0


def holder(metrics: KeyMetrics, **limits: int) -> KeyHolder:
    one = key("alice", "user", "acme-*", **limits)
    return KeyHolder(one, Allowances(lambda: 0.0).of(one), metrics, lambda: 0.0)


def test_work_is_counted_and_given_back_once() -> None:
    registry = CollectorRegistry()
    alice = holder(KeyMetrics(registry), concurrent=2, tokens_per_minute=100)
    lease = Lease("acme-sql", "r")
    work = alice.begin(lease, choices=2, prompt_tokens=10, priority=0)
    work.charge("prompt", 10)
    work.charge("generated", 1)
    with pytest.raises(ApiError, match="in work at once"):
        alice.begin(lease, choices=1, prompt_tokens=1, priority=0)
    assert 'peqa_key_running{key="alice"} 2.0' in generate_latest(registry).decode()
    for _ in range(3):
        work.close()
    with alice.uploading():
        text = generate_latest(registry).decode()
        assert 'peqa_key_running{key="alice"} 1.0' in text
        assert 'peqa_key_tokens_total{key="alice",kind="prompt"} 10.0' in text
        assert 'peqa_key_tokens_total{key="alice",kind="generated"} 1.0' in text
    assert 'peqa_key_running{key="alice"} 0.0' in generate_latest(registry).decode()


def test_labels_are_bounded() -> None:
    metrics = KeyMetrics(CollectorRegistry(), max_keys=2)
    assert [metrics.label(name) for name in ("a", "b", "c", "a")] == ["a", "b", "other", "a"]


def test_salts_differ_by_tenant_and_by_what_the_body_says() -> None:
    one, two, other = key("one", tenant="acme"), key("two", tenant="acme"), key("three", tenant="acme2")
    salts = {k.salt(text) for k in (one, other) for text in ("", "x", ":x", "2:x")}
    assert len(salts) == 8
    assert one.salt("x") == two.salt("x"), "keys of one tenant share what is cached"
    assert key("a", tenant="b").salt("1:c:d") != key("a", tenant="b:1:c").salt("d")


def test_nobody_may_do_anything() -> None:
    nobody = Caller()
    assert not nobody.may_use("acme-sql")
    assert not nobody.may_use("base")
    with pytest.raises(ApiError, match="nobody"):
        nobody.check_change("acme-sql")
    with pytest.raises(ApiError, match="nobody"):
        nobody.begin(Lease("base", ""), choices=1, prompt_tokens=1, priority=0)
