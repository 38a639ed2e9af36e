"""Rounding to nearest, in a range that is fitted per group: the start of every quantizer.

A group of weights w becomes codes q = clamp(round(w / scale + zero), 0, 2^bits - 1); what counts is the squared error
of scale * (q - zero), each weight by its importance where one is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peqa_kernels.packing import pack_codes
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.model.base_checkpoint import Precision

# Parts of the min-max range that are tried, widest first. Measured on normal weights: the best range at 2 bits and one
# group per row is near 0.5 of min-max, at 4 bits and groups of 32 near 0.95.
_SHRINK = tuple(1.0 - 0.04 * i for i in range(18))
_REFINE = 6  # least-squares rounds after the search; each can only lower the error
_CHUNK = 1 << 19  # elements at a time: 2 MB of fp32, the second-level cache


def quantize_rtn(
    weight: Tensor, bits: int, group_size: int, *, integer_zeros: bool = False
) -> QuantizedWeight:
    """Codes of a float matrix [N, K]: asymmetric, each group's range fitted to least squares.

    `group_size` inputs share a scale and a zero (-1: the whole row) and must divide K. Zeros are fractions unless
    `integer_zeros`, which keeps them whole and within the codes. With fractions a group of equal values m becomes
    codes 0, scale |m|, zero -sign(m) (scale 1, zero 0 for m = 0). Raises ValueError when the weight is not finite.
    """
    rows, columns = weight.shape
    groups = Precision(bits, group_size).groups(columns)
    step = max(1, _CHUNK // columns)
    parts = [
        fit(chunk.float().view(-1, groups, columns // groups), bits, integer_zeros=integer_zeros)
        for chunk in weight.split(step)
    ]
    codes, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return QuantizedWeight(pack_codes(codes.view(rows, columns), bits), scales, zeros, bits, columns)


def fit(
    weight: Tensor,  # [n, G, k]
    bits: int,
    importance: Tensor | None = None,  # [G, k], not negative
    *,
    integer_zeros: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The range with the least error of each group: codes uint8 [n, G, k], scales [n, G], zeros [n, G].

    Raises ValueError when the weight is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinity")
    top = (1 << bits) - 1
    low, high = weight.aminmax(dim=-1)
    if integer_zeros:  # zero is a code, so the range must hold it
        low, high = low.clamp(max=0), high.clamp(min=0)
    flat = low == high
    span = torch.where(flat, torch.ones_like(low), high - low)
    scale, offset = span / top, low  # w = scale * q + offset
    best = torch.full_like(low, float("inf"))
    for part in _SHRINK:
        tried, start = span * (part / top), low * part
        if integer_zeros:
            start = (start / tried).round_() * tried
        error = _sum((weight - _decode(_round(weight, tried, start, top), tried, start)).square(), importance)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, tried, scale), torch.where(better, start, offset)
    codes = _round(weight, scale, offset, top)
    for _ in range(_REFINE):
        if integer_zeros:
            scale, offset = _least_squares_scale(weight, codes, scale, offset, importance)
        else:
            scale, offset = _least_squares(weight, codes, scale, offset, importance)
        codes = _round(weight, scale, offset, top)
    codes = torch.where(flat[..., None], torch.zeros_like(codes), codes)
    scale = torch.where(flat, torch.where(low == 0, torch.ones_like(low), low.abs()), scale)
    zero = torch.where(flat, -low.sign(), -offset / scale) + 0.0  # no negative zero
    return codes.to(torch.uint8), scale, zero.round() if integer_zeros else zero


def _round(weight: Tensor, scale: Tensor, offset: Tensor, top: int) -> Tensor:
    return ((weight - offset[..., None]) / scale[..., None]).round_().clamp_(0, top)


def _decode(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return codes * scale[..., None] + offset[..., None]


def _sum(values: Tensor, importance: Tensor | None) -> Tensor:
    return values.sum(-1) if importance is None else (values * importance).sum(-1)


def _least_squares(
    weight: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The scale and offset that fit best for given codes; the old ones where all codes are equal."""
    if importance is None:
        code_mean, weight_mean = codes.mean(-1), weight.mean(-1)
    else:
        total = importance.sum(-1).clamp_min(torch.finfo(weight.dtype).tiny)
        code_mean, weight_mean = _sum(codes, importance) / total, _sum(weight, importance) / total
    centred = codes - code_mean[..., None]
    variance = _sum(centred.square(), importance)
    fitted = _sum(centred * weight, importance) / variance
    usable = (variance > 0) & (fitted > 0)
    fitted = torch.where(usable, fitted, scale)
    return fitted, torch.where(usable, weight_mean - fitted * code_mean, offset)


def _least_squares_scale(
    weight: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The scale that fits best for given codes and a zero that stays where it is."""
    zero = (-offset / scale).round()
    centred = codes - zero[..., None]
    power = _sum(centred.square(), importance)
    fitted = _sum(centred * weight, importance) / power
    fitted = torch.where((power > 0) & (fitted > 0), fitted, scale)
    return fitted, -zero * fitted
