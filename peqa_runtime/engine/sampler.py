"""Chooses tokens from logits, each row by itself: no neighbour, batch order or preemption changes a choice.

Order of what shapes a row: penalties, min_tokens, temperature, top_k, top_p (of what top_k left), min_p. Random
numbers are counter-based: one uniform number from (seed, position of the token), so recomputing gives it again.
Reported log-probabilities are the model's own, before any of that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Items
from hashlib import blake2b

import torch
from torch import Tensor

from peqa_runtime.core import Batch, ScheduledSequence, Sequence, StepResult, TokenLogprobs

_CANDIDATES = 512
"""Sorting 50 000 probabilities costs milliseconds, taking the best 512 a fraction; nearly always top_p ends there."""


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
        layout = _Layout(batch)
        if layout.num_rows == 0:
            return [StepResult() for _ in batch.scheduled]
        assert logits.shape[0] == layout.num_rows, (logits.shape, layout.num_rows)
        logprobs = _reported(layout, logits)
        self._apply_penalties(layout, logits)
        self._apply_min_tokens(layout, logits)
        # NaN wins every maximum, so the maxima of all rows also tell which rows are fit to use.
        best, tokens = logits.max(dim=-1)
        finite = best.isfinite().tolist()
        choices: list[int] = tokens.tolist()
        self._sample_random(layout, logits, finite, choices)
        return _results(layout, finite, choices, logprobs)

    def _apply_penalties(self, layout: _Layout, logits: Tensor) -> None:
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
            at = (_index(rows, logits), _index(tokens, logits))
            factor, offset = _floats(factors, logits), _floats(offsets, logits)
            values = logits[at]
            logits[at] = torch.where(values > 0, values / factor, values * factor) - offset

    def _apply_min_tokens(self, layout: _Layout, logits: Tensor) -> None:
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
            logits[_index(rows, logits), _index(tokens, logits)] = float("-inf")

    def _sample_random(self, layout: _Layout, logits: Tensor, finite: list[bool], choices: list[int]) -> None:
        """Replace the greedy choice of every row that asks for a random one."""
        drawn = [(row, s) for row, s in layout.sampled if not s.request.params.greedy and finite[row]]
        plain = [(row, s) for row, s in drawn if not _filtered(s)]
        filtered = [(row, s) for row, s in drawn if _filtered(s)]
        for group, draw in ((plain, _draw_plain), (filtered, _draw_filtered)):
            if group:
                rows = [row for row, _ in group]
                temperature = _floats([s.request.params.temperature for _, s in group], logits)
                probs = torch.softmax(logits[_index(rows, logits)] / temperature[:, None], dim=-1)
                sequences = [s for _, s in group]
                for row, token in zip(rows, draw(probs, sequences), strict=True):
                    choices[row] = token


def logit_positions(item: ScheduledSequence) -> range:
    """Positions of the sequence whose logits the step needs: for prompt log-probabilities, and to sample."""
    positions = item.prompt_logprob_positions
    end = item.start + item.num_tokens
    if not (item.samples and item.sequence.request.params.max_tokens > 0):
        return positions
    return range(positions.start, end) if positions else range(end - 1, end)


class _Layout:
    """Which row of the logits belongs to whom. Rows of one sequence are adjacent, the sampled one last."""

    def __init__(self, batch: Batch) -> None:
        self.items = batch.scheduled
        self.rows: list[range] = []
        self.sampled: list[tuple[int, Sequence]] = []
        self.prompt: list[range] = []
        row = 0
        for item in batch.scheduled:
            prompt, all_rows = len(item.prompt_logprob_positions), len(logit_positions(item))
            self.rows.append(range(row, row + all_rows))
            self.prompt.append(range(row, row + prompt))
            if all_rows > prompt:
                self.sampled.append((row + prompt, item.sequence))
            row += all_rows
        self.num_rows = row


class _Reported:
    """Log-probabilities of the rows whose request wants them; made before the logits are reshaped."""

    def __init__(self, rows: list[int], width: int, logprobs: Tensor) -> None:
        self.place = {row: i for i, row in enumerate(rows)}
        self.logprobs = logprobs  # [len(rows), vocab]
        values, tokens = logprobs.topk(min(width, logprobs.shape[-1]), dim=-1) if width else (None, None)
        self.top_values: list[list[float]] = values.tolist() if values is not None else [[]] * len(rows)
        self.top_tokens: list[list[int]] = tokens.tolist() if tokens is not None else [[]] * len(rows)

    def chosen(self, rows: list[int], tokens: list[int]) -> list[float]:
        """Log-probability of one token in each of `rows`."""
        places = _index([self.place[row] for row in rows], self.logprobs)
        values: list[float] = self.logprobs[places, _index(tokens, self.logprobs)].tolist()
        return values

    def entry(self, row: int, token: int, value: float, width: int) -> TokenLogprobs:
        """One token's report with its `width` best alternatives; ties stand in the order of token ids."""
        place = self.place[row]
        top = sorted(
            zip(self.top_tokens[place][:width], self.top_values[place][:width], strict=True),
            key=lambda pair: (-pair[1], pair[0]),
        )
        if top and top[-1][1] == value and all(token != other for other, _ in top):
            top[-1] = (token, value)  # the chosen token is as likely as the last one listed: name the chosen
        return TokenLogprobs(token, value, tuple(top))


def _reported(layout: _Layout, logits: Tensor) -> _Reported | None:
    """Log-softmax and best alternatives of every row that must be reported; None when there is none."""
    rows: list[int] = []
    width = 0
    for item, prompt, all_rows in zip(layout.items, layout.prompt, layout.rows, strict=True):
        params = item.sequence.request.params
        if prompt:
            rows += prompt
            width = max(width, params.prompt_logprobs or 0)
        if params.logprobs is not None and len(all_rows) > len(prompt):
            rows.append(all_rows[-1])
            width = max(width, params.logprobs)
    if not rows:
        return None
    chosen = logits if len(rows) == layout.num_rows else logits[_index(rows, logits)]
    return _Reported(rows, width, torch.log_softmax(chosen, dim=-1))


def _results(
    layout: _Layout, finite: list[bool], choices: list[int], reported: _Reported | None
) -> list[StepResult]:
    """Assemble one result per scheduled sequence."""
    wanted: list[tuple[int, int]] = []  # (row, token) in the order in which they are read below
    for item, prompt, rows in zip(layout.items, layout.prompt, layout.rows, strict=True):
        start = item.prompt_logprob_positions.start + 1
        wanted += [(row, item.sequence.token_ids[start + i]) for i, row in enumerate(prompt)]
        if item.sequence.request.params.logprobs is not None and len(rows) > len(prompt):
            wanted.append((rows[-1], choices[rows[-1]]))
    values = iter(reported.chosen([r for r, _ in wanted], [t for _, t in wanted]) if reported else [])
    entries = iter(wanted)

    results = []
    for item, prompt, rows in zip(layout.items, layout.prompt, layout.rows, strict=True):
        params = item.sequence.request.params

        def entry(width: int) -> TokenLogprobs:
            assert reported is not None
            row, token = next(entries)
            return reported.entry(row, token, next(values), width)

        prompt_logprobs = tuple(entry(params.prompt_logprobs or 0) for _ in prompt)
        sampled = len(rows) > len(prompt)
        logprobs = entry(params.logprobs) if sampled and params.logprobs is not None else None
        if not all(finite[row] for row in rows):
            results.append(StepResult(finite=False))
        else:
            results.append(StepResult(choices[rows[-1]] if sampled else None, logprobs, prompt_logprobs))
    return results


def _filtered(sequence: Sequence) -> bool:
    p = sequence.request.params
    return p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0


def _uniforms(sequences: list[Sequence], like: Tensor) -> Tensor:
    """float64 [sequences, 1]: each one's random number for its next token."""
    numbers = [uniform(s.seed, s.num_tokens) for s in sequences]
    return torch.tensor(numbers, dtype=torch.float64, device=like.device)[:, None]


def _draw(weights: Tensor, sequences: list[Sequence]) -> Tensor:
    """Invert the cumulative distribution of `weights` (float64 [S, C], not normalised): int64 index [S, 1].

    The index is the first whose cumulative weight exceeds u * total, so one of weight 0 is never drawn. float64,
    because a float32 running sum over a large vocabulary loses the tail.
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.minimum(_uniforms(sequences, weights) * total, total * (1 - 2.0**-53))
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[-1] - 1)


def _draw_plain(probs: Tensor, sequences: list[Sequence]) -> list[int]:
    """Draw from whole rows of probabilities [S, vocab]."""
    tokens: list[int] = _draw(probs.double(), sequences)[:, 0].tolist()
    return tokens


def _draw_filtered(probs: Tensor, sequences: list[Sequence]) -> list[int]:
    """Draw from rows [S, vocab] narrowed by top_k, top_p and min_p.

    Works on the most likely candidates; a row for which they may not be enough is sorted whole. Which of the two
    happens depends on that row alone.
    """
    values, tokens = probs.topk(min(_CANDIDATES, probs.shape[-1]), dim=-1)
    mass: list[float] = values.double().sum(dim=-1).tolist()
    least: list[float] = (values[:, -1] / values[:, 0]).tolist()
    enough = [_enough(s, values.shape[-1], mass[i], least[i]) for i, s in enumerate(sequences)]
    short = [i for i, is_enough in enumerate(enough) if is_enough]
    drawn = dict(zip(short, _narrow_and_draw(values, tokens, sequences, short), strict=True)) if short else {}
    for i, sequence in enumerate(sequences):
        if i not in drawn:
            ordered = probs[i : i + 1].sort(dim=-1, descending=True, stable=True)
            drawn[i] = _narrow_and_draw(ordered.values, ordered.indices, [sequence], [0])[0]
    return [drawn[i] for i in range(len(sequences))]


def _enough(sequence: Sequence, candidates: int, mass: float, least: float) -> bool:
    """Do the best `candidates` tokens hold everything that the filters keep?

    `mass`: their probability together; `least`: the last one's relative to the first one's. Margins keep clear of
    rounding.
    """
    p = sequence.request.params
    return 0 < p.top_k <= candidates or (p.top_p < 1.0 and mass > p.top_p + 1e-4) or least < p.min_p * 0.999


def _narrow_and_draw(values: Tensor, tokens: Tensor, sequences: list[Sequence], rows: list[int]) -> list[int]:
    """Filter candidates sorted by falling probability ([S, C]) and draw one token in each of `rows`."""
    some = [sequences[i] for i in rows]
    index = _index(rows, values)
    weights, tokens = values[index].double(), tokens[index]
    width = weights.shape[-1]
    params = [s.request.params for s in some]
    top_k = _floats([float(p.top_k) if p.top_k > 0 else math.inf for p in params], weights)[:, None]
    top_p = _floats([p.top_p if p.top_p < 1.0 else math.inf for p in params], weights)[:, None]
    min_p = _floats([p.min_p for p in params], weights)[:, None]
    weights = weights * (torch.arange(width, device=weights.device) < top_k)
    # Without top_k the total is the whole vocabulary's, which is 1, whether or not all of it is here.
    total = torch.where(torch.isinf(top_k), torch.ones_like(top_k), weights.sum(dim=-1, keepdim=True))
    before = weights.cumsum(dim=-1) - weights
    keep = (before < top_p * total) & (weights >= min_p * weights[:, :1])
    drawn = tokens.gather(1, _draw(weights * keep, some))[:, 0].tolist()
    return list(drawn)


def _index(numbers: list[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)


def _floats(numbers: list[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)
