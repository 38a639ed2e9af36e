"""One batch mixes tasks: each request gets the tokens it gets alone, at the throughput of the base."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow

TASKS = ("base", "sql", "slots", "intents")


def prompts(count: int, seed: int) -> list[str]:
    """Distinct prompts of different lengths, different from the first token on."""
    nouns = [
        "table",
        "river",
        "engine",
        "lantern",
        "garden",
        "market",
        "violin",
        "harbour",
        "recipe",
        "ticket",
    ]
    verbs = ["holds", "feeds", "turns", "lights", "grows", "sells", "plays", "guards", "circles", "needs"]
    out = []
    for i in range(count):
        words = [
            f"{nouns[(i * 5 + j * 7 + seed) % 10]} {verbs[(i * 3 + j * 11 + seed) % 10]}"
            for j in range(2 + i % 9)
        ]
        out.append(f"{(i * 37 + seed) % 1000} " + " and the ".join(words))
    return out


def test_32_mixed_requests_equal_each_alone(demo_server: Any, together: Callable[..., list[Any]]) -> None:
    jobs = [(p, TASKS[i % 4]) for i, p in enumerate(prompts(32, seed=1))]

    def ask(prompt: str, task: str) -> list[int]:
        answer = demo_server.complete(prompt, task, max_tokens=32, ignore_eos=True)
        return list(answer["choices"][0]["token_ids"])

    alone = [ask(*job) for job in jobs]
    mixed = together([lambda job=job: ask(*job) for job in jobs])
    equal = sum(a == b for a, b in zip(alone, mixed, strict=True))
    assert all(len(tokens) == 32 for tokens in alone)
    assert len({tuple(t) for t in alone}) > 16, "the prompts and tasks do differ in their answers"
    assert equal == 32, f"only {equal} of 32 requests gave the tokens that they give alone"


def test_one_prompt_differs_by_task(demo_server: Any) -> None:
    answers = {
        task: tuple(
            demo_server.complete("Which is it?", task, max_tokens=16, ignore_eos=True)["choices"][0][
                "token_ids"
            ]
        )
        for task in TASKS
    }
    assert len(set(answers.values())) == 4, "the tasks are not mixed up, nor is the base served instead"


@pytest.mark.alone
def test_throughput_of_mixed_tasks(demo_server: Any, together: Callable[..., list[Any]]) -> None:
    """The median of 20 ratios of one run after the other: 16 requests over 4 tasks against 16 on the base.

    Every run has prompts of its own, or the prefix cache would know those of the run before. What else a machine does
    makes runs up to 10 % slower for seconds, neighbours alike. What misses the bar is measured again, twice at most.
    A machine that takes over a minute for 20 ratios gets by with fewer, 8 at least.
    """

    def run(tasks: tuple[str, ...], seed: int) -> float:
        jobs = [(p, tasks[i % len(tasks)]) for i, p in enumerate(prompts(16, seed))]
        start = time.perf_counter()
        answers = together(
            [lambda j=j: demo_server.complete(j[0], j[1], max_tokens=32, ignore_eos=True) for j in jobs]
        )
        seconds = time.perf_counter() - start
        assert sum(a["usage"]["completion_tokens"] for a in answers) == 16 * 32
        return 16 * 32 / seconds

    run(TASKS, 0)
    ratio, seed = 0.0, 2
    for _ in range(3):
        rates: dict[tuple[str, ...], list[float]] = {("base",): [], TASKS: []}
        begun = time.perf_counter()
        for i in range(20):
            if i >= 8 and time.perf_counter() - begun > 60:
                break
            for tasks in (("base",), TASKS) if i % 2 else (TASKS, ("base",)):
                rates[tasks].append(run(tasks, seed))
                seed += 1
        pairs = list(zip(rates[("base",)], rates[TASKS], strict=True))
        base, mixed = (statistics.median(rate) for rate in zip(*pairs, strict=True))
        ratio = statistics.median(mixed / base for base, mixed in pairs)
        print(f"\nbase {base:.0f} tokens/s, 4 tasks {mixed:.0f} tokens/s, ratio {ratio:.3f}")
        if ratio >= 0.97:
            break
    assert ratio >= 0.97
