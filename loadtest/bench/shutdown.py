"""SIGTERM: new requests are told when to come back, running ones end, the status is 0; a second ends it at once."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import httpx

from peqa_loadtest.bench.figure import Figure, figure
from peqa_loadtest.bench.process import ServerProcess
from peqa_loadtest.bench.session import Session, open_session
from peqa_loadtest.client import Answer

STREAMS = 4
ANSWER_TOKENS = 256  # long enough to be still running when the signal comes
LONG_ANSWER_TOKENS = 4096  # as many take longer than AT_ONCE_SECONDS on a CPU
AT_ONCE_SECONDS = 2.0
DRAIN_SECONDS = 60.0


async def shutdown(start: Callable[[], ServerProcess], prompt_tokens: int) -> list[Figure]:
    """Two servers of their own: one gets one signal, the other two."""
    with start() as server:
        session = await open_session(server, prompt_tokens, ANSWER_TOKENS)
        running = await _begin_streams(session, ANSWER_TOKENS)
        server.signal(signal.SIGTERM)
        refused = await _refusal(server.url)
        answers = await asyncio.gather(*running)
        await session.close()
        status = await asyncio.to_thread(server.exit_status, DRAIN_SECONDS)
        finished = sum(answer.failure is None for answer in answers) / STREAMS
    with start() as server:
        room = max(entry["max_model_len"] for entry in httpx.get(f"{server.url}/v1/models").json()["data"])
        tokens = min(LONG_ANSWER_TOKENS, room - 2 * prompt_tokens)
        session = await open_session(server, prompt_tokens, tokens)
        running = await _begin_streams(session, tokens)
        server.signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        server.signal(signal.SIGTERM)
        begin = time.monotonic()
        await asyncio.to_thread(server.exit_status, DRAIN_SECONDS)
        seconds = time.monotonic() - begin
        answers = await asyncio.gather(*running)
        begun = [answer for answer in answers if answer.text_times]  # others may have been refused
        cut = sum(answer.failure is not None for answer in begun) / max(1, len(begun))
        await session.close()
    return [
        figure("served/sigterm/new-request-refused", float(refused), "yes", ">=", 1),
        figure("served/sigterm/running-finished", finished, "share", ">=", 1.0, streams=STREAMS),
        figure(
            "served/sigterm/exit-status-0",
            float(status == 0),
            "yes",
            ">=",
            1,
            status="still running" if status is None else status,
        ),
        figure("served/sigterm/second-signal", seconds, "s", "<=", AT_ONCE_SECONDS, tokens=tokens),
        figure(
            "served/sigterm/second-signal-cuts",
            cut,
            "share",
            ">=",
            1.0 if tokens == LONG_ANSWER_TOKENS else None,  # shorter ones may have ended
            streams=len(begun),
        ),
    ]


async def _begin_streams(session: Session, tokens: int) -> list[asyncio.Task[Answer]]:
    """Streams that have begun: the server has told of tokens."""
    before = session.server.metric("peqa_engine_generation_tokens_total")
    running = [
        asyncio.create_task(session.client.complete("base", prompt, tokens))
        for prompt in session.prompts(STREAMS)
    ]
    while (
        await asyncio.to_thread(session.server.metric, "peqa_engine_generation_tokens_total")
        < before + STREAMS
    ):
        await asyncio.sleep(0.02)
    return running


async def _refusal(url: str) -> bool:
    """Whether the first request that is not served any more gets 503 with Retry-After."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        while True:  # the signal is handled between two events of the server's loop
            try:
                answer = await client.post("/v1/completions", json={"prompt": "one", "max_tokens": 1})
            except httpx.TransportError:
                return False
            if answer.status_code != 200:
                return answer.status_code == 503 and "retry-after" in answer.headers
