"""What an engine does with its weights before the first request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peqa_kernels.quant_matmul import PreparedWeight
from peqa_runtime.engine import readiness
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.model.loader import load


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
