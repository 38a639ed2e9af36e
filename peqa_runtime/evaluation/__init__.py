"""Measuring a base, or sets on it, with rows or a text: by the engine, or by the model in fp32."""

from __future__ import annotations

from peqa_runtime.evaluation.metrics import metric_named
from peqa_runtime.evaluation.reference import Reference
from peqa_runtime.evaluation.run import Question, evaluate
from peqa_runtime.evaluation.served import Served
from peqa_runtime.evaluation.ways import opened

__all__ = ["Question", "Reference", "Served", "evaluate", "metric_named", "opened"]
