"""Clients that hang up at any moment: afterwards nothing is held that nobody uses."""

from __future__ import annotations

import asyncio
import random

import httpx

from peqa_loadtest.bench.figure import Figure, figure
from peqa_loadtest.bench.session import Session
from peqa_loadtest.client import LoadTestError
from peqa_loadtest.swap import remember_task, restore_task

AT_ONCE = 16
LATEST_SECONDS = (
    1.5  # hanging up happens at a random moment up to here: in the queue, in the prompt, in the answer
)
SETTLE_SECONDS = 30.0


async def disconnects(session: Session, tasks: list[str], count: int) -> list[Figure]:
    """Hang up `count` times, wait until the server is idle, and count what it still holds."""
    rng = random.Random("disconnects")
    prompts = iter(session.prompts(count))
    rude = [(prompt, rng.choice(tasks), rng.uniform(0.0, LATEST_SECONDS)) for prompt in prompts]
    turn = iter(rude)
    cut = 0

    async def work() -> None:
        nonlocal cut
        for prompt, task, seconds in turn:
            body = session.client.body(task, prompt, session.output_tokens)
            cut += await _hang_up(session.server.url, body, seconds)

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
    facts = {"disconnects": cut, "finished_before": count - cut}
    return [
        figure("served/disconnects/leaked-blocks", blocks, "blocks", "<=", 0, **facts),
        figure("served/disconnects/leaked-rows", rows, "rows", "<=", 0, **facts),
    ]


async def _hang_up(url: str, body: dict[str, object], seconds: float) -> bool:
    """Read a stream for `seconds`, then close the connection; False when the answer had ended before."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:

        async def read() -> None:
            async with client.stream("POST", "/v1/completions", json=body) as response:
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
