"""How sure a value is, and a difference between two sets on the same rows: percentile bootstrap over the rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peqa_runtime.evaluation.metrics import Metric

_CHUNK = 1 << 22  # drawn row numbers at a time


@dataclass(frozen=True)
class Interval:
    """A value over all rows and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Second minus first on the same rows; `better` is the share of resamples in which the second one is better."""

    difference: float
    low: float
    high: float
    better: float


def interval(stats: np.ndarray, metric: Metric, *, samples: int = 1000, seed: int = 0) -> Interval:
    """Of one set: `stats` [rows, numbers]."""
    values = metric.value(_resampled(stats, samples, seed))
    low, high = np.percentile(values, (2.5, 97.5))
    return Interval(float(metric.value(stats.sum(0))), float(low), float(high))


def paired(
    first: np.ndarray, second: np.ndarray, metric: Metric, *, samples: int = 1000, seed: int = 0
) -> Difference:
    """Of two sets on the same rows, each [rows, numbers]: every resample draws the same rows for both."""
    assert first.shape[0] == second.shape[0], (first.shape, second.shape)
    found = metric.value(_resampled(second, samples, seed)) - metric.value(_resampled(first, samples, seed))
    whole = float(metric.value(second.sum(0)) - metric.value(first.sum(0)))
    low, high = np.percentile(found, (2.5, 97.5))
    better = np.mean(found < 0) if metric.lower_is_better else np.mean(found > 0)
    return Difference(whole, float(low), float(high), float(better))


def _resampled(stats: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Sums of resamples with replacement, [samples, numbers]; the rows drawn depend on seed and count only."""
    rng = np.random.default_rng(seed)
    rows = stats.shape[0]
    step = max(1, _CHUNK // rows)
    parts = []
    for first in range(0, samples, step):
        drawn = rng.integers(0, rows, size=(min(step, samples - first), rows))
        parts.append(stats[drawn].sum(1))
    return np.concatenate(parts)
