"""Tuning scale sets on a frozen base. Uses model/ and scales/, never engine/."""

from __future__ import annotations

from peqa_runtime.training.logprobs import completion_logprobs, token_logprobs
from peqa_runtime.training.run import FinishedRun, TrainingFiles, train_files
from peqa_runtime.training.settings import TuneConfig
from peqa_runtime.training.trainer import TaskData, TrainingInterrupted, TuneResult
from peqa_runtime.training.tuning import TunableModel, apply_scale_set, load_tunable

__all__ = [
    "FinishedRun",
    "TaskData",
    "TrainingFiles",
    "TrainingInterrupted",
    "TunableModel",
    "TuneConfig",
    "TuneResult",
    "apply_scale_set",
    "completion_logprobs",
    "load_tunable",
    "token_logprobs",
    "train_files",
]
