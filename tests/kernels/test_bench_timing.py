"""The bench's timers: a clock whose ticks are written down here, and graph replay on a fake torch.cuda."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest

from peqa_kernels.bench.timing import Clock, GraphReplay, Timing, Way


def test_clock_interleaves_and_takes_turns() -> None:
    ticks = itertools.count()
    made: list[str] = []
    ways = [
        Way("a", [lambda: made.append("a0"), lambda: made.append("a1")]),
        Way("b", [lambda: made.append("b0")]),
    ]
    pauses: list[float] = []
    clock = Clock(
        0.0,
        least_rounds=3,
        sample_seconds=0.0,
        settle_seconds=0.5,
        now=lambda: float(next(ticks)),
        sleep=pauses.append,
    )
    times = clock.compare("label", *ways)
    # In each turn one call that wakes the threads, then the one that is timed.
    assert made[-8:] == ["a1", "a0", "b0", "b0"] * 2
    assert pauses == [0.5] * 6
    assert times["a"] == Timing(1.0, 1.0, 3)


def test_clock_fills_a_sample_with_short_calls() -> None:
    now, made = [0.0], [0]

    def call() -> None:
        made[0] += 1
        now[0] += 1e-4

    times = Clock(0.0, least_rounds=1, sample_seconds=1e-3, now=lambda: now[0]).compare("", Way("a", [call]))
    assert made[0] >= 10
    assert times["a"].median == pytest.approx(1e-4)


def test_a_way_may_bring_its_own_clock() -> None:
    now, booked = [0.0], [0.0]

    def call() -> None:
        now[0] += 1.0  # a whole step ...
        booked[0] += 0.25  # ... of which this is compared

    clock = Clock(0.0, least_rounds=3, now=lambda: now[0], sleep=lambda _: None)
    times = clock.compare("", Way("part", [call], lambda: booked[0]), Way("whole", [call]))
    assert (times["part"].median, times["whole"].median) == (0.25, 1.0)


class FakeCuda:
    """The parts of torch.cuda that GraphReplay uses; in a graph a call takes one second of its clock, alone `eager`."""

    def __init__(self, eager: float = 1.0) -> None:
        self.now = 0.0
        self.eager = eager
        self.capturing: list[Any] | None = None
        self.replayed: list[int] = []
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = math.nan

            def record(self) -> None:
                self.at = fake.now

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            def __init__(self) -> None:
                self.calls: list[Any] = []

            def replay(self) -> None:
                fake.replayed.append(len(self.calls))
                fake.now += len(self.calls)

            def reset(self) -> None:
                self.calls = []

        class Stream:
            def wait_stream(self, _: Stream) -> None: ...

        self.Event, self.CUDAGraph, self.Stream = Event, CUDAGraph, Stream

    def current_stream(self) -> Any:
        return self.Stream()

    def stream(self, _: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.capturing = graph.calls
        yield
        self.capturing = None

    def synchronize(self) -> None: ...

    def call(self) -> None:
        if self.capturing is not None:
            self.capturing.append(1)
        else:
            self.now += self.eager


def test_graph_replay_times_whole_rotations() -> None:
    fake = FakeCuda()
    timer = GraphReplay(rounds=4, pass_seconds=5.0, cuda=fake)
    times = timer.compare("", Way("a", [fake.call] * 2), Way("b", [fake.call] * 6))
    assert times["a"] == Timing(1.0, 1.0, 4)  # 3 rotations of 2 calls fill 5 seconds
    assert fake.replayed[-8:] == [6, 6] * 4
    assert times["b"] == Timing(1.0, 1.0, 4)


def test_graph_replay_fills_a_pass_though_calls_wait_for_python_outside_of_it() -> None:
    fake = FakeCuda(eager=8.0)
    times = GraphReplay(rounds=4, pass_seconds=50.0, cuda=fake).compare("", Way("a", [fake.call] * 2))
    assert fake.replayed[-4:] == [50] * 4
    assert times["a"] == Timing(1.0, 1.0, 4)
