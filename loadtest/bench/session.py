"""Loads on one server: tasks put there, prompts that never repeat, answers timed."""

from __future__ import annotations

from pathlib import Path

from peqa_loadtest.bench.process import ServerProcess
from peqa_loadtest.client import Answer, CompletionClient, Target
from peqa_loadtest.report import Summary
from peqa_loadtest.run import Completes, calibrate, run_plan
from peqa_loadtest.swap import put_set
from peqa_loadtest.workload import PromptWriter, plan_requests


class Session:
    """What the loads of one server share. Make it with `open_session`."""

    def __init__(
        self, server: ServerProcess, client: CompletionClient, words: int, output_tokens: int
    ) -> None:
        """`words`: of a prompt that has the wanted number of tokens."""
        self.server = server
        self.client = client
        self.words = words
        self.output_tokens = output_tokens
        self._seed = 0
        self._number = 0

    async def close(self) -> None:
        """Close its connections."""
        await self.client.__aexit__()

    def take_numbers(self, count: int) -> int:
        """The first of `count` prompt numbers that no load has used."""
        first, self._number = self._number, self._number + count
        return first

    def prompts(self, count: int) -> list[str]:
        """Prompts that no load has used."""
        first, writer = self.take_numbers(count), PromptWriter(self._seed)
        return [writer.write(first + i, self.words) for i in range(count)]

    async def load(
        self,
        tasks: list[str],
        concurrency: int,
        requests: int,
        prompts_of: dict[str, list[str]] | None = None,
        client: Completes | None = None,
    ) -> list[Answer]:
        """Send `requests` requests, `concurrency` at a time, tasks in equal shares and random order.

        `client`: another than the session's own.
        """
        first = self.take_numbers(requests)
        plan = plan_requests(
            tasks,
            mix="uniform",
            count=requests,
            words=self.words,
            seed=self._seed + first,
            first_number=first,
            prompts_of=prompts_of,
        )
        return await run_plan(client or self.client, plan, self.output_tokens, concurrency)

    async def put_tasks(self, names: list[str], files: list[Path]) -> None:
        """Upload a set per task, files in turn."""
        for i, name in enumerate(names):
            file = files[i % len(files)]
            await put_set(self.client, name, file.name, file.read_bytes())


async def open_session(
    server: ServerProcess, prompt_tokens: int, output_tokens: int, timeout: float = 300.0
) -> Session:
    """Find out how long prompts must be. Raises LoadTestError when the server answers no completion."""
    found = await calibrate(
        Target(server.url, timeout=timeout), "base", prompt_tokens, seed=0, number=1 << 20
    )
    return Session(server, CompletionClient(found.target), found.words, output_tokens)


def rate(answers: list[Answer]) -> float:
    """Output tokens/s from the first request's start to the last one's end."""
    duration = max(a.finished for a in answers) - min(a.started for a in answers)
    return Summary.of(answers, duration).output_tokens_per_s


def failures(answers: list[Answer]) -> int:
    """How many have no answer."""
    return sum(answer.failure is not None for answer in answers)


def gaps(answers: list[Answer]) -> list[float]:
    """Seconds between neighbouring tokens of an answer, of all answers."""
    return [
        later - earlier
        for answer in answers
        if answer.failure is None
        for earlier, later in zip(answer.text_times, answer.text_times[1:], strict=False)
    ]
