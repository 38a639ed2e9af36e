"""What a model says to rows: greedy answers, the likeliest option, the loss of text windows; in batches, one yielded
after the other, so that whoever asks can keep what is done."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from peqa_runtime.errors import InvalidData
from peqa_runtime.training.batches import collate
from peqa_runtime.training.data import Example, prompt_ids
from peqa_runtime.training.metrics import Metric, Stats
from peqa_runtime.training.rows import Row
from peqa_runtime.training.tuning import TunableModel, logits_at


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


def greedy(tunable: TunableModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
    """Most likely continuation of each prompt (token ids), decoded, without the end-of-sequence token."""
    eos = tunable.eos_token_id
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), eos)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = tunable.model.device
    with torch.no_grad():
        out = tunable.model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    answers: list[str] = []
    for ids in out[:, width:].tolist():
        end = ids.index(eos) if eos in ids else len(ids)
        answers.append(str(tunable.tokenizer.decode(ids[:end], skip_special_tokens=True)))
    return answers


def answer_rows(
    tunable: TunableModel,
    rows: Sequence[Row],
    metric: Metric,
    *,
    prompt_format: str = "",
    batch_rows: int = 25,
    done: frozenset[int] = frozenset(),
) -> Iterator[list[Scored]]:
    """Greedy answers, a batch of like lengths at a time; a batch that `done` (row numbers) holds whole is passed over.

    A row is answered until end-of-sequence, or until it is so much longer than the longest reference of its batch that
    it is beside the point. A prompt that leaves no room in the context raises `InvalidData`.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    for start in range(0, len(order), batch_rows):
        part = order[start : start + batch_rows]
        if done.issuperset(part):
            continue
        prompts = [prompt_ids(rows[i], tunable, prompt_format) for i in part]
        longest = max(len(tunable.encode(text)) for i in part for text in rows[i].good_answers)
        room = round(longest * metric.room) + 8
        for i, prompt in zip(part, prompts, strict=True):
            check_room(tunable, rows[i], len(prompt), longest)
        room = min(room, tunable.max_tokens - max(map(len, prompts)))
        answers = greedy(tunable, prompts, max_new_tokens=room)
        yield [_scored(i, rows[i], answer, metric) for i, answer in zip(part, answers, strict=True)]


def _scored(number: int, row: Row, answer: str, metric: Metric) -> Scored:
    return Scored(number, row.line, row.prompt, row.completion, answer, metric.stats(row, answer))


def check_room(tunable: TunableModel, row: Row, prompt: int, answer: int) -> None:
    """Raise `InvalidData` for a row of so many tokens that does not fit the context."""
    if prompt + answer > tunable.max_tokens:
        raise InvalidData(
            f"line {row.line}: {prompt} prompt tokens and {answer} of the answer exceed the context "
            f"of {tunable.max_tokens}"
        )


def choose_options(
    tunable: TunableModel,
    rows: Sequence[Row],
    metric: Metric,
    *,
    prompt_format: str = "",
    done: frozenset[int] = frozenset(),
) -> Iterator[list[Scored]]:
    """The option with the highest mean log-probability per token, a row at a time."""
    for number, row in enumerate(rows):
        if number in done:
            continue
        if len(row.options) < 2 or row.completion not in row.options:
            raise InvalidData(
                f"line {row.line}: multiple-choice needs 'options', two or more, with the completion among them"
            )
        prompt = prompt_ids(row, tunable, prompt_format)
        examples = [Example((*prompt, *tunable.encode(option)), len(prompt)) for option in row.options]
        check_room(tunable, row, len(prompt), max(len(e.token_ids) for e in examples) - len(prompt))
        batch = collate(examples, tunable.eos_token_id).to(tunable.model.device)
        with torch.no_grad():
            logits = logits_at(tunable.model, batch.input_ids, batch.positions)
        logprobs = -functional.cross_entropy(logits, batch.targets, reduction="none")
        means = [logprobs[batch.owners == i].mean().item() for i in range(len(examples))]
        yield [_scored(number, row, row.options[means.index(max(means))], metric)]


def window_losses(
    tunable: TunableModel, windows: Sequence[Example], *, done: frozenset[int] = frozenset()
) -> Iterator[list[Scored]]:
    """Negative log-likelihood and predicted tokens of each window, one at a time."""
    for number, example in enumerate(windows):
        if number in done:
            continue
        batch = collate([example], tunable.eos_token_id).to(tunable.model.device)
        with torch.no_grad():
            logits = logits_at(tunable.model, batch.input_ids, batch.positions)
        loss = functional.cross_entropy(logits, batch.targets, reduction="sum").item()
        yield [Scored(number, 0, "", "", "", (loss, float(len(batch.targets))))]
