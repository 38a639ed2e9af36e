"""Modules over codes: base, bank rows and trainable scales give the formula; casts and moves keep the codes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from peqa_kernels.quant_matmul import dequantize
from peqa_kernels.quant_matmul.weight import LinearBank, QuantizedWeight
from peqa_runtime.errors import UnsupportedModel
from peqa_runtime.model import QuantizedEmbedding, QuantizedLinear, StepRows, TiedHead, quantize_rtn
from peqa_runtime.model.quantized_linear import TunedParts

K, N = 64, 40


def fill(module: nn.Module, weight: QuantizedWeight) -> None:
    for leaf in ("qweight", "scales", "zeros"):
        getattr(module, leaf).data.copy_(getattr(weight, leaf))


def linear(bits: int = 4, group_size: int = 32, bias: bool = True, seed: int = 0) -> QuantizedLinear:
    torch.manual_seed(seed)
    made = QuantizedLinear(K, N, bits, group_size, bias)
    fill(made, quantize_rtn(torch.randn(N, K), bits, group_size))
    if made.bias is not None:
        made.bias.data.normal_()
    return made


def formula(x: Tensor, made: QuantizedLinear, out: Tensor, into: Tensor, group: Tensor) -> Tensor:
    """The design's sum, for one task: out [N], into [K], group [N, G]."""
    weight = dequantize(made.weight_codes()).view(N, -1, made.group_size) * group[..., None]
    y = ((x * into) @ weight.view(N, K).T) * out
    return y if made.bias is None else y + made.bias


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for what rounding activations to 16 bits adds."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def scales(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_base(bits: int, group_size: int, bias: bool) -> None:
    made = linear(bits, group_size, bias)
    x = torch.randn(2, 5, K)
    one = torch.ones(1)
    expected = formula(x, made, one, one, torch.ones_like(made.scales))
    with torch.no_grad():
        found = made(x)
    assert found.shape == (2, 5, N)
    close(found, expected)


def test_rows_of_a_bank() -> None:
    """Every token under its own row, other scales in each; the holder is read at each forward."""
    made = linear()
    bank = LinearBank((N,), scales(1, 3, N), scales(2, 3, 1, K), scales(3, 2, 2, N))
    for tensor in (bank.out_scale, bank.in_scale, bank.group_scale):
        tensor[0] = 1.0
    rows = StepRows()
    made.attach(bank, rows)
    x = torch.randn(1, 4, K)
    with torch.no_grad():
        base = made(x)
        rows.row = torch.tensor([2, 0, 1, 2], dtype=torch.int32)
        rows.group_row = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
        found = made(x)
    for m, (r, g) in enumerate([(2, 0), (0, 0), (1, 1), (2, 1)]):
        expected = formula(x[0, m], made, bank.out_scale[r], bank.in_scale[r, 0], bank.group_scale[g].T)
        close(found[0, m], expected)
    assert torch.equal(found[0, 1], base[0, 1]), "row 0 is the base, bit for bit"
    assert not torch.allclose(found[0, 0], base[0, 0])


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("channel", {"tuned.0.out_scale": (N,)}),
        ("channel+input", {"tuned.0.out_scale": (N,), "tuned.0.in_scale": (K,)}),
        ("group", {"tuned.0.group_scale": (N, 2)}),
    ],
)
def test_tuned_scales_and_their_gradients(kind: str, names: dict[str, tuple[int, ...]]) -> None:
    made = linear()
    made.tune(kind)
    trainable = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert {name: tuple(p.shape) for name, p in trainable.items()} == names
    assert all((p == 1).all() and p.dtype == torch.float32 for p in trainable.values())
    for i, parameter in enumerate(trainable.values()):
        parameter.data.copy_(scales(i, *parameter.shape))
    x = torch.randn(3, K, requires_grad=True)
    dy = torch.randn(3, N)
    made(x).backward(dy)
    found = {"x": x.grad, **{name: p.grad for name, p in trainable.items()}}
    leaves = {name: p.detach().clone().requires_grad_() for name, p in trainable.items()}
    leaves["x"] = x.detach().clone().requires_grad_()
    expected = formula(
        leaves["x"],
        made,
        leaves.get("tuned.0.out_scale", torch.ones(N)),
        leaves.get("tuned.0.in_scale", torch.ones(K)),
        leaves.get("tuned.0.group_scale", torch.ones(N, 2)),
    )
    with torch.no_grad():
        close(made(x), expected)
    expected.backward(dy)
    for name, leaf in leaves.items():
        torch.testing.assert_close(
            found[name], leaf.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert all(
        not p.requires_grad and p.grad is None for p in (made.qweight, made.scales, made.zeros, made.bias)
    )


def test_tuning_starts_at_the_base_and_ends() -> None:
    made = linear()
    x = torch.randn(9, K)
    with torch.no_grad():
        base = made(x)
        made.tune("channel+input")
        close(made(x), base)
        made.tune("channel")
        assert made.tuned[0].in_scale is None
        made.tune(None)
        assert torch.equal(made(x), base)
    assert not [p for p in made.parameters() if p.requires_grad]


def test_each_row_trains_the_set_that_it_is_under() -> None:
    """Several sets in one product: values and gradients are those of each set's rows alone; base rows train none."""
    made, alone = linear(), linear()
    parts = TunedParts(((1, 2), (None, 3), (0, 4)))
    made.tune("channel+input", 2, parts)
    for i, parameter in enumerate(p for p in made.parameters() if p.requires_grad):
        parameter.data.copy_(scales(i, *parameter.shape))
    x, dy = torch.randn(9, K), torch.randn(9, N)
    found = made(x)
    found.backward(dy)
    for index, rows in ((1, slice(0, 2)), (0, slice(5, 9))):
        alone.tune("channel+input")
        for name, parameter in alone.tuned[0].named_parameters():
            parameter.data.copy_(made.tuned[index].get_parameter(name).data)
        expected = alone(x[rows])
        expected.backward(dy[rows])
        torch.testing.assert_close(found[rows], expected)
        for name, parameter in alone.tuned[0].named_parameters():
            torch.testing.assert_close(made.tuned[index].get_parameter(name).grad, parameter.grad)
    alone.tune(None)
    torch.testing.assert_close(found[2:5], alone(x[2:5]))
    with pytest.raises(UnsupportedModel, match="one at a time"):
        made(x[:8])


def test_gradient_passes_a_linear_that_is_not_tuned() -> None:
    made = linear()
    x = torch.randn(3, K, requires_grad=True)
    made(x).sum().backward()
    torch.testing.assert_close(
        x.grad, dequantize(made.weight_codes()).sum(0).expand(3, K), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_the_codes_alone(dtype: torch.dtype) -> None:
    made = linear()
    made.tune("channel")
    embedding = QuantizedEmbedding(N, K, 8, 32, torch.float32)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    model = nn.ModuleList([made, embedding, nn.Linear(2, 2)]).to(dtype)
    assert model[2].weight.dtype == dtype
    for name, parameter in made.named_parameters():
        assert parameter.dtype == before[name].dtype
        assert torch.equal(parameter, before[name])
    assert embedding.scales.dtype == torch.float32
    assert embedding(torch.tensor([1])).dtype == dtype


def test_result_follows_the_dtype_of_the_input() -> None:
    made = linear()
    x = torch.randn(8, K)
    with torch.no_grad():
        exact, rounded = made(x), made(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert ((rounded.float() - exact).square().mean() / exact.square().mean()).sqrt() < 0.01


def test_new_codes_are_laid_out_anew_after_a_move() -> None:
    made = linear()
    x = torch.randn(4, K)
    with torch.no_grad():
        made(x)
        fill(made, quantize_rtn(torch.randn(N, K), 4, 32))
        made.to("cpu")
        one = torch.ones(1)
        close(made(x), formula(x, made, one, one, torch.ones_like(made.scales)))


def test_state_dict_and_deepcopy() -> None:
    made = linear()
    assert sorted(made.state_dict()) == ["bias", "qweight", "scales", "zeros"]
    assert not list(made.buffers()), "DDP broadcasts buffers at every step"
    twin = copy.deepcopy(made)
    x = torch.randn(4, K)
    with torch.no_grad():
        assert torch.equal(twin(x), made(x))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_embedding_is_exact(bits: int) -> None:
    torch.manual_seed(0)
    weight = quantize_rtn(torch.randn(50, K), bits, 32)
    embedding = QuantizedEmbedding(50, K, bits, 32, torch.float32)
    fill(embedding, weight)
    ids = torch.tensor([[3, 49, 0], [7, 7, 1]])
    assert torch.equal(embedding(ids), dequantize(weight)[ids])


def test_tied_head_multiplies_by_the_embedding() -> None:
    torch.manual_seed(0)
    embedding = QuantizedEmbedding(50, K, 8, 32, torch.float32)
    fill(embedding, quantize_rtn(torch.randn(50, K), 8, 32))
    head = TiedHead(embedding)
    assert not head.state_dict()
    assert not list(head.modules())[1:], "the embedding is not a child: it would be saved twice"
    hidden = torch.randn(2, 3, K)
    expected = hidden @ dequantize(embedding.weight_codes()).T
    with torch.no_grad():
        close(head(hidden), expected)
    hidden.requires_grad_()
    head(hidden).sum().backward()
    expected_grad = dequantize(embedding.weight_codes()).sum(0).expand_as(hidden)
    torch.testing.assert_close(hidden.grad, expected_grad, rtol=1e-4, atol=1e-4)
