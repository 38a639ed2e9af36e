"""Chooses tokens from logits, each row by itself: no neighbour, batch order or preemption changes a choice.

Order of what shapes a row: penalties, min_tokens, temperature, top_k, top_p (of what top_k left), min_p. Random
numbers are counter-based: one uniform number from (seed, position of the token), so recomputing gives it again.
Reported log-probabilities are the model's own, before any of that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items
from hashlib import blake2b
from math import isfinite

import torch
from torch import Tensor

from peqa_kernels.sampling import Draw, draw, row_best
from peqa_runtime.core import Batch, StepResult
from peqa_runtime.engine.logit_rows import LogitRows
from peqa_runtime.engine.token_report import TokenReport

_NOTHING = StepResult()  # of a sequence whose end the step did not reach


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of the token at `position` of a request with `seed` (53 bits, from BLAKE2b)."""
    counter = seed.to_bytes(8, "little", signed=True) + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(counter, digest_size=8).digest(), "little") >> 11) * 2.0**-53


class Sampler:
    """Turns one step's logits into one `StepResult` per scheduled sequence. Holds no state between steps."""

    def __init__(self, eos_token_ids: Items[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(self, batch: Batch, logits: Tensor) -> list[StepResult]:
        """Choose the next token of every sequence that reached its end.

        logits: float32 [rows, vocab] in the order of `logit_positions` over `batch.scheduled`; it may be changed.
        """
        layout = LogitRows(batch)
        if layout.num_rows == 0:
            return [_NOTHING] * len(batch.scheduled)
        assert logits.shape[0] == layout.num_rows, (logits.shape, layout.num_rows)
        report = TokenReport(layout, logits) if layout.reports else None
        self._apply_penalties(layout, logits, report)
        self._apply_min_tokens(layout, logits, report)
        best, choices = row_best(logits)
        self._draw(layout, logits, best, choices)
        finite = [isfinite(value) for value in best]
        if report is not None:
            return report.results(finite, choices)
        return [
            _NOTHING
            if not rows
            else StepResult(choices[rows[0]])
            if finite[rows[0]]
            else StepResult(finite=False)
            for rows in layout.rows
        ]

    def _apply_penalties(self, layout: LogitRows, logits: Tensor, report: TokenReport | None) -> None:
        """repetition_penalty over prompt and output (as in transformers); presence and frequency over the output."""
        rows: list[int] = []
        tokens: list[int] = []
        factors: list[float] = []
        offsets: list[float] = []
        for row, sequence in layout.sampled:
            p = sequence.request.params
            if p.repetition_penalty == 1.0 and not p.presence_penalty and not p.frequency_penalty:
                continue
            generated = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
            seen = set(sequence.token_ids) if p.repetition_penalty != 1.0 else set(generated)
            for token in seen:
                times = generated[token]
                rows.append(row)
                tokens.append(token)
                factors.append(p.repetition_penalty)
                offsets.append(p.frequency_penalty * times + (p.presence_penalty if times else 0.0))
        if rows:
            if report is not None:
                report.keep(rows)
            at = (_index(rows, logits), _index(tokens, logits))
            factor, offset = _floats(factors, logits), _floats(offsets, logits)
            values = logits[at]
            logits[at] = torch.where(values > 0, values / factor, values * factor) - offset

    def _apply_min_tokens(self, layout: LogitRows, logits: Tensor, report: TokenReport | None) -> None:
        """Before min_tokens no token that would end the request can be chosen."""
        rows: list[int] = []
        tokens: list[int] = []
        for row, sequence in layout.sampled:
            params = sequence.request.params
            if sequence.num_generated_tokens < params.min_tokens:
                ends = (
                    params.stop_token_ids
                    if params.ignore_eos
                    else params.stop_token_ids + self._eos_token_ids
                )
                rows += [row] * len(ends)
                tokens += ends
        if rows:
            if report is not None:
                report.keep(rows)
            logits[_index(rows, logits), _index(tokens, logits)] = float("-inf")

    def _draw(self, layout: LogitRows, logits: Tensor, best: list[float], choices: list[int]) -> None:
        """Replace the greedy choice of every row that asks for a random one."""
        draws = []
        for row, sequence in layout.sampled:
            p = sequence.request.params
            if not p.greedy and isfinite(best[row]):
                number = uniform(sequence.seed, sequence.num_tokens)
                draws.append(Draw(row, best[row], number, p.temperature, max(0, p.top_k), p.top_p, p.min_p))
        if draws:
            for chosen, token in zip(draws, draw(logits, draws), strict=True):
                choices[chosen.row] = token


def _index(numbers: list[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)


def _floats(numbers: list[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)
