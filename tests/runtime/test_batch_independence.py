"""On a real model: what a request gets does not depend, to the last bit, on what runs beside it (fp32 on the CPU)."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peqa_runtime.core import SCALE_KINDS
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.engine.offline import Completion
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.set_layout import expected_shapes

CONFIG = EngineConfig(num_blocks=96, max_batch_tokens=128, task_rows=5)
SENTENCE = "the cat and the dog sat on the mat; then they ran into another house, over there, without them"


def random_set(engine: Engine, kind: str, seed: int, width: float) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    manifest = engine.model.manifest
    tensors = {
        name: 1 + width * (2 * torch.rand(shape, generator=generator) - 1)
        for name, shape in expected_shapes(kind, manifest).items()
    }
    return ScaleSet.build(kind, tensors, manifest).to_bytes()  # type: ignore[arg-type]


def engine_with_tasks(base: Path, config: EngineConfig = CONFIG, width: float = 0.2) -> Engine:
    engine = Engine(base, device="cpu", config=config)
    for i, kind in enumerate(SCALE_KINDS):
        engine.tasks.upload(f"task{i}", random_set(engine, kind, i, width))
    return engine


def mixed(count: int, max_tokens: int) -> tuple[list[str], list[SamplingParams], list[str]]:
    rng = random.Random(1)
    words = SENTENCE.split()
    prompts = [" ".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(count)]
    params = [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if i % 3 else 0.8,
            seed=i,
            logprobs=2 if i % 5 == 0 else None,
            prompt_logprobs=1 if i % 8 == 0 else None,
            ignore_eos=True,
        )
        for i in range(count)
    ]
    return prompts, params, [("base", "task0", "task1", "task2")[i % 4] for i in range(count)]


def assert_independent(engine: Engine, count: int, max_tokens: int) -> list[Completion]:
    prompts, params, tasks = mixed(count, max_tokens)
    together = engine.generate(prompts, params, tasks)
    for i in range(count):
        (alone,) = engine.generate([prompts[i]], params[i], tasks[i])
        assert alone == together[i], f"request {i} of {tasks[i]}"
    return together


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Engine:
    return engine_with_tasks(tiny_base)


def test_32_mixed_requests_equal_each_alone(engine: Engine) -> None:
    """Tokens, log-probabilities and prompt log-probabilities, compared as floats without tolerance."""
    together = assert_independent(engine, 32, 6)
    by_task = {
        c.task: c
        for c in engine.generate(
            [SENTENCE] * 4, SamplingParams(temperature=0.0), ["base", "task0", "task1", "task2"]
        )
    }
    assert len({c.token_ids for c in by_task.values()}) == 4, "tasks differ, or this test shows nothing"
    assert len({c.token_ids for c in together}) > 25


def test_chunks_and_preemption_change_no_bit(engine: Engine, tiny_base: Path) -> None:
    prompts, params, tasks = mixed(16, 12)
    want = engine.generate(prompts, params, tasks)
    tight = engine_with_tasks(
        tiny_base, EngineConfig(num_blocks=20, max_batch_tokens=37, task_rows=5, block_size=8)
    )
    assert tight.generate(prompts, params, tasks) == want
    assert tight.stats()["preemptions_total"] > 0


def test_a_cache_full_of_nan_is_never_read(tiny_base: Path) -> None:
    engine = engine_with_tasks(tiny_base, replace(CONFIG, prefix_cache=False))
    prompts, params, tasks = mixed(8, 6)
    want = engine.generate(prompts, params, tasks)
    for key, value in engine.kv_cache.layers:
        key.fill_(float("nan"))
        value.fill_(float("nan"))
    assert engine.generate(prompts, params, tasks) == want


def test_a_task_of_infinite_scales_harms_only_itself(engine: Engine) -> None:
    """An upload of it is refused; forced into memory, it ends its own request and no other differs by a bit."""
    prompts, params, tasks = mixed(8, 6)
    want = engine.generate(prompts, params, tasks)
    (row,) = (p.row for r, p in engine.tasks.registry.resident().items() if r == want[1].revision)
    good = [bank.out_scale[row].clone() for bank in engine.bank.banks]
    try:
        for bank in engine.bank.banks:
            bank.out_scale[row] = float("inf")
        got = engine.generate(prompts, params, tasks)
    finally:
        for bank, scales in zip(engine.bank.banks, good, strict=True):
            bank.out_scale[row] = scales
    for after, before in zip(got, want, strict=True):
        if before.task == "task0":
            assert after.finish_reason == "error"
        else:
            assert after == before
    assert engine.generate(prompts, params, tasks) == want, "nothing stays behind in the cache"


@pytest.mark.slow
def test_the_demo_model_with_the_settings_of_make_serve(smollm2_base: Path) -> None:
    engine = engine_with_tasks(smollm2_base, EngineConfig(), width=0.02)
    together = assert_independent(engine, 32, 16)
    assert len({c.token_ids for c in together}) > 25
