"""The same answer whatever the neighbours: random mixed batches in a small KV cache against each request alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from peqa_kernels.bench.row import Row
from peqa_runtime.bench.workload import Load, Prompts
from peqa_runtime.core import BASE_TASK, Request, TokenOutput
from peqa_runtime.engine.engine import Engine
from peqa_runtime.sampling_params import SamplingParams

FAMILIES = 4  # beginnings that prompts share
SHARED_TOKENS = 48  # three blocks
TAILS = (8, 64)  # tokens after the shared beginning, from … to
OUTPUT_TOKENS = 24  # enough to need a block or two more than at the start, which is what forces preemption
CASES = 48
MOST_IN_BATCH = 10
SMALL_BLOCKS = 16  # of 16 tokens: two or three of the requests; ten need 70 and more
LATEST_START = 6  # steps
SAMPLED_SHARE = 0.3  # of the cases; the others are greedy

Answer = tuple[tuple[object, ...], ...]  # token, log-probabilities and end of each output


@dataclass(frozen=True)
class Case:
    """What is asked, again and again, in ever other company."""

    prompt: tuple[int, ...]
    task: str
    params: SamplingParams


def random_cases(load: Load, vocab_size: int, seed: int, count: int = CASES) -> list[Case]:
    """Prompts in families that share a beginning, for the base and any task, greedy and sampled."""
    rng = random.Random(f"cases {seed}")
    prompts = Prompts(vocab_size, seed)
    beginnings = [prompts.write(SHARED_TOKENS) for _ in range(FAMILIES)]
    tasks = [BASE_TASK, *load.task_names]
    cases = []
    for _ in range(count):
        params = SamplingParams(
            max_tokens=OUTPUT_TOKENS,
            temperature=0.8 if rng.random() < SAMPLED_SHARE else 0.0,
            seed=rng.randrange(1 << 30),
            ignore_eos=True,
            logprobs=1,
        )
        prompt = rng.choice(beginnings) + prompts.write(rng.randint(*TAILS))
        cases.append(Case(prompt, rng.choice(tasks), params))
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


def random_batches(
    engine: Engine,
    cases: list[Case],
    alone: list[Answer],
    batches: int,
    seed: int,
    show: Callable[[str], None],
) -> list[Row]:
    """Random companies of cases in an engine with little KV memory and a prefix cache; bits must not change."""
    rng = random.Random(f"batches {seed}")
    before = engine.stats()
    equal = requests = 0
    for number in range(batches):
        picked = [rng.randrange(len(cases)) for _ in range(rng.randint(2, MOST_IN_BATCH))]
        starts = [(cases[i], rng.randrange(LATEST_START)) for i in picked]
        equal += run_together(engine, starts) == [alone[i] for i in picked]
        requests += len(picked)
        show(f"batch {number + 1} of {batches}")
    after = engine.stats()
    facts = {"batches": batches, "requests": requests}
    rows = [Row("engine/random-batches/equal-to-alone", equal / batches, "share", ">=", 1.0, facts)]
    for name, counter in (
        ("preemptions", "preemptions_total"),
        ("prefix-hit-tokens", "prefix_cache_hits_total"),
    ):
        forced = after[counter] - before[counter]
        rows.append(Row(f"engine/random-batches/{name}", forced, "count", ">=", 1.0, facts))
    return rows


def little_memory(small: Engine, ample: list[Answer], cases: list[Case]) -> list[Row]:
    """One load that needs several times the KV memory there is: the answers of ample memory, and no error."""
    before = small.stats()
    answers = run_together(small, [(case, 0) for case in cases])
    after = small.stats()
    equal = sum(one == other for one, other in zip(answers, ample, strict=True)) / len(cases)
    needed = sum(small.scheduler.blocks.blocks_for(len(c.prompt) + c.params.max_tokens) for c in cases)
    facts = {
        "requests": len(cases),
        "blocks": small.scheduler.blocks.num_blocks,
        "blocks_wanted": needed,
        "preemptions": after["preemptions_total"] - before["preemptions_total"],
    }
    errors = after["errors_total"] - before["errors_total"]
    return [
        Row("engine/little-kv-memory/equal-to-ample", equal, "share", ">=", 1.0, facts),
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
