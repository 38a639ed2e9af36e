"""How good a scale set is: perplexity, exact match of greedy answers, and per-token log-probabilities, all in fp32."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from peqa_runtime.errors import InvalidData
from peqa_runtime.training.batches import collate
from peqa_runtime.training.data import Example, encode_rows, encode_text
from peqa_runtime.training.rows import Row
from peqa_runtime.training.tuning import TunableModel, apply_scale_set, load_tunable, logits_at

Progress = Callable[[int, int], None]
"""Called with (done, all)."""


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over `tokens` predicted tokens in `windows` windows."""

    perplexity: float
    tokens: int
    windows: int


@dataclass(frozen=True)
class Prediction:
    """One row's greedy answer."""

    line: int
    prompt: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        """Equal but for white space around it."""
        return self.answer.strip() == self.expected.strip()


@dataclass(frozen=True)
class ExactMatch:
    """Share of rows whose greedy answer is the reference, character for character."""

    predictions: tuple[Prediction, ...]

    @property
    def correct(self) -> int:
        """Rows answered exactly."""
        return sum(p.correct for p in self.predictions)

    @property
    def percent(self) -> float:
        """Exact matches in percent."""
        return 100.0 * self.correct / len(self.predictions)


def perplexity(
    tunable: TunableModel,
    text: str,
    *,
    context: int = 1024,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of `text`: encoded as a whole without special tokens, cut into non-overlapping windows of
    `context` tokens, every token but a window's first predicted from the window's tokens before it.

    `limit`: only the first windows. This is the usual way to measure wikitext-2; a sliding window gives lower values.
    """
    if not 2 <= context <= tunable.max_tokens:
        raise InvalidData(
            f"the context must be between 2 and the model's {tunable.max_tokens}, got {context}"
        )
    windows = encode_text(text, tunable.encode, window=context).examples[:limit]
    total, count = 0.0, 0
    with torch.no_grad():
        for done, example in enumerate(windows, start=1):
            batch = collate([example], tunable.eos_token_id).to(tunable.model.device)
            logits = logits_at(tunable.model, batch.input_ids, batch.positions)
            total += functional.cross_entropy(logits, batch.targets, reduction="sum").item()
            count += len(batch.targets)
            if progress:
                progress(done, len(windows))
    return Perplexity(math.exp(total / count), count, len(windows))


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


def exact_match(
    tunable: TunableModel,
    rows: Sequence[Row],
    *,
    prompt_format: str = "",
    batch_rows: int = 25,
    progress: Progress | None = None,
) -> ExactMatch:
    """Greedy answers to `rows`, compared with their completions.

    A row is answered until end-of-sequence, or until it is longer than the longest reference of its batch and
    so cannot match any more.
    """
    ordered = sorted(rows, key=lambda row: len(row.prompt))
    predictions: list[Prediction] = []
    for start in range(0, len(ordered), batch_rows):
        part = ordered[start : start + batch_rows]
        prompts = [tunable.prompt_ids(row, prompt_format) for row in part]
        longest = max(len(tunable.encode(row.completion)) for row in part)
        answers = greedy(tunable, prompts, max_new_tokens=longest + 8)
        predictions += [
            Prediction(row.line, row.prompt, row.completion, answer)
            for row, answer in zip(part, answers, strict=True)
        ]
        if progress:
            progress(len(predictions), len(ordered))
    return ExactMatch(tuple(sorted(predictions, key=lambda p: p.line)))


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


@dataclass(frozen=True)
class RowLogprobs:
    """Tokens of prompt, completion and end-of-sequence; log-probabilities of the last `len(logprobs)` of them."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def completion_logprobs(
    base: Path,
    scale_set: Path | None,
    rows: Sequence[Mapping[str, str]],
    *,
    device: str = "cpu",
) -> list[RowLogprobs]:
    """Log-probabilities of each row's completion tokens and its end under a saved set, in fp32, as training sees them.

    `rows` hold "prompt" and "completion"; the set's prompt format is applied. None is the base. Raises as
    `load_tunable` and `ScaleSet.parse` do.
    """
    tunable = load_tunable(base, device=device)
    prompt_format = apply_scale_set(tunable, scale_set).prompt_format if scale_set else ""
    data = encode_rows(
        [Row(row["prompt"], row["completion"], line) for line, row in enumerate(rows, start=1)],
        tunable.encode,
        tunable.eos_token_id,
        encode_prompt=tunable.encode_prompt,
        encode_chat=tunable.encode_chat,
        prompt_format=prompt_format,
        max_tokens=tunable.max_tokens,
        too_long="fail",
    )
    found = token_logprobs(tunable, [example.token_ids for example in data.examples])
    return [
        RowLogprobs(example.token_ids, tuple(logprobs[example.loss_from - 1 :]))
        for example, logprobs in zip(data.examples, found, strict=True)
    ]


def token_logprobs(tunable: TunableModel, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """log p(token | tokens before it) for every token but the first of each sequence of token ids, in fp32.

    One sequence at a time, the whole prompt in one forward: the reference that a server is compared with.
    """
    result: list[list[float]] = []
    with torch.no_grad():
        for sequence in sequences:
            if len(sequence) < 2:
                raise InvalidData("a sequence needs at least two tokens")
            batch = collate([Example(tuple(sequence), 1)], tunable.eos_token_id).to(tunable.model.device)
            logprobs = logits_at(tunable.model, batch.input_ids, batch.positions).log_softmax(-1)
            result.append(logprobs.gather(1, batch.targets[:, None])[:, 0].tolist())
    return result
