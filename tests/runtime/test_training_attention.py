"""The trainer's own attention on a CPU: values and gradients of torch's, and used where it is meant to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peqa_runtime.training import attention
from peqa_runtime.training.attention import attention_forward, tuning_attention
from peqa_runtime.training.tuning import load_tunable, logits_at, start_tuning


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 3


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call that was not handed on to transformers."""
    seen: list[int] = []
    apply = attention._Attention.apply

    def counted(*args: Tensor) -> Tensor:
        seen.append(args[0].shape[2])
        return apply(*args)

    monkeypatch.setattr(attention._Attention, "apply", counted)
    return seen


def run(function: object, tensors: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out, _ = function(Layer(), *leaves, mask, scaling=0.2)  # type: ignore[operator]
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("tokens", [2, 37, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_torch(tokens: int, masked: bool, calls: list[int]) -> None:
    torch.manual_seed(tokens)
    tensors = [torch.randn(5, heads, tokens, 16).bfloat16() for heads in (9, 3, 3)]
    mask = None
    if masked:  # examples of unlike lengths packed into each row
        owner = torch.randint(0, 3, (5, tokens)).sort(-1).values
        mask = (owner[:, None, :, None] == owner[:, None, None, :]) & torch.ones(tokens, tokens).tril().bool()
    exact = run(sdpa_attention_forward, [tensor.double() for tensor in tensors], mask)
    theirs = run(sdpa_attention_forward, tensors, mask)
    ours = run(attention_forward, tensors, mask)
    assert calls == [tokens]
    for name, own, their, wanted in zip(("out", "q", "k", "v"), ours, theirs, exact, strict=True):
        errors = [((x.double() - wanted).norm() / wanted.norm()).item() for x in (own, their)]
        assert errors[0] < max(1.5 * errors[1], 6e-3), name


def test_what_is_unusual_goes_to_transformers(calls: list[int]) -> None:
    tensors = [torch.randn(2, heads, 8, 16).bfloat16() for heads in (9, 3, 3)]
    run(attention_forward, [tensor.float() for tensor in tensors], None)
    run(attention_forward, tensors, torch.zeros(2, 1, 8, 8).bfloat16())
    with torch.no_grad():
        attention_forward(Layer(), *tensors, None, scaling=0.2)
    assert calls == []


def test_a_model_has_it_while_it_is_tuned(tiny_base: Path, calls: list[int]) -> None:
    torch.set_num_threads(1)
    tunable = load_tunable(tiny_base, device="cpu")
    scales = start_tuning(tunable, "channel")
    ids, places = torch.tensor([[5, 6, 7, 8]]), torch.tensor([1, 3])
    found: list[Tensor] = []
    for own in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if own:
                with tuning_attention(tunable.model):
                    logits = logits_at(tunable.model, ids, places)
            else:
                logits = logits_at(tunable.model, ids, places)
        logits.logsumexp(-1).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in scales.values() if p.grad is not None]))
        for p in scales.values():
            p.grad = None
    assert calls == [4] * tunable.model.config.num_hidden_layers
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()
    assert tunable.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("masked", [False, True])
def test_without_the_library_torch_gives_the_same(
    masked: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(3, heads, 21, 16).bfloat16() for heads in (4, 2, 2)]
    mask = torch.ones(3, 1, 21, 21, dtype=torch.bool).tril() if masked else None
    if mask is not None:
        mask[1, :, :, :5] = False  # the first tokens of the second row see nothing
    with_it = run(attention_forward, tensors, mask)
    monkeypatch.setattr(attention, "native_training", lambda: None)
    without = run(attention_forward, tensors, mask)
    assert calls == [21, 21]
    for ours, theirs in zip(with_it, without, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0.05, atol=0.05)
