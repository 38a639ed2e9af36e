"""Block-wise training: its rounding and gradients, what it gains, and that it keeps the best."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peqa_kernels.packing import unpack_codes
from peqa_kernels.quant_matmul import dequantize
from peqa_runtime.errors import InvalidRequest
from peqa_runtime.model.base_checkpoint import Precision
from peqa_runtime.model.quantizers.block import Block, BlockOptions, BlockResult
from peqa_runtime.model.quantizers.blockwise import (
    BlockTrainer,
    TrainedLinear,
    TrainingOptions,
    token_error,
)
from peqa_runtime.model.quantizers.gptq import GptqOptions, Rounded, gptq
from peqa_runtime.model.quantizers.plan import LinearPlan, Method
from peqa_runtime.model.quantizers.skeleton import Call
from peqa_runtime.model.quantizers.workbench import HiddenStates

CPU = torch.device("cpu")
WINDOWS, TOKENS, WIDTH = 32, 24, 32


class Mixer(nn.Module):
    """A small block: two linears on one input, a third on what they give, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gate, self.up = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64, bias=False)
        self.down = nn.Linear(64, WIDTH)
        for linear in (self.gate, self.up, self.down):
            nn.init.normal_(linear.weight, std=0.2)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        normed = nn.functional.rms_norm(hidden, (WIDTH,))
        return (hidden + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed)),)


def states(folder: Path, name: str, seed: int = 0) -> HiddenStates:
    found = HiddenStates(folder / name, WINDOWS, TOKENS, WIDTH)
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) * 0.9 ** torch.arange(WIDTH)
    found.write(torch.randn(1, TOKENS, WIDTH, generator=generator) @ mix.t() for _ in range(WINDOWS))
    return found


def quantized(
    folder: Path, bits: int, method: Method, group_size: int = 16, **options: object
) -> tuple[float, BlockResult, Mixer]:
    """Error of the block's outputs on all windows, its result, and the block."""
    module = Mixer()
    inputs, targets = states(folder, "in.f32"), HiddenStates(folder / "out.f32", WINDOWS, TOKENS, WIDTH)
    linears = {name: getattr(module, name) for name in ("gate", "up", "down")}
    block = Block(
        module, linears, dict.fromkeys(linears, LinearPlan(bits, group_size, method)), Call((), {}), CPU
    )
    targets.write(block.outputs(inputs))
    settings = BlockOptions(GptqOptions(), TrainingOptions(**{"batch": 2, **options}))  # type: ignore[arg-type]
    result = block.quantize(inputs, targets, settings)
    errors = [token_error(found, targets.read(i)) for i, found in enumerate(block.outputs(inputs))]
    return float(torch.stack(errors).mean()), result, module


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("group_size", [16, -1])
def test_gptq_is_better_than_rounding_and_training_never_worse(
    tmp_path: Path, bits: int, group_size: int
) -> None:
    """Of the block's outputs; this block is almost linear, so that little is left to gain after GPTQ."""
    rounded, _, _ = quantized(tmp_path, bits, "rtn", group_size)
    by_gptq, _, _ = quantized(tmp_path, bits, "gptq", group_size)
    trained, result, module = quantized(tmp_path, bits, "blockwise", group_size)
    assert by_gptq < 0.7 * rounded
    assert trained < 1.02 * by_gptq  # on all windows; the held-out ones decide
    assert result.gain is not None
    assert result.gain.after <= result.gain.before
    for name, weight in result.weights.items():
        assert torch.equal(getattr(module, name).weight, dequantize(weight))


def test_the_seed_decides(tmp_path: Path) -> None:
    def codes() -> list[Tensor]:
        _, result, _ = quantized(tmp_path, 2, "blockwise", epochs=1)
        return [getattr(w, leaf) for w in result.weights.values() for leaf in ("qweight", "scales", "zeros")]

    assert all(torch.equal(a, b) for a, b in zip(codes(), codes(), strict=True))


def test_training_that_does_harm_changes_nothing(tmp_path: Path) -> None:
    _, before, _ = quantized(tmp_path, 4, "gptq")
    _, after, _ = quantized(tmp_path, 4, "blockwise", weight_rate=3.0, scale_rate=1.0)
    assert after.gain is not None
    assert after.gain.before == after.gain.after
    for name, weight in before.weights.items():
        assert torch.equal(weight.qweight, after.weights[name].qweight)
        torch.testing.assert_close(weight.scales, after.weights[name].scales, rtol=1e-6, atol=0)


def test_it_stops_when_nothing_is_gained(tmp_path: Path) -> None:
    _, result, _ = quantized(tmp_path, 4, "blockwise", weight_rate=3.0, scale_rate=1.0, epochs=50, patience=1)
    assert result.gain is not None
    assert result.gain.steps < 30


def test_whole_zeros_are_not_trained(tmp_path: Path) -> None:
    start = made(integer_zeros=True)
    linear = TrainedLinear(start, None, train_zeros=False)
    assert [p.requires_grad for p in (linear.place, linear.theta, linear.zero)] == [True, True, False]
    assert torch.equal(linear.freeze().zeros, start.weight.zeros)


def made(*, integer_zeros: bool = False) -> Rounded:
    torch.manual_seed(0)
    x = torch.randn(200, 32, dtype=torch.float64)
    precision = Precision(3, 16)
    return gptq(torch.randn(8, 32), x.t() @ x, precision, GptqOptions(), integer_zeros=integer_zeros)


def test_the_start_is_what_gptq_gave() -> None:
    start = made()
    linear = TrainedLinear(start, None, train_zeros=True)
    found = linear.freeze()
    assert torch.equal(unpack_codes(found.qweight, 3, 32), unpack_codes(start.weight.qweight, 3, 32))
    torch.testing.assert_close(dequantize(found), dequantize(start.weight))
    linear.begin()
    torch.testing.assert_close(linear.forward(torch.eye(32)).t(), dequantize(start.weight))


def test_gradients_pass_straight_through_the_rounding() -> None:
    """Against autograd on the formula with the rounding's residual held constant."""
    linear = TrainedLinear(made(), None, train_zeros=True)
    with torch.no_grad():
        linear.place += torch.randn_like(linear.place) * 2  # some leave the range
        linear.theta += torch.randn_like(linear.theta) * 0.2
        linear.zero += torch.randn_like(linear.zero)
    given = torch.randn(8, 32)
    linear.begin()
    (linear.forward(torch.eye(32)).t() * given).sum().backward()
    linear.end()
    place, theta, zero = (
        p.detach().clone().requires_grad_() for p in (linear.place, linear.theta, linear.zero)
    )
    position = place * torch.exp(-theta) + zero
    residual = (position.round() - position).detach()
    codes = position + residual
    inside = (codes >= 0) & (codes <= 7)
    assert 0 < int(inside.sum()) < inside.numel()
    codes = torch.where(inside, codes, codes.detach().clamp(0, 7))
    weight = (codes - zero) * linear.step * torch.exp(theta)
    (weight.view(8, 32) * given).sum().backward()
    for found, expected in ((linear.place, place), (linear.theta, theta), (linear.zero, zero)):
        assert found.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_held_out_windows_are_not_trained_on(tmp_path: Path) -> None:
    inputs = states(tmp_path, "in.f32")
    trainer = BlockTrainer({}, lambda x: x, inputs, inputs, TrainingOptions(held_out=0.25), 7, CPU)
    assert len(trainer.held) == 8
    assert sorted(trainer.held + trainer.train) == list(range(WINDOWS))


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"batch": 0},
        {"weight_rate": -1},
        {"scale_rate": math.nan},
        {"held_out": 0.6},
        {"looks": 0},
    ],
)
def test_numbers_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(options))):
        TrainingOptions(**options)  # type: ignore[arg-type]
