"""Training of one task's scales: gradients for the input and the scales, never for the frozen weight.

W0 = s0 * (q - z) is the frozen dense fp32 copy; out, in and group scales are fp32 and relative to the base.

    y = b + out * ((x * in) @ W^T),   W[n, k] = W0[n, k] * group[g(k), n]
    dL/d out[n]      = sum_m dY[m, n] * (Y - b)[m, n] / out[n]              no weight gradient, and x is not kept
    dL/d in[k]       = sum_m x[m, k] * dV[m, k],   dV = (dY * out) @ W
    dL/d group[g, n] = out[n] * sum_{k in g} W0[n, k] * in[k] * (dY^T x)[n, k]   some rows n at a time
    dL/d x           = dV * in

All scales are multiplied into the fp32 weight, which is then rounded once to x.dtype. Scaling a product that is already
bfloat16 by 1.001 would round back to that product: every change below 0.2 % would be lost. Rounded after scaling, the
weights of a row round this way and that, and their sum keeps the change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from peqa_kernels.quant_matmul import PreparedWeight

_BLOCK = 1 << 18  # elements of an fp32 intermediate: 1 MB, so that it stays in the second-level cache


def scaled_linear(
    x: Tensor,  # [..., K], float32, bfloat16 or float16
    prepared: PreparedWeight,
    bias: Tensor | None = None,  # [N]
    out_scale: Tensor | None = None,  # float32 [N], no element zero
    in_scale: Tensor | None = None,  # float32 [K]
    group_scale: Tensor | None = None,  # float32 [G, N]
) -> Tensor:
    """Multiply by the frozen weight under one task's trainable scales; [..., N] in x.dtype.

    Gradients reach x and the scales; a missing scale means ones. Matrix products run in x.dtype, scales and their
    gradients stay fp32. Fused siblings with unlike input scales are to be called one by one.
    """
    assert x.shape[-1] == prepared.in_features, (x.shape, prepared.in_features)
    y = _ScaledLinear.apply(
        x.reshape(-1, prepared.in_features), prepared, bias, out_scale, in_scale, group_scale
    )
    return y.view(*x.shape[:-1], prepared.out_features)


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, K]
        prepared: PreparedWeight,
        bias: Tensor | None,
        out_scale: Tensor | None,
        in_scale: Tensor | None,
        group_scale: Tensor | None,
    ) -> Tensor:
        y = F.linear(x, _folded(prepared, x.dtype, out_scale, in_scale, group_scale))
        needs_x = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        ctx.prepared = prepared
        ctx.save_for_backward(
            x if needs_x else None,
            y if ctx.needs_input_grad[3] else None,
            out_scale,
            in_scale,
            group_scale,
        )
        # Out of place: with a bias of 100 times the product, Y - b would have lost the product.
        return y if bias is None else y + bias.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0].contiguous()
        x, y, out_scale, in_scale, group_scale = ctx.saved_tensors
        dx = d_out = d_in = d_group = d_bias = None
        if ctx.needs_input_grad[2]:
            d_bias = dy.sum(0)
        if y is not None:
            d_out = _column_dot(dy, y) / out_scale
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[4]:
            dx = dy @ _folded(ctx.prepared, dy.dtype, out_scale, None, group_scale)  # dV
            if ctx.needs_input_grad[4]:
                d_in = _column_dot(x, dx)
            if in_scale is not None:
                # dV + dV * (in - 1): one rounding, and half the time of multiplying bfloat16 by fp32.
                dx.addcmul_(dx, (in_scale - 1.0).to(dx.dtype))
        if ctx.needs_input_grad[5]:
            d_group = _group_gradient(dy, x, ctx.prepared.dense(), in_scale, group_scale.shape[0])
            if out_scale is not None:
                d_group *= out_scale
        return dx if ctx.needs_input_grad[0] else None, None, d_bias, d_out, d_in, d_group


def _folded(
    prepared: PreparedWeight,
    dtype: torch.dtype,
    out_scale: Tensor | None,
    in_scale: Tensor | None,
    group_scale: Tensor | None,
) -> Tensor:
    """Give [N, K] with the scales multiplied in, rounded once to `dtype`."""
    if out_scale is None and in_scale is None and group_scale is None:
        return prepared.dense(dtype)
    w = prepared.dense()
    if group_scale is not None:
        grouped = group_scale.t().unsqueeze(-1)  # [N, G, 1]
        w = (w.view(*grouped.shape[:2], -1) * grouped).view_as(w)
    if in_scale is not None:
        w = w * in_scale
    if out_scale is not None:
        w = w * out_scale.unsqueeze(1)
    return w.to(dtype)


def _column_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum a * b over the rows, [M, N] x 2 -> fp32 [N]."""
    rows = max(1, _BLOCK // a.shape[1])
    total = torch.zeros(a.shape[1], dtype=torch.float32, device=a.device)
    for first in range(0, a.shape[0], rows):
        total += (a[first : first + rows].float() * b[first : first + rows]).sum(0)
    return total


def _group_gradient(dy: Tensor, x: Tensor, dense: Tensor, in_scale: Tensor | None, groups: int) -> Tensor:
    """Give sum_{k in g} W0[n, k] * in[k] * (dY^T x)[n, k], fp32 [G, N], holding only some rows of dY^T x."""
    n, k = dense.shape
    gradient = torch.empty((groups, n), dtype=torch.float32, device=dy.device)
    step = max(64, _BLOCK // k)  # fewer rows than 64 would make the matrix products too thin
    for first in range(0, n, step):
        last = min(n, first + step)
        product = (dy[:, first:last].t() @ x).float().mul_(dense[first:last])
        if in_scale is not None:
            product *= in_scale
        gradient[:, first:last] = product.view(last - first, groups, -1).sum(-1).t()
    return gradient
