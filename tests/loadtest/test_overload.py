"""The overload of the bench, short and against a slow tiny server in this process; and how it is judged."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

from peqa_loadtest.bench.overload import Outcome, judge, overload
from peqa_loadtest.bench.session import open_session
from peqa_loadtest.client import Answer, Failure
from peqa_server.app import create_loading_app
from peqa_server.start.loading import ServeOptions, load_services

PLACES = 8
STEP_SECONDS = 0.08
MAX_WAIT = 3.0


def answer(first: float, last: float, status: int | None = 200) -> Answer:
    failure = None if status == 200 else Failure(status, "no")
    return Answer("t", "p", 0.0, finished=last, text_times=[first, last], output_tokens=10, failure=failure)


def test_lost_refused_and_served_are_told_apart() -> None:
    outcome = Outcome(
        [answer(1, 2), answer(3, 4), answer(0, 1, 429), answer(0, 1, 500), answer(0, 1, None)], 7
    )
    assert (len(outcome.served), outcome.refused, outcome.lost) == (2, 1, 2)
    assert outcome.first_tokens == [1, 3]
    rows = {row["name"].rpartition("/")[2]: row for row in judge([outcome], outcome, outcome, 1.0, 2.0)}
    assert rows["lost"]["ok"] is False
    assert rows["first-token-p99-ratio"]["value"] == rows["goodput-ratio"]["value"] == 1
    late = Outcome([answer(7, 8), answer(8, 9)], 12)
    rows = {
        row["name"].rpartition("/")[2]: row["ok"]
        for row in judge([outcome, outcome], outcome, late, 1.0, 2.0)
    }
    assert rows == {
        "lost": False,
        "first-token-p99-ratio": False,
        "goodput-ratio": False,
        "longest-queue": False,
    }


@pytest.fixture
def slow_server(tiny_base: Path, tmp_path: Path) -> Iterator[Any]:
    """Steps sleep most of their time, so that this process can be its client as well."""
    sizes = {"num_blocks": 256, "max_sequences": PLACES, "max_wait": MAX_WAIT}
    services, _ = load_services(
        ServeOptions(tiny_base, home=tmp_path, store=tmp_path / "s", engine=sizes), print
    )
    engine: Any = services.engine
    model = engine.engine.model
    forward = model.forward

    def slow(*args: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return forward(*args)

    model.forward = slow
    app = create_loading_app()
    app.state.gate.open(services)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    def metric(name: str) -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name
        )

    yield SimpleNamespace(url=url, metric=metric, services=services)
    server.should_exit = True
    thread.join(10)
    services.engine.stop()
    services.tasks.close()


@pytest.mark.slow
@pytest.mark.alone
def test_ten_times_too_much_for_ten_seconds(slow_server: Any) -> None:
    async def measure() -> list[dict[str, Any]]:
        session = await open_session(slow_server, 16, 16)
        try:
            return await overload(session, ["base"], 10.0, PLACES, MAX_WAIT)
        finally:
            await session.close()

    rows = {row["name"].rpartition("/")[2]: row for row in asyncio.run(measure())}
    print("\n" + "\n".join(f"{name}: {row}" for name, row in rows.items()))
    assert rows["lost"]["value"] == 0
    assert rows["lost"]["refused"] > 4 * rows["lost"]["served"], "it was too much"
    assert rows["first-token-p99-ratio"]["value"] <= 2.0
    assert (
        rows["goodput-ratio"]["value"] >= 0.6
    )  # the bench's bar is 0.9; here the client takes from the same process
    assert rows["longest-queue"]["ok"]
    assert slow_server.services.engine.stats()["requests_waiting"] == 0
