"""GPTQ of one weight: against a loop that removes one input at a time, and against rounding to nearest."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peqa_kernels.packing import unpack_codes
from peqa_kernels.quant_matmul import dequantize
from peqa_runtime.errors import InvalidRequest
from peqa_runtime.model import quantize_rtn
from peqa_runtime.model.base_checkpoint import Precision
from peqa_runtime.model.quantizers import gptq as module
from peqa_runtime.model.quantizers.gptq import GptqOptions, Hessian, gptq, output_error
from peqa_runtime.model.quantizers.rounding import fit

DAMPING = 0.02


def inputs(columns: int, tokens: int = 600, seed: int = 0) -> Tensor:
    """Correlated activations: a few directions carry most of them."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns // 6, generator=generator) @ torch.randn(
        columns // 6, columns, generator=generator
    )
    return mixed + 0.3 * torch.randn(tokens, columns, generator=generator)


def second_moment(x: Tensor) -> Tensor:
    return (x.double().t() @ x.double()) / len(x)


def naive(weight: Tensor, hessian: Tensor, bits: int, size: int, options: GptqOptions) -> Tensor:
    """Optimal brain quantizer with a fixed order, by the book: the inverse is updated after each column. fp64."""
    columns = weight.shape[1]
    work = weight.double().clone()
    damped = hessian + options.damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    order = hessian.diagonal().argsort(descending=True, stable=True) if options.act_order else range(columns)
    importance = hessian.diagonal().sqrt().float().view(-1, size)
    importance = importance / (importance.square().mean()).sqrt()
    _, scales, zeros = fit(weight.view(len(weight), -1, size), bits, importance)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for k in (int(k) for k in order):
        group = k // size
        if not options.static_groups and k % size == 0:
            part = work[:, k : k + size].float().unsqueeze(1)
            _, scales[:, group : group + 1], zeros[:, group : group + 1] = fit(
                part, bits, importance[group : group + 1]
            )
        scale, zero = scales[:, group].double(), zeros[:, group].double()
        code = (work[:, k] / scale + zero).round().clamp(0, 2**bits - 1)
        codes[:, k] = code.to(torch.uint8)
        error = (work[:, k] - (code - zero) * scale) / inverse[k, k]
        work -= error[:, None] * inverse[k]
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes


@pytest.mark.parametrize("count", [5, 128, 300, 800])
def test_the_square_of_a_matrix_is_whole(count: int) -> None:
    rows = torch.randn(40, count, generator=torch.Generator().manual_seed(0))
    found = module._square(rows)
    assert torch.allclose(found, rows.t() @ rows, rtol=1e-5, atol=1e-5)


def test_windows_count_together_as_they_do_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some the first token is loud: it is held down by its own window."""
    monkeypatch.setattr(module, "_TOKENS", 20)
    windows = torch.randn(5, 8, 160, generator=torch.Generator().manual_seed(0))
    windows[::2, 0] *= 100
    together, alone = Hessian(160), Hessian(160)
    together.add(windows)
    together.add(windows[:0])
    for window in windows:
        alone.add(window)
    assert together.tokens == alone.tokens == 40
    assert torch.allclose(together.mean(), alone.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "act_order", "static"),
    [(16, False, False), (16, False, True), (16, True, True), (-1, False, False), (64, False, False)],
)
def test_equals_the_loop_by_the_book(
    bits: int, group_size: int, act_order: bool, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_COLUMNS", 48)  # the last block is not full, and groups of 64 are wider
    columns = 128
    torch.manual_seed(bits)
    weight = torch.randn(9, columns) * 0.1
    hessian = second_moment(inputs(columns))
    options = GptqOptions(DAMPING, act_order, static)
    found = gptq(weight, hessian, Precision(bits, group_size), options)
    expected = naive(weight, hessian, bits, columns if group_size == -1 else group_size, options)
    assert torch.equal(unpack_codes(found.weight.qweight, bits, columns), expected)
    assert found.weight.groups == (1 if group_size == -1 else columns // group_size)
    assert found.error == pytest.approx(output_error(weight, dequantize(found.weight), hessian), rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_outputs_are_closer_than_rounding_makes_them(bits: int, group_size: int) -> None:
    torch.manual_seed(0)
    weight, x, fresh = torch.randn(48, 256) * 0.1, inputs(256), inputs(256)[:100]
    made = Hessian(256)
    for part in x.split(150):
        made.add(part)
    rounded = dequantize(quantize_rtn(weight, bits, group_size))
    found = dequantize(gptq(weight, made.mean(), Precision(bits, group_size), GptqOptions()).weight)

    def error(quantized: Tensor) -> float:
        return float(((quantized - weight) @ fresh.t()).square().sum())

    assert error(found) < 0.3 * error(rounded)


@pytest.mark.parametrize("bits", [2, 3])
def test_ranges_are_fitted_to_the_inputs_that_count(bits: int) -> None:
    """Each group has one input of a hundred times the power; its weights come out far closer than the others."""
    torch.manual_seed(0)
    weight, x = torch.randn(40, 64), torch.randn(500, 64)
    x[:, ::32] *= 10
    found = dequantize(gptq(weight, second_moment(x), Precision(bits, 32), GptqOptions()).weight)
    error = (found - weight).square().mean(0)
    assert error[::32].mean() < 0.8 * error.mean()


def test_settled_weights_round_to_the_codes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 64)
    found = gptq(weight, second_moment(inputs(64)), Precision(3, 32), GptqOptions())
    scales, zeros = (v.repeat_interleave(32, 1) for v in (found.weight.scales, found.weight.zeros))
    codes = (found.settled / scales + zeros).round().clamp(0, 7)
    assert torch.equal(codes.to(torch.uint8), unpack_codes(found.weight.qweight, 3, 64))
    assert not torch.equal(found.settled, weight)


def test_dead_inputs_are_rounded_to_nearest() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(12, 64), inputs(64)
    x[:, 7] = 0
    hessian = second_moment(x)
    found = gptq(weight, hessian, Precision(4, 64), GptqOptions())
    assert torch.equal(found.settled[:, 7], weight[:, 7])
    nothing = gptq(weight, torch.zeros(64, 64, dtype=torch.float64), Precision(4, 64), GptqOptions())
    assert torch.equal(nothing.settled, weight)
    assert nothing.error == 0


def test_a_hessian_of_few_tokens_is_damped_until_it_can_be_inverted() -> None:
    weight, x = torch.randn(4, 64), torch.randn(1, 64)
    found = gptq(weight, second_moment(x * 1e4), Precision(4, 64), GptqOptions(damping=1e-18))
    assert math.isfinite(found.error)


def test_rows_at_a_time_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, hessian = torch.randn(20, 64), second_moment(inputs(64))
    whole = gptq(weight, hessian, Precision(3, 32), GptqOptions())
    monkeypatch.setattr(module, "_ELEMENTS", 3 * 64)
    assert torch.equal(
        whole.weight.qweight, gptq(weight, hessian, Precision(3, 32), GptqOptions()).weight.qweight
    )


def test_whole_zeros_stay_codes() -> None:
    torch.manual_seed(0)
    weight, hessian = torch.randn(20, 64) + 0.3, second_moment(inputs(64))
    for act_order in (False, True):
        options = GptqOptions(act_order=act_order, static_groups=act_order)
        zeros = gptq(weight, hessian, Precision(3, 32), options, integer_zeros=True).weight.zeros
        assert torch.equal(zeros, zeros.round())
        assert zeros.min() >= 0
        assert zeros.max() <= 7


def test_the_hessian_caps_loud_tokens_only() -> None:
    x = torch.randn(50, 8)
    quiet = Hessian(8)
    for part in x.split(20):
        quiet.add(part)
    torch.testing.assert_close(quiet.mean(), second_moment(x), rtol=1e-5, atol=1e-6)
    assert quiet.tokens == 50
    loud = Hessian(8)
    loud.add(torch.cat([x, torch.full((1, 8), 1000.0)]))
    limit = 4 * float(torch.cat([x, torch.full((1, 8), 1000.0)]).square().sum(-1).median())
    assert float(loud.mean().trace()) * 51 == pytest.approx(float(x.square().sum()) + limit, rel=1e-4)


def test_what_cannot_be_is_refused() -> None:
    weight, hessian = torch.randn(4, 64), second_moment(inputs(64))
    scattered = GptqOptions(act_order=True, static_groups=False)
    with pytest.raises(ValueError, match="use static groups"):
        gptq(weight, hessian, Precision(4, 32), scattered)
    gptq(weight, hessian, Precision(4, -1), scattered)  # one group holds every input, in any order
    with pytest.raises(ValueError, match="activations hold NaN"):
        gptq(weight, hessian * math.nan, Precision(4, 32), GptqOptions())
    with pytest.raises(ValueError, match="weight holds NaN"):
        gptq(weight * math.inf, hessian, Precision(4, 32), GptqOptions())
    with pytest.raises(InvalidRequest, match="damping must be above 0"):
        GptqOptions(damping=0)
