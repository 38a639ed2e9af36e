"""What training has of the C library: every build that runs here against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peqa_kernels import native
from peqa_kernels.native.isa import usable
from peqa_kernels.native.training import NativeTraining


@pytest.fixture(params=[build.name for build in usable()])
def training(request: pytest.FixtureRequest) -> NativeTraining:
    """Each build that this CPU can run."""
    ops = native.load(request.param)
    assert ops is not None, "the C library is not built: python -m peqa_kernels.native.compile"
    return NativeTraining(ops)


def of_all_threads(function: object, *threads: int) -> list[Tensor]:
    before = torch.get_num_threads()
    try:
        found = []
        for count in threads:
            torch.set_num_threads(count)
            found.append(function())  # type: ignore[operator]
        return found
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 5), (64, 64), (67, 576), (200, 1100), (5, 4099), (0, 8)]
)
def test_sums_over_the_rows(training: NativeTraining, rows: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    a, b = (torch.randn(rows, columns).to(dtype) for _ in range(2))
    want = (a.double() * b.double()).sum(0)
    got = of_all_threads(lambda: training.column_dot(a, b), 1, 3, 8)
    assert all(torch.equal(one, got[0]) for one in got)
    torch.testing.assert_close(got[0].double(), want, rtol=1e-5, atol=1e-5 * max(rows, 1) ** 0.5)


def test_many_rows_do_not_add_up_to_a_large_error(training: NativeTraining) -> None:
    torch.manual_seed(0)
    a = torch.rand(20_000, 16).bfloat16()
    got = training.column_dot(a, torch.ones_like(a))
    assert ((got.double() - a.double().sum(0)).abs() / got).max() < 2e-6


def seen_by(kind: str, masks: int, tokens: int) -> Tensor | None:
    """Which keys each token sees."""
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if kind == "causal":
        return None
    if kind == "packed":
        owner = torch.randint(0, 3, (masks, tokens)).sort(-1).values
        return (owner[:, :, None] == owner[:, None, :]) & causal
    if kind == "holes":
        return (torch.rand(masks, tokens, tokens) < 0.5) & causal
    assert kind == "padded on the left"  # whose first tokens see nothing
    return (causal & (torch.arange(tokens) >= tokens // 3)).expand(masks, -1, -1).contiguous()


@pytest.mark.parametrize("kind", ["causal", "packed", "holes", "padded on the left"])
@pytest.mark.parametrize("masks", [1, 3])
@pytest.mark.parametrize(("tokens", "each"), [(1, 1), (7, 3), (37, 2), (64, 1)])
def test_weights_of_attention_and_their_way_back(
    training: NativeTraining, kind: str, masks: int, tokens: int, each: int
) -> None:
    """Heads 1 to 5 of three rows with two heads each."""
    torch.manual_seed(tokens)
    heads, scale, first = 5, 0.3, 1
    scores = torch.randn(heads, each * tokens, tokens) * 6
    slopes = torch.randn(scores.shape).bfloat16()
    seen = seen_by(kind, masks, tokens)
    shown = torch.ones(1, tokens, tokens, dtype=torch.bool).tril() if seen is None else seen
    of_head = [0 if len(shown) == 1 else (first + h) // 2 for h in range(heads)]
    unseen = ~shown[of_head].repeat(1, each, 1)
    exact = torch.softmax((scores.double() * scale).masked_fill(unseen, -1e30), -1)
    back = slopes.double()
    back = scale * exact * (back - (exact * back).sum(-1, keepdim=True))

    def both() -> Tensor:
        there = slopes.clone()
        weights = training.attention_weights(scores.clone(), seen, scale, first, 2, there)
        return torch.stack([weights, there])

    found = of_all_threads(both, 1, 3)
    assert torch.equal(*found)
    alone = training.attention_weights(scores.clone(), seen, scale, first, 2)
    assert torch.equal(alone, found[0][0])
    torch.testing.assert_close(alone.double(), exact, rtol=2**-8, atol=1e-7)
    torch.testing.assert_close(found[0][1].double(), back, rtol=2**-7, atol=1e-5)


def test_what_is_not_finite_stays_so(training: NativeTraining) -> None:
    scores = torch.randn(1, 4, 4)
    scores[0, 2, 1] = float("nan")
    weights = training.attention_weights(scores, None, 1.0)
    assert weights[0, 2, :3].isnan().all()
    assert weights[0, [0, 1, 3]].isfinite().all()
    large = torch.tensor([[3e38], [float("nan")], [float("inf")]]).bfloat16()
    assert training.column_dot(large.T.contiguous(), torch.ones(1, 3).bfloat16()).isfinite().tolist() == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, 5), (7, 1001), (3, 49_152)])
def test_cross_entropy_and_its_gradient(
    training: NativeTraining, rows: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(width)
    logits = (torch.randn(rows, width) * 8).to(dtype)
    targets = torch.randint(0, width, (rows,))
    exact = logits.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    want.sum().backward()
    slopes = torch.empty_like(logits)
    got = of_all_threads(lambda: training.losses(logits, targets, slopes), 1, 3)
    assert torch.equal(*got)
    assert torch.equal(training.losses(logits, targets), got[0])
    torch.testing.assert_close(got[0].double(), want.detach(), rtol=1e-5, atol=2e-5)
    off = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(slopes.double(), exact.grad, rtol=off, atol=1e-6)
    own = logits.clone()
    training.losses(own, targets, own)
    assert torch.equal(own, slopes), "the gradient may take the place of the logits"


def test_a_small_loss_keeps_its_digits(training: NativeTraining) -> None:
    logits = torch.full((2, 49_152), 40.0)
    logits[:, 7] = torch.tensor([60.0, 72.0])
    want = torch.nn.functional.cross_entropy(logits.double(), torch.tensor([7, 7]), reduction="none")
    got = training.losses(logits, torch.tensor([7, 7]))
    torch.testing.assert_close(got[0].double(), want[0], rtol=4e-3, atol=0.0)  # fp32, summed by 64 a lane
    assert 0.0 <= float(got[1]) < 1e-6


def test_a_loss_of_what_is_not_finite_is_not_finite(training: NativeTraining) -> None:
    logits = torch.randn(2, 40)
    logits[1, 39] = float("nan")
    slopes = torch.empty_like(logits)
    losses = training.losses(logits, torch.tensor([3, 3]), slopes)
    assert losses.isfinite().tolist() == [True, False]
    assert slopes.isfinite().all(1).tolist() == [True, False]


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 37), (40, 1536), (0, 8)])
def test_a_gate_and_its_way_back(
    training: NativeTraining, shape: tuple[int, ...], dtype: torch.dtype, off: float
) -> None:
    torch.manual_seed(len(shape))
    gate, up, slope = ((torch.randn(shape) * 4).to(dtype) for _ in range(3))
    exact = [gate.double().requires_grad_(), up.double().requires_grad_()]
    want = torch.nn.functional.silu(exact[0]) * exact[1]
    want.backward(slope.double())
    for threads in (1, 3):
        (got,) = of_all_threads(lambda: training.gate(gate, up), threads)
        torch.testing.assert_close(got.double(), want.detach(), rtol=off, atol=1e-6)
        (back,) = of_all_threads(lambda: torch.stack(training.gate_back(gate, up, slope)), threads)
        for found, one in zip(back, exact, strict=True):
            torch.testing.assert_close(found.double(), one.grad, rtol=off, atol=4e-6)


def test_a_gate_far_from_zero(training: NativeTraining) -> None:
    gate = torch.tensor([-3e38, -200.0, -88.5, 88.5, 200.0, 3e38])
    one = torch.ones_like(gate)
    torch.testing.assert_close(
        training.gate(gate, one), torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-35
    )
    by_gate, by_up = training.gate_back(gate, one, one)
    assert by_gate.tolist() == pytest.approx([0, 0, 0, 1, 1, 1], abs=1e-6)
    assert by_up.equal(training.gate(gate, one))
    odd = torch.tensor([float("nan"), 1.0, float("inf")])
    assert training.gate(odd, torch.ones(3)).isfinite().tolist() == [False, True, False]
    assert training.gate(torch.ones(3), odd).isfinite().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 37), (40, 576), (0, 8)])
def test_a_norm_and_its_way_back(training: NativeTraining, shape: tuple[int, ...]) -> None:
    torch.manual_seed(len(shape))
    x, slope, weight = torch.randn(shape) * 3, torch.randn(shape), torch.rand(shape[-1]) + 0.5
    exact = x.double().requires_grad_()
    want = torch.nn.functional.rms_norm(exact, shape[-1:], weight.double(), 1e-5)
    want.backward(slope.double())
    got = of_all_threads(lambda: training.norm(x, weight, 1e-5), 1, 3)
    assert torch.equal(*got)
    torch.testing.assert_close(got[0].double(), want.detach(), rtol=2e-6, atol=1e-6)
    back = of_all_threads(lambda: training.norm(x, weight, 1e-5, slope), 1, 3)
    assert torch.equal(*back)
    torch.testing.assert_close(back[0].double(), exact.grad, rtol=1e-5, atol=3e-6)


def test_a_row_that_is_not_finite_spoils_no_other(training: NativeTraining) -> None:
    x, weight = torch.randn(3, 20), torch.ones(20)
    x[1, 19] = float("nan")
    for slope in (None, torch.randn(3, 20)):
        assert training.norm(x, weight, 1e-5, slope).isfinite().all(1).tolist() == [True, False, True]
