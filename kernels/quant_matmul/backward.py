"""Training of one task's scales: gradients for the input and the scales, never for the frozen weight.

W0 = s0 * (q - z) is the frozen base; out, in and group scales are fp32 and relative to it.

    y = b + out * ((x * in) @ W^T),   W[n, k] = W0[n, k] * group[g(k), n]
    dL/d out[n]      = sum_m dY[m, n] * (Y - b)[m, n] / out[n]              no weight gradient, and x is not kept
    dL/d in[k]       = sum_m x[m, k] * dV[m, k],   dV = (dY * out) @ W
    dL/d group[g, n] = out[n] * sum_{k in g} W0[n, k] * in[k] * (dY^T x)[n, k]   some of dY^T x at a time
    dL/d x           = dV * in

Only the packed codes are kept. Each product makes the floats that it multiplies anew, a panel at a time, and forgets
them. All scales are multiplied in fp32 and the weight is then rounded once to x.dtype. Scaling a product that is
already bfloat16 by 1.001 would round back to that product: every change below 0.2 % would be lost. Rounded after
scaling, the weights of a row round this way and that, and their sum keeps the change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peqa_kernels.native.training import native_training
from peqa_kernels.products import matmul
from peqa_kernels.quant_matmul.checks import check_scaled
from peqa_kernels.quant_matmul.dense import Scales, column_step, dequantize_panel
from peqa_kernels.quant_matmul.weight import QuantizedWeight

if TYPE_CHECKING:
    from peqa_kernels.quant_matmul import PreparedWeight

_BLOCK = (
    1 << 18
)  # elements of an fp32 intermediate on the CPU: 1 MB, so that it stays in the second-level cache
# Elements of a panel of floats. On a GPU 16 MB in bfloat16, which its second-level cache keeps between the kernel that
# makes it and the product that reads it; on a CPU 64 MB (float32: 128), since a part's result is copied into the whole.
_PANEL_GPU = 1 << 23
_PANEL_CPU = 1 << 25


def scaled_linear(
    x: Tensor,  # [..., K], float32, bfloat16 or float16
    prepared: PreparedWeight,
    bias: Tensor | None = None,  # [N], float32, bfloat16 or float16
    out_scale: Tensor | None = None,  # float32 [N], no element zero
    in_scale: Tensor | None = None,  # float32 [K]
    group_scale: Tensor | None = None,  # float32 [G, N]
) -> Tensor:
    """Multiply by the frozen weight under one task's trainable scales; [..., N] in x.dtype.

    Gradients reach x and the scales; a missing scale means ones. Matrix products run in x.dtype, scales and their
    gradients stay fp32. Fused siblings with unlike input scales are to be called one by one. Raises
    QuantMatmulInputError for arguments that do not fit, RuntimeError when the weight's codes were freed for serving.
    """
    check_scaled(x, prepared, bias, out_scale, in_scale, group_scale)
    weight = prepared.weight.present()
    y = _ScaledLinear.apply(x.reshape(-1, weight.in_features), weight, bias, out_scale, in_scale, group_scale)
    return y.view(*x.shape[:-1], weight.out_features)


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, K]
        weight: QuantizedWeight,
        bias: Tensor | None,
        out_scale: Tensor | None,
        in_scale: Tensor | None,
        group_scale: Tensor | None,
    ) -> Tensor:
        y = _times_transposed(x, weight, Scales(out_scale, in_scale, group_scale))
        needs_x = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        ctx.weight = weight
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
            dx = _times(dy, ctx.weight, Scales(out_scale, None, group_scale))  # dV
            if ctx.needs_input_grad[4]:
                d_in = _column_dot(x, dx)
            if in_scale is not None:
                # dV + dV * (in - 1): one rounding, and half the time of multiplying bfloat16 by fp32.
                dx.addcmul_(dx, (in_scale - 1.0).to(dx.dtype))
        if ctx.needs_input_grad[5]:
            d_group = _group_gradient(dy, x, ctx.weight, in_scale)
            if out_scale is not None:
                d_group *= out_scale
        return dx if ctx.needs_input_grad[0] else None, None, d_bias, d_out, d_in, d_group


def _times_transposed(x: Tensor, weight: QuantizedWeight, scales: Scales) -> Tensor:
    """x @ W^T, [M, N] in x.dtype, a panel of outputs at a time."""
    n, k = weight.out_features, weight.in_features
    step = max(64, _panel(x) // k)
    if step >= n:
        return matmul(x, dequantize_panel(weight, x.dtype, scales).t())
    y = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    for first in range(0, n, step):
        some = slice(first, first + step)
        y[:, some] = matmul(x, dequantize_panel(weight, x.dtype, scales, rows=some).t())
    return y


def _times(dy: Tensor, weight: QuantizedWeight, scales: Scales) -> Tensor:
    """dy @ W, [M, K] in dy.dtype, a panel of inputs at a time: no sum is cut, so none is rounded twice."""
    n, k = weight.out_features, weight.in_features
    step = column_step(weight, max(64, _panel(dy) // n))
    if step >= k:
        return matmul(dy, dequantize_panel(weight, dy.dtype, scales))
    dx = torch.empty((dy.shape[0], k), dtype=dy.dtype, device=dy.device)
    for first in range(0, k, step):
        some = slice(first, min(k, first + step))
        dx[:, some] = matmul(dy, dequantize_panel(weight, dy.dtype, scales, columns=some))
    return dx


def _panel(x: Tensor) -> int:
    return _PANEL_GPU if x.is_cuda else _PANEL_CPU


def _column_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum a * b over the rows, [M, N] x 2 -> fp32 [N]."""
    if a.is_cuda:
        from peqa_kernels.quant_matmul.backward_gpu import column_dot_gpu

        return column_dot_gpu(a, b)
    if a.dtype in (torch.bfloat16, torch.float32) and (native := native_training()) is not None:
        return native.column_dot(a.contiguous(), b.contiguous())
    return _column_dot_torch(a, b)


def _column_dot_torch(a: Tensor, b: Tensor) -> Tensor:
    rows = max(1, _BLOCK // a.shape[1])
    total = torch.zeros(a.shape[1], dtype=torch.float32, device=a.device)
    for first in range(0, a.shape[0], rows):
        total += (a[first : first + rows].float() * b[first : first + rows]).sum(0)
    return total


def _group_gradient(dy: Tensor, x: Tensor, weight: QuantizedWeight, in_scale: Tensor | None) -> Tensor:
    """Give sum_{k in g} W0[n, k] * in[k] * (dY^T x)[n, k], fp32 [G, N], holding only some rows of dY^T x."""
    if dy.is_cuda:
        from peqa_kernels.quant_matmul import backward_gpu

        if backward_gpu.fits_group_kernel(dy, weight):
            return backward_gpu.group_gradient_gpu(dy, x, weight, in_scale)
    n, k = weight.out_features, weight.in_features
    gradient = torch.empty((weight.groups, n), dtype=torch.float32, device=dy.device)
    step = max(64, (_PANEL_GPU if dy.is_cuda else _BLOCK) // k)  # fewer rows than 64: too thin a product
    for first in range(0, n, step):
        some = slice(first, min(n, first + step))
        base = dequantize_panel(weight, torch.float32, Scales(into=in_scale), rows=some)
        base *= matmul(dy[:, some].t(), x)
        gradient[:, some] = base.view(base.shape[0], weight.groups, -1).sum(-1).t()
    return gradient
