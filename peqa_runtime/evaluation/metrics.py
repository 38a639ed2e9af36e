"""Metrics of `peqa eval`. Each row gives a few numbers; a metric's value is a function of their sums over the rows.

So a value over any resample of the rows needs no second look at the answers, which is what the bootstrap lives on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

import numpy as np

from peqa_runtime.errors import InvalidData
from peqa_runtime.training.rows import Row

Stats = tuple[float, ...]
Sums = np.ndarray  # float64 [..., numbers of a row]


@dataclass(frozen=True)
class Metric:
    """`asks`: what a row is asked for: a greedy answer, the likeliest of its options, or the loss of a text window."""

    name: str
    asks: Literal["answer", "option", "window"]
    stats: Callable[[Row, str], Stats]
    value: Callable[[Sums], np.ndarray]
    unit: str = "%"
    lower_is_better: bool = False
    room: float = 1.0  # tokens that an answer may have, in lengths of the longest reference


def metric_named(name: str, *, ignore_case: bool = False) -> Metric:
    """The metric of this name; `ignore_case` is for exact-match. `InvalidData` for others; bleu needs sacrebleu."""
    if ignore_case and name != "exact-match":
        raise InvalidData("only exact-match can ignore case")
    if name == "bleu":
        return Metric(name, "answer", _bleu_stats, _bleu_value(), unit="BLEU", room=1.5)
    metrics = (
        Metric("exact-match", "answer", _exact(ignore_case), _share),
        Metric("final-number", "answer", _number_stats, _share, room=1.5),
        Metric("slot-f1", "answer", _slot_stats, _f1, room=1.5),
        Metric("multiple-choice", "option", _exact(False), _share),
        Metric("perplexity", "window", _no_stats, _perplexity, unit="", lower_is_better=True),
    )
    for metric in metrics:
        if metric.name == name:
            return metric
    raise InvalidData(f"the metric must be bleu or one of {', '.join(m.name for m in metrics)}, got {name!r}")


def _share(sums: Sums) -> np.ndarray:
    """Percent of rows, of sums (right, rows)."""
    return np.asarray(100 * sums[..., 0] / np.maximum(sums[..., 1], 1))


def _perplexity(sums: Sums) -> np.ndarray:
    """Of sums (negative log-likelihood, tokens)."""
    return np.asarray(np.exp(sums[..., 0] / np.maximum(sums[..., 1], 1)))


def _no_stats(row: Row, answer: str) -> Stats:
    raise AssertionError("windows have no answers")


def _exact(ignore_case: bool) -> Callable[[Row, str], Stats]:
    def stats(row: Row, answer: str) -> Stats:
        """Equal but for white space around it."""
        wanted, found = row.completion.strip(), answer.strip()
        if ignore_case:
            wanted, found = wanted.casefold(), found.casefold()
        return (float(wanted == found), 1.0)

    return stats


_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, or the last number at all; None where there is none."""
    marked = text.rsplit("####", 1)
    found = _NUMBER.findall(marked[1]) if len(marked) == 2 else _NUMBER.findall(text)[-1:]
    if not found:
        return None
    try:
        return Decimal(found[0].replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def _number_stats(row: Row, answer: str) -> Stats:
    wanted = final_number(row.completion)
    if wanted is None:
        raise InvalidData(f"line {row.line}: final-number needs a number in the completion")
    return (float(final_number(answer) == wanted), 1.0)


def _slots(text: str) -> set[tuple[str, str]] | None:
    """(key, value) of a JSON object, values as JSON; None for anything else."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    return {(key, json.dumps(value)) for key, value in found.items()}


def _slot_stats(row: Row, answer: str) -> Stats:
    """(right, found, wanted) slots; an answer that is no object has found none."""
    wanted = _slots(row.completion)
    if wanted is None:
        raise InvalidData(f"line {row.line}: slot-f1 needs a JSON object as completion")
    found = _slots(answer) or set()
    return (float(len(wanted & found)), float(len(found)), float(len(wanted)))


def _f1(sums: Sums) -> np.ndarray:
    """Micro-averaged F1 in percent; 100 where there is nothing to find and nothing was found."""
    both = sums[..., 1] + sums[..., 2]
    return np.asarray(np.where(both > 0, 200 * sums[..., 0] / np.maximum(both, 1), 100.0))


_ORDERS = 4


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise InvalidData("bleu needs a package that is not here: pip install sacrebleu") from None
    return sacrebleu


def _bleu_stats(row: Row, answer: str) -> Stats:
    """Matches and totals of n-grams of each order, length of answer and nearest reference, by sacrebleu."""
    score = _sacrebleu().sentence_bleu(answer.strip(), list(row.good_answers))
    return (*map(float, score.counts), *map(float, score.totals), float(score.sys_len), float(score.ref_len))


def _bleu_value() -> Callable[[Sums], np.ndarray]:
    compute = _sacrebleu().BLEU.compute_bleu

    def one(sums: np.ndarray) -> float:
        counts, totals = sums[:_ORDERS], sums[_ORDERS : 2 * _ORDERS]
        found = compute(
            [round(c) for c in counts],
            [round(t) for t in totals],
            sys_len=round(sums[-2]),
            ref_len=round(sums[-1]),
            smooth_method="exp",
        )
        return float(found.score)

    return lambda sums: np.apply_along_axis(one, -1, sums)
