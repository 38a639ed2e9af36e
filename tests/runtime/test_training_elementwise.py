"""Norms and gates of training in one pass: the losses and gradients that transformers' own forwards give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP

from peqa_kernels.native.training import native_training
from peqa_runtime.training import elementwise
from peqa_runtime.training.elementwise import fused_elementwise
from peqa_runtime.training.tuning import TunableModel, load_tunable, start_tuning

pytestmark = pytest.mark.skipif(native_training() is None, reason="the C library is not built")


def replaced(model: PreTrainedModel) -> list[str]:
    """Classes of the modules whose forward is another now, in order."""
    return sorted({type(module).__name__ for module in model.modules() if "forward" in vars(module)})


def step(tunable: TunableModel, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    scales = start_tuning(tunable, "channel+input")
    ids = torch.randint(0, 250, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = tunable.model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: scale.grad for name, scale in scales.items()}


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_losses_and_gradients_are_those_of_the_models_own_forwards(
    tiny_base: Path, dtype: torch.dtype, off: float
) -> None:
    tunable = load_tunable(tiny_base, device="cpu")
    want, wanted = step(tunable, dtype)
    with fused_elementwise(tunable.model):
        assert replaced(tunable.model) == ["LlamaMLP", "LlamaRMSNorm"]
        found, gradients = step(tunable, dtype)
    assert replaced(tunable.model) == []
    assert found == pytest.approx(want, rel=off / 10)
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() / wanted[name].norm() < off, name


def test_what_computes_otherwise_is_left_alone(tiny_base: Path) -> None:
    tunable = load_tunable(tiny_base, device="cpu")
    model = tunable.model
    for layer in model.model.layers:
        norm = GemmaRMSNorm(64)
        layer.input_layernorm = norm.requires_grad_(False)  # multiplies by 1 + weight
        layer.mlp.act_fn = ACT2FN["gelu"]
    model.model.layers[0].mlp = DropsSome(64, 128)
    trained = model.model.norm
    trained.weight.requires_grad_(True)
    with fused_elementwise(model):
        assert replaced(model) == ["LlamaRMSNorm"]
        assert "forward" not in vars(trained), "no gradient of a norm's weight would be made"
        assert "forward" in vars(model.model.layers[0].post_attention_layernorm)


class DropsSome(LlamaMLP):
    """As Llama's, when it is not trained."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__(LlamaConfig(hidden_size=hidden, intermediate_size=inner))

    def forward(self, x: Tensor) -> Tensor:
        """With dropout at the end."""
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_a_gradient_that_lies_otherwise(tiny_base: Path) -> None:
    """Of a sum it is one number for all, of a slice it is not in one piece."""
    model = load_tunable(tiny_base, device="cpu").model
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    drawn = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

    def gradients() -> list[Tensor]:
        found = []
        for module in (norm, mlp):
            for take in (lambda y: y.sum(), lambda y: (y.t()[::2] ** 2).sum()):
                x = drawn.clone().requires_grad_()
                take(module(x)).backward()
                found.append(x.grad)
        return found

    want = gradients()
    with fused_elementwise(model):
        found = gradients()
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_the_library_nothing_is_replaced(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "native_training", lambda: None)
    model = load_tunable(tiny_base, device="cpu").model
    with fused_elementwise(model):
        assert replaced(model) == []


def test_what_was_replaced_before_stays(tiny_base: Path) -> None:
    model = load_tunable(tiny_base, device="cpu").model
    calls: list[int] = []
    norm, own = model.model.norm, model.model.norm.forward

    def counted(hidden: Tensor) -> Tensor:
        calls.append(1)
        return own(hidden)

    nn.Module.__setattr__(norm, "forward", counted)
    with fused_elementwise(model), torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert calls == [1]
    assert norm.forward is counted


def test_an_error_inside_leaves_nothing_replaced(tiny_base: Path) -> None:
    model = load_tunable(tiny_base, device="cpu").model
    with pytest.raises(KeyboardInterrupt), fused_elementwise(model):
        raise KeyboardInterrupt
    assert replaced(model) == []
