"""How calibration windows go through a block: all together where that is right and fits, else one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peqa_runtime.model.quantizers import block as module
from peqa_runtime.model.quantizers.block import Block, BlockOptions, BlockResult
from peqa_runtime.model.quantizers.blockwise import TrainingOptions
from peqa_runtime.model.quantizers.gptq import GptqOptions
from peqa_runtime.model.quantizers.plan import LinearPlan
from peqa_runtime.model.quantizers.skeleton import Call
from peqa_runtime.model.quantizers.workbench import HiddenStates

WINDOWS, TOKENS, WIDTH = 12, 24, 32
NAMES = ("gate", "up", "down", "idle")


class Perceptron(nn.Module):
    """Two linears on one input, a third on what they give, and one that no token reaches."""

    def __init__(self, centre: bool = False, single: bool = False, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gate, self.up, self.idle = (nn.Linear(WIDTH, 64, bias=False) for _ in range(3))
        self.down = nn.Linear(64, WIDTH)
        self.centre, self.single, self.twice, self.calls = centre, single, twice, 0
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        self.calls += 1
        if self.single and len(hidden) > 1:
            raise ValueError("one window, please")
        if self.centre:  # over all windows: together they are something else than alone
            hidden = hidden - hidden.mean((0, 1))
        if self.twice:  # one linear on two inputs, each time beside another one
            return (
                hidden
                + self.down(self.gate(hidden) * self.up(hidden) + self.gate(-hidden) * self.idle(hidden)),
            )
        return (hidden + self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden)),)


def windows(folder: Path) -> HiddenStates:
    found = HiddenStates(folder / "in.f32", WINDOWS, TOKENS, WIDTH)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) * 0.9 ** torch.arange(WIDTH)
    found.write(torch.randn(1, TOKENS, WIDTH, generator=generator) @ mix.t() for _ in range(WINDOWS))
    return found


def quantized(folder: Path, perceptron: Perceptron) -> tuple[BlockResult, Tensor]:
    """The result, and what the quantized block then makes of each window alone."""
    inputs = windows(folder)
    linears = {name: getattr(perceptron, name) for name in NAMES}
    plans = dict.fromkeys(linears, LinearPlan(3, 16, "gptq"))
    block = Block(perceptron, linears, plans, Call((), {}), torch.device("cpu"))
    result = block.quantize(inputs, None, BlockOptions(GptqOptions(), TrainingOptions()))
    return result, torch.cat(list(block.outputs(inputs)))


def test_all_windows_together_give_what_they_give_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, alone = Perceptron(), Perceptron()
    found, outputs = quantized(tmp_path, together)
    monkeypatch.setattr(module, "_AT_ONCE", 0)
    wanted, _ = quantized(tmp_path, alone)
    assert together.calls < alone.calls - WINDOWS
    assert found.weights.keys() == wanted.weights.keys() == set(NAMES)
    for name in NAMES:
        assert torch.equal(found.weights[name].qweight, wanted.weights[name].qweight), name
        torch.testing.assert_close(found.weights[name].scales, wanted.weights[name].scales)
    assert found.errors == pytest.approx(wanted.errors, rel=1e-4)
    assert wanted.outputs is None
    assert found.outputs is not None
    torch.testing.assert_close(found.outputs, outputs)


@pytest.mark.parametrize("kind", ["centre", "single", "twice"])
def test_a_block_that_wants_one_window_gets_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = quantized(tmp_path, Perceptron(**{kind: True}))
    monkeypatch.setattr(module, "_AT_ONCE", 0)
    wanted, _ = quantized(tmp_path, Perceptron(**{kind: True}))
    assert found.outputs is None
    for name in NAMES:
        assert torch.equal(found.weights[name].qweight, wanted.weights[name].qweight), name
