"""Paged attention in plain torch, fp32, one sequence after the other: the formula every fast path is tested on."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention_reference(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from packed queries to each sequence's own blocks; arguments and result as `paged_attention`.

    Source: softmax(softcap * tanh(scaling * q k / softcap)) v over the keys at positions in (p - sliding_window, p],
    where a sink adds exp(sink) to the denominator and nothing to the numerator.
    """
    tokens, heads, _ = q.shape
    block_size, kv_heads, d_v = value_cache.shape[1:]
    out = torch.empty(tokens, heads, d_v)
    for s in range(len(seq_lens)):
        first, last, length = int(query_starts[s]), int(query_starts[s + 1]), int(seq_lens[s])
        if first == last:
            continue
        blocks = block_tables[s, : -(-length // block_size)].long()
        keys = key_cache[blocks].flatten(0, 1)[:length].float()  # [length, kv_heads, d]
        values = value_cache[blocks].flatten(0, 1)[:length].float()  # [length, kv_heads, d_v]
        keys = keys.repeat_interleave(heads // kv_heads, 1)  # [length, heads, d]
        values = values.repeat_interleave(heads // kv_heads, 1)
        queries = q[first:last].float()  # [new, heads, d]
        score = torch.einsum("qhd,khd->hqk", queries, keys) * scaling
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        at = torch.arange(length - (last - first), length, device=q.device)[:, None]
        key_at = torch.arange(length, device=q.device)
        seen = key_at <= at  # [new, length]
        if sliding_window is not None:
            seen &= key_at > at - sliding_window
        score = score.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            column = sinks.float().view(-1, 1, 1).expand(-1, last - first, 1)
            score = torch.cat([score, column], -1)
        weight = score.softmax(-1)[..., :length]
        out[first:last] = torch.einsum("hqk,khd->qhd", weight, values).cpu()
    return out.to(q)


def to_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round keys or values to a cache's dtype: to the nearest, halves to the even one.

    Finite numbers beyond the range of fp16 become its ends: an infinity in a key would turn a row into NaN where the
    number itself had only been large. Infinity and NaN stay what they are.
    """
    if dtype != torch.float16 or x.dtype == dtype:
        return x.to(dtype)
    end = torch.finfo(dtype).max
    return torch.where(x.isinf(), x, x.clamp(-end, end)).to(dtype)


def write_kv_reference(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Copy each token's key and value to its slot, rounded as `to_cache` does; in place; arguments as `write_kv`."""
    block_size = key_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            key_cache[slot // block_size, slot % block_size] = to_cache(key[token], key_cache.dtype)
            value_cache[slot // block_size, slot % block_size] = to_cache(value[token], value_cache.dtype)
