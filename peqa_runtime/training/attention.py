"""Causal attention for training in bfloat16 on a CPU: a few large products, forward and back.

torch's own kernel takes 17 ms for 16 rows of 64 tokens and 22 ms for 8 of 128 (9 heads on 3, forward and backward, one
core of an EPYC with AVX-512 BF16), this 6 and 9. The query heads that share a key head are one product; scores are
fp32, as they are inside that kernel, and made again in the backward pass, so that nothing of the size of tokens by
tokens is kept. Longer rows, fp32, masks of floats and everything unusual go to transformers' own function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "peqa_tuning"
LONGEST = 512  # tokens; beyond, torch's kernel wins by leaving out the masked half
_SCORES = 1 << 18  # of one chunk: 1 MB in fp32, which stays in the second-level cache
_UNSEEN = -1e30  # not infinite: a row that sees nothing becomes a mean, not NaN


@contextmanager
def tuning_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it a model on a CPU that runs on torch's kernel trains with this attention."""
    before = model.config._attn_implementation
    own = model.device.type == "cpu" and before == "sdpa"
    if own:
        AttentionInterface.register(NAME, attention_forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        if own:
            model.set_attn_implementation(before)


def attention_forward(
    module: nn.Module,
    query: Tensor,  # [rows, heads, tokens, d_k]
    key: Tensor,  # [rows, kv_heads, tokens, d_k]
    value: Tensor,  # [rows, kv_heads, tokens, d_v]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Gives ([rows, tokens, heads, d_v], None), as transformers' attention functions do."""
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = not kwargs.get("dropout") and kwargs.get("position_bias") is None and kwargs.get("s_aux") is None
    plain = plain and kwargs.get("softcap") is None and kwargs.get("cache") is None
    masked = attention_mask is not None and attention_mask.dtype == torch.bool
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    plain = plain and dtype == torch.bfloat16
    square = 1 < query.shape[2] == key.shape[2] <= LONGEST
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not (plain and square and trains and (masked or (attention_mask is None and causal))):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    tokens = query.shape[2]
    if attention_mask is None:
        unseen = torch.full((1, tokens, tokens), _UNSEEN).triu(1)
    else:
        hidden = ~attention_mask[:, 0].expand(query.shape[0], tokens, tokens)
        unseen = torch.zeros(hidden.shape).masked_fill_(hidden, _UNSEEN)
    # As autocast would have it done for torch's kernel: rotary positions have made fp32 of query and key.
    out = _Attention.apply(query.to(dtype), key.to(dtype), value.to(dtype), unseen, scale)
    return out.transpose(1, 2), None


class _Attention(torch.autograd.Function):
    """Heads of one key head lie one after the other: [rows * kv_heads, heads_each * tokens, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, unseen: Tensor, scale: float) -> Tensor:
        rows, heads, tokens, _ = query.shape
        kv_heads = key.shape[1]
        q, k, v = (_folded(x, kv_heads) for x in (query, key, value))
        out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype)
        for part in _parts(q, k):
            probabilities = _probabilities(q[part], k[part], unseen, part, kv_heads, scale)
            torch.bmm(probabilities.to(v.dtype), v[part], out=out[part])
        ctx.save_for_backward(q, k, v, unseen)
        ctx.shape, ctx.kv_heads, ctx.scale = (rows, heads, tokens), kv_heads, scale
        return out.view(rows, heads, tokens, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, unseen = ctx.saved_tensors
        rows, heads, tokens = ctx.shape
        d_out = _folded(grads[0], ctx.kv_heads)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _parts(q, k):
            p = _probabilities(q[part], k[part], unseen, part, ctx.kv_heads, ctx.scale)
            torch.bmm(p.to(v.dtype).transpose(1, 2), d_out[part], out=dv[part])
            d_p = torch.bmm(d_out[part], v[part].transpose(1, 2)).float()
            d_s = torch._softmax_backward_data(d_p, p, -1, torch.float32).to(q.dtype)
            torch.bmm(d_s, k[part], out=dq[part])
            torch.bmm(d_s.transpose(1, 2), q[part], out=dk[part])
        dq.mul_(ctx.scale)
        dk.mul_(ctx.scale)
        shapes = (
            (rows, heads, tokens, -1),
            (rows, ctx.kv_heads, tokens, -1),
            (rows, ctx.kv_heads, tokens, -1),
        )
        folded = (grad.view(shape) for grad, shape in zip((dq, dk, dv), shapes, strict=True))
        return (*folded, None, None)


def _folded(x: Tensor, kv_heads: int) -> Tensor:
    """[rows, heads, tokens, d] -> [rows * kv_heads, heads / kv_heads * tokens, d], contiguous."""
    return x.reshape(x.shape[0] * kv_heads, -1, x.shape[-1]).contiguous()


def _parts(q: Tensor, k: Tensor) -> Iterator[slice]:
    step = max(1, _SCORES // (q.shape[1] * k.shape[1]))
    for first in range(0, q.shape[0], step):
        yield slice(first, min(first + step, q.shape[0]))


def _probabilities(q: Tensor, k: Tensor, unseen: Tensor, part: slice, kv_heads: int, scale: float) -> Tensor:
    """Softmax of scaled scores, fp32 [heads of the part, queries, keys]; `unseen` is added to the scores."""
    if unseen.shape[0] > 1:
        unseen = unseen[torch.arange(part.start, part.stop) // kv_heads]
    unseen = unseen.repeat(1, q.shape[1] // k.shape[1], 1).expand(q.shape[0], -1, -1)
    scores = torch.baddbmm(unseen, q.float(), k.float().transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1)
