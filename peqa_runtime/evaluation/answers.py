"""What a model says to rows: greedy answers, the likeliest option, the loss of text windows; in batches, one yielded
after the other, so that whoever asks can keep what is done."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peqa_runtime.errors import InvalidData
from peqa_runtime.evaluation.measured import Measured
from peqa_runtime.evaluation.metrics import Metric, Stats
from peqa_runtime.training.data import Example, prompt_ids
from peqa_runtime.training.rows import Row


@dataclass(frozen=True)
class Scored:
    """One row's (or window's) answer and its numbers for the metric. `number` counts the rows asked, from 0."""

    number: int
    line: int
    prompt: str
    expected: str
    answer: str
    stats: Stats


def sample_rows(rows: Sequence[Row], limit: int | None, seed: int, *, skip_empty: bool = False) -> list[Row]:
    """A seeded sample of `limit` rows without replacement, in file order; all rows when there are no more.

    `skip_empty` first leaves out rows whose answer is empty JSON (`{}`, `[]` or `""`).
    """
    if limit is not None and limit < 1:
        raise InvalidData(f"the limit must be at least 1, got {limit}")
    if skip_empty:
        rows = [row for row in rows if row.completion.strip() not in ("{}", "[]", '""')]
    if not rows:
        raise InvalidData("no rows are left to evaluate")
    if limit is None or limit >= len(rows):
        return list(rows)
    picked = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[i] for i in picked]


def answer_rows(
    model: Measured,
    rows: Sequence[Row],
    metric: Metric,
    *,
    prompt_format: str = "",
    batch_rows: int = 25,
    done: frozenset[int] = frozenset(),
) -> Iterator[list[Scored]]:
    """Greedy answers, a batch of like lengths at a time; a batch that `done` (row numbers) holds whole is passed over.

    A row is answered until end-of-sequence, or until it is so much longer than the longest reference of its batch that
    it is beside the point. The rows have gone through `check_rows`. A batch whose longest prompt leaves no room for its
    longest reference is answered row by row.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    for start in range(0, len(order), batch_rows):
        part = order[start : start + batch_rows]
        if done.issuperset(part):
            continue
        prompts = {i: prompt_ids(rows[i], model, prompt_format) for i in part}
        longest = {i: max(len(model.encode(text)) for text in rows[i].good_answers) for i in part}
        fits = max(map(len, prompts.values())) + max(longest.values()) <= model.max_tokens
        for together in [part] if fits else [[i] for i in part]:
            own = [prompts[i] for i in together]
            room = round(max(longest[i] for i in together) * metric.room) + 8
            room = min(room, model.max_tokens - max(map(len, own)))
            answers = model.greedy(own, max_new_tokens=room)
            yield [_scored(i, rows[i], answer, metric) for i, answer in zip(together, answers, strict=True)]


def _scored(number: int, row: Row, answer: str, metric: Metric) -> Scored:
    return Scored(number, row.line, row.prompt, row.completion, answer, metric.stats(row, answer))


def check_rows(model: Measured, rows: Sequence[Row], metric: Metric, *, prompt_format: str = "") -> None:
    """Raise `InvalidData` for rows that cannot be asked or measured: before the first answer, not after the others."""
    too_long: list[tuple[Row, int, int]] = []
    for row in rows:
        texts = row.good_answers
        if metric.asks == "option":
            texts = row.options
            if len(texts) < 2 or row.completion not in texts:
                raise InvalidData(
                    f"line {row.line}: multiple-choice needs 'options', two or more, with the completion among them"
                )
        else:
            metric.stats(row, "")  # raises for a completion that nothing can be measured against
        prompt = len(prompt_ids(row, model, prompt_format))
        sizes = [len(model.encode(text)) for text in texts]
        if not prompt or (metric.asks == "option" and not all(sizes)):
            raise InvalidData(f"line {row.line}: the prompt, or an option, has no tokens")
        answer = max(sizes)
        if prompt + answer > model.max_tokens:
            too_long.append((row, prompt, answer))
    if too_long:
        row, prompt, answer = too_long[0]
        others = [str(other.line) for other, _, _ in too_long[1:]]
        shown = ", ".join(others[:5]) + (" …" if len(others) > 5 else "")
        also = f", and {len(others)} more rows do (lines {shown})" if others else ""
        raise InvalidData(
            f"line {row.line}: {prompt} prompt tokens and {answer} of the answer exceed the context "
            f"of {model.max_tokens}, which is {model.bounded_by}{also}; shorten such rows or leave them out"
        )


def choose_options(
    model: Measured,
    rows: Sequence[Row],
    metric: Metric,
    *,
    prompt_format: str = "",
    done: frozenset[int] = frozenset(),
) -> Iterator[list[Scored]]:
    """The option with the highest mean log-probability per token, a row at a time, of rows that `check_rows` passed."""
    for number, row in enumerate(rows):
        if number in done:
            continue
        prompt = prompt_ids(row, model, prompt_format)
        examples = [Example((*prompt, *model.encode(option)), len(prompt)) for option in row.options]
        means = [sum(own) / len(own) for own in model.logprobs(examples)]
        yield [_scored(number, row, row.options[means.index(max(means))], metric)]


def window_losses(
    model: Measured, windows: Sequence[Example], *, done: frozenset[int] = frozenset()
) -> Iterator[list[Scored]]:
    """Negative log-likelihood and predicted tokens of each window, one at a time."""
    for number, example in enumerate(windows):
        if number in done:
            continue
        (logprobs,) = model.logprobs([example])
        yield [Scored(number, 0, "", "", "", (-math.fsum(logprobs), float(len(logprobs))))]
