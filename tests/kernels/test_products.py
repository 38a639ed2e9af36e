"""Float32 products on a CPU: the same numbers and gradients as torch's, whichever library multiplies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peqa_kernels import products


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that the other library is given; made up where this processor would not have it."""
    seen: list[tuple[int, ...]] = []

    def one_dnn(x: Tensor, weight: Tensor) -> Tensor:
        seen.append((*x.shape, len(weight)))
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    monkeypatch.setattr(products, "_has_one_dnn", lambda: True)
    monkeypatch.setattr(products, "_one_dnn", one_dnn)
    return seen


def test_products_of_any_layout(calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(70, 96), torch.randn(96, 130)
    for left, right in ((a, b), (a.t().contiguous().t(), b), (a, b.t().contiguous().t())):
        torch.testing.assert_close(products.matmul(left, right), a @ b, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        products.matmul(a.view(7, 10, 96), b), (a @ b).view(7, 10, 130), rtol=1e-5, atol=1e-4
    )
    assert len(calls) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_small_products_stay_with_torch(
    calls: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    a, b = torch.randn(96, 96), torch.randn(96, 96)
    assert torch.equal(products.matmul(a.to(dtype), b.to(dtype)), a.to(dtype) @ b.to(dtype))
    assert torch.equal(products.matmul(a[:4], b), a[:4] @ b)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.matmul(a, b).dtype == torch.bfloat16
    assert calls == []


def test_linears_keep_their_values_and_gradients(calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 130)
    x, towards = torch.randn(3, 25, 96), torch.randn(3, 25, 130)

    def gradients() -> tuple[Tensor, ...]:
        given = x.clone().requires_grad_()
        y = layer(given)
        found = torch.autograd.grad((y * towards).sum(), [given, layer.weight, layer.bias])
        return y.detach(), *found

    wanted = gradients()
    assert calls == []
    with products.FastLinears():
        found = gradients()
        frozen = F.linear(x, layer.weight.detach())
    assert calls == [(3, 25, 96, 130), (75, 130, 96), (130, 75, 96), (3, 25, 96, 130)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(frozen, wanted[0] - layer.bias.detach(), rtol=1e-5, atol=1e-4)


def test_a_torch_without_the_operator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(x: Tensor, weight: Tensor) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(products, "_one_dnn", gone)
    monkeypatch.setattr(products, "_made_by_intel", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    products._has_one_dnn.cache_clear()
    try:
        a, b = torch.randn(96, 96), torch.randn(96, 96)
        assert torch.equal(products.matmul(a, b), a @ b)
    finally:
        products._has_one_dnn.cache_clear()
