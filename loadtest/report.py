"""Numbers of a run: percentiles overall and per task, as one aligned table for people or JSON for machines."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from peqa_loadtest.client import Answer
from peqa_loadtest.swap import SwapReport

PERCENTILES = (50, 90, 99)
SHOWN = 10  # errors and violations printed one by one; --json holds them all


def percentile(values: list[float], percent: float) -> float:
    """The value below which `percent` % of the values lie, linear between neighbours (numpy's default); NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Distribution:
    """Seconds."""

    p50: float | None  # None: nothing was measured
    p90: float | None
    p99: float | None
    mean: float | None
    count: int

    @staticmethod
    def of(values: list[float]) -> Distribution:
        """Percentiles and mean of a list of seconds."""
        if not values:
            return Distribution(None, None, None, None, 0)
        p50, p90, p99 = (percentile(values, p) for p in PERCENTILES)
        return Distribution(p50, p90, p99, sum(values) / len(values), len(values))


@dataclass(frozen=True)
class Summary:
    """What one task's answers, or all, came to. Rates count answered requests only, over the whole run's duration."""

    completed: int
    failed: int
    retried: int
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_mean: float | None
    output_tokens_mean: float | None
    ttft_s: Distribution  # due time to the first chunk with text
    inter_token_s: Distribution  # between neighbouring chunks with text, of all requests together
    end_to_end_s: Distribution  # due time to the end of the stream

    @staticmethod
    def of(answers: list[Answer], duration: float) -> Summary:
        """Summarise answers of a run that took `duration` seconds."""
        good = [answer for answer in answers if answer.failure is None]
        output = [output_tokens(answer) for answer in good]
        prompt = [answer.prompt_tokens for answer in good if answer.prompt_tokens is not None]
        gaps = [b - a for x in good for a, b in zip(x.text_times, x.text_times[1:], strict=False)]
        return Summary(
            completed=len(good),
            failed=len(answers) - len(good),
            retried=sum(answer.retried for answer in answers),
            requests_per_s=len(good) / duration,
            output_tokens_per_s=sum(output) / duration,
            prompt_tokens_mean=sum(prompt) / len(prompt) if prompt else None,
            output_tokens_mean=sum(output) / len(output) if output else None,
            ttft_s=Distribution.of([x.text_times[0] - x.started for x in good if x.text_times]),
            inter_token_s=Distribution.of(gaps),
            end_to_end_s=Distribution.of([x.finished - x.started for x in good]),
        )


@dataclass(frozen=True)
class ErrorCount:
    """One kind of failure and how often it came."""

    status: int | None
    message: str
    count: int


@dataclass(frozen=True)
class Report:
    """A whole run."""

    settings: dict[str, Any]
    duration_s: float
    overall: Summary
    tasks: dict[str, Summary]
    errors: list[ErrorCount]
    warmup_errors: list[ErrorCount]
    notes: list[str]
    swap: SwapReport | None

    @property
    def ok(self) -> bool:
        """Some request was answered, and no answer broke the swap check."""
        return self.overall.completed > 0 and not (self.swap and self.swap.violations)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"ok": self.ok, **asdict(self)}


def build_report(
    settings: dict[str, Any],
    answers: list[Answer],
    warmup: list[Answer],
    tasks: list[str],
    notes: list[str],
    swap: SwapReport | None,
) -> Report:
    """Summarise a run; its duration reaches from the first request's due time to the last one's end."""
    duration = max(a.finished for a in answers) - min(a.started for a in answers)
    notes = list(notes)
    if (unsaid := sum(a.failure is None and a.output_tokens is None for a in answers)) > 0:
        notes.append(f"{unsaid} answers without usage: their output tokens are counted in chunks")
    good = [answer for answer in answers if answer.failure is None]
    chunks, tokens = sum(len(a.text_times) for a in good), sum(output_tokens(a) for a in good)
    if chunks and tokens > 1.1 * chunks:
        notes.append(f"{tokens / chunks:.1f} tokens per chunk: inter-token latency is a chunk's")
    return Report(
        settings,
        duration,
        Summary.of(answers, duration),
        {task: Summary.of([a for a in answers if a.task == task], duration) for task in tasks},
        count_errors(answers),
        count_errors(warmup),
        notes,
        swap,
    )


def output_tokens(answer: Answer) -> int:
    """Tokens as the server counts them, else chunks with text."""
    return answer.output_tokens if answer.output_tokens is not None else len(answer.text_times)


def count_errors(answers: list[Answer]) -> list[ErrorCount]:
    """Failures by status and message, the most frequent first."""
    counts = Counter(answer.failure for answer in answers if answer.failure is not None)
    return [ErrorCount(failure.status, failure.message, n) for failure, n in counts.most_common()]


def print_report(report: Report, console: Console) -> None:
    """The table, then whatever is wrong or worth knowing."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task")
    for name in ("requests", "failed", "tok/s", "req/s", "TTFT ms", "inter-token ms", "end-to-end ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("", "", "", "", "", *["p50 / p90 / p99"] * 3, style="dim")
    rows = {"all": report.overall} | (report.tasks if len(report.tasks) > 1 else {})
    for name, row in rows.items():
        table.add_row(
            name,
            str(row.completed),
            str(row.failed),
            f"{row.output_tokens_per_s:.1f}",
            f"{row.requests_per_s:.2f}",
            *(_milliseconds(d) for d in (row.ttft_s, row.inter_token_s, row.end_to_end_s)),
        )
    console.print(table)
    whole = report.overall
    if whole.completed:
        prompt = "?" if whole.prompt_tokens_mean is None else f"{whole.prompt_tokens_mean:.1f}"
        console.print(
            f"{report.duration_s:.1f} s, {prompt} tokens in and {whole.output_tokens_mean:.1f} out per request"
            + (f", {whole.retried} sent again on a fresh connection" if whole.retried else "")
        )
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    for title, errors in (("error", report.errors), ("error in warm-up", report.warmup_errors)):
        for error in errors[:SHOWN]:
            status = f"HTTP {error.status} " if error.status else ""
            console.print(f"{title}: {error.count} x {status}{error.message}", markup=False)
        if len(errors) > SHOWN:
            console.print(f"{title}: {len(errors) - SHOWN} more kinds")
    if report.swap:
        _print_swap(report.swap, console)


def _print_swap(swap: SwapReport, console: Console) -> None:
    split = ", ".join(f"{digest[:12]}: {n}" for digest, n in sorted(swap.answers_per_revision.items()))
    console.print(
        f"swap: {swap.uploads} uploads of task {swap.task}, {swap.checked} answers checked ({split}; "
        f"{swap.could_be_stale} could have been stale), "
        f"{len(swap.violations)} violations",
        markup=False,
    )
    for violation in swap.violations[:SHOWN]:
        console.print(f"violation: {violation}", markup=False)
    if len(swap.violations) > SHOWN:
        console.print(f"violation: {len(swap.violations) - SHOWN} more")


def _milliseconds(d: Distribution) -> str:
    if d.p50 is None or d.p90 is None or d.p99 is None:
        return "-"
    return " / ".join(f"{x * 1000:.1f}" if x < 0.0995 else f"{x * 1000:.0f}" for x in (d.p50, d.p90, d.p99))
