"""What an engine does with its weights before the first request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peqa_kernels import quant_matmul
from peqa_kernels.quant_matmul import PreparedWeight
from peqa_runtime.engine import readiness
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.model.loader import load
from peqa_runtime.sampling_params import SamplingParams


@pytest.mark.parametrize("on", [False, True])
def test_the_mode_reaches_every_weight_and_the_attention(
    tiny_base: Path, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[PreparedWeight, bool] = {}
    monkeypatch.setattr(PreparedWeight, "set_row_invariant", lambda weight, on: told.__setitem__(weight, on))
    engine = Engine(tiny_base, device="cpu", config=EngineConfig(num_blocks=8, row_invariant=on))
    assert {linear.module.prepare() for linear in engine.model.linears} <= told.keys()
    assert set(told.values()) == {on}
    plans = []
    forward = engine.runner.forward
    monkeypatch.setattr(
        engine.runner, "forward", lambda given: plans.append(given.context.plan) or forward(given)
    )
    engine.generate(["a"])
    assert {plan.invariant for plan in plans} == {on}


@pytest.mark.parametrize("on", [False, True])
def test_on_a_gpu_the_mode_reaches_floats_too_and_says_what_it_does_not_reach(
    architecture_base: Callable[..., Path],
    on: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu_tune = pytest.importorskip("peqa_kernels.quant_matmul.gpu_tune")
    model = load(architecture_base("mixtral", num_local_experts=4), device="cpu", verify=False)
    monkeypatch.setattr(gpu_tune, "warm_up", lambda *_: None)
    monkeypatch.setattr(readiness, "warm_up_attention", lambda *_, **__: None)
    on_gpu = SimpleNamespace(**{**vars(model), "device": torch.device("cuda")})
    readiness.make_ready(on_gpu, EngineConfig(row_invariant=on))  # type: ignore[arg-type]
    assert model.model.lm_head.part == (64 if on else None)
    assert ("does not reach" in caplog.text) is on


def test_activations_of_8_bits_change_answers_but_not_from_batch_to_batch(tiny_base: Path) -> None:
    prompts = [[5, 6, 7, 8], [9, 10], [11] * 20]
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=1, ignore_eos=True)
    fine, coarse = (
        Engine(tiny_base, device="cpu", config=EngineConfig(num_blocks=32, activation_bits=bits))
        for bits in (16, 8)
    )
    want = [coarse.generate([prompt], params)[0] for prompt in prompts]
    assert coarse.generate(prompts, params) == want
    assert fine.generate(prompts, params) != want


@pytest.mark.parametrize("bits", [4, 0, 32])
def test_activation_bits_are_16_or_8(bits: int) -> None:
    with pytest.raises(ValueError, match="activation_bits must be"):
        EngineConfig(activation_bits=bits)


def test_activations_of_8_bits_where_there_are_no_kernels_for_them(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant_matmul, "_native_ops", lambda: None)
    with pytest.raises(ValueError, match="activations of 8 bits need the compiled CPU kernels"):
        Engine(tiny_base, device="cpu", config=EngineConfig(num_blocks=8, activation_bits=8))
