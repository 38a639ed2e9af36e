"""What the log tells without being asked: when it begins, and again only after a while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server_stubs import StubEngine, StubTasks

from peqa_server.observe import conditions
from peqa_server.observe.conditions import LOW_DISK_BYTES, REMIND_SECONDS, Conditions
from peqa_server.services import Services

PLENTY = 1 << 40


class Server:
    """A stub server whose numbers are set by hand."""

    def __init__(self) -> None:
        self.numbers = {
            "steps_total": 0.0, "preemptions_total": 0.0, "row_writes_total": 0.0, "rejected_total": 0.0,
            "requests_waiting": 7.0, "kv_blocks": 10.0, "task_rows": 3.0,
        }  # fmt: skip
        self.free = PLENTY
        engine, self.tasks = StubEngine(), StubTasks()
        engine.stats = lambda: self.numbers  # type: ignore[method-assign]
        self.services = Services(engine, self.tasks, None, Path())  # type: ignore[arg-type]
        self.conditions = Conditions(self.services, lambda: self.free)

    def add(self, **numbers: float) -> None:
        self.numbers = {
            **self.numbers,
            **{f"{n}_total": self.numbers[f"{n}_total"] + v for n, v in numbers.items()},
        }

    def look(self, now: float) -> list[str]:
        return [key for key, *_ in self.conditions.look(now)]


def test_a_storm_is_told_when_it_begins_and_once_a_minute() -> None:
    server = Server()
    assert server.look(0) == []
    server.add(steps=100, preemptions=4)
    assert server.look(5) == [], "a few preemptions are no storm"
    server.add(steps=100, preemptions=19)
    assert server.look(10) == [], "nor are they beside many steps"
    server.add(steps=100, preemptions=20)
    assert server.look(15) == ["preemptions"]
    for now in (20, 25, 70):
        server.add(steps=10, preemptions=10)
        assert server.look(now) == []
    server.add(steps=10, preemptions=10)
    assert server.look(15 + REMIND_SECONDS) == ["preemptions"]
    assert server.look(200) == [], "over"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda s: s.add(steps=30, row_writes=20), "rows"),
        (lambda s: s.add(rejected=1), "overload"),
        (lambda s: setattr(s, "free", LOW_DISK_BYTES - 1), "disk"),
    ],
)
def test_each_condition_is_found(change: Callable[[Server], None], key: str) -> None:
    server = Server()
    change(server)
    ((found, level, sentence, fields),) = server.conditions.look(1)
    assert found == key
    assert level == logging.WARNING
    assert len(sentence) > 20
    assert fields


def test_quarantine_is_told_at_its_begin_and_end() -> None:
    server = Server()
    server.tasks.set_aside["sql"] = "NaN"
    ((_, level, sentence, fields),) = server.conditions.look(1)
    assert (level, sentence, fields) == (logging.ERROR, "task set aside", {"task": "sql", "reason": "NaN"})
    assert server.look(2) == []
    server.tasks.set_aside["qa"] = "NaN"
    assert len(server.look(3)) == 1, "another task is told at once, not after a minute"
    del server.tasks.set_aside["sql"]
    ((_, level, sentence, fields),) = server.conditions.look(4)
    assert (level, sentence, fields) == (logging.INFO, "task no longer set aside", {"task": "sql"})


def test_the_watch_writes_to_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(conditions, "LOOK_SECONDS", 0.01)
    server = Server()

    async def watch() -> None:
        watching = asyncio.ensure_future(
            conditions.watch_conditions(server.services, tmp_path / "not" / "there")
        )
        await asyncio.sleep(0.05)
        server.add(rejected=3)
        while not caplog.records:
            await asyncio.sleep(0.01)
        watching.cancel()

    with caplog.at_level(logging.WARNING, logger="peqa.server"):
        asyncio.run(asyncio.wait_for(watch(), 5))
    record: Any = caplog.records[0]
    assert "refused" in record.getMessage()
    assert (record.fields["rejected"], record.fields["waiting"]) == (3, 7)
