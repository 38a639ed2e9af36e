"""Plans: the same from the same seed, mixes as asked, prompts that share no beginning."""

from __future__ import annotations

from collections import Counter

import pytest

from peqa_loadtest.words import WORDS
from peqa_loadtest.workload import PromptWriter, arrival_times, choose_tasks, plan_requests


def test_a_seed_is_a_plan() -> None:
    def plan(seed: int) -> list:
        return plan_requests(["base", "sql"], mix="zipf", count=50, words=20, seed=seed, rate=3.0)

    assert plan(1) == plan(1)
    assert [r.prompt for r in plan(1)] != [r.prompt for r in plan(2)]
    assert [r.task for r in plan(1)] != [r.task for r in plan(2)]
    assert [r.start for r in plan(1)] != [r.start for r in plan(2)]


def test_prompts_share_no_beginning() -> None:
    assert len(WORDS) == len(set(WORDS)) >= 512
    writer = PromptWriter(seed=3)
    prompts = [writer.write(n, 12).split() for n in range(3 * len(WORDS))]
    assert {len(words) for words in prompts} == {12}
    assert len({words[0] for words in prompts[: len(WORDS)]}) == len(WORDS)
    assert len({tuple(words[:2]) for words in prompts}) == len(prompts)


def test_uniform_is_balanced_in_every_round() -> None:
    tasks = choose_tasks(list("abcd"), "uniform", 18, seed=0)
    assert all(sorted(tasks[i : i + 4]) == list("abcd") for i in range(0, 16, 4))
    assert len({tuple(tasks[i : i + 4]) for i in range(0, 16, 4)}) > 1, "the order changes"


def test_zipf_follows_the_order_of_the_list() -> None:
    counts = Counter(choose_tasks(list("abcd"), "zipf", 20000, seed=0))
    share = [counts[task] / 20000 for task in "abcd"]
    want = [1 / rank / (1 + 1 / 2 + 1 / 3 + 1 / 4) for rank in (1, 2, 3, 4)]
    assert share == pytest.approx(want, abs=0.015)


def test_arrivals_have_the_rate() -> None:
    times = arrival_times(4000, rate=8.0, seed=0)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(500, rel=0.06)


def test_a_pool_is_used_in_turn() -> None:
    plan = plan_requests(
        ["t", "base"], mix="uniform", count=12, words=5, seed=0, prompts_of={"t": ["one", "two", "three"]}
    )
    assert [r.prompt for r in plan if r.task == "t"] == ["one", "two", "three"] * 2
    assert not {"one", "two", "three"} & {r.prompt for r in plan if r.task == "base"}
