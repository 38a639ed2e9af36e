"""Which running sequences give their places and blocks to one that waits. No torch."""

from __future__ import annotations

from collections.abc import Sequence as Items

from peqa_runtime.engine.block_manager import BlockManager
from peqa_runtime.engine.fair_queue import FairQueue
from peqa_runtime.engine.sequence import Sequence


class GivingWay:
    """Chooses, and changes nothing. `running` is the scheduler's list, first to last; `places` how many may run."""

    def __init__(
        self, blocks: BlockManager, waiting: FairQueue, running: Items[Sequence], places: int
    ) -> None:
        self._blocks = blocks
        self._waiting = waiting
        self._running = running
        self._places = places

    def victims(self, sequence: Sequence, found: Items[int]) -> list[Sequence] | None:
        """Running sequences to preempt so that this one has a place and blocks, often none; None when it must wait.

        Those of worse priority as far as need be, or else one of a task that holds several places. `found`: blocks of
        the prefix cache that the sequence begins with.
        """
        cost, free, places = self._blocks.cost(sequence, found), self._blocks.num_free, self._places
        victims: list[Sequence] = []
        for number in range(len(self._running), -1, -1):
            # One spare block per running sequence: each may need its next one soon, and a preemption costs more.
            if number < places and cost + number <= free:
                return victims
            if number == 0 or self._running[number - 1].priority <= sequence.priority:
                break
            victims.append(self._running[number - 1])
            free += self._blocks.freed_by(victims[-1], found)
        return self._from_a_crowd(sequence, found)

    def _from_a_crowd(self, sequence: Sequence, found: Items[int]) -> list[Sequence] | None:
        """When every place is taken and the sequence's task has none: the latest of a task that has several and was
        served no less. Only with a prefix cache, in which that one finds again what it has computed; without, a few
        short requests could keep others computing the same again and again."""
        taken = len(self._running)
        if self._blocks.cache is None or taken < self._places or self._waiting.running(sequence) > 0:
            return None
        for other in reversed(self._running):
            if (
                other.priority == sequence.priority
                and self._waiting.running(other) > 1
                and self._waiting.served(other) >= self._waiting.served(sequence)
            ):
                free = self._blocks.num_free + self._blocks.freed_by(other, found)
                return [other] if self._blocks.cost(sequence, found) + taken - 1 <= free else None
        return None
