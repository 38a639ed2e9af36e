"""Log-probabilities of prompt and sampled tokens: of the model's own logits, before they are reshaped to choose."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from peqa_kernels.sampling import likeliest
from peqa_runtime.core import TokenLogprobs
from peqa_runtime.engine.batch import StepResult
from peqa_runtime.engine.logit_rows import LogitRows


class TokenReport:
    """The rows of one step whose request wants log-probabilities; made before penalties touch the logits."""

    def __init__(self, layout: LogitRows, logits: Tensor) -> None:
        self._layout = layout
        self._logits = logits
        self._untouched: dict[int, Tensor] = {}
        rows: list[int] = []
        width = 0
        for item, prompt, chosen in zip(layout.items, layout.prompt, layout.chosen, strict=True):
            params = item.sequence.request.params
            if prompt:
                rows += prompt
                width = max(width, params.prompt_logprobs or 0)
            if params.logprobs is not None and chosen is not None:
                rows.append(chosen)
                width = max(width, params.logprobs)
        self._place = {row: i for i, row in enumerate(rows)}
        found = likeliest(logits, rows, min(width, logits.shape[-1]))
        self._tokens: list[list[int]] = found.tokens.tolist()
        self._values: list[list[float]] = found.logits.tolist()
        # Both subtractions in float64: a token's value is the same float as its entry among the likeliest.
        self._shift = [
            (best, math.log(total) if total > 0 else 0.0)
            for best, total in zip(found.best.tolist(), found.sums.tolist(), strict=True)
        ]

    def keep(self, rows: Iterable[int]) -> None:
        """Remember what these rows hold, as they are about to be changed."""
        for row in rows:
            if row in self._place and row not in self._untouched:
                self._untouched[row] = self._logits[row].clone()

    def results(self, finite: list[bool], choices: list[int]) -> list[StepResult]:
        """One result per scheduled sequence, of the token chosen for each row."""
        layout = self._layout
        wanted: list[tuple[int, int]] = []  # (row, token) in the order in which they are read below
        for item, prompt, chosen in zip(layout.items, layout.prompt, layout.chosen, strict=True):
            start = item.prompt_logprob_positions.start + 1
            wanted += [(row, item.sequence.token_ids[start + i]) for i, row in enumerate(prompt)]
            params = item.sequence.request.params
            if params.logprobs is not None and chosen is not None:
                wanted.append((chosen, choices[chosen]))
                wanted += [(chosen, token) for token in params.logprob_token_ids]
        entries = iter(zip(wanted, self._logits_of(wanted), strict=True))

        def entry(width: int) -> TokenLogprobs:
            (row, token), logit = next(entries)
            return self._entry(row, token, logit, width)

        def asked() -> tuple[int, float]:
            (row, token), logit = next(entries)
            return token, self._value(row, logit)

        results = []
        for item, prompt, rows, chosen in zip(
            layout.items, layout.prompt, layout.rows, layout.chosen, strict=True
        ):
            params = item.sequence.request.params
            prompt_logprobs = self._ranked(prompt, [entry(params.prompt_logprobs or 0) for _ in prompt])
            wanted_width = None if chosen is None else params.logprobs
            logprobs = None if wanted_width is None else entry(wanted_width)
            if logprobs is not None and params.logprob_token_ids:
                logprobs = replace(logprobs, asked=tuple(asked() for _ in params.logprob_token_ids))
            if not all(finite[row] for row in rows):
                results.append(StepResult(finite=False))
            else:
                token = None if chosen is None else choices[chosen]
                results.append(StepResult(token, logprobs, prompt_logprobs))
        return results

    def _logits_of(self, wanted: list[tuple[int, int]]) -> list[float]:
        """The model's own logit of each (row, token)."""
        at = torch.tensor(wanted, dtype=torch.int64, device=self._logits.device)
        values: list[float] = self._logits[at[:, 0], at[:, 1]].tolist()
        for i, (row, token) in enumerate(wanted):
            if row in self._untouched:
                values[i] = float(self._untouched[row][token])
        return values

    def _ranked(self, rows: range, entries: list[TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
        """The entries of a prompt's tokens with their ranks, which takes a pass over each row of logits [vocab]."""
        if not rows:
            return ()
        tokens = torch.tensor([entry.token_id for entry in entries], device=self._logits.device)
        logits = self._logits[rows.start : rows.stop]
        own = logits.gather(1, tokens[:, None])
        likelier: Iterable[int]
        if logits.device.type == "cpu":  # torch counts more slowly there
            pairs = zip(logits.numpy(), own.numpy(), strict=True)
            likelier = (int(np.count_nonzero(row > value)) for row, value in pairs)
        else:
            likelier = torch.count_nonzero(logits > own, dim=-1).tolist()
        return tuple(replace(e, rank=1 + count) for e, count in zip(entries, likelier, strict=True))

    def _value(self, row: int, logit: float) -> float:
        """The log-probability of a logit of this row, by one and the same sum for every token."""
        best, log_sum = self._shift[self._place[row]]
        return (logit - best) - log_sum

    def _entry(self, row: int, token: int, logit: float, width: int) -> TokenLogprobs:
        """One token's report with its `width` best alternatives; ties stand in the order of token ids."""
        place = self._place[row]
        value = self._value(row, logit)
        pairs = zip(self._tokens[place][:width], self._values[place][:width], strict=True)
        top = sorted(
            ((other, self._value(row, theirs)) for other, theirs in pairs),
            key=lambda pair: (-pair[1], pair[0]),
        )
        if top and top[-1][1] == value and all(token != other for other, _ in top):
            top[-1] = (token, value)  # the chosen token is as likely as the last one listed: name the chosen
        return TokenLogprobs(token, value, tuple(top))
