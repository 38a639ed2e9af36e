"""Chooses tokens from logits, each row by itself: no neighbour, batch order or preemption changes a choice.

Order of what shapes a row: logit_bias, penalties, allowed_token_ids, bad_words, min_tokens, the form of the answer,
temperature, top_k, top_p (of what top_k left), min_p. Random numbers are counter-based: one uniform number from (seed,
position of the token), so recomputing gives it again. Reported log-probabilities are the model's own, before any of
that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import replace
from hashlib import blake2b
from math import inf, isfinite
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from peqa_kernels.sampling import Draw, draw, row_best
from peqa_runtime.engine.batch import Batch, StepResult
from peqa_runtime.engine.forms import FormStep
from peqa_runtime.engine.guidance import Guidance
from peqa_runtime.engine.logit_rows import LogitRows
from peqa_runtime.engine.sequence import Sequence
from peqa_runtime.engine.token_masks import TokenMasks
from peqa_runtime.engine.token_report import TokenReport
from peqa_runtime.engine.token_rules import NOTHING_LEFT, RuleBook, RuledRow

_NOTHING = StepResult()  # of a sequence that gets no token in this step


def uniform(seed: int, position: int, attempt: int = 0) -> float:
    """The random number in [0, 1) of the token at `position` of a request with `seed` (53 bits, from BLAKE2b).

    `attempt`: how often a choice of this token was refused before.
    """
    counter = seed.to_bytes(8, "little", signed=True) + position.to_bytes(8, "little") + bytes(attempt)
    return (int.from_bytes(blake2b(counter, digest_size=8).digest(), "little") >> 11) * 2.0**-53


class Sampler:
    """Turns one step's logits into one `StepResult` per scheduled sequence.

    Between steps it keeps what follows from a sequence's request and tokens alone: where it stands in its form, and
    which tokens would end it.
    """

    def __init__(self, eos_token_ids: Items[int], guidance: Guidance | None = None) -> None:
        """`guidance`: of the base, for requests that ask for a form."""
        self._eos_token_ids = tuple(eos_token_ids)
        self._rules = RuleBook(guidance)
        self._masks = TokenMasks()
        self._ends: WeakKeyDictionary[Sequence, Tensor] = WeakKeyDictionary()

    def sample(self, batch: Batch, logits: Tensor) -> list[StepResult]:
        """Choose the next token of every sequence that reached its end.

        logits: float32 [rows, vocab] in the order of `logit_positions` over `batch.scheduled`; it may be changed.
        """
        layout = LogitRows(batch)
        assert logits.shape[0] == layout.num_rows, (logits.shape, layout.num_rows)
        report = TokenReport(layout, logits) if layout.reports else None
        ruled = self._rules.rows(layout, logits) if layout.ruled else []
        self._apply_biases(ruled, logits, report)
        self._apply_penalties(layout, logits, report)
        for item in ruled:
            item.rules.forbid(logits, item.row)
        self._apply_min_tokens(layout, logits, report)
        if ruled:
            return self._choose_by_rules(layout, logits, report, ruled)
        best, choices = row_best(logits)
        self._draw(layout.sampled, logits, best, choices)
        return _results(layout, report, best, choices)

    def _choose_by_rules(
        self, layout: LogitRows, logits: Tensor, report: TokenReport | None, ruled: list[RuledRow]
    ) -> list[StepResult]:
        """The step's results where some rows have rules."""

        def keep(rows: Iterable[int]) -> None:
            if report is not None:
                report.keep(rows)

        forms = FormStep(ruled, self._masks)
        forms.mask(forms.narrowing(), logits, keep)
        best, choices = row_best(logits)
        self._draw(layout.sampled, logits, best, choices)
        refused = forms.refused(best, choices)
        forms.mask(refused, logits, keep)
        for item in refused:
            row = item.row
            best[row : row + 1], choices[row : row + 1] = row_best(logits[row : row + 1])
        self._draw([(item.row, item.sequence) for item in refused], logits, best, choices, attempt=1)
        forms.take(best, choices)
        results = _results(layout, report, best, choices)
        for item in ruled:
            refusal = forms.refusals.get(item.row, NOTHING_LEFT if best[item.row] == -inf else None)
            if refusal is not None:
                results[item.place] = StepResult(refusal=refusal)
            elif item.row in forms.forms:
                results[item.place] = replace(results[item.place], form=forms.forms[item.row])
        return results

    def _apply_biases(self, ruled: list[RuledRow], logits: Tensor, report: TokenReport | None) -> None:
        """logit_bias; also remembers the rows that rules are about to change."""
        if report is not None:
            report.keep(item.row for item in ruled)
        for item in ruled:
            item.rules.bias(logits, item.row)

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
        held = [
            (row, sequence)
            for row, sequence in layout.sampled
            if sequence.num_generated_tokens < sequence.request.params.min_tokens
        ]
        if not held:
            return
        if report is not None:
            report.keep(row for row, _ in held)
        ends = [self._ends_of(sequence, logits) for _, sequence in held]
        rows = _index([row for row, _ in held], logits)
        counts, tokens = _index([len(ids) for ids in ends], logits), torch.cat(ends)
        logits[rows.repeat_interleave(counts, output_size=len(tokens)), tokens] = -inf

    def _ends_of(self, sequence: Sequence, logits: Tensor) -> Tensor:
        """Ids [n] of the tokens that would end the sequence, on the device of its logits."""
        ends = self._ends.get(sequence)
        if ends is None:
            params = sequence.request.params
            ids = params.stop_token_ids if params.ignore_eos else params.stop_token_ids + self._eos_token_ids
            ends = self._ends[sequence] = _index(list(ids), logits)
        return ends

    def _draw(
        self,
        rows: Items[tuple[int, Sequence]],
        logits: Tensor,
        best: list[float],
        choices: list[int],
        *,
        attempt: int = 0,
    ) -> None:
        """Replace the greedy choice of every row that asks for a random one."""
        draws = []
        for row, sequence in rows:
            p = sequence.request.params
            if not p.greedy and isfinite(best[row]):
                number = uniform(sequence.seed, sequence.num_tokens, attempt)
                top_k = p.top_k if 0 < p.top_k < logits.shape[-1] else 0  # 0: of all tokens
                draws.append(Draw(row, best[row], number, p.temperature, top_k, p.top_p, p.min_p))
        if draws:
            for chosen, token in zip(draws, draw(logits, draws), strict=True):
                choices[chosen.row] = token


def _results(
    layout: LogitRows, report: TokenReport | None, best: list[float], choices: list[int]
) -> list[StepResult]:
    """What was chosen, in the order of the batch. `best`: each row's highest logit, finite where all is well."""
    finite = [isfinite(value) for value in best]
    if report is not None:
        return report.results(finite, choices)
    return [
        StepResult(finite=False)
        if not all(finite[row] for row in rows)
        else _NOTHING
        if chosen is None
        else StepResult(choices[chosen])
        for rows, chosen in zip(layout.rows, layout.chosen, strict=True)
    ]


def _index(numbers: list[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)


def _floats(numbers: list[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)
