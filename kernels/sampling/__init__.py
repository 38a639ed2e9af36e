"""Choosing tokens from rows of logits, each row by itself: what a row gives depends on that row alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peqa_kernels.sampling.draws import Draw, Likeliest
from peqa_kernels.sampling.native_path import NativeSampling, native_sampling
from peqa_kernels.sampling.torch_path import draw_torch, likeliest_torch, row_best_torch

__all__ = ["Draw", "Likeliest", "draw", "likeliest", "row_best"]


def row_best(logits: Tensor) -> tuple[list[float], list[int]]:
    """Each row's highest logit and its token, of float32 logits [rows, vocab]: the first token where several are.

    A row that holds NaN has NaN for its highest logit, so these also tell which rows are fit to draw from.
    """
    native = _native(logits)
    return row_best_torch(logits) if native is None else native.row_best(logits)


def draw(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token for each draw, with probability softmax(logits / temperature) among those that are kept.

    Kept are the `top_k` likeliest, of these the likeliest that together reach `top_p`, of these those that have at
    least `min_p` of the best one's probability. The same uniform number gives the same token. `logits`: float32
    [rows, vocab]; rows that are drawn from hold neither NaN nor plus infinity.
    """
    native = _native(logits)
    return draw_torch(logits, draws) if native is None else native.draw(logits, draws)


def likeliest(logits: Tensor, rows: Sequence[int], top: int) -> Likeliest:
    """The `top` most likely tokens of each of `rows` of float32 logits [rows, vocab]; `top` may be 0."""
    native = _native(logits)
    return likeliest_torch(logits, rows, top) if native is None else native.likeliest(logits, rows, top)


def _native(logits: Tensor) -> NativeSampling | None:
    usable = logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.stride(1) == 1
    return native_sampling() if usable else None
