"""Choosing tokens with torch's operations: on a GPU, and on a CPU without the compiled library.

On a GPU torch adds up a row in an order that hangs on how many rows there are. So there rows are always computed in
parts of one size, the last part filled up with its first row: what a row gives depends on that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peqa_kernels.sampling.draws import Draw, Likeliest

_CANDIDATES = 512
"""Sorting 50 000 probabilities costs milliseconds, taking the best 512 a fraction; nearly always top_p ends there."""

_PART = 32
"""Rows of a part: as many as a decode step mostly has, and few enough that one alone costs little more."""


def row_best_torch(logits: Tensor) -> tuple[list[float], list[int]]:
    """See `peqa_kernels.sampling.row_best`."""
    best, tokens = logits.max(dim=-1)  # NaN wins every maximum
    values, numbers = torch.stack(
        (best.double(), tokens.double())
    ).tolist()  # one look: each waits for the device
    return values, [int(number) for number in numbers]


def draw_torch(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """See `peqa_kernels.sampling.draw`."""
    chosen = [0] * len(draws)
    for narrows, draw in ((False, _draw_plain), (True, _draw_narrowed)):
        some = [i for i, d in enumerate(draws) if d.narrows is narrows]
        for part in _parts(some, logits):
            group = [draws[i] for i in part]
            temperature = _floats([d.temperature for d in group], logits)
            rows = logits[_index([d.row for d in group], logits)]
            probs = torch.softmax(rows / temperature[:, None], dim=-1)
            for i, token in zip(part, draw(probs, group), strict=True):
                chosen[i] = token  # what fills a part up gives its first row's token again
    return chosen


def likeliest_torch(logits: Tensor, rows: Sequence[int], top: int) -> Likeliest:
    """See `peqa_kernels.sampling.likeliest`."""
    parts = [_likeliest(logits, part, top) for part in _parts(rows, logits) or [[]]]
    return Likeliest(*(torch.cat(tensors)[: len(rows)] for tensors in zip(*parts, strict=True)))


def _likeliest(logits: Tensor, rows: list[int], top: int) -> Likeliest:
    """`likeliest` of one part."""
    some = logits[_index(rows, logits)]
    best = some.amax(dim=-1)
    sums = (some - best[:, None]).exp_().sum(dim=-1, dtype=torch.float64)
    if top == 0:
        return Likeliest(some.new_empty((len(rows), 0), dtype=torch.int64), some[:, :0], best, sums)
    values, tokens = some.topk(top, dim=-1)
    return Likeliest(tokens, values, best, sums)


def _draw(weights: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Invert the cumulative distribution of `weights` (float64 [S, C], not normalised): int64 index [S, 1].

    The index is the first whose cumulative weight exceeds u * total, so one of weight 0 is never drawn. float64,
    because a float32 running sum over a large vocabulary loses the tail.
    """
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    uniforms = _floats([d.uniform for d in draws], weights)[:, None]
    target = torch.minimum(uniforms * total, total * (1 - 2.0**-53))
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[-1] - 1)


def _draw_plain(probs: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Draw from whole rows of probabilities [S, vocab]."""
    tokens: list[int] = _draw(probs.double(), draws)[:, 0].tolist()
    return tokens


def _draw_narrowed(probs: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Draw from rows [S, vocab] narrowed by top_k, top_p and min_p.

    Works on the most likely candidates; a row for which they may not be enough is sorted whole. Which of the two
    happens depends on that row alone.
    """
    values, tokens = probs.topk(min(_CANDIDATES, probs.shape[-1]), dim=-1)
    found = _narrow_and_draw(values, tokens, draws)
    facts = (values.double().sum(dim=-1), (values[:, -1] / values[:, 0]).double(), found.double())
    mass, least, numbers = torch.stack(facts).tolist()  # together: each look waits for the device
    drawn = [int(number) for number in numbers]
    for i, draw in enumerate(draws):
        if _enough(draw, values.shape[-1], mass[i], least[i]):
            continue
        if i > 0 and draw is draws[0]:
            drawn[i] = drawn[0]  # it fills the part up
        else:
            ordered = probs[i : i + 1].sort(dim=-1, descending=True, stable=True)
            drawn[i] = int(_narrow_and_draw(ordered.values, ordered.indices, [draw]))
    return drawn


def _enough(draw: Draw, candidates: int, mass: float, least: float) -> bool:
    """Do the best `candidates` tokens hold everything that the filters keep?

    `mass`: their probability together; `least`: the last one's relative to the first one's. Margins keep clear of
    rounding.
    """
    top_p = draw.top_p < 1.0 and mass > draw.top_p + 1e-4
    return 0 < draw.top_k <= candidates or top_p or least < draw.min_p * 0.999


def _narrow_and_draw(values: Tensor, tokens: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Filter candidates sorted by falling probability ([S, C]) and draw one token in each row, int64 [S]."""
    weights = values.double()
    width = weights.shape[-1]
    top_k = _floats([float(d.top_k) if d.top_k > 0 else math.inf for d in draws], weights)[:, None]
    top_p = _floats([d.top_p if d.top_p < 1.0 else math.inf for d in draws], weights)[:, None]
    min_p = _floats([d.min_p for d in draws], weights)[:, None]
    weights = weights * (torch.arange(width, device=weights.device) < top_k)
    # Without top_k the total is the whole vocabulary's, which is 1, whether or not all of it is here.
    total = torch.where(torch.isinf(top_k), torch.ones_like(top_k), weights.sum(dim=-1, keepdim=True))
    before = weights.cumsum(dim=-1) - weights
    keep = (before < top_p * total) & (weights >= min_p * weights[:, :1])
    return tokens.gather(1, _draw(weights * keep, draws))[:, 0]


def _parts(rows: Sequence[int], like: Tensor) -> list[list[int]]:
    """The rows in parts of one size, the last one filled up with its first row."""
    size = _part_size(len(rows), like)
    parts = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [part + part[:1] * (size - len(part)) for part in parts]


def _part_size(rows: int, like: Tensor) -> int:
    """Rows of one part: always the same on a GPU, all of them on a CPU."""
    return _PART if like.is_cuda else max(1, rows)


def _index(numbers: list[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=like.device)


def _floats(numbers: list[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)
