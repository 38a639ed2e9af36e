"""What decides a tuning run's result, the data aside, and the recipes that fill in what is not given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from peqa_runtime.core import SCALE_KINDS, ScaleKind
from peqa_runtime.errors import InvalidData

Compute = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["cosine", "linear", "constant"]
OPTIONS = MappingProxyType({"learning_rate": "--lr", "warmup_steps": "--warmup", "batch_rows": "--batch"})
"""What `peqa train` calls settings that it does not call by their name."""
LEARNING_RATES = MappingProxyType(dict.fromkeys(SCALE_KINDS, 1e-2))
"""Default per kind, per step on the relative scale: the best of each in the sweep that docs/results.md records.
`--auto` finds the one for a base and its data."""
BETA2 = MappingProxyType(dict.fromkeys(SCALE_KINDS, 0.999) | {"channel": 0.95})
"""Default per kind, of AdamW's mean of squared gradients: the best of each in the same sweep."""
MOST_STEPS = 1_000_000
MOST_EPOCHS = 10_000
"""Runs of more are typing errors: at a tenth of a second a step, a million take more than a day."""


@dataclass(frozen=True)
class TuneConfig:
    """Settings of a run; AdamW without weight decay. The learning rate is per step on the relative scale.

    `beta2` is of AdamW's mean of squared gradients.

    A step takes `batch_rows` rows of each task, cut into `accumulate` parts that are computed one after the other.
    `patience`: stop after so many held-out losses in a row without a better one (0 = never).
    `distill` is the teacher's share of the loss (0 = none), its KL divergence at `temperature`.
    """

    kind: ScaleKind = "channel"
    steps: int = 500
    learning_rate: float = 1e-2
    schedule: Schedule = "linear"
    warmup_steps: int = 20
    batch_rows: int = 16
    accumulate: int = 1
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    compute: Compute = "auto"
    check_every: int = 100  # steps between held-out losses and checkpoints
    patience: int = 0
    pack: bool = False
    checkpoint_activations: bool = False
    distill: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        checks = (
            ("kind", self.kind in SCALE_KINDS, f"one of {', '.join(SCALE_KINDS)}"),
            ("steps", 1 <= self.steps <= MOST_STEPS, f"at least 1 and at most {MOST_STEPS}"),
            ("learning_rate", 0 < self.learning_rate <= 1, "above 0 and at most 1"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("batch_rows", self.batch_rows >= 1, "at least 1"),
            ("accumulate", 1 <= self.accumulate <= self.batch_rows, "between 1 and the rows of a step"),
            ("beta2", 0 <= self.beta2 < 1, "at least 0 and below 1"),
            ("clip", 0 < self.clip < math.inf, "above 0 and no infinity"),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 4294967295"),
            ("check_every", self.check_every >= 1, "at least 1"),
            ("patience", self.patience >= 0, "at least 0"),
            ("distill", 0 <= self.distill <= 1, "between 0 and 1"),
            ("temperature", 0 < self.temperature <= 100, "above 0 and at most 100"),
        )
        for name, ok, allowed in checks:
            if not ok:
                option = f" ({OPTIONS[name]})" if name in OPTIONS else ""
                raise InvalidData(f"{name}{option} must be {allowed}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Recipe:
    """Settings for what is not given. `text_epochs` is for plain text."""

    epochs: float = 1.0
    text_epochs: float = 1.0
    schedule: Schedule = "linear"
    warmup_steps: int = 20
    batch_rows: int = 16
    accumulate: int = 1
    beta2: float | None = None  # by kind
    per_channel_base: bool = False  # refuse a base of groups


RECIPES = MappingProxyType(
    {
        "default": Recipe(),
        # The setting of arXiv 2305.14152 as it is quoted: one scale a row, AdamW, linear decay, 128 rows a step, 3
        # epochs of instructions, 15 of wikitext-2. Its rates, one a model, are for the raw scale: none is built in.
        # AdamW is as torch has it.
        "peqa-paper": Recipe(3.0, 15.0, "linear", 0, 128, 16, beta2=0.999, per_channel_base=True),
    }
)


@dataclass(frozen=True)
class Wanted:
    """Settings as somebody asks for them: None means that kind or recipe decide. `others` go into `TuneConfig`."""

    recipe: str = "default"
    kind: ScaleKind | None = None
    learning_rate: float | None = None
    steps: int | None = None
    epochs: float | None = None
    schedule: Schedule | None = None
    warmup_steps: int | None = None
    batch_rows: int | None = None
    accumulate: int | None = None
    beta2: float | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    def config(self, rows: int, *, text: bool = False) -> TuneConfig:
        """Settings of a run over so many rows (of plain text: windows). Raises `InvalidData`."""
        if self.steps is not None and self.epochs is not None:
            raise InvalidData("steps and epochs both say how long a run is; give one of them")
        recipe = RECIPES[self.recipe]
        kind = self.kind or "channel"
        batch_rows = recipe.batch_rows if self.batch_rows is None else self.batch_rows
        own_epochs = recipe.text_epochs if text else recipe.epochs
        accumulate = min(recipe.accumulate, batch_rows) if self.accumulate is None else self.accumulate
        return TuneConfig(
            kind=kind,
            steps=steps_for(rows, batch_rows, own_epochs if self.epochs is None else self.epochs)
            if self.steps is None
            else self.steps,
            learning_rate=LEARNING_RATES[kind] if self.learning_rate is None else self.learning_rate,
            schedule=self.schedule or recipe.schedule,
            warmup_steps=recipe.warmup_steps if self.warmup_steps is None else self.warmup_steps,
            batch_rows=batch_rows,
            accumulate=accumulate,
            beta2=next(beta2 for beta2 in (self.beta2, recipe.beta2, BETA2[kind]) if beta2 is not None),
            **self.others,
        )


def steps_for(rows: int, batch_rows: int, epochs: float) -> int:
    """Optimizer steps that go `epochs` times over `rows`."""
    if not 0 < epochs <= MOST_EPOCHS:
        raise InvalidData(f"epochs must be above 0 and at most {MOST_EPOCHS}, got {epochs}")
    steps = max(1, math.ceil(epochs * math.ceil(rows / max(1, batch_rows))))
    if steps > MOST_STEPS:
        raise InvalidData(
            f"{epochs:g} epochs over {rows} rows are {steps} steps of {batch_rows} rows, and a run may have "
            f"{MOST_STEPS}; give fewer epochs, or more rows to a step (--batch)"
        )
    return steps
