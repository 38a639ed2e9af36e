"""The formula in plain fp32 torch: what every fast path is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from peqa_kernels.packing import unpack_codes
from peqa_kernels.quant_matmul.weight import LinearBank, QuantizedWeight


def dequantize(weight: QuantizedWeight) -> Tensor:
    """Give the dense base weight s0 * (q - z) as fp32 [N, K]."""
    n, g = weight.scales.shape
    codes = unpack_codes(weight.present().qweight, weight.bits, weight.in_features).to(torch.float32)
    grouped = codes.view(n, g, weight.group_size).sub_(weight.zeros.float().unsqueeze(-1))
    return grouped.mul_(weight.scales.float().unsqueeze(-1)).view(n, weight.in_features)


def quant_matmul_reference(
    x: Tensor,  # [M, K]
    weight: QuantizedWeight,
    bias: Tensor | None = None,  # [N]
    bank: LinearBank | None = None,
    row: Tensor | None = None,  # int32 [M]
    group_row: Tensor | None = None,  # int32 [M]
) -> Tensor:
    """Compute y = b + out[row] * sum_g s[group_row, g] * sum_{k in g} (x * in[row]) (q - z) in fp32, [M, N].

    s = s0 * group_scale[group_row]. `row` None: output and input scales of one; `group_row` None: the base's
    group scales. Without a bank both are ignored.
    """
    n, groups = weight.scales.shape
    size = weight.group_size
    segments = (n,) if bank is None else bank.segments
    assert sum(segments) == n, (segments, n)
    codes = unpack_codes(weight.qweight, weight.bits, weight.in_features).float().view(n, groups, size)
    centred = codes - weight.zeros.float().unsqueeze(-1)

    total = torch.zeros((x.shape[0], n), dtype=torch.float32, device=x.device)
    first = 0
    for segment, width in enumerate(segments):
        last = first + width
        inputs = x.float()
        if bank is not None and bank.in_scale is not None and row is not None:
            inputs = inputs * bank.in_scale[row.long(), segment].float()
        for g in range(groups):
            part = inputs[:, g * size : (g + 1) * size] @ centred[first:last, g].t()  # [M, width]
            scale = weight.scales[first:last, g].float()
            if bank is not None and bank.group_scale is not None and group_row is not None:
                scale = scale * bank.group_scale[group_row.long(), g, first:last].float()
            total[:, first:last] += part * scale
        first = last
    if bank is not None and row is not None:
        total = total * bank.out_scale[row.long()].float()
    return total if bias is None else total + bias.float()
