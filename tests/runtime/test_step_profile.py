"""The profile of a step: its parts are all there, they add up, and the engine is idle again afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.engine.step_profile import OVERHEAD, main, profile_step
from peqa_runtime.errors import PromptTooLong
from peqa_runtime.sampling_params import SamplingParams

LEAN = {"matmul", "attention", "elementwise", "head", "call"}


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "modules"])
def test_parts_of_a_step(tiny_base: Path, lean: bool) -> None:
    engine = Engine(tiny_base, device="cpu", config=EngineConfig(num_blocks=96))
    if not lean:
        engine.model.lean = None
    for params in (None, SamplingParams(temperature=0.7, top_p=0.9, logprobs=2)):
        profile = profile_step(engine, sequences=5, context=20, steps=30, params=params)
        assert set(profile.parts) == LEAN | set(OVERHEAD) if lean else {"model"} | set(OVERHEAD) - {"call"}
        assert all(value >= 0 for value in profile.parts.values())
        assert sum(profile.parts.values()) > 0.99 * profile.milliseconds, "what is not in a part is the rest"
        assert 0 < profile.overhead < 1
        model = ("matmul", "attention", "elementwise", "head", "model")
        time = sum(profile.parts.get(name, 0.0) for name in model)
        assert profile.overhead == pytest.approx((sum(profile.parts.values()) - time) / profile.milliseconds)
        assert not engine.has_work
        assert engine.scheduler.blocks.num_used == 0
    with pytest.raises(PromptTooLong):
        profile_step(engine, sequences=1, context=500, steps=100)
    assert not engine.has_work


def test_the_command_prints_a_table(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tiny_base), "--sequences", "1", "3", "--context", "9", "--steps", "4", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "1 sequences after 9 tokens each" in printed
    assert "3 sequences after 9 tokens each" in printed
    assert printed.count("sampling together:") == 2
