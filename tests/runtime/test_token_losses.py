"""The loss of each token without all logits at once: the loss and the gradients that all logits give."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from peqa_kernels.quant_matmul import backward
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.model.quantized_linear import QuantizedEmbedding, TiedHead
from peqa_runtime.training import token_losses as module
from peqa_runtime.training.token_losses import has_plain_head, token_losses
from peqa_runtime.training.tuning import TunableModel, load_tunable, logits_at, start_tuning

Losses = Callable[[TunableModel, Tensor, Tensor, Tensor], Tensor]


def at_once(tunable: TunableModel, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits_at(tunable.model, ids, positions), targets, reduction="none")


def by_parts(tunable: TunableModel, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    return token_losses(tunable, tunable.model, ids, positions, targets)


def plain(base: Path) -> TunableModel:
    return load_tunable(base, device="cpu")


def with_coded_head(base: Path) -> TunableModel:
    """A model whose head multiplies by the codes of an embedding, as that of a GGUF file's base does."""
    tunable = load_tunable(base, device="cpu")
    head = tunable.model.get_output_embeddings()
    codes = QuantizedEmbedding(head.out_features, head.in_features, 8, 32, torch.float32)
    codes.qweight.data.random_(0, 256)
    codes.scales.data.uniform_(1e-4, 2e-4)
    codes.zeros.data.fill_(128)
    tunable.model.set_output_embeddings(TiedHead(codes))
    return tunable


def gradients(
    base: Path, losses: Losses, dtype: torch.dtype, load: Callable[[Path], TunableModel]
) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    tunable = load(base)
    scales = start_tuning(tunable, "channel")
    ids, targets = torch.randint(0, 250, (3, 12)), torch.randint(0, 250, (20,))
    positions, weights = torch.randperm(36)[:20], torch.rand(20)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = losses(tunable, ids, positions, targets)
    (found * weights).sum().backward()
    return found.detach(), {name: scale.grad for name, scale in scales.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("load", "largest_head"), [(plain, 0), (with_coded_head, 0), (with_coded_head, 1 << 28)]
)
@pytest.mark.parametrize(("logits", "softmax"), [(1 << 25, 1 << 20), (300 * 7, 300 * 3), (1, 1)])
def test_parts_give_the_losses_and_gradients_of_all_logits(
    tiny_base: Path,
    dtype: torch.dtype,
    logits: int,
    softmax: int,
    load: Callable[[Path], TunableModel],
    largest_head: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_LARGEST_HEAD", largest_head)
    monkeypatch.setattr(module, "_LOGITS", logits)
    monkeypatch.setattr(module, "_AT_ONCE", softmax)
    wanted, wanted_gradients = gradients(tiny_base, at_once, dtype, load)
    found, found_gradients = gradients(tiny_base, by_parts, dtype, load)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert len(found_gradients) > 1
    for name, gradient in found_gradients.items():
        error = (gradient - wanted_gradients[name]).norm() / wanted_gradients[name].norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), name


@pytest.mark.parametrize(("largest_head", "made"), [(0, 3), (1 << 28, 1)])
def test_the_head_sees_a_part_of_the_tokens_at_a_time(
    tiny_base: Path, largest_head: int, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its floats are made once where they are small, else for every part."""
    tunable = with_coded_head(tiny_base)
    assert has_plain_head(tunable)
    seen: list[tuple[int, ...]] = []
    floats: list[int] = []
    softmax, head_floats, panel = module._softmax_losses, module.dequantize_panel, backward.dequantize_panel

    def looked(logits: Tensor, *rest: Any) -> None:
        seen.append(tuple(logits.shape))
        softmax(logits, *rest)

    def counted(make: Callable[..., Tensor], weight: QuantizedWeight, *rest: Any, **more: Any) -> Tensor:
        floats.append(weight.out_features)
        return make(weight, *rest, **more)

    monkeypatch.setattr(module, "_softmax_losses", looked)
    monkeypatch.setattr(module, "dequantize_panel", partial(counted, head_floats))
    monkeypatch.setattr(backward, "dequantize_panel", partial(counted, panel))
    vocab = tunable.model.config.vocab_size
    monkeypatch.setattr(module, "_LOGITS", vocab * 7)
    monkeypatch.setattr(module, "_LARGEST_HEAD", largest_head)
    ids = torch.randint(0, 250, (2, 10))
    with torch.no_grad():
        losses = by_parts(tunable, ids, torch.arange(18), torch.randint(0, 250, (18,)))
    assert not losses.requires_grad
    assert seen == [(7, vocab), (7, vocab), (4, vocab)]
    assert floats.count(vocab) == made, "the model's own call makes none"


def test_a_model_that_changes_its_logits_takes_them_all_at_once(tiny_base: Path) -> None:
    tunable = load_tunable(tiny_base, device="cpu")
    forward = tunable.model.forward

    def capped(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits = torch.tanh(out.logits / 3.0) * 3.0
        return out

    nn.Module.__setattr__(tunable.model, "forward", capped)
    ids, targets = torch.randint(0, 250, (2, 10)), torch.randint(0, 250, (18,))
    assert not has_plain_head(tunable)
    with torch.no_grad():
        found = by_parts(tunable, ids, torch.arange(18), targets)
        assert torch.equal(found, at_once(tunable, ids, torch.arange(18), targets))
