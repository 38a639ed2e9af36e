"""Times of several ways to compute the same: interleaved, so that a slow second of the machine meets all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Call = Callable[[], object]


@dataclass(frozen=True)
class Way:
    """One way to compute: a call per weight of its rotation, taken in turn, so that no weight is still in a cache.

    `clock` counts the seconds of what is compared where a call does more than that; None: all of it is.
    """

    name: str
    calls: Sequence[Call]
    clock: Callable[[], float] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    best: float
    samples: int


class Timer(Protocol):
    """Times ways against each other."""

    def compare(self, label: str, *ways: Way) -> dict[str, Timing]:
        """Seconds of one call of each way, by name; `label` says what is being compared."""
        ...


def none_shown(label: str) -> None:
    """Show no progress."""


class Clock:
    """Wall clock. In each round every way makes a few calls, the ways one after the other.

    Before its turn each way waits until the one before has let go of the cores (OpenMP's threads go on spinning for
    milliseconds after the last call), and makes one call that wakes its own threads and is not timed.
    """

    def __init__(
        self,
        seconds: float = 2.0,
        *,
        least_rounds: int = 7,
        most_rounds: int = 300,
        sample_seconds: float = 1e-3,
        settle_seconds: float = 2e-2,
        show: Callable[[str], None] = none_shown,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Spend about `seconds` on a comparison; a sample lasts `sample_seconds` or one call, if that is longer."""
        self._seconds = seconds
        self._least, self._most = least_rounds, most_rounds
        self._sample_seconds = sample_seconds
        self._settle_seconds = settle_seconds
        self._show = show
        self._now = now
        self._sleep = sleep

    def compare(self, label: str, *ways: Way) -> dict[str, Timing]:
        """Seconds of one call of each way, by name."""
        self._show(label)
        turns = [_endless(way.calls) for way in ways]
        counts = []
        clocks = [way.clock or self._now for way in ways]
        for turn, clock in zip(turns, clocks, strict=True):
            self._sample(turn, 1, clock)  # the first call builds what is built once
            once = min(self._sample(turn, 1, clock) for _ in range(2))
            counts.append(max(1, math.ceil(self._sample_seconds / max(once, 1e-9))))
        samples: list[list[float]] = [[] for _ in ways]
        end = self._now() + self._seconds
        while len(samples[0]) < self._least or (self._now() < end and len(samples[0]) < self._most):
            for turn, count, clock, taken in zip(turns, counts, clocks, samples, strict=True):
                self._sleep(self._settle_seconds)
                next(turn)()
                taken.append(self._sample(turn, count, clock))
        return {way.name: _timing(taken) for way, taken in zip(ways, samples, strict=True)}

    def _sample(self, turn: Iterator[Call], calls: int, clock: Callable[[], float]) -> float:
        """Seconds per call of the next `calls` calls."""
        begin = clock()
        for _ in range(calls):
            next(turn)()
        return (clock() - begin) / calls


class GraphReplay:
    """CUDA events around replays of a graph that holds whole passes over the rotation, as a served step does.

    Launches cost nothing that way, and no call finds its weight in the L2 cache. What a replay itself costs, some
    10 us, vanishes in a pass of milliseconds.
    """

    def __init__(
        self,
        *,
        rounds: int = 25,
        pass_seconds: float = 4e-3,
        show: Callable[[str], None] = none_shown,
        cuda: Any = None,
    ) -> None:
        """Replay each way's graph `rounds` times in turn; a pass lasts `pass_seconds` or one rotation.

        `cuda` is torch.cuda, or what stands in for it.
        """
        if cuda is None:
            import torch.cuda as cuda
        self._rounds = rounds
        self._pass_seconds = pass_seconds
        self._show = show
        self._cuda = cuda

    def compare(self, label: str, *ways: Way) -> dict[str, Timing]:
        """Seconds of one call of each way, by name."""
        self._show(label)
        passes = [self._pass(way) for way in ways]
        samples: list[list[float]] = [[] for _ in ways]
        for _ in range(self._rounds):
            for (graph, calls), taken in zip(passes, samples, strict=True):
                taken.append(self._elapsed(graph.replay) / calls)
        for graph, _ in passes:
            graph.reset()
        return {way.name: _timing(taken) for way, taken in zip(ways, samples, strict=True)}

    def _pass(self, way: Way) -> tuple[Any, int]:
        """The graph of as many rotations as fill a pass, and its number of calls.

        How many that are says a replay of one rotation: called one by one, small kernels wait for Python.
        """
        cuda = self._cuda
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(
            stream
        ):  # libraries choose algorithms and workspaces now, where no capture is under way
            for _ in range(2):
                _run(way.calls)
        cuda.current_stream().wait_stream(stream)
        graph = self._capture(way, 1)
        once = min(self._elapsed(graph.replay) for _ in range(3))
        repeats = max(1, math.ceil(self._pass_seconds / max(once, 1e-9)))
        if repeats > 1:
            graph.reset()
            graph = self._capture(way, repeats)
        return graph, repeats * len(way.calls)

    def _capture(self, way: Way, repeats: int) -> Any:
        """A graph of so many rotations, replayed once: the first replay brings it to the device."""
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            for _ in range(repeats):
                _run(way.calls)
        graph.replay()
        return graph

    def _elapsed(self, work: Callable[[], object]) -> float:
        """Seconds between two events around `work`."""
        cuda = self._cuda
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _endless(calls: Sequence[Call]) -> Iterator[Call]:
    while True:
        yield from calls


def _timing(samples: list[float]) -> Timing:
    return Timing(statistics.median(samples), min(samples), len(samples))
