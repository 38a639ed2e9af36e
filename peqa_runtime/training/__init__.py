"""Tuning scale sets on a frozen base, and measuring them. Uses model/ and scales/, never engine/."""

from __future__ import annotations

from peqa_runtime.training.evaluation import Question, evaluate
from peqa_runtime.training.logprobs import completion_logprobs, token_logprobs
from peqa_runtime.training.metrics import metric_named
from peqa_runtime.training.run import FinishedRun, TrainingFiles, train_files
from peqa_runtime.training.settings import TuneConfig
from peqa_runtime.training.trainer import TaskData, TrainingInterrupted, TuneResult
from peqa_runtime.training.tuning import TunableModel, apply_scale_set, load_tunable

__all__ = [
    "FinishedRun",
    "Question",
    "TaskData",
    "TrainingFiles",
    "TrainingInterrupted",
    "TunableModel",
    "TuneConfig",
    "TuneResult",
    "apply_scale_set",
    "completion_logprobs",
    "evaluate",
    "load_tunable",
    "metric_named",
    "token_logprobs",
    "train_files",
]
