"""Checks of tuning's Triton kernels: python quant_matmul_backward_triton_checks.py cpu|cuda.

On "cpu" TRITON_INTERPRET=1 must be set; the kernels are then put in the place of the CPU's paths by hand. Exits
non-zero at the first difference.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

from peqa_kernels.packing import pack_codes
from peqa_kernels.quant_matmul import QuantizedWeight, backward, backward_gpu, dense, scaled_linear
from peqa_kernels.quant_matmul.dense import Scales, dequantize_panel_torch

_spec = importlib.util.spec_from_file_location(
    "cases", Path(__file__).with_name("test_quant_matmul_backward.py")
)
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["cases"] = cases
_spec.loader.exec_module(cases)

SHAPES = [(96, 128, 4), (33, 35, 1), (150, 224, 7), (70, 136, 1)]


def make_weight(shape: tuple[int, int, int], bits: int, device: str) -> QuantizedWeight:
    """Codes over the whole range, zero points between codes, another scale for each group."""
    n, k, groups = shape
    gen = torch.Generator().manual_seed(n + k + bits)
    codes = torch.randint(0, 1 << bits, (n, k), generator=gen, dtype=torch.uint8)
    scales = 0.01 + 0.05 * torch.rand((n, groups), generator=gen)
    zeros = (1 << bits) * torch.rand((n, groups), generator=gen)
    return QuantizedWeight(pack_codes(codes, bits).to(device), scales.to(device), zeros.to(device), bits, k)


def make_scales(weight: QuantizedWeight, device: str) -> Scales:
    """One of each; the group scales as a transposed view, as a model has them."""
    gen = torch.Generator().manual_seed(5)
    n, k, groups = weight.out_features, weight.in_features, weight.groups
    made = [0.5 + torch.rand(shape, generator=gen) for shape in ((n,), (k,), (n, groups))]
    out, into, group = (scale.to(device) for scale in made)
    return Scales(out, into, group.t())


def check_panels(device: str) -> int:
    """Whole weights and panels of them, to the bit."""
    count = 0
    for shape, bits, dtype in itertools.product(SHAPES, (2, 3, 4, 8), (torch.float16, torch.float32)):
        weight = make_weight(shape, bits, device)
        n, k = shape[:2]
        step = dense.column_step(weight, 40)
        column = step if step < k else 0
        for scales in (Scales(), make_scales(weight, device)):
            for row, last, left, right in ((0, n, 0, k), (5, 31, column, k), (n - 1, n, 0, min(k, step))):
                got = torch.full((last - row, right - left), float("nan"), dtype=dtype, device=device)
                want = torch.empty_like(got)
                backward_gpu.dequantize_panel_gpu(weight, scales, row, left, got)
                dequantize_panel_torch(weight, scales, row, left, want)
                assert torch.equal(got, want), (shape, bits, dtype, row, left)
                count += 1
    return count


def check_sums(device: str) -> int:
    """Column sums, and group gradients wherever the kernel takes them."""
    count = 0
    for rows, columns in ((1, 5), (64, 128), (1100, 200)):
        a, b = torch.randn(2, rows, columns, device=device).half()
        want = (a.double() * b.double()).sum(0)
        torch.testing.assert_close(backward_gpu.column_dot_gpu(a, b).double(), want, rtol=1e-4, atol=1e-3)
        count += 1
    for shape, bits, rows in itertools.product(
        [(96, 128, 4), (150, 224, 7), (130, 512, 2), (20, 96, 1)], (2, 3, 4), (1, 150)
    ):
        weight = make_weight(shape, bits, device)
        into = make_scales(weight, device).into
        dy = torch.randn(rows, shape[0], device=device).half()
        x = torch.randn(rows, shape[1], device=device).half()
        assert backward_gpu.fits_group_kernel(dy, weight)
        got = backward_gpu.group_gradient_gpu(dy, x, weight, into)
        product = (dy.double().t() @ x.double()) * dense.dequantize(weight).double() * into.double()
        want = product.view(shape[0], shape[2], -1).sum(-1).t()
        assert cases.relative_rms(got, want) < 1e-4, (shape, bits, rows)
        count += 1
    assert not backward_gpu.fits_group_kernel(dy.float(), weight)
    assert not backward_gpu.fits_group_kernel(dy, make_weight((24, 36, 3), 4, device))  # groups of 12
    return count


def check_gradients(device: str) -> int:
    """`scaled_linear` on the kernels against autograd through the formula in float64, in panels of every size."""
    dtypes = (
        {torch.float16: 2e-3}
        if device == "cpu"
        else {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-4}
    )
    count = 0
    for shape, kind, (dtype, limit), panel in itertools.product(
        SHAPES[:3], cases.KINDS, dtypes.items(), (1 << 20, 3000)
    ):
        prepared = cases.make_prepared(*shape, device=device)
        inputs = {
            name: value.to(device)
            for name, value in cases.make_inputs(prepared, kind, dtype, 150, 3.0).items()
        }
        ours = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        exact = {name: value.double().requires_grad_() for name, value in inputs.items()}
        with ExitStack() as stack:
            stack.enter_context(patch.object(backward, "_PANEL_CPU", panel))
            stack.enter_context(patch.object(backward, "_PANEL_GPU", panel))
            if device == "cpu":
                stack.enter_context(patch.object(dense.native, "load", lambda: None))
                stack.enter_context(
                    patch.object(dense, "dequantize_panel_torch", backward_gpu.dequantize_panel_gpu)
                )
                stack.enter_context(patch.object(backward, "_column_dot", backward_gpu.column_dot_gpu))
                if shape[1] // shape[2] % 16 == 0:
                    stack.enter_context(
                        patch.object(backward, "_group_gradient", backward_gpu.group_gradient_gpu)
                    )
            y = scaled_linear(
                ours["x"], prepared, *(ours.get(name) for name in ("bias", "out", "in", "group"))
            )
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype).to(device)
            y.backward(dy)
        want = cases.formula(prepared, exact)
        want.backward(dy.double())
        assert cases.relative_rms(y.detach(), want.detach()) <= limit
        for name, value in ours.items():
            error = cases.relative_rms(value.grad, exact[name].grad)
            assert error <= limit, f"{kind} {shape} {dtype} {panel}: gradient of {name} {error:.2e}"
        count += 1
    return count


if __name__ == "__main__":
    where = sys.argv[1]
    print(f"{check_panels(where) + check_sums(where) + check_gradients(where)} checks passed")
