"""The door of the engine: what waits is foreseen in seconds, and who would wait too long is told so."""

from __future__ import annotations

import heapq
import random
from typing import Any

import pytest

from peqa_runtime.core import Blend, Request
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.queue_gauge import QueueGauge
from peqa_runtime.errors import Overloaded
from peqa_runtime.sampling_params import SamplingParams


def request(name: str, task: str = "a", prompt: int = 60, max_tokens: int = 40) -> Request:
    return Request(name, (1,) * prompt, SamplingParams(max_tokens=max_tokens), task)


BUSY = ("busy",)


def gauge(rate: float | None = 100.0, **config: Any) -> QueueGauge:
    """Of a server whose one place is taken."""
    found = QueueGauge(EngineConfig(max_sequences=1, **config))
    found.add(request("busy"))
    if rate is not None:
        found.step(int(rate), 1.0)
    return found


def test_work_that_waits_over_what_is_done_a_second() -> None:
    queue = gauge(100.0)
    assert queue.wait("a", BUSY) == 0
    for i in range(5):
        queue.add(request(str(i)))  # 60 of the prompt, 40 to generate
    assert queue.wait("a", BUSY) == pytest.approx(5.0)
    assert queue.wait("a", ["busy", "0", "1"]) == pytest.approx(3.0)
    assert queue.wait("a", [*BUSY, *map(str, range(5))]) == 0
    queue.drop("4")
    assert queue.wait("a", ["busy", "0", "1"]) == pytest.approx(2.0)
    queue.reserve("a")
    assert queue.wait("a", ["busy", "0", "1"]) == pytest.approx(3.0), (
        "one that is being prepared is of a usual size"
    )
    queue.give_up("a")
    queue.step(10_000, 20.0)
    assert queue.wait("a", ["busy", "0", "1"]) < 1.0, "it is faster now"


def test_blends_wait_as_the_task_that_pays_for_them() -> None:
    queue = gauge(100.0)
    for i in range(20):
        blend = Blend.of({"a": 0.6 + i / 100, "b": 0.4 - i / 100}).name
        queue.add(request(str(i), blend))
    queue.add(request("c", "c"))
    other = queue.wait("d", BUSY)
    assert other == pytest.approx(3.0), "one of each of the three tasks, not of 22"
    assert queue.wait("a:0.9+z:0.1", BUSY) == queue.wait("a", BUSY) > 20
    for i in range(3):
        queue.reserve(f"a:0.{6 + i}+b:0.{4 - i}")
    assert queue.wait("d", BUSY) == pytest.approx(other)
    for i in range(3):
        queue.give_up(f"a:0.{6 + i}+b:0.{4 - i}")
    assert not queue._reserved


def test_who_finds_a_place_does_not_wait() -> None:
    queue = QueueGauge(EngineConfig(max_sequences=4, max_wait=1.0))
    queue.step(100, 1.0)
    for i in range(3):
        queue.refuse("a", ())
        queue.add(request(str(i)))
    queue.reserve("a")
    assert queue.wait("a", ()) == 0, "four places, and nothing runs yet"
    queue.refuse("a", ())
    queue.add(request("3"))
    assert queue.wait("a", ()) == pytest.approx(1.0), "the fifth"
    queue.give_up("a")
    assert queue.wait("a", ("0", "1")) == 0


def test_before_anything_is_measured_only_numbers_count() -> None:
    queue = gauge(None, max_waiting=3, max_wait=1.0)
    for i in range(3):
        queue.refuse("a", BUSY)
        queue.add(request(str(i), prompt=10_000))
    with pytest.raises(Overloaded, match="3 requests wait") as caught:
        queue.refuse("a", BUSY)
    assert caught.value.retry_after == 1


def test_the_refusal_says_how_long() -> None:
    queue = gauge(100.0, max_wait=4.0)
    for i in range(4):
        queue.refuse("a", BUSY)
        queue.add(request(str(i), prompt=90))
    with pytest.raises(Overloaded, match=r"about 5 s .* limit is 4 s") as caught:
        queue.refuse("a", BUSY)
    assert caught.value.retry_after == 6
    for i in range(4, 200):
        queue.add(request(str(i)))
    with pytest.raises(Overloaded) as caught:
        queue.refuse("a", BUSY)
    assert caught.value.retry_after == 60, "at most"


def test_a_task_that_fills_the_queue_does_not_close_it_to_others() -> None:
    queue = gauge(100.0, max_wait=5.0)
    for i in range(20):
        queue.add(request(str(i), "flood"))
    with pytest.raises(Overloaded):
        queue.refuse("flood", BUSY)
    queue.refuse("other", BUSY)
    assert queue.wait("other", BUSY) == pytest.approx(2.0), "one of each task goes before"
    for i in range(20):
        queue.add(request(f"x{i}", f"name {i}"))
    with pytest.raises(Overloaded):
        queue.refuse("one more name", BUSY)


def test_choices_are_let_in_together_or_not_at_all() -> None:
    queue = QueueGauge(EngineConfig(max_sequences=4, max_wait=5.0))
    queue.step(100, 1.0)
    queue.add(request("one"))
    running = ("one",)
    assert queue.wait("a", running, 3) == 0, "three places are left"
    assert queue.wait("a", running, 5) == pytest.approx(1.0), "the fourth"
    queue.refuse("a", running, 9)
    with pytest.raises(Overloaded, match=r"last of 10 choices .* 6 s .* 5 s.* fewer at once") as caught:
        queue.refuse("a", running, 10)
    assert caught.value.retry_after == 1, "nobody waits"
    queue.reserve("a", 9)
    assert queue.wait("a", running) == pytest.approx(6.0)
    with pytest.raises(Overloaded, match="a request would wait"):
        queue.refuse("a", running)
    queue.give_up("a", 9)
    assert queue.wait("a", running) == 0
    assert not queue._reserved


def test_choices_of_a_task_that_has_nothing_in_work_wait_for_one_another_only() -> None:
    queue = QueueGauge(EngineConfig(max_sequences=4, max_wait=5.0))
    queue.step(100, 1.0)
    queue.refuse("a", (), 1024)
    queue.reserve("a", 1024)
    with pytest.raises(Overloaded):
        queue.refuse("a", (), 2)
    queue.refuse("b", (), 1024)
    queue.give_up("a", 1024)
    queue.add(request("one", "a"))
    queue.refuse("b", ("one",), 1024)
    with pytest.raises(Overloaded):
        queue.refuse("a:0.9+b:0.1", ("one",), 1024)
    queue.drop("one")
    queue.refuse("a", (), 1024)


def test_what_really_had_to_be_computed_corrects_what_was_expected() -> None:
    queue = gauge(100.0)
    for i in range(100):  # answers are short whatever max_tokens says, and prompts mostly known
        queue.add(request(str(i), prompt=1000, max_tokens=8000))
        queue.finish(str(i), generated=20, cached=980)
    for i in range(10):
        queue.add(request(f"next {i}", prompt=1000, max_tokens=8000))
    assert queue.wait("a", BUSY) == pytest.approx(10 * 40 / 100, rel=0.15)


@pytest.mark.parametrize("likely", [40, 4000], ids=["max_tokens true", "max_tokens far too high"])
def test_ten_times_too_much(likely: int) -> None:
    """A server of 8 places that computes 1000 tokens a second gets 100 requests a second of 100 tokens each."""
    queue = QueueGauge(EngineConfig(max_sequences=8, max_wait=5.0, max_waiting=10_000))
    rng = random.Random(0)
    running: dict[str, float] = {}
    waiting: list[tuple[float, str]] = []
    waits: list[tuple[float, float]] = []
    now, next_arrival, number, done = 0.0, 0.0, 0, 0
    while now < 60:
        while next_arrival <= now:
            next_arrival += rng.expovariate(100)
            try:
                queue.refuse("a", running)
            except Overloaded:
                continue
            number += 1
            queue.add(request(str(number), max_tokens=likely))
            heapq.heappush(waiting, (now, str(number)))
        while waiting and len(running) < 8:
            arrived, name = heapq.heappop(waiting)
            waits.append((now, now - arrived))
            running[name] = rng.uniform(80, 120)
        if running:
            share = 100 / len(running)  # a step of 0.1 s
            for name in list(running):
                running[name] -= share
                if running[name] <= 0:
                    del running[name]
                    queue.finish(name, 40, 0)
                    done += 1
            queue.step(100, 0.1)
        now += 0.1
    late = [seconds for at, seconds in waits if at > 15]
    assert max(late) < 1.3 * 5, "nobody who was let in waits much longer than foreseen"
    assert min(late) > 0.5 * 5, "and nobody is refused without need"
    assert max(seconds for _, seconds in waits) < 3 * 5, "nor at the beginning, when little is known"
    assert done > 0.9 * 600  # a request that ends within a step wastes its rest
