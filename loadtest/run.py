"""Run a plan: calibrate, warm up, then many requests at once, closed or open loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from peqa_loadtest.client import Answer, CompletionClient, LoadTestError, Target
from peqa_loadtest.workload import PlannedRequest, PromptWriter

PROBE_WORDS = 64  # at most: long enough for a begin-of-sequence token to weigh little
GUESSED_TOKENS_PER_WORD = 1.3  # where a server reports no usage


@dataclass(frozen=True)
class Calibration:
    """What one probe request told about the server."""

    target: Target  # with ignore_eos off if the server refuses it, and `model` filled in
    words: int  # words of a prompt of the wanted number of tokens
    notes: list[str]


async def calibrate(target: Target, task: str, input_tokens: int, seed: int, number: int) -> Calibration:
    """Find how many words make `input_tokens` tokens and whether the server knows ignore_eos.

    Raises LoadTestError when the server does not answer a completion for `task`.
    """
    notes = []
    if target.task_field == "model" and target.model is None:
        target = replace(target, model=await _first_model(target))
    words = min(PROBE_WORDS, max(2, input_tokens // 2))
    prompt = PromptWriter(seed).write(number, words)
    answer = await _probe(target, task, prompt)
    if answer.failure is not None and answer.failure.status in (400, 422) and target.ignore_eos:
        without = replace(target, ignore_eos=False)
        answer = await _probe(without, task, prompt)
        if answer.failure is None:
            target = without
            notes.append("the server refuses ignore_eos: answers may be shorter than --output-tokens")
    if answer.failure is not None:
        status = f"HTTP {answer.failure.status}: " if answer.failure.status else ""
        raise LoadTestError(f"the probe request for task {task!r} failed: {status}{answer.failure.message}")
    if answer.prompt_tokens:
        rate = answer.prompt_tokens / words
    else:
        rate = GUESSED_TOKENS_PER_WORD
        notes.append(f"the server reports no usage: prompts are a guess at {rate} tokens per word")
    return Calibration(target, max(2, round(input_tokens / rate)), notes)


class Completes(Protocol):
    """A client that sends one completion and reads its answer; never raises for what the server does."""

    async def complete(
        self, task: str, prompt: str, max_tokens: int, started: float | None = None
    ) -> Answer: ...


async def run_plan(
    client: Completes,
    plan: list[PlannedRequest],
    max_tokens: int,
    concurrency: int,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """Send every request of the plan; answers in the order in which they finished.

    Requests without a starting time go out as soon as one of `concurrency` workers is free (closed loop); those with
    one go out then, whatever else runs, and are timed from then (open loop).
    """
    answers: list[Answer] = []

    def enter(answer: Answer) -> None:
        answers.append(answer)
        on_answer(answer)

    waiting = iter([request for request in plan if request.start is None])

    async def work() -> None:
        for request in waiting:
            enter(await client.complete(request.task, request.prompt, max_tokens))

    async def at_its_time(request: PlannedRequest, due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        enter(await client.complete(request.task, request.prompt, max_tokens, started=due))

    begin = time.perf_counter()
    timed = [at_its_time(request, begin + request.start) for request in plan if request.start is not None]
    await asyncio.gather(*(work() for _ in range(concurrency)), *timed)
    return answers


async def _probe(target: Target, task: str, prompt: str) -> Answer:
    async with CompletionClient(target) as client:
        return await client.complete(task, prompt, max_tokens=1)


async def _first_model(target: Target) -> str | None:
    """The first entry of /v1/models, which a server with adapters uses for its base; None if there is none."""
    async with CompletionClient(target) as client:
        response = await client.call("GET", "/v1/models")
    if response.status_code != 200:
        return None
    models = response.json().get("data") or []
    return models[0]["id"] if models else None
