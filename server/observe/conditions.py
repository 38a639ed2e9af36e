"""What an operator should hear of without asking: looked for every few seconds, told when it begins, never in a flood.

Each look compares the numbers with those of the look before. A condition that lasts is told again once a minute.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from peqa_server.observe.log_format import event
from peqa_server.services import Services

log = logging.getLogger("peqa.server")

LOOK_SECONDS = 5.0
REMIND_SECONDS = 60.0
STORM = 0.2  # preemptions per step: every fifth step throws work away
STORM_LEAST = 5
THRASH = 0.5  # row writes per step: tasks push one another from the device
THRASH_LEAST = 20
LOW_DISK_BYTES = 256 << 20

Found = tuple[str, int, str, dict[str, object]]
"""Its key, the level, a sentence, and fields."""


class Conditions:
    """Looks at one server. `free_bytes`: of the store's disk."""

    def __init__(self, services: Services, free_bytes: Callable[[], int]) -> None:
        self._services = services
        self._free_bytes = free_bytes
        self._before = dict(services.engine.stats())
        self._quarantined = set(services.tasks.quarantined())
        self._told: dict[str, float] = {}

    def look(self, now: float) -> list[Found]:
        """What is to be told at `now` (seconds of any steady clock)."""
        stats = dict(self._services.engine.stats())
        told = list(self._tasks())
        for found in (*self._load(stats), *self._disk()):
            last = self._told.get(found[0])
            if last is None or now - last >= REMIND_SECONDS:
                self._told[found[0]] = now
                told.append(found)
        self._before = stats
        return told

    def _load(self, stats: Mapping[str, float]) -> Iterator[Found]:
        def grown(name: str) -> int:
            return int(stats.get(name, 0) - self._before.get(name, 0))

        steps = grown("steps_total")
        preempted, written = grown("preemptions_total"), grown("row_writes_total")
        if preempted >= STORM_LEAST and preempted >= STORM * steps:
            yield (
                "preemptions",
                logging.WARNING,
                "running requests are preempted again and again: give more --kv-blocks or fewer --max-sequences",
                {"preemptions": preempted, "steps": steps, "in_all": int(stats["preemptions_total"])},
            )
        if written >= THRASH_LEAST and written >= THRASH * steps:
            yield (
                "rows",
                logging.WARNING,
                "tasks push one another from the device: give more --task-rows",
                {"row_writes": written, "steps": steps, "task_rows": int(stats["task_rows"]) + 1},
            )
        if rejected := grown("rejected_total"):
            yield (
                "overload",
                logging.WARNING,
                "requests are refused because too many wait",
                {
                    "rejected": rejected,
                    "in_all": int(stats["rejected_total"]),
                    "waiting": int(stats["requests_waiting"]),
                },
            )

    def _tasks(self) -> Iterator[Found]:
        quarantined = self._services.tasks.quarantined()
        for task, reason in quarantined.items():
            if task not in self._quarantined:
                yield "quarantine", logging.ERROR, "task set aside", {"task": task, "reason": reason}
        for task in sorted(self._quarantined.difference(quarantined)):
            yield "quarantine", logging.INFO, "task no longer set aside", {"task": task}
        self._quarantined = set(quarantined)

    def _disk(self) -> Iterator[Found]:
        free = self._free_bytes()
        if free < LOW_DISK_BYTES:
            fields: dict[str, object] = {"free_bytes": free}
            yield "disk", logging.WARNING, "the store's disk is nearly full: uploads will be refused", fields


async def watch_conditions(services: Services, store: Path) -> None:
    """Tell the log what `Conditions` finds, until cancelled."""
    conditions = Conditions(services, lambda: _free_bytes(store))
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        for _, level, message, fields in await asyncio.to_thread(conditions.look, time.monotonic()):
            event(log, level, message, said=None, **fields)


def _free_bytes(folder: Path) -> int:
    """Free bytes of the disk that `folder`, or the nearest one above that exists, is on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
