"""Log-probabilities of tokens under a saved set, in fp32: what a server's answers are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from peqa_runtime.errors import InvalidData
from peqa_runtime.training.batches import collate
from peqa_runtime.training.data import Example, encode_rows
from peqa_runtime.training.rows import Row
from peqa_runtime.training.tuning import TunableModel, apply_scale_set, load_tunable, logits_at


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
        tunable,
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
