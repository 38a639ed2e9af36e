"""What an engine does with its weights before the first request."""

from __future__ import annotations

from pathlib import Path

import pytest

from peqa_kernels.quant_matmul import PreparedWeight
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine


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
