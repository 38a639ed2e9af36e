"""scaled_linear: outputs and every gradient against autograd through the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peqa_kernels import native
from peqa_kernels.packing import pack_codes
from peqa_kernels.quant_matmul import (
    PreparedWeight,
    QuantizedWeight,
    QuantMatmulInputError,
    backward,
    dequantize,
    prepare,
    scaled_linear,
)
from peqa_kernels.quant_matmul.dense import Scales, column_step, dequantize_panel, dequantize_panel_torch

SCALES = ("out", "in", "group")
KINDS = {"channel": ("out",), "channel+input": ("out", "in"), "group": ("group",), "all": SCALES, "base": ()}


def make_prepared(n: int, k: int, groups: int, bits: int = 4, device: str = "cpu") -> PreparedWeight:
    g = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 1 << bits, (n, k), generator=g, dtype=torch.uint8)
    scales = 0.01 + 0.05 * torch.rand((n, groups), generator=g)
    zeros = (1 << bits) * (0.25 + 0.5 * torch.rand((n, groups), generator=g))
    tensors = (tensor.to(device) for tensor in (pack_codes(codes, bits), scales, zeros))
    return prepare(QuantizedWeight(*tensors, bits, k), backend="torch" if device == "cpu" else None)


def make_inputs(
    prepared: PreparedWeight, kind: str, dtype: torch.dtype, m: int, bias: float
) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(m)
    n, k = prepared.out_features, prepared.in_features
    shapes = {"out": (n,), "in": (k,), "group": (prepared.weight.groups, n)}
    inputs = {"x": torch.randn((m, k), generator=g).to(dtype)}
    inputs |= {name: 0.5 + torch.rand(shapes[name], generator=g) for name in KINDS[kind]}
    if bias:
        inputs["bias"] = bias * torch.randn(n, generator=g)
    return inputs


def formula(prepared: PreparedWeight, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same function in plain operations, differentiable by autograd."""
    w = dequantize(prepared.weight).double()
    n, k = w.shape
    if "group" in t:
        w = (w.view(n, -1, k // t["group"].shape[0]) * t["group"].t().unsqueeze(-1)).view(n, k)
    y = (t["x"] * t["in"] if "in" in t else t["x"]) @ w.t()
    y = y * t["out"] if "out" in t else y
    return y + t["bias"] if "bias" in t else y


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("bias", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 128, 4), (33, 35, 1), (600, 640, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_autograd(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, bias: float
) -> None:
    prepared = make_prepared(*shape)
    inputs = make_inputs(prepared, kind, dtype, 700, bias)
    ours = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    exact = {name: value.double().requires_grad_() for name, value in inputs.items()}
    y = scaled_linear(
        ours["x"], prepared, ours.get("bias"), ours.get("out"), ours.get("in"), ours.get("group")
    )
    want = formula(prepared, exact)
    limit = (
        2e-6 if dtype == torch.float32 else 1e-2
    )  # bfloat16 rounds weights, outputs and gradients by 2**-9
    assert y.dtype == dtype
    assert relative_rms(y.detach(), want.detach()) <= limit

    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    y.backward(dy)
    want.backward(dy.double())
    for name, value in ours.items():
        other = exact[name].grad
        assert value.grad is not None
        assert other is not None
        assert value.grad.dtype == value.dtype
        error = relative_rms(value.grad, other)
        assert error <= limit, f"gradient of {name}: relative RMS error {error:.2e}"


def test_a_small_change_of_scale_survives_bfloat16() -> None:
    """A scale of 1.001 is 1 in bfloat16; its effect on the outputs must not be lost on average."""
    prepared = make_prepared(64, 128, 1)
    x = torch.randn((512, 128), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    base = scaled_linear(x, prepared).double()
    moved = scaled_linear(x, prepared, None, torch.full((64,), 1.001)).double()
    change = float((moved * base).sum() / base.square().sum()) - 1
    assert abs(change - 1e-3) < 2e-4


def test_leading_dimensions_and_frozen_inputs() -> None:
    prepared = make_prepared(24, 32, 2)
    out = torch.full((24,), 1.5, requires_grad=True)
    x = torch.randn((2, 5, 32), generator=torch.Generator().manual_seed(1))
    y = scaled_linear(x, prepared, None, out)
    assert y.shape == (2, 5, 24)
    y.sum().backward()
    assert x.grad is None
    assert out.grad is not None
    assert relative_rms(out.grad, (x @ dequantize(prepared.weight).t()).sum((0, 1)).double()) < 1e-5


@pytest.mark.parametrize(("kind", "keeps_x"), [("channel", False), ("group", True), ("base", False)])
def test_what_is_kept_for_the_backward_pass(kind: str, keeps_x: bool) -> None:
    """`channel` keeps neither x nor anything of the size of the weight; `group` keeps x but no [N, K] tensor."""
    prepared = make_prepared(96, 128, 4)
    inputs = {
        name: value.requires_grad_()
        for name, value in make_inputs(prepared, kind, torch.float32, 50, 0.0).items()
    }
    kept: list[torch.Size] = []

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        scaled_linear(inputs["x"], prepared, None, inputs.get("out"), inputs.get("in"), inputs.get("group"))
    assert ((50, 128) in kept) == keeps_x
    assert (96, 128) not in kept


@pytest.mark.parametrize("panel", [1 << 23, 5000])
@pytest.mark.parametrize("kind", ["all", "base"])
@pytest.mark.parametrize(
    ("bits", "shape"), [(2, (40, 96, 3)), (3, (130, 200, 5)), (8, (70, 64, 2)), (3, (66, 37, 1))]
)
def test_every_width_in_panels_of_every_size(
    bits: int, shape: tuple[int, int, int], kind: str, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward, "_PANEL_CPU", panel)
    prepared = make_prepared(*shape, bits=bits)
    inputs = make_inputs(prepared, kind, torch.float32, 50, 0.0)
    ours = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    exact = {name: value.double().requires_grad_() for name, value in inputs.items()}
    y = scaled_linear(ours["x"], prepared, None, ours.get("out"), ours.get("in"), ours.get("group"))
    want = formula(prepared, exact)
    assert relative_rms(y.detach(), want.detach()) <= 2e-6
    y.square().sum().backward()
    want.square().sum().backward()
    for name, value in ours.items():
        assert relative_rms(value.grad, exact[name].grad) <= 4e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_compiled_panels_have_the_bits_of_the_torch_ones(bits: int, dtype: torch.dtype) -> None:
    ops = native.load()
    assert ops is not None, "the compiled kernels are not there"
    for n, k, groups in ((33, 37, 1), (70, 2000, 1), (40, 96, 3), (9, 1224, 34)):
        weight = make_prepared(n, k, groups, bits).weight
        scale = [
            0.5 + torch.rand(size, generator=torch.Generator().manual_seed(n)) for size in (n, k, n * groups)
        ]
        for scales in (Scales(), Scales(scale[0], scale[1], scale[2].view(n, groups).t())):
            step = column_step(weight, 0)
            for row, column in ((0, 0), (n // 2, step if step < k else 0)):
                got, want = torch.full((2, n - row, k - column), float("nan"), dtype=dtype)
                ops.dequantize(weight, got, row, column, *scales)
                dequantize_panel_torch(weight, scales, row, column, want)
                assert torch.equal(got, want), (n, k, groups, row, column)
    assert torch.equal(dequantize_panel(weight, dtype), dequantize(weight).to(dtype))


def change(given: dict[str, torch.Tensor], name: str, how: Any) -> dict[str, torch.Tensor]:
    return {**given, name: how(given[name])}


@pytest.mark.parametrize(
    ("name", "how", "sentence"),
    [
        ("x", lambda t: t[:, :-1], r"x must be \[\.\.\., 64\], not \[5, 63\]"),
        ("x", lambda t: t[0, 0], r"x must be \[\.\.\., 64\], not \[\]"),
        ("x", lambda t: t.double(), "x must be float32, bfloat16 or float16, not torch.float64"),
        ("x", lambda t: t.to("meta"), "x is on meta, the weight on cpu"),
        ("bias", lambda t: t[:1], r"bias must be .* \[40\], not torch.float32 of shape \[1\]"),
        ("bias", lambda t: t.int(), r"bias must be float32, bfloat16 or float16 \[40\], not torch.int32"),
        ("bias", lambda t: t.to("meta"), "bias is on meta, x on cpu"),
        ("out", lambda t: t[:39], r"out_scale must be float32 \[40\], not torch.float32 of shape \[39\]"),
        ("out", lambda t: t[:, None], r"out_scale must be float32 \[40\]"),
        ("out", lambda t: t.double(), r"out_scale must be float32 \[40\], not torch.float64"),
        ("out", lambda t: t.to("meta"), "out_scale is on meta, the weight on cpu"),
        ("in", lambda t: t[:1], r"in_scale must be float32 \[64\], not torch.float32 of shape \[1\]"),
        ("in", lambda t: t.bfloat16(), r"in_scale must be float32 \[64\], not torch.bfloat16"),
        (
            "group",
            lambda t: t.t(),
            r"group_scale must be float32 \[2, 40\], not torch.float32 of shape \[40, 2\]",
        ),
        ("group", lambda t: t.half(), r"group_scale must be float32 \[2, 40\], not torch.float16"),
    ],
)
def test_refuses_what_does_not_fit(name: str, how: Any, sentence: str) -> None:
    prepared = make_prepared(40, 64, 2)
    given = change(make_inputs(prepared, "all", torch.float32, 5, 1.0), name, how)
    with pytest.raises(QuantMatmulInputError, match=sentence):
        scaled_linear(given["x"], prepared, given["bias"], given["out"], given["in"], given["group"])


@pytest.mark.parametrize(
    ("name", "how", "sentence"),
    [
        ("out", lambda t: t[:39], r"out_scale must be float32 \[40\]"),
        ("in", lambda t: t[:63], r"in_scale must be float32 \[64\]"),
        ("group", lambda t: t[:1], r"group_scale must be float32 \[2, 40\]"),
        ("out", lambda t: t.to("meta"), "out_scale is on meta"),
        ("panel", lambda t: t.half(), "panel must be float32 or bfloat16"),
        ("panel", lambda t: t.t(), "contiguous"),
        (
            "panel",
            lambda t: torch.zeros(31, 32),
            r"\[31, 32\] from \[10, 32\] on must lie within the weight's \[40, 64\]",
        ),
        ("panel", lambda t: torch.zeros(30, 33), "must lie within"),
        ("panel", lambda t: t.to("meta"), "must be on the CPU, not on cpu and meta"),
        ("row", lambda row: -1, "must lie within"),
        ("column", lambda column: 4, "multiple of 8 columns"),
        ("weight", lambda weight: weight.shapes(), "must be on the CPU, not on meta and cpu"),
    ],
)
def test_the_compiled_panels_refuse_what_would_be_read_out_of_bounds(
    name: str, how: Any, sentence: str
) -> None:
    ops = native.load()
    assert ops is not None, "the compiled kernels are not there"
    prepared = make_prepared(40, 64, 2)
    given: dict[str, Any] = {"weight": prepared.weight, "panel": torch.zeros(30, 32), "row": 10, "column": 32}
    given |= make_inputs(prepared, "all", torch.float32, 5, 0.0)
    given = change(given, name, how)
    with pytest.raises(QuantMatmulInputError, match=sentence):
        ops.dequantize(*(given[key] for key in ("weight", "panel", "row", "column", "out", "in", "group")))


def test_tuning_keeps_no_floats_of_the_weight() -> None:
    """Forward and backward leave nothing of the size of the weight behind but the codes."""
    prepared = make_prepared(96, 128, 4)
    inputs = {
        name: value.requires_grad_()
        for name, value in make_inputs(prepared, "all", torch.bfloat16, 20, 0.0).items()
    }
    scaled_linear(inputs["x"], prepared, None, inputs["out"], inputs["in"], inputs["group"]).sum().backward()
    assert not prepared._copies._copies


class Products(TorchDispatchMode):
    """Notes over how many numbers each number of each matrix product is summed."""

    def __init__(self) -> None:
        super().__init__()
        self.summed: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "mm" in func.__name__ or "linear" in func.__name__:
            matrices = [a for a in args if isinstance(a, torch.Tensor) and a.dim() >= 2]
            self.summed.add(matrices[-2].shape[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_weights_is_made_for_no_scales_but_group_scales(kind: str, dtype: torch.dtype) -> None:
    """It alone is a sum over rows: dy [M, N] and x [M, K] give [N, K]. All others are vectors."""
    n, k, m = 96, 128, 29
    prepared = make_prepared(n, k, 4)
    inputs = {
        name: value.requires_grad_() for name, value in make_inputs(prepared, kind, dtype, m, 0).items()
    }
    y = scaled_linear(inputs["x"], prepared, None, *(inputs.get(name) for name in SCALES))
    with Products() as products:
        y.backward(torch.ones_like(y))
    assert n in products.summed, "the gradient of x was seen"
    assert (m in products.summed) == ("group" in inputs)
