"""Who starts next: by priority, then so that tasks share tokens, then by age. No torch.

Within one priority each task has a counter of the tokens that were computed for it, prompt and output alike. The task
with the smallest counter goes first, so a task with a thousand waiting requests gets no more than one with a few. A
task that begins to wait starts at the smallest counter of those that wait already: having been away earns nothing.
(The virtual token counter of "Fairness in Serving Large Language Models", arXiv 2401.00588, with one token = 1.)

The bound, where rows of the scale bank are enough for all and no prompt waits for a beginning that another computes:
as long as two tasks of one priority both have something waiting, the tokens computed for them differ by at most 2·N·L,
N being the most sequences that run at once and L the longest prompt plus output. For a task starts a sequence only
while its counter is the smallest; from then on at most N·L tokens are added to it by what runs, before it is its turn
again; and counters of waiting tasks never jump. Tokens computed again after a preemption, or found in the prefix
cache, count nothing. A blend counts for its member with the largest weight (`payer_of`): a sequence's task is here its
`Request.payer`.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from itertools import count

from peqa_runtime.engine.sequence import Sequence

_MIN_NAMES = 64  # fewer are not worth tidying up


class FairQueue:
    """The waiting sequences; it also hears of what runs, for the counters. One step costs O(log tasks) per start."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """Every waiting sequence, in no promised order."""
        for level in self._levels.values():
            for share in level.shares.values():
                yield from share.begun
                yield from share.new.values()

    def add(self, sequence: Sequence) -> None:
        """A new request waits."""
        level = self._levels.setdefault(sequence.priority, _Level())
        level.add(sequence)
        self._count += 1

    def start(self, sequence: Sequence) -> None:
        """It waits no more, but runs."""
        self._levels[sequence.priority].start(sequence)
        self._count -= 1

    def put_back(self, sequence: Sequence) -> None:
        """It was preempted: it waits again, before those of its task and priority that have not begun."""
        self._levels[sequence.priority].put_back(sequence)
        self._count += 1

    def drop(self, sequence: Sequence, *, running: bool) -> None:
        """It ended or was aborted, where it ran or waited."""
        level = self._levels[sequence.priority]
        if running:
            level.share(sequence).running -= 1
            level.num_running -= 1
        else:
            level.remove(sequence)
            self._count -= 1
        if not level.num_running and not level.num_waiting:
            del self._levels[sequence.priority]  # nobody is left to be compared with

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Tokens were computed for this running sequence."""
        self._levels[sequence.priority].share(sequence).served += num_tokens

    def served(self, sequence: Sequence) -> int:
        """The counter of the sequence's task, comparable within one priority."""
        return self._levels[sequence.priority].share(sequence).served

    def running(self, sequence: Sequence) -> int:
        """How many sequences of the same task and priority run."""
        return self._levels[sequence.priority].share(sequence).running

    def candidates(self, among: Collection[str] | None = None) -> Generator[Sequence, None, None]:
        """Sequences in the order in which they should start, `among` these tasks only (None: all).

        Between two of them the last one may be started; a task whose first one was not is not offered again.
        """
        for priority in sorted(self._levels):
            level = self._levels[priority]
            yield from level.in_order() if among is None else level.in_order_among(among)


@dataclass(eq=False)
class _Share:
    """One task's part of a priority. `served`: its counter; `begun` and `new`: what waits, oldest first.

    A task's sequences begin in the order of their arrival, so all that were preempted are older than all new ones.
    `entry`: which entry of the heap stands for it; any others are left over.
    """

    served: int = 0
    running: int = 0
    begun: list[Sequence] = field(default_factory=list)
    new: OrderedDict[int, Sequence] = field(default_factory=OrderedDict)
    entry: int | None = None

    @property
    def waits(self) -> bool:
        return bool(self.begun or self.new)

    @property
    def head(self) -> Sequence:
        return self.begun[0] if self.begun else next(iter(self.new.values()))

    @property
    def place(self) -> tuple[int, int]:
        """Its place in the order of tasks."""
        return self.served, self.head.arrival


class _Level:
    """One priority. The heap holds each waiting task at a place that it had: when it comes up it is looked at. A place
    moves back as tokens are counted; when it moves forward, by a preemption, a new entry says so."""

    def __init__(self) -> None:
        self.shares: dict[str, _Share] = {}
        self.num_running = 0
        self.num_waiting = 0
        self._heap: list[tuple[int, int, int, _Share]] = []
        self._entries = count()
        self._last = _Share()  # the task that was the last to leave the queue
        self._tidy_at = _MIN_NAMES

    def share(self, sequence: Sequence) -> _Share:
        return self.shares[sequence.request.payer]

    def add(self, sequence: Sequence) -> None:
        self._tidy()
        share = self.shares.setdefault(sequence.request.payer, _Share())
        self._catch_up(share)
        share.new[sequence.arrival] = sequence
        self.num_waiting += 1
        if share.entry is None:
            self._push(share)

    def start(self, sequence: Sequence) -> None:
        self.remove(sequence)
        share = self.share(sequence)
        share.running += 1
        self.num_running += 1
        if not share.waits:
            self._last = share

    def put_back(self, sequence: Sequence) -> None:
        share = self.share(sequence)
        share.running -= 1
        self.num_running -= 1
        self._catch_up(share)
        insort(share.begun, sequence, key=_arrival)
        self.num_waiting += 1
        self._push(share)

    def remove(self, sequence: Sequence) -> None:
        share = self.share(sequence)
        if share.new.pop(sequence.arrival, None) is None:
            share.begun.remove(sequence)
        self.num_waiting -= 1

    def in_order(self) -> Generator[Sequence, None, None]:
        """The oldest of the first task, and on; O(log tasks) each."""
        passed: list[_Share] = []
        try:
            while (share := self._first()) is not None:
                head = share.head
                yield head
                if share.waits and share.head is head:
                    heappop(self._heap)
                    passed.append(share)
        finally:
            for share in passed:
                self._push(share)

    def in_order_among(self, tasks: Collection[str]) -> Iterator[Sequence]:
        """The same for a few tasks; O(tasks) each."""
        shares = [self.shares[task] for task in tasks if task in self.shares]
        while shares := [share for share in shares if share.waits]:
            share = min(shares, key=lambda share: share.place)
            head = share.head
            yield head
            if share.waits and share.head is head:
                shares.remove(share)

    def _catch_up(self, share: _Share) -> None:
        """A task begins to wait: not behind those that wait already, or else the last that did."""
        if not share.waits:
            first = self._first()
            share.served = max(share.served, self._last.served if first is None else first.served)

    def _push(self, share: _Share) -> None:
        share.entry = next(self._entries)
        heappush(self._heap, (*share.place, share.entry, share))

    def _first(self) -> _Share | None:
        """The waiting task whose turn it is, at the top of the heap."""
        while self._heap:
            served, arrival, entry, share = self._heap[0]
            if entry != share.entry:
                heappop(self._heap)
            elif not share.waits:
                heappop(self._heap)
                share.entry = None
            elif share.place != (served, arrival):
                heapreplace(self._heap, (*share.place, entry, share))
            else:
                return share
        return None

    def _tidy(self) -> None:
        """Forget idle tasks that would start at the smallest counter anyway, before names pile up."""
        if len(self.shares) < self._tidy_at:
            return
        first = self._first()
        least = self._last.served if first is None else first.served
        self.shares = {
            task: share
            for task, share in self.shares.items()
            if share.waits or share.running or share.served > least
        }
        self._tidy_at = max(_MIN_NAMES, 2 * len(self.shares))


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
