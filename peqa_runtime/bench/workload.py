"""Prompts and scale sets of a bench, all drawn from one seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from peqa_runtime.core import BASE_TASK, BaseManifest
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.scales.scale_set import ScaleSet

SPREAD = 0.06  # standard deviation of random scales: enough to change most greedy answers
LEAST_TOKEN_ID = 16  # a vocabulary begins with its special tokens


@dataclass(frozen=True)
class Load:
    """The load that the figures are stated for."""

    prompt_tokens: int = 128
    output_tokens: int = 64
    tasks: int = 16

    @property
    def params(self) -> SamplingParams:
        """Greedy, always to the last token."""
        return SamplingParams(max_tokens=self.output_tokens, temperature=0.0, ignore_eos=True)

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks."""
        return [f"task-{i}" for i in range(self.tasks)]


class Prompts:
    """Random token ids. No two prompts begin alike, so that no prefix cache helps."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        """Draw from ids past the special ones."""
        self._random = random.Random(f"prompts {seed}")
        self._vocab_size = vocab_size
        self._count = 0

    def write(self, tokens: int) -> tuple[int, ...]:
        """The next prompt of `tokens` ids; its first two number it."""
        span = self._vocab_size - LEAST_TOKEN_ID
        high, low = divmod(self._count, span)
        self._count += 1
        ids = [LEAST_TOKEN_ID + high % span, LEAST_TOKEN_ID + low]
        return tuple(
            (ids + [self._random.randrange(LEAST_TOKEN_ID, self._vocab_size) for _ in range(tokens)])[:tokens]
        )


def random_set(manifest: BaseManifest, seed: int) -> bytes:
    """The file of a `channel` set with random output scales around 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.out_scale": 1 + SPREAD * torch.randn(shape.out_features, generator=generator)
        for name, shape in manifest.linears.items()
    }
    return ScaleSet.build("channel", tensors, manifest, task=f"seed-{seed}").to_bytes()


@contextmanager
def engine_with_tasks(
    base: Path, tasks: list[str], config: EngineConfig, device: str, dtype: str = "auto"
) -> Iterator[Engine]:
    """An engine whose `tasks` have random sets, in a store that is gone afterwards."""
    engine = Engine(base, device=device, dtype=dtype, config=config)
    try:
        for seed, name in enumerate(tasks):
            engine.tasks.upload(name, random_set(engine.model.manifest, seed))
        yield engine
    finally:
        engine.close()


def mixed(tasks: list[str], count: int) -> list[str]:
    """The task of each of `count` requests: all in turn, or the base alone where there is none."""
    return [tasks[i % len(tasks)] for i in range(count)] if tasks else [BASE_TASK] * count
