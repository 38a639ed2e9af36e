"""Clients that hang up at any moment: afterwards nothing is held that nobody uses."""

from __future__ import annotations

import asyncio
import random
from statistics import median

import httpx

from peqa_loadtest.bench.figure import Figure, figure
from peqa_loadtest.bench.session import Session, failures
from peqa_loadtest.client import LoadTestError
from peqa_loadtest.swap import remember_task, restore_task

AT_ONCE = 16
LATEST = 1.2  # times a whole answer's time: hanging up happens at a random moment up to here
WHOLE_SHARE = 0.25  # of the requests ask for the answer in one piece
CHOICES_SHARE = 0.25  # … for two choices
SETTLE_SECONDS = 30.0


async def disconnects(session: Session, tasks: list[str], count: int) -> list[Figure]:
    """Hang up `count` times before the answer ends, wait until the server is idle, and count what it still holds."""
    rng = random.Random("disconnects")
    whole = await session.load(tasks, AT_ONCE, AT_ONCE)
    if failures(whole):
        raise LoadTestError(f"{failures(whole)} requests failed before anybody hung up")
    latest = LATEST * median(answer.finished - answer.sent for answer in whole)
    cut = finished = begun = 0

    async def work() -> None:
        nonlocal cut, finished, begun
        while cut + begun < count:
            (prompt,) = session.prompts(1)
            body = session.client.body(rng.choice(tasks), prompt, session.output_tokens)
            if rng.random() < WHOLE_SHARE:
                body = {name: value for name, value in body.items() if not name.startswith("stream")}
            if rng.random() < CHOICES_SHARE:
                body["n"] = 2
            begun += 1
            hung_up = await _hang_up(session.server.url, body, rng.uniform(0.0, latest))
            begun -= 1
            cut += hung_up
            finished += not hung_up

    while cut < count:  # those that had finished before are made up for
        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    await _settle(session)
    server = session.server
    blocks = server.metric("peqa_kv_blocks_used")
    sets = {task: await remember_task(session.client, task) for task in tasks}
    for task in tasks:  # a row whose task is gone is freed as soon as nobody holds it
        await session.client.call("DELETE", f"/v1/tasks/{task}")
    rows = server.metric("peqa_task_rows_used")
    for task, data in sets.items():
        await restore_task(session.client, task, data)
    facts = {"disconnects": cut, "finished_before": finished}
    return [
        figure("served/disconnects/leaked-blocks", blocks, "blocks", "<=", 0, **facts),
        figure("served/disconnects/leaked-rows", rows, "rows", "<=", 0, **facts),
    ]


async def _hang_up(url: str, body: dict[str, object], seconds: float) -> bool:
    """Read an answer for `seconds`, then close the connection; False when it had ended before.

    Raises LoadTestError when the request is refused.
    """
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:

        async def read() -> None:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise LoadTestError(
                        f"a request that was to be hung up on got HTTP {response.status_code}"
                    )
                async for _ in response.aiter_bytes():
                    pass

        try:
            await asyncio.wait_for(read(), seconds)
        except (TimeoutError, asyncio.TimeoutError):
            return True
    return False


async def _settle(session: Session) -> None:
    """Wait until nothing runs or waits. Raises LoadTestError when something still does."""
    for _ in range(int(SETTLE_SECONDS / 0.2)):
        server = session.server
        if server.metric("peqa_requests_running") == server.metric("peqa_requests_waiting") == 0:
            return
        await asyncio.sleep(0.2)
    raise LoadTestError(f"requests still run {SETTLE_SECONDS:.0f} s after every client has gone")
