"""Paged attention: packed queries of many sequences against a KV cache of blocks, and the write into that cache.

A cache is [blocks, block_size, kv_heads, d]; a sequence's token p stands in block block_tables[s, p // block_size] at
offset p % block_size; slot = block * block_size + offset. Decode steps and prefill chunks go in the same call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peqa_kernels import native
from peqa_kernels.paged_attention.cpu import paged_attention_cpu, write_kv_cpu
from peqa_kernels.paged_attention.reference import paged_attention_reference, write_kv_reference

__all__ = ["paged_attention", "paged_attention_reference", "write_kv", "write_kv_reference"]


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed queries over paged keys and values: [tokens, heads, d_v] in q.dtype.

    Query i of sequence s stands at position seq_lens[s] - (query_starts[s + 1] - query_starts[s]) + i and sees the
    positions up to its own, which must have been written (`write_kv`) before. Table entries and slots outside a
    sequence's positions are never read into a result, whatever they hold. On the CPU a token's bits depend neither
    on other sequences nor on how its prompt was cut into calls.

    Args:
        q: [tokens, heads, d], the sequences' new tokens one after the other.
        key_cache: [blocks, block_size, kv_heads, d], contiguous, heads a multiple of kv_heads (query head h reads
            h // (heads // kv_heads)).
        value_cache: [blocks, block_size, kv_heads, d_v], contiguous.
        block_tables: int32 [seqs, max_blocks].
        query_starts: int32 [seqs + 1], first row of each sequence in q; the last entry is `tokens`.
        seq_lens: int32 [seqs], keys of each sequence, the new tokens included.
        scaling: factor on q·k.
        sliding_window: a query sees its own position and the sliding_window - 1 before it.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: [heads], each one more logit in the softmax that carries no value.
    """
    _check(q, key_cache, value_cache, block_tables, query_starts, seq_lens, sinks)
    if torch.compiler.is_compiling():
        return torch.ops.peqa.paged_attention(
            q,
            key_cache,
            value_cache,
            block_tables,
            query_starts,
            seq_lens,
            scaling,
            sliding_window,
            softcap,
            sinks,
        )
    return _paged_attention(
        q,
        key_cache,
        value_cache,
        block_tables,
        query_starts,
        seq_lens,
        scaling,
        sliding_window,
        softcap,
        sinks,
    )


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Copy each token's key and value into its slot of the caches, in place.

    Args:
        key: [tokens, kv_heads, d]; may be a view with strides.
        value: [tokens, kv_heads, d_v].
        key_cache: [blocks, block_size, kv_heads, d], contiguous.
        value_cache: [blocks, block_size, kv_heads, d_v], contiguous.
        slot_mapping: int64 [tokens], block * block_size + offset; -1 skips the token. No slot twice.
    """
    assert key.shape[1:] == key_cache.shape[2:], (key.shape, key_cache.shape)
    assert value.shape[1:] == value_cache.shape[2:], (value.shape, value_cache.shape)
    assert slot_mapping.dtype == torch.int64, slot_mapping.dtype
    assert slot_mapping.shape == key.shape[:1] == value.shape[:1], slot_mapping.shape
    if torch.compiler.is_compiling():
        torch.ops.peqa.write_kv(key, value, key_cache, value_cache, slot_mapping)
    else:
        _write_kv(key, value, key_cache, value_cache, slot_mapping)


def _check(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
) -> None:
    """Shapes and dtypes; a mismatch is a bug of the caller. Reads no tensor's values (no device sync)."""
    assert q.shape[2] == key_cache.shape[3], (q.shape, key_cache.shape)
    assert key_cache.shape[:3] == value_cache.shape[:3], (key_cache.shape, value_cache.shape)
    assert q.shape[1] % key_cache.shape[2] == 0, (q.shape, key_cache.shape)
    assert block_tables.shape[0] == seq_lens.shape[0] == query_starts.shape[0] - 1
    assert block_tables.dtype == query_starts.dtype == seq_lens.dtype == torch.int32
    assert sinks is None or sinks.shape == q.shape[1:2], (sinks, q.shape)


def _paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Choose the path for q's device."""
    if q.shape[0] == 0:
        return q.new_empty(0, q.shape[1], value_cache.shape[3])
    if q.is_cuda:
        from peqa_kernels.paged_attention.gpu import paged_attention_gpu as path
    else:
        # The C library computes in float32; it is None where no compiler was found at installation.
        ops = native.load() if q.dtype == key_cache.dtype == torch.float32 else None
        path = paged_attention_cpu if ops is None else ops.paged_attention
    return path(
        q,
        key_cache,
        value_cache,
        block_tables,
        query_starts,
        seq_lens,
        scaling,
        sliding_window,
        softcap,
        sinks,
    )


def _write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Choose the path for the cache's device."""
    if key_cache.is_cuda:
        from peqa_kernels.paged_attention.gpu import write_kv_gpu as path
    else:
        path = write_kv_cpu
    path(key, value, key_cache, value_cache, slot_mapping)


# A compiler traces a custom op as one node; eager calls go past it (its dispatch costs tens of microseconds a call).
@torch.library.custom_op("peqa::paged_attention", mutates_args=())
def _paged_attention_op(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return _paged_attention(
        q,
        key_cache,
        value_cache,
        block_tables,
        query_starts,
        seq_lens,
        scaling,
        sliding_window,
        softcap,
        sinks,
    )


@_paged_attention_op.register_fake
def _(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], value_cache.shape[3])


@torch.library.custom_op("peqa::write_kv", mutates_args=("key_cache", "value_cache"))
def _write_kv_op(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    _write_kv(key, value, key_cache, value_cache, slot_mapping)


@_write_kv_op.register_fake
def _(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    return None
