"""The same answer whatever the neighbours: random mixed batches in a small KV cache against each request alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from peqa_kernels.bench.row import Row
from peqa_runtime.bench.workload import Load, Prompts
from peqa_runtime.core import BASE_TASK, Blend, Request, TokenOutput
from peqa_runtime.engine.engine import Engine
from peqa_runtime.sampling_params import SamplingParams

FAMILIES = 4  # beginnings that prompts share
SHARED_TOKENS = 48  # three blocks
TAILS = (8, 64)  # tokens after the shared beginning, from … to
OUTPUT_TOKENS = 24  # enough to need a block or two more than at the start, which is what forces preemption
CASES = 48
MOST_IN_BATCH = 10
WIDE_EVERY = 5  # batches: one of them has many requests, and room for half of them
LEAST_IN_WIDE, MOST_IN_WIDE = 20, 40
SMALL_BLOCKS = 16  # of 16 tokens: two or three of the requests; ten need 70 and more
WIDE_BLOCKS = 128
LATEST_START = 6  # steps
SAMPLED_SHARE = 0.3  # of the cases; the others are greedy
BLEND_SHARE = 0.15

Answer = tuple[tuple[object, ...], ...]  # token, log-probabilities and end of each output


@dataclass(frozen=True)
class Case:
    """What is asked, again and again, in ever other company."""

    prompt: tuple[int, ...]
    task: str | Blend
    params: SamplingParams


def random_cases(load: Load, vocab_size: int, seed: int, count: int = CASES) -> list[Case]:
    """Prompts in families that share a beginning, for the base, any task and blends of two, greedy and sampled."""
    rng = random.Random(f"cases {seed}")
    prompts = Prompts(vocab_size, seed)
    beginnings = [prompts.write(SHARED_TOKENS) for _ in range(FAMILIES)]
    tasks = [BASE_TASK, *load.task_names]
    cases = []
    for _ in range(count):
        sampled = rng.random() < SAMPLED_SHARE
        params = SamplingParams(
            max_tokens=OUTPUT_TOKENS,
            temperature=0.8 if sampled else 0.0,
            top_p=rng.choice((1.0, 0.9)) if sampled else 1.0,
            frequency_penalty=rng.choice((0.0, 0.3)),
            seed=rng.randrange(1 << 30),
            ignore_eos=True,
            logprobs=1,
        )
        prompt = rng.choice(beginnings) + prompts.write(rng.randint(*TAILS))
        task: str | Blend = rng.choice(tasks)
        if len(tasks) > 2 and rng.random() < BLEND_SHARE:
            one, other = rng.sample(load.task_names, 2)
            task = Blend.of({one: 0.7, other: 0.3})
        cases.append(Case(prompt, task, params))
    return cases


def answers_alone(engine: Engine, cases: list[Case]) -> list[Answer]:
    """Each case's answer with nobody else in the engine."""
    return [run_together(engine, [(case, 0)])[0] for case in cases]


def run_together(engine: Engine, starts: list[tuple[Case, int]]) -> list[Answer]:
    """Answers of cases that enter the engine at given steps, in the order given."""
    outputs: dict[str, list[TokenOutput]] = {f"bench-{i}": [] for i in range(len(starts))}
    waiting = sorted(range(len(starts)), key=lambda i: starts[i][1])
    step = 0
    try:
        while waiting or engine.has_work:
            while waiting and (starts[waiting[0]][1] <= step or not engine.has_work):
                number = waiting.pop(0)
                case = starts[number][0]
                lease = engine.tasks.acquire(case.task)
                request = Request(
                    f"bench-{number}", case.prompt, case.params, lease.task, lease.revision, lease.kind
                )
                engine.add_request(request, lease)
            for output in engine.step():
                outputs[output.request_id].append(output)
            step += 1
    finally:
        engine.abort_all()
    return [
        tuple((o.token_id, o.logprobs, o.finish_reason) for o in outputs[f"bench-{i}"])
        for i in range(len(starts))
    ]


@dataclass
class Batches:
    """What came of random batches so far."""

    count: int = 0
    wide: int = 0
    equal: int = 0
    requests: int = 0
    preemptions: float = 0.0
    prefix_hit_tokens: float = 0.0

    def rows(self) -> list[Row]:
        """The share of batches that equal their requests alone, and that there was what could have changed them."""
        facts = {"batches": self.count, "wide_batches": self.wide, "requests": self.requests}
        name = "engine/random-batches"
        return [
            Row(f"{name}/equal-to-alone", self.equal / self.count, "share", ">=", 1.0, facts),
            Row(f"{name}/preemptions", self.preemptions, "count", ">=", self.count / 4, facts),
            Row(f"{name}/prefix-hit-tokens", self.prefix_hit_tokens, "count", ">=", float(self.count), facts),
        ]


def random_batches(
    engine: Engine,
    cases: list[Case],
    alone: list[Answer],
    batches: int,
    seed: int,
    show: Callable[[str], None],
    found: Batches,
    *,
    wide: bool = False,
) -> None:
    """Random companies of cases in an engine with little KV memory and a prefix cache; bits must not change.

    `wide`: companies large enough for the kernels' ways with many rows.
    """
    rng = random.Random(f"batches {seed} {wide}")
    sizes = (LEAST_IN_WIDE, MOST_IN_WIDE) if wide else (2, MOST_IN_BATCH)
    before = engine.stats()
    for number in range(batches):
        picked = [rng.randrange(len(cases)) for _ in range(rng.randint(*sizes))]
        starts = [(cases[i], rng.randrange(LATEST_START)) for i in picked]
        found.equal += run_together(engine, starts) == [alone[i] for i in picked]
        found.requests += len(picked)
        show(f"{'wide ' if wide else ''}batch {number + 1} of {batches}")
    after = engine.stats()
    found.count += batches
    found.wide += batches if wide else 0
    found.preemptions += after["preemptions_total"] - before["preemptions_total"]
    found.prefix_hit_tokens += after["prefix_cache_hits_total"] - before["prefix_cache_hits_total"]


def little_memory(small: Engine, alone: list[Answer], cases: list[Case]) -> list[Row]:
    """One load that needs several times the KV memory there is: each request's answer alone, and no error."""
    before = small.stats()
    answers = run_together(small, [(case, 0) for case in cases])
    after = small.stats()
    equal = sum(one == other for one, other in zip(answers, alone, strict=True)) / len(cases)
    needed = sum(small.scheduler.blocks.blocks_for(len(c.prompt) + c.params.max_tokens) for c in cases)
    facts = {
        "requests": len(cases),
        "blocks": small.scheduler.blocks.num_blocks,
        "blocks_wanted": needed,
        "preemptions": after["preemptions_total"] - before["preemptions_total"],
    }
    errors = after["errors_total"] - before["errors_total"]
    return [
        Row("engine/little-kv-memory/equal-to-alone", equal, "share", ">=", 1.0, facts),
        Row("engine/little-kv-memory/errors", errors, "count", "<=", 0.0, facts),
        Row("engine/little-kv-memory/preemptions", facts["preemptions"], "count", ">=", 1.0, facts),
    ]


def load_cases(load: Load, vocab_size: int, seed: int, count: int) -> list[Case]:
    """The load of the figures as cases: greedy, each task in turn."""
    prompts = Prompts(vocab_size, seed)
    params = SamplingParams(
        max_tokens=load.output_tokens, temperature=0.0, seed=0, ignore_eos=True, logprobs=1
    )
    return [
        Case(prompts.write(load.prompt_tokens), load.task_names[i % load.tasks], params) for i in range(count)
    ]
