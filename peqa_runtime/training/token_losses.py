"""Cross-entropy of each token, the head on some tokens at a time: all logits of a step are never there at once.

2,044 tokens of a vocabulary of 49,152 are 400 MB of fp32 logits, and several times as much with what the loss keeps of
them for its gradient. A token's loss depends on its own hidden state alone, so the gradient is made beside the loss and
waits, [tokens, hidden], for the factor that comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from peqa_kernels.native.training import native_training
from peqa_kernels.products import matmul
from peqa_kernels.quant_matmul.dense import dequantize_panel
from peqa_runtime.model.quantized_linear import QuantizedEmbedding, QuantizedLinear, TiedHead
from peqa_runtime.training.tuning import TunableModel, as_base, logits_at

_LOGITS = 1 << 25  # of one product of the head: fewer would make its weights from their codes too often
_NATIVE = (torch.bfloat16, torch.float32)
_LARGEST_HEAD = 1 << 28  # bytes of its floats
_AT_ONCE = 1 << 20  # of one softmax: 4 MB in fp32


def token_losses(
    tunable: TunableModel,
    model: nn.Module,
    input_ids: Tensor,
    positions: Tensor,
    targets: Tensor,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Cross-entropy [len(targets)], fp32, of the tokens after `positions` of the flattened `input_ids` [rows, tokens].

    As `functional.cross_entropy` of `logits_at`, which is what it is where the model does more with its head's output
    than return it. `model` is the tunable's, or wraps it.
    """
    if not has_plain_head(tunable):
        logits = logits_at(model, input_ids, positions, position_ids)
        return functional.cross_entropy(logits, targets, reduction="none")
    inner = cast(PreTrainedModel, model.module if isinstance(model, DistributedDataParallel) else model)
    head = cast(nn.Module, inner.get_output_embeddings())
    packed = {} if position_ids is None else {"position_ids": position_ids}
    vocab = inner.config.get_text_config().vocab_size
    with _in_place_of(head, positions, vocab) as seen:
        model(input_ids=input_ids, use_cache=False, **packed)
    hidden, dtype = seen[0]
    losses: Tensor = _Losses.apply(hidden, targets, head, dtype, max(1, _LOGITS // vocab))
    return losses


_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def has_plain_head(tunable: TunableModel) -> bool:
    """Whether the model's logits are its head's output as it is: no softcapping, no factor. Found out once."""
    known = _plain.get(tunable.model)
    if known is None:
        known = _plain[tunable.model] = _is_plain(tunable)
    return known


def _is_plain(tunable: TunableModel) -> bool:
    outputs: list[Tensor] = []
    head = tunable.model.get_output_embeddings()
    if head is None:
        return False
    handle = head.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        ids = torch.arange(4, device=tunable.model.device)[None]
        with torch.no_grad(), as_base(tunable, ids.numel()):
            logits = tunable.model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return len(outputs) == 1 and torch.equal(outputs[0], logits)


@contextmanager
def _in_place_of(
    head: nn.Module, positions: Tensor, vocab: int
) -> Iterator[list[tuple[Tensor, torch.dtype | None]]]:
    """Within it the head gives zeros for one place, and the list gets what it was given: [places, hidden], and the
    dtype that autocast has there.
    """
    seen: list[tuple[Tensor, torch.dtype | None]] = []

    def take(given: Tensor) -> Tensor:
        hidden = given.reshape(-1, given.shape[-1])[positions]
        kind = hidden.device.type
        amp = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        seen.append((hidden, amp))
        return hidden.new_zeros(1, 1, vocab)

    head.forward = take
    try:
        yield seen
    finally:
        del head.forward


def _floats(head: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """On a CPU the weight [vocab, hidden] of a head of codes, made once for all products of a step, where it is small.

    Three products and their gradients made it six times, a tenth of a step (SmolLM2, 2,044 tokens, Zen 4).
    """
    codes = head.embedding if isinstance(head, TiedHead) else head
    if not isinstance(codes, (QuantizedEmbedding, QuantizedLinear)):
        return None
    if isinstance(codes, QuantizedLinear) and (codes.tuned is not None or codes.bias is not None):
        return None
    weight = codes.weight_codes()
    count = weight.out_features * weight.in_features
    if weight.qweight.device.type != "cpu" or count * dtype.itemsize > _LARGEST_HEAD:
        return None
    return dequantize_panel(weight, dtype)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [tokens, H]
        targets: Tensor,  # int64 [tokens]
        head: nn.Module,
        dtype: torch.dtype | None,  # of autocast
        rows: int,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        slopes: Tensor | None = None
        floats = _floats(head, dtype or hidden.dtype)
        for first in range(0, len(targets), rows):
            some = slice(first, first + rows)
            x = hidden[some].detach()
            if floats is None:
                x.requires_grad_(wanted)
                amp = torch.autocast(hidden.device.type, dtype, enabled=dtype is not None)
                with torch.set_grad_enabled(wanted), amp:
                    logits = head(x)
            else:
                logits = matmul(x.to(floats.dtype), floats.t())
            if gradient is None:
                _softmax_losses(logits, targets[some], losses[some], None)
                continue
            if slopes is None:
                slopes = logits.new_empty(logits.shape)  # one for all: new memory has to be cleared first
            slope = slopes[: len(logits)]
            _softmax_losses(logits.detach(), targets[some], losses[some], slope)
            if floats is None:
                (gradient[some],) = torch.autograd.grad(logits, x, slope)
            else:
                gradient[some] = matmul(slope, floats)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0][:, None]).to(gradient.dtype), None, None, None, None


def _softmax_losses(logits: Tensor, targets: Tensor, losses: Tensor, slope: Tensor | None) -> None:
    """Write each row's loss, and its gradient by the logits where it is wanted."""
    native = native_training() if logits.device.type == "cpu" and logits.dtype in _NATIVE else None
    if native is not None:
        losses.copy_(native.losses(logits.contiguous(), targets, slope))
        return
    step = max(1, _AT_ONCE // logits.shape[1])
    for first in range(0, len(targets), step):
        some = slice(first, first + step)
        found, places = logits[some].log_softmax(-1, dtype=torch.float32), targets[some, None]
        losses[some] = -found.gather(1, places)[:, 0]
        if slope is not None:
            found.exp_().scatter_add_(1, places, found.new_full(places.shape, -1.0))
            slope[some] = found
