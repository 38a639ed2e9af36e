"""Steps of a run as the optimizer sees them: the learning rate of each, and each task's own clipped gradient."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import get_total_norm

from peqa_runtime.training.callbacks import ClipEachTask
from peqa_runtime.training.run import TrainingFiles, train_files
from peqa_runtime.training.settings import Schedule, TuneConfig
from peqa_runtime.training.tuning import TunableModel, load_tunable

RATE = 2e-2
CONFIG = TuneConfig(
    steps=10, learning_rate=RATE, warmup_steps=4, batch_rows=4, check_every=100, seed=5, compute="float32"
)


class Steps:
    """What every optimizer step was given: its learning rate, each task's gradient norm before and after clipping."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rates: list[float] = []
        self.before: list[list[float]] = []
        self.after: list[list[float]] = []
        clip = ClipEachTask.on_pre_optimizer_step

        def watched(callback: ClipEachTask, *args: Any, **kwargs: Any) -> None:
            self.rates += {group["lr"] for group in kwargs["optimizer"].param_groups}
            self.before.append(norms(callback))
            clip(callback, *args, **kwargs)
            self.after.append(norms(callback))

        monkeypatch.setattr(ClipEachTask, "on_pre_optimizer_step", watched)


def norms(callback: ClipEachTask) -> list[float]:
    return [
        get_total_norm([parameter.grad for parameter in own if parameter.grad is not None]).item()
        for own in callback.tasks
    ]


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Steps]:
    """`run(config, "task", …)`: tune the tasks on rows of their own and give the steps."""
    torch.set_num_threads(1)
    tunable: TunableModel = load_tunable(tiny_base, device="cpu")

    def tuned(config: TuneConfig, *tasks: str) -> Steps:
        files = []
        for task in tasks:
            data = tmp_path / f"{task}.jsonl"
            rows = ({"prompt": f"{i} is", "completion": f"{task} {i % 3}"} for i in range(20))
            data.write_text("\n".join(map(json.dumps, rows)))
            files.append(TrainingFiles(task, data, tmp_path / f"{task}.safetensors"))
        with monkeypatch.context() as patch:
            steps = Steps(patch)
            train_files(tunable, files, lambda rows: config, progress=False)
        return steps

    return tuned


def expected_rate(schedule: Schedule, step: int, steps: int, warmup: int) -> float:
    """Up in a straight line from 0 to the rate, then down to 0 after the last step: straight, or half a cosine."""
    if step < warmup:
        return RATE * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return (
        RATE * {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]
    )


@pytest.mark.parametrize(
    ("schedule", "steps", "warmup"),
    [
        ("linear", 10, 4),
        ("cosine", 10, 4),
        ("constant", 6, 3),
        ("linear", 6, 0),
        ("cosine", 6, 0),
        ("linear", 3, 20),
    ],
)
def test_the_rate_warms_up_and_decays_as_the_schedule_says(
    run: Callable[..., Steps], schedule: Schedule, steps: int, warmup: int
) -> None:
    config = replace(CONFIG, schedule=schedule, steps=steps, warmup_steps=warmup)
    rates = run(config, "t").rates
    warmup = min(warmup, steps)  # a run that is shorter than its warm-up never reaches the rate
    assert rates == pytest.approx([expected_rate(schedule, step, steps, warmup) for step in range(steps)])
    assert warmup == steps or max(rates) == RATE


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_tasks_gradient_is_clipped_by_its_own_norm(run: Callable[..., Steps], accumulate: int) -> None:
    """A clip between the norms of two tasks takes from the larger and leaves the smaller as it is."""
    config = replace(CONFIG, steps=4, accumulate=accumulate, clip=1e6)
    free = run(config, "odd", "longer-answer")
    assert free.after == free.before
    small, large = sorted(free.before[0])
    assert large > 1.1 * small, "the tasks differ"
    clip = (small + large) / 2
    clipped = run(replace(config, clip=clip), "odd", "longer-answer")
    assert clipped.before[0] == pytest.approx(free.before[0], rel=1e-5), (
        "the first step is that of the free run"
    )
    assert sorted(clipped.after[0]) == pytest.approx([small, clip], rel=1e-4)
    tight = run(replace(config, clip=small / 10), "odd", "longer-answer")
    assert len(tight.after) == 4
    for step in tight.after:
        assert step == pytest.approx([small / 10] * 2, rel=1e-4)
