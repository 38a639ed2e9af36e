"""Numbers of a report, from clock readings that are written down here."""

from __future__ import annotations

import io
import json
import math
import statistics

import pytest
from rich.console import Console

from peqa_loadtest.client import Answer, Failure
from peqa_loadtest.report import Distribution, build_report, percentile, print_report
from peqa_loadtest.swap import SwapReport


def answer(task: str, started: float, times: list[float], *, tokens: int | None, error: str = "") -> Answer:
    made = Answer(task, "p", started, started, times[-1] if times else started + 1, list(times))
    made.text, made.output_tokens, made.prompt_tokens = "x", tokens, 10
    made.failure = Failure(503, error) if error else None
    return made


def test_percentile_interpolates() -> None:
    values = [float(v) for v in (15, 20, 35, 40, 50)]
    assert percentile(values, 50) == 35
    assert percentile(values, 90) == pytest.approx(46)
    assert percentile(values[::-1], 40) == pytest.approx(29)
    assert percentile([7.0], 99) == 7
    assert math.isnan(percentile([], 50))
    many = [((i * 7919) % 1000) / 10 for i in range(1000)]
    cuts = statistics.quantiles(many, n=100, method="inclusive")
    for percent in (50, 90, 99):
        assert percentile(many, percent) == pytest.approx(cuts[percent - 1])
    assert Distribution.of([]) == Distribution(None, None, None, None, 0)


def test_rates_latencies_and_split() -> None:
    answers = [
        answer("sql", 100.0, [100.5, 101.0, 103.0], tokens=3),
        answer("base", 101.0, [101.1, 101.3], tokens=8),
        answer("base", 102.0, [], tokens=None, error="queue full"),
        answer("base", 109.0, [109.5, 110.0], tokens=None),
    ]
    report = build_report({}, answers, [], ["base", "sql"], [], None)
    assert report.duration_s == pytest.approx(10)
    assert (report.overall.completed, report.overall.failed) == (3, 1)
    assert report.overall.output_tokens_per_s == pytest.approx((3 + 8 + 2) / 10)
    assert report.overall.requests_per_s == pytest.approx(0.3)
    assert report.overall.ttft_s.p50 == pytest.approx(0.5)
    assert report.tasks["sql"].inter_token_s.mean == pytest.approx(1.25)
    assert report.tasks["sql"].inter_token_s.p90 == pytest.approx(1.85)
    assert report.tasks["base"].end_to_end_s.p50 == pytest.approx(0.65)
    assert (report.tasks["base"].completed, report.tasks["base"].failed) == (2, 1)
    assert report.tasks["base"].requests_per_s + report.tasks["sql"].requests_per_s == pytest.approx(0.3)
    assert [(e.status, e.message, e.count) for e in report.errors] == [(503, "queue full", 1)]
    assert report.ok
    assert any("without usage" in note for note in report.notes)
    assert any("tokens per chunk" in note for note in report.notes)


def test_nothing_answered_is_not_ok() -> None:
    report = build_report({}, [answer("base", 1.0, [], tokens=None, error="no")], [], ["base"], [], None)
    assert not report.ok
    assert report.overall.ttft_s.p50 is None
    json.dumps(report.to_dict(), allow_nan=False)
    print_report(report, Console(file=io.StringIO(), width=130))


def test_a_violation_is_not_ok_and_everything_is_printed() -> None:
    swap = SwapReport("sql", 3, 9, 5, {"aa": 9}, ["answer is stale"])
    answers = [
        answer("sql", 1.0, [1.01, 1.03], tokens=2),
        answer("sql", 1.0, [], tokens=None, error="full [x]"),
    ]
    report = build_report({}, answers, answers[1:], ["sql"], ["a note"], swap)
    assert not report.ok
    out = io.StringIO()
    print_report(report, Console(file=out, width=130))
    text = out.getvalue()
    for part in ("10.0 / 10.0 / 10.0", "error: 1 x HTTP 503 full [x]", "error in warm-up", "note: a note"):
        assert part in text, text
    assert "3 uploads of task sql, 9 answers checked" in text
    assert "violation: answer is stale" in text
