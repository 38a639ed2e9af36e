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

from peqa_kernels.native.training import native_training
from peqa_kernels.products import matmul

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
    seen = None
    if attention_mask is not None:
        masks = 1 if attention_mask.shape[0] == 1 else query.shape[0]
        seen = attention_mask[:, 0].expand(masks, tokens, tokens).contiguous()
    # As autocast would have it done for torch's kernel: rotary positions have made fp32 of query and key.
    out = _Attention.apply(query.to(dtype), key.to(dtype), value.to(dtype), seen, scale)
    return out.transpose(1, 2), None


class _Attention(torch.autograd.Function):
    """Heads of one key head lie one after the other: [rows * kv_heads, heads_each * tokens, d]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float
    ) -> Tensor:
        rows, heads, tokens, _ = query.shape
        kv_heads = key.shape[1]
        q, k, v = (_folded(x, kv_heads) for x in (query, key, value))
        out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype)
        for part in _parts(q, k):
            weights = attention_weights(_scores(q[part], k[part]), seen, scale, part.start, kv_heads)
            torch.bmm(weights, v[part], out=out[part])
        ctx.save_for_backward(q, k, v, seen)
        ctx.shape, ctx.kv_heads, ctx.scale = (rows, heads, tokens), kv_heads, scale
        return out.view(rows, heads, tokens, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, seen = ctx.saved_tensors
        rows, heads, tokens = ctx.shape
        kv_heads = ctx.kv_heads
        d_out = _folded(grads[0], kv_heads)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _parts(q, k):
            slopes = torch.bmm(d_out[part], v[part].transpose(1, 2))
            scores = _scores(q[part], k[part])
            weights = attention_weights(scores, seen, ctx.scale, part.start, kv_heads, slopes)
            torch.bmm(weights.transpose(1, 2), d_out[part], out=dv[part])
            torch.bmm(slopes, k[part], out=dq[part])
            torch.bmm(slopes.transpose(1, 2), q[part], out=dk[part])
        return (
            dq.view(rows, heads, tokens, -1),
            dk.view(rows, kv_heads, tokens, -1),
            dv.view(rows, kv_heads, tokens, -1),
            None,
            None,
        )


def _folded(x: Tensor, kv_heads: int) -> Tensor:
    """[rows, heads, tokens, d] -> [rows * kv_heads, heads / kv_heads * tokens, d], contiguous."""
    return x.reshape(x.shape[0] * kv_heads, -1, x.shape[-1]).contiguous()


def _parts(q: Tensor, k: Tensor) -> Iterator[slice]:
    step = max(1, _SCORES // (q.shape[1] * k.shape[1]))
    for first in range(0, q.shape[0], step):
        yield slice(first, min(first + step, q.shape[0]))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Products of queries and keys, fp32 [heads of the part, queries, keys]: exp would enlarge errors of bfloat16."""
    with torch.autocast("cpu", enabled=False):
        if len(q) == 1:
            return matmul(q[0].float(), k[0].float().t())[None]
        return torch.bmm(q.float(), k.float().transpose(1, 2))


def attention_weights(
    scores: Tensor,  # fp32 [heads, queries, keys], overwritten
    seen: Tensor | None,  # bool [1 or rows, tokens, keys]; None: causal
    scale: float,
    first: int,
    heads_each: int,
    slopes: Tensor | None = None,
) -> Tensor:
    """See `NativeTraining.attention_weights`."""
    if (native := native_training()) is not None:
        return native.attention_weights(scores, seen, scale, first, heads_each, slopes)
    return attention_weights_torch(scores, seen, scale, first, heads_each, slopes)


def attention_weights_torch(
    scores: Tensor,
    seen: Tensor | None,
    scale: float,
    first: int,
    heads_each: int,
    slopes: Tensor | None = None,
) -> Tensor:
    """`NativeTraining.attention_weights` in torch."""
    heads, queries, keys = scores.shape
    if seen is None:
        seen = torch.ones(1, keys, keys, dtype=torch.bool).tril_()
    elif len(seen) > 1:
        seen = seen[torch.arange(first, first + heads) // heads_each]
    tokens = seen.shape[1]
    folded = scores.mul_(scale).view(heads, queries // tokens, tokens, keys)
    folded.masked_fill_(~seen[:, None], _UNSEEN)
    exact = torch.softmax(scores, -1)
    if slopes is not None:
        back = torch._softmax_backward_data(slopes.float(), exact, -1, torch.float32)
        slopes.copy_(back.mul_(scale))
    return exact.bfloat16()
