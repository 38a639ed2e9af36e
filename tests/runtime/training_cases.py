"""A run of few steps on the tiny base, and who calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peqa_runtime.training.run import FinishedRun, TrainingFiles, train_files
from peqa_runtime.training.settings import TuneConfig
from peqa_runtime.training.tuning import TunableModel

CONFIG = TuneConfig(
    steps=6, learning_rate=2e-2, warmup_steps=1, batch_rows=4, check_every=3, seed=5, compute="float32"
)
Rows = Callable[[str, int], Path]
"""Write a file of so many rows that end in a word."""


def run(
    tunable: TunableModel, *files: TrainingFiles, config: TuneConfig = CONFIG, **more: Any
) -> list[FinishedRun]:
    return train_files(tunable, files, lambda rows: config, progress=False, **more)
