"""Random mixed batches on little memory: every answer is, bit for bit, the one that the request gets alone.

Alone means an engine that runs one request at a time and shares nothing. Together means requests of several tasks that
come at random steps, some with a common beginning, some aborted, with priorities, on a KV cache too small for them;
preemptions and prefix hits are counted, because a test in which none happened shows nothing. Before each batch every
block that nobody can find is filled with NaN.
"""

from __future__ import annotations

import importlib.util
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from peqa_runtime.core import Request, TokenLogprobs, TokenOutput
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.sampling_params import SamplingParams

_spec = importlib.util.spec_from_file_location(
    "cases", Path(__file__).with_name("test_batch_independence.py")
)
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

TASKS = ("base", "task0", "task1", "task2")


@dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    task: str
    params: SamplingParams


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    finish_reason: str | None


def answer_of(outputs: list[TokenOutput]) -> Answer:
    last = outputs[-1]
    with_token = [o for o in outputs if o.token_id is not None]
    return Answer(
        tuple(o.token_id for o in with_token if o.token_id is not None),
        tuple(o.logprobs for o in with_token),
        outputs[0].prompt_logprobs,
        last.finish_reason,
    )


def some_asks(count: int, vocab_size: int, rng: random.Random) -> list[Ask]:
    """Prompts of 1 to 70 tokens; most of a task's have its beginning."""

    def ids(number: int) -> list[int]:
        return [rng.randrange(1, vocab_size) for _ in range(number)]

    beginnings = {task: ids(rng.choice([33, 40, 56])) for task in TASKS}
    asks = []
    for i in range(count):
        task = rng.choice(TASKS)
        beginning = beginnings[task] if rng.random() < 0.7 else []
        prompt = (*beginning, *ids(rng.randint(1, 14 if beginning else 60)))
        params = SamplingParams(
            max_tokens=rng.randint(1, 14),
            temperature=rng.choice([0.0, 0.0, 0.9]),
            top_p=rng.choice([1.0, 0.9]),
            seed=i,
            logprobs=2,
            prompt_logprobs=1 if rng.random() < 0.15 else None,
            ignore_eos=True,
        )
        asks.append(Ask(prompt, task, params))
    return asks


def add(engine: Engine, name: str, ask: Ask, priority: int = 0) -> None:
    lease = engine.tasks.acquire(ask.task)
    request = Request(name, ask.prompt, ask.params, ask.task, lease.revision, lease.kind, priority)
    engine.add_request(request, lease)


def alone(engine: Engine, ask: Ask) -> Answer:
    add(engine, "alone", ask)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return answer_of(outputs)


def poison_what_nobody_finds(engine: Engine) -> None:
    cache = engine.scheduler.blocks.cache
    assert cache is not None
    lost = [b for b in range(engine.kv_cache.num_blocks) if cache.key_of(b) is None]
    for keys, values in engine.kv_cache.layers:
        keys[lost] = float("nan")
        values[lost] = float("nan")


def together(engine: Engine, asks: list[Ask], rng: random.Random) -> dict[int, Answer]:
    """Run the asks as one random workload; the answers of those that were not aborted, by place."""
    poison_what_nobody_finds(engine)
    coming = sorted((rng.randrange(12), i) for i in range(len(asks)))
    leaving = {i: rng.randrange(1, 30) for i in range(len(asks)) if rng.random() < 0.1}
    outputs: dict[str, list[TokenOutput]] = defaultdict(list)
    gone: set[int] = set()
    at = 0
    while coming or engine.has_work:
        while coming and coming[0][0] <= at:
            i = coming.pop(0)[1]
            add(engine, str(i), asks[i], priority=rng.choice([0, 0, 0, -1, 2]))
        for i, when in leaving.items():
            if when == at and engine.abort(str(i)):
                gone.add(i)
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.scheduler.check_integrity()
        at += 1
    assert engine.scheduler.blocks.num_used == 0
    assert engine.tasks.registry.counts().leases == 0
    return {i: answer_of(outputs[str(i)]) for i in range(len(asks)) if i not in gone}


def check_batches(base: Path, batches: int, width: float) -> None:
    """Compare, and count what must have happened."""
    rng = random.Random(batches)
    roomy = EngineConfig(
        num_blocks=40, block_size=8, max_batch_tokens=64, max_sequences=1, prefix_cache=False, task_rows=5
    )
    single = cases.engine_with_tasks(base, roomy, width)
    tight = replace(
        roomy, num_blocks=26, max_batch_tokens=40, max_sequences=8, prefix_cache=True, task_rows=3
    )
    mixed = cases.engine_with_tasks(base, tight, width)
    asks = some_asks(min(60, 6 * batches), single.model.vocab_size, rng)
    expected = [alone(single, ask) for ask in asks]
    assert len({a.tokens for a in expected if len(a.tokens) > 3}) > len(asks) // 3, "answers differ"
    assert single.stats()["preemptions_total"] == 0
    compared, with_preemption, with_hits = 0, 0, 0
    for batch in range(batches):
        before = mixed.stats()
        chosen = [rng.randrange(len(asks)) for _ in range(rng.randint(6, 12))]
        answers = together(mixed, [asks[i] for i in chosen], rng)
        for place, answer in answers.items():
            assert answer == expected[chosen[place]], f"batch {batch}, request {place}: {asks[chosen[place]]}"
        compared += len(answers)
        after = mixed.stats()
        with_preemption += after["preemptions_total"] > before["preemptions_total"]
        with_hits += after["prefix_cache_hits_total"] > before["prefix_cache_hits_total"]
    assert compared > 5 * batches
    assert with_preemption > batches // 4, f"{with_preemption} of {batches} batches had a preemption"
    assert with_hits > batches // 2, f"{with_hits} of {batches} batches had a prefix hit"
    assert mixed.stats()["errors_total"] == 0


def test_mixed_batches(tiny_base: Path) -> None:
    check_batches(tiny_base, 20, width=0.2)


@pytest.mark.slow
def test_200_mixed_batches(tiny_base: Path) -> None:
    check_batches(tiny_base, 200, width=0.2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_mixed_batches_of_the_demo_model(smollm2_base: Path) -> None:
    check_batches(smollm2_base, 40, width=0.02)
