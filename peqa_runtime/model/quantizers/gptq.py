"""GPTQ (Frantar et al., arXiv 2210.17323): round column after column, and let the columns that are left make it good.

With x the inputs of a linear and H = E[x x^T], the error of its outputs is tr((W - W') H (W - W')^T). Rounding column k
by e costs least when the later columns j take up -e * U[k, j] / U[k, k], where U^T U = H^-1 and U is upper triangular.
Rows do not depend on each other, and the updates of far columns wait until a block of columns is done.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peqa_kernels.packing import pack_codes
from peqa_kernels.products import matmul
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidRequest
from peqa_runtime.model.base_checkpoint import Precision
from peqa_runtime.model.quantizers.rounding import fit

_COLUMNS = 128  # of a block: within it every column updates the rest of the block only
_ELEMENTS = 1 << 24  # of rows that are worked on at once: 128 MB as doubles
_WIDEST_DOUBLE = 8192  # inputs up to which sums are doubles: 512 MB for a Hessian
# Times the median power that a token counts with at most. A first token's inputs to a down projection can have 10 000
# times the power of others'; uncapped, SmolLM2's block 2 at 2 bits lost more by GPTQ than by rounding to nearest.
_LOUDEST = 4.0
_TOKENS = 2048  # of one product of a Hessian
_NARROWEST = 128  # rows of its blocks
_TRIES = 6  # dampings, each ten times the last, before a Hessian is given up


@dataclass(frozen=True)
class GptqOptions:
    """`damping`: part of the mean diagonal that is added to it. `act_order`: inputs with the largest activations first;
    `static_groups`: ranges fitted to the weights as they were, not as they are when their group's turn comes.
    """

    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True

    def __post_init__(self) -> None:
        """Raise `InvalidRequest` for a damping that is none."""
        if not 0 < self.damping <= 1:
            raise InvalidRequest(
                f"damping must be above 0 and at most 1, not {self.damping}", param="damping"
            )


class Hessian:
    """The second moment E[x x^T] of one linear's inputs, gathered batch by batch, no token counting for too much."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        dtype = torch.float64 if in_features <= _WIDEST_DOUBLE else torch.float32
        self._sum = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Count x, [tokens, K] or windows [..., tokens, K]: multiplied in fp32, summed in fp64 (fp32 where K is large).

        What is too much for a token is judged within its window.
        """
        if not x.numel():
            return
        windows = x.detach().reshape(-1, *x.shape[-2:])
        for some in windows.split(max(1, _TOKENS // windows.shape[1])):
            rows = some.float()
            power = rows.square().sum(-1, keepdim=True)
            most = _LOUDEST * power.median(1, keepdim=True).values
            rows = (rows * (most / power.clamp_min(1e-20)).clamp_max(1).sqrt()).flatten(0, 1)
            self._sum += _square(rows).to(self._sum.dtype)
            self.tokens += len(rows)

    def mean(self) -> Tensor:
        """E[x x^T], [K, K]; zeros when nothing was counted."""
        return self._sum / max(1, self.tokens)


def _square(rows: Tensor) -> Tensor:
    """rows^T rows [K, K] of [tokens, K]: the upper part by blocks, the lower one its mirror."""
    # Transposed in memory: the product of a view took twice as long (512 tokens, 1536 inputs, Zen 4).
    columns, count = rows.t().contiguous(), rows.shape[1]
    found = torch.empty(count, count, dtype=rows.dtype, device=rows.device)
    step = max(_NARROWEST, -(-count // 6))
    for first in range(0, count, step):
        last = min(first + step, count)
        found[first:last, first:] = matmul(columns[first:last], columns[first:].t())
        found[last:, first:last] = found[first:last, last:].t()
    return found


@dataclass(frozen=True)
class Rounded:
    """What became of one linear's weight."""

    weight: QuantizedWeight
    settled: Tensor  # float32 [N, K], the value of each weight when its turn came; its rounding is the code
    error: float  # squared error of the outputs, relative to their power


def gptq(
    weight: Tensor,  # [N, K]
    hessian: Tensor,  # [K, K], E[x x^T]
    precision: Precision,
    options: GptqOptions,
    *,
    integer_zeros: bool = False,
) -> Rounded:
    """Quantize a weight so that its outputs change least on the inputs that `hessian` was gathered from.

    Inputs that are always zero are rounded to nearest. Raises ValueError when the weight or the Hessian is not finite,
    and for `act_order` without `static_groups` where a row has several groups: their columns would be scattered.
    """
    rows, columns = weight.shape
    groups = precision.groups(columns)
    if options.act_order and groups > 1 and not options.static_groups:
        raise ValueError(
            "act-order with groups of their own order scatters each group's inputs, which a base cannot "
            "hold; use static groups with it"
        )
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the calibration activations hold NaN or infinity")
    order = hessian.diagonal().argsort(descending=True, stable=True) if options.act_order else None
    factor = _factor(hessian if order is None else hessian[order][:, order], options.damping)
    importance = _importance(hessian.diagonal()).view(groups, -1)
    step = max(1, _ELEMENTS // columns)
    parts = [
        _rows(chunk.to(hessian.dtype), factor, importance, order, precision, options, integer_zeros)
        for chunk in weight.split(step)
    ]
    codes, scales, zeros, settled = (torch.cat(part) for part in zip(*parts, strict=True))
    decoded = ((codes.view(rows, groups, -1) - zeros[..., None]) * scales[..., None]).view(rows, columns)
    packed = pack_codes(codes.to(torch.uint8), precision.bits)
    quantized = QuantizedWeight(packed, scales, zeros, precision.bits, columns)
    return Rounded(quantized, settled.float(), output_error(weight, decoded, hessian))


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Squared error of the outputs of `quantized` [N, K] relative to their power under `weight` [N, K]."""
    change = (quantized - weight).to(hessian.dtype)
    power = float((weight.to(hessian.dtype) @ hessian).mul_(weight).sum())
    return float((change @ hessian).mul_(change).sum()) / power if power > 0 else 0.0


def _factor(hessian: Tensor, damping: float) -> Tensor:
    """U [K, K], upper triangular, U^T U = (H + damping)^-1. Dead inputs stand alone with the mean diagonal."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    diagonal[dead] = mean
    for attempt in range(_TRIES):
        damped = hessian.clone()
        damped.diagonal().add_(damping * 10**attempt * mean)
        # With rows and columns reversed: H = R R^T, R upper triangular, so that U = R^-1 needs no inverse of H.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    raise ValueError("the calibration activations leave no invertible Hessian; use more text or more damping")


def _importance(diagonal: Tensor) -> Tensor:
    """How much each input counts when a range is fitted, fp32 [K]: its root mean square. Dead inputs count as the mean.

    Measured on SmolLM2's block 2 at 2 bits: error of the block's outputs 0.0198 when all count alike, 0.0116 so, 0.0111
    by the mean square; at 3 bits 0.0030, 0.0027 and 0.0027, but more than now for some linears by the mean square.
    """
    alive = diagonal > 0
    mean = diagonal[alive].mean() if bool(alive.any()) else torch.ones_like(diagonal[0])
    return (torch.where(alive, diagonal, mean) / mean).sqrt().float()


def _rows(
    weight: Tensor,  # [n, K]
    factor: Tensor,  # [K, K], in the order of work
    importance: Tensor,  # [G, k], of inputs when ranges are fitted
    order: Tensor | None,  # [K], column that is worked on i-th
    precision: Precision,
    options: GptqOptions,
    integer_zeros: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes [n, K] in the model's order, scales and zeros fp32 [n, G], the weights as they were when rounded [n, K]."""
    count, columns = weight.shape
    groups = precision.groups(columns)
    size = columns // groups
    top = (1 << precision.bits) - 1
    grouped = weight.view(count, groups, size)

    def ranges(part: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        _, scale, zero = fit(part.float(), precision.bits, weights, integer_zeros=integer_zeros)
        return scale, zero

    static = options.static_groups or options.act_order
    scales, zeros = (
        torch.empty(groups, count, device=weight.device),
        torch.empty(groups, count, device=weight.device),
    )
    if static:
        found = ranges(grouped, importance)
        scales[:], zeros[:] = found[0].t(), found[1].t()
    # [K, n] from here on: what is worked on at a time lies together.
    work = weight.t().clone(memory_format=torch.contiguous_format) if order is None else weight.t()[order]
    codes, settled = torch.empty_like(work), torch.empty_like(work)
    width = max(_COLUMNS, size) if not static and size < columns else _COLUMNS
    group_of = (
        (torch.arange(columns) if order is None else order.cpu()).div(size, rounding_mode="floor").tolist()
    )
    for start in range(0, columns, width):
        end = min(start + width, columns)
        inside = factor[start:end, start:end]
        steps = inside.diagonal().tolist()
        block, errors = work[start:end], torch.empty_like(work[start:end])
        for i in range(end - start):
            column, group = start + i, group_of[start + i]
            if not static and column % size == 0:
                own = work[column : column + size].t().unsqueeze(1)
                found = ranges(own, importance[group : group + 1])
                scales[group], zeros[group] = found[0][:, 0], found[1][:, 0]
            scale, zero = scales[group].to(work.dtype), zeros[group].to(work.dtype)
            value = block[i]
            code = torch.div(value, scale, out=codes[column]).add_(zero).round_().clamp_(0, top)
            settled[column] = value
            error = torch.sub(value, (code - zero).mul_(scale), out=errors[i]).div_(steps[i])
            block[i:].addr_(inside[i, i:], error, alpha=-1)
        work[end:] -= factor[start:end, end:].t() @ errors
    if order is not None:
        back = order.argsort()
        codes, settled = codes[back], settled[back]
    return codes.t().contiguous(), scales.t().contiguous(), zeros.t().contiguous(), settled.t().contiguous()
