"""A whole evaluation: rows of a file, one or two sets, a report; what is done is kept beside the rows' file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peqa_runtime.disk_space import disk_full_named
from peqa_runtime.errors import InvalidData
from peqa_runtime.evaluation.answers import (
    Scored,
    answer_rows,
    check_rows,
    choose_options,
    sample_rows,
    window_losses,
)
from peqa_runtime.evaluation.compare import interval, paired
from peqa_runtime.evaluation.measured import Measured
from peqa_runtime.evaluation.metrics import Metric
from peqa_runtime.scales.atomic_file import write_atomic
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.training.data import TEXT_SUFFIXES, Example, encode_text, file_digest, read_text
from peqa_runtime.training.rows import Row, check_prompt_format, read_rows

Progress = Callable[[int, int], None]
"""Called with (done, all)."""
BASE = "base"


@dataclass(frozen=True)
class Question:
    """What is measured on which rows. `limit` takes a seeded sample of rows, or the first windows of a text."""

    data: Path
    metric: Metric
    limit: int | None = None
    seed: int = 0
    skip_empty: bool = False
    prompt_format: str | None = None  # None: what each set notes
    context: int | None = None  # tokens of a window; None: 1024, or the model's context where that is less
    batch_rows: int = 25


def evaluate(
    model: Measured,
    question: Question,
    scale_set: Path | None = None,
    *,
    against: Path | str | None = None,
    predictions: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the base, or a set on it; `against` measures another set (or `base`) on the same rows too, and the
    paired difference (first minus `against`).

    `predictions`: a file for the row's answers; beside it what is done is kept, so that an interrupted evaluation goes
    on. What cannot be measured raises before the first answer: `InvalidData`, and `InvalidScaleSet` as `ScaleSet.parse`
    does. Raises `DiskFull`.
    """
    rows = _rows(model, question)
    sets: list[Path | None] = [None if scale_set is None else Path(scale_set)]
    if against is not None:
        sets.append(None if against == BASE else Path(against))
    used = [None if chosen is None else ScaleSet.parse(chosen, model.manifest) for chosen in sets]
    forms = [_form(question, chosen) for chosen in used]
    if question.metric.asks != "window":
        _check(model, question, rows, forms)
    found: list[list[Scored]] = []
    for place, (chosen, form) in enumerate(zip(used, forms, strict=True)):
        partial = predictions.with_name(f"{predictions.name}.partial{place or ''}") if predictions else None
        model.use(chosen)
        offset = place * len(rows)
        moved = None if progress is None else _moved(progress, offset, len(rows) * len(sets))
        found.append(_ask(model, question, rows, chosen, form, partial, moved))
    report = _report(model, question, used, found)
    if predictions is not None:
        _write_predictions(predictions, question.metric, found)
        for file in predictions.parent.glob(f"{predictions.name}.partial*"):
            file.unlink()
    return report


def _rows(model: Measured, question: Question) -> Sequence[Row] | Sequence[Example]:
    if question.limit is not None and question.limit < 1:
        raise InvalidData(f"the limit must be at least 1, got {question.limit}")
    suffix = question.data.suffix.lower()
    if question.metric.asks != "window":
        if suffix in TEXT_SUFFIXES:
            raise InvalidData(f"{question.metric.name} is of rows (.jsonl, .json); {question.data} is text")
        return sample_rows(
            read_rows(question.data), question.limit, question.seed, skip_empty=question.skip_empty
        )
    if suffix in (".jsonl", ".json"):
        raise InvalidData(f"{question.metric.name} is of plain text (.txt, .md); {question.data} holds rows")
    text = encode_text(read_text(question.data), model.encode, window=_context(model, question))
    return text.examples[: question.limit]


def _context(model: Measured, question: Question) -> int:
    """Tokens of a window."""
    if question.context is None:
        return min(1024, model.max_tokens)
    if not 2 <= question.context <= model.max_tokens:
        raise InvalidData(
            f"the context must be between 2 and {model.max_tokens}, which is {model.bounded_by}, got {question.context}"
        )
    return question.context


def _form(question: Question, scale_set: ScaleSet | None) -> str:
    """The prompt format that is asked for, or else the one that the set notes."""
    noted = scale_set.prompt_format if scale_set else ""
    return check_prompt_format(noted if question.prompt_format is None else question.prompt_format)


def _check(model: Measured, question: Question, rows: Sequence[Any], forms: Sequence[str]) -> None:
    try:
        for form in dict.fromkeys(forms):
            check_rows(model, rows, question.metric, prompt_format=form)
    except InvalidData as error:
        raise InvalidData(f"{question.data}, {error}") from None


def _moved(progress: Progress, offset: int, total: int) -> Progress:
    return lambda done, _: progress(offset + done, total)


def _ask(
    model: Measured,
    question: Question,
    rows: Sequence[Any],
    scale_set: ScaleSet | None,
    form: str,
    partial: Path | None,
    progress: Progress | None,
) -> list[Scored]:
    """Every row's answer in order; those that `partial` holds are not asked again."""
    fingerprint = {
        "computes": model.computes,
        "data": file_digest(question.data),
        "metric": question.metric.name,
        "rows": len(rows),
        "seed": question.seed,
        "limit": question.limit,
        "skip_empty": question.skip_empty,
        "context": _context(model, question),
        "batch_rows": question.batch_rows,
        "prompt_format": form,
        "base_digest": model.manifest.base_digest,
        "revision": scale_set.revision if scale_set else None,
    }
    done = _read_partial(partial, fingerprint)
    before = frozenset(done)
    batches: Iterator[list[Scored]]
    if question.metric.asks == "window":
        batches = window_losses(model, rows, done=before)
    elif question.metric.asks == "option":
        batches = choose_options(model, rows, question.metric, prompt_format=form, done=before)
    else:
        batches = answer_rows(
            model, rows, question.metric, prompt_format=form, batch_rows=question.batch_rows, done=before
        )
    for batch in batches:
        done |= {scored.number: scored for scored in batch}
        if partial is not None:
            with disk_full_named(partial), open(partial, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(scored)) + "\n" for scored in batch)
        if progress is not None:
            progress(len(done), len(rows))
    return [done[number] for number in range(len(rows))]


def _read_partial(partial: Path | None, fingerprint: dict[str, Any]) -> dict[int, Scored]:
    """What an interrupted evaluation of the same question had done; else the file begins anew."""
    if partial is None:
        return {}
    done: dict[int, Scored] = {}
    try:
        lines = partial.read_text(encoding="utf-8").split("\n")
        if json.loads(lines[0]) == json.loads(json.dumps(fingerprint)):
            for line in lines[1:-1]:  # what follows the last line break was cut short
                row = json.loads(line)
                done[row["number"]] = Scored(**(row | {"stats": tuple(row["stats"])}))
    except (OSError, ValueError, KeyError, TypeError):
        done = {}
    kept = [json.dumps(fingerprint), *(json.dumps(asdict(scored)) for scored in done.values())]
    _write_lines(partial, kept)
    return done


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    """All lines, or the file as it was."""
    with disk_full_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, ("\n".join(lines) + "\n").encode(), durable=False)


def _report(
    model: Measured,
    question: Question,
    used: Sequence[ScaleSet | None],
    found: Sequence[Sequence[Scored]],
) -> dict[str, Any]:
    metric = question.metric
    key = metric.name.replace("-", "_")
    stats = [np.array([scored.stats for scored in rows]) for rows in found]
    whole = interval(stats[0], metric, seed=question.seed)
    report: dict[str, Any] = {
        "metric": metric.name,
        "data": question.data.name,
        "computes": model.computes,
        "base_digest": model.manifest.base_digest,
        "revision": used[0].revision if used[0] else None,
        key: whole.value,
        "low": whole.low,
        "high": whole.high,
        "rows": len(found[0]),
        "seed": question.seed,
    }
    if metric.asks == "window":
        report |= {"tokens": int(stats[0][:, 1].sum()), "context": _context(model, question)}
    if stats[0].shape[1] == 2 and metric.asks != "window":
        report["correct"] = int(stats[0][:, 0].sum())
    if len(found) == 2:
        other = interval(stats[1], metric, seed=question.seed)
        difference = paired(stats[1], stats[0], metric, seed=question.seed)
        report["against"] = {
            "revision": used[1].revision if used[1] else None,
            key: other.value,
            "difference": difference.difference,
            "low": difference.low,
            "high": difference.high,
            "better": difference.better,
        }
    return report


def _write_predictions(path: Path, metric: Metric, found: Sequence[Sequence[Scored]]) -> None:
    """One object a row; `against` holds the other set's answer."""
    lines: list[str] = []
    for rows in zip(*found, strict=True):
        entries = [_entry(scored, metric) for scored in rows]
        if len(entries) == 2:
            entries[0]["against"] = {key: entries[1][key] for key in ("answer", "stats")}
        lines.append(json.dumps(entries[0], ensure_ascii=False))
    _write_lines(path, lines)


def _entry(scored: Scored, metric: Metric) -> dict[str, Any]:
    entry = asdict(scored)
    if len(scored.stats) == 2 and metric.asks != "window":
        entry["correct"] = bool(scored.stats[0])
    return entry
