"""Paged attention: packed queries of many sequences against a KV cache of blocks, and the write into that cache.

A cache is [blocks, block_size, kv_heads, d]; a sequence's token p stands in block block_tables[s, p // block_size] at
offset p % block_size; slot = block * block_size + offset. Decode steps and prefill chunks go in the same call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from peqa_kernels import native
from peqa_kernels.native import kv_layout
from peqa_kernels.paged_attention.checks import AttentionInputError, check_attention, check_write
from peqa_kernels.paged_attention.cpu import paged_attention_cpu, write_kv_cpu
from peqa_kernels.paged_attention.plan import AttentionPlan
from peqa_kernels.paged_attention.reference import paged_attention_reference, write_kv_reference

__all__ = [
    "AttentionInputError",
    "AttentionPlan",
    "cache_dtype",
    "new_caches",
    "paged_attention",
    "paged_attention_reference",
    "write_kv",
    "write_kv_reference",
]


def cache_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of caches that attention in `dtype` reads fastest on `device`.

    Decode attention waits for memory. On a CPU keys and values of fp32 activations are kept in fp16 where the compiled
    kernels read it: half the bytes, rounded finer than bf16. Else they are kept in `dtype`.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return dtype
    ops = native.load()
    return torch.float16 if ops is not None and ops.halves else torch.float32


def new_caches(
    blocks: int,
    block_size: int,
    kv_heads: int,
    d: int,
    d_v: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    make: Callable[[tuple[int, ...]], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys [blocks, block_size, kv_heads, d] and values [..., d_v], laid out as the device's kernels read them fastest.

    `make(shape)` gives the memory, of that dtype and device, on a GPU contiguous, on a CPU but for what may lie between
    two blocks; None: zeros.
    """
    ops = native.load() if device.type == "cpu" else None
    fast = ops is not None and ops.reads_caches(dtype)
    make = make or partial(torch.zeros, dtype=dtype, device=device)
    return kv_layout.new_caches(
        kv_layout.HEADS_FIRST if fast else kv_layout.TOKENS_FIRST, blocks, block_size, kv_heads, d, d_v, make
    )


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
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Causal attention of packed queries over paged keys and values: [tokens, heads, d_v] in q.dtype.

    Query i of sequence s stands at position seq_lens[s] - (query_starts[s + 1] - query_starts[s]) + i and sees the
    positions up to its own, which must have been written (`write_kv`) before. Table entries and slots outside a
    sequence's positions are never read into a result, whatever they hold.

    What a token's bits depend on. On the CPU: its position, its sequence's keys and values and the build, so neither
    on other sequences nor on how its prompt was cut into calls. On a GPU the same holds for neighbours: which kernel
    takes a sequence hangs on its own number of new tokens (one, or more), tile shapes hang on sizes of the model only,
    keys are cut at absolute positions (`tiles`), parts are joined in the order of the keys in fp32, and positions that
    a row may not see add exact zeros. But a token computed alone, as in decode, and within a chunk, as in prefill, are
    multiplied by other tiles there, and their last bits may differ. `plan.invariant` removes that: both kernels then
    take the same tiles, instructions and cuts, at a cost that `python -m peqa_kernels.bench` prints.

    Args:
        q: [tokens, heads, d], the sequences' new tokens one after the other.
        key_cache: [blocks, block_size, kv_heads, d], contiguous or as `new_caches` lays it out, heads a multiple of
            kv_heads (query head h reads h // (heads // kv_heads)). On a CPU of any float dtype: it is computed in fp32.
        value_cache: [blocks, block_size, kv_heads, d_v], likewise.
        block_tables: int32 [seqs, max_blocks].
        query_starts: int32 [seqs + 1], first row of each sequence in q: 0 first, `tokens` last.
        seq_lens: int32 [seqs], keys of each sequence, the new tokens included.
        scaling: factor on q·k.
        sliding_window: a query sees its own position and the sliding_window - 1 before it.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: [heads], each one more logit in the softmax that carries no value.
        plan: what the host knows of the step, for launches on a GPU.

    Raises AttentionInputError, before anything is computed, for shapes, dtypes, devices, layouts or query starts that
    do not fit (on a GPU query starts are read, which waits for the device, where no plan is given), and on a CPU for
    lengths and needed table entries that point outside of the tensors.
    """
    check_attention(
        q, key_cache, value_cache, block_tables, query_starts, seq_lens, sliding_window, softcap, sinks, plan
    )
    args = (q, key_cache, value_cache, block_tables, query_starts, seq_lens)
    options = (scaling, sliding_window, softcap, sinks)
    if torch.compiler.is_compiling():
        numbers = (0, 0, False) if plan is None else (plan.max_new, plan.max_len, plan.invariant)
        return torch.ops.peqa.paged_attention(*args, *options, *numbers)
    return _paged_attention(*args, *options, plan)


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Copy each token's key and value into its slot of the caches, in place.

    On a CPU, numbers beyond the range of fp16 caches become its ends; infinity and NaN stay what they are.

    Args:
        key: [tokens, kv_heads, d]; may be a view with strides.
        value: [tokens, kv_heads, d_v].
        key_cache: [blocks, block_size, kv_heads, d], contiguous or as `new_caches` lays it out.
        value_cache: [blocks, block_size, kv_heads, d_v], likewise.
        slot_mapping: int64 [tokens], block * block_size + offset; -1 skips the token. No slot twice.

    Raises AttentionInputError for shapes, dtypes, devices or layouts that do not fit, and on a CPU, before anything is
    written, for slots that the caches do not have (a GPU is not asked).
    """
    check_write(key, value, key_cache, value_cache, slot_mapping)
    if torch.compiler.is_compiling():
        torch.ops.peqa.write_kv(key, value, key_cache, value_cache, slot_mapping)
    else:
        _write_kv(key, value, key_cache, value_cache, slot_mapping)


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
    plan: AttentionPlan | None,
) -> Tensor:
    """Choose the path for q's device."""
    if q.shape[0] == 0:
        return q.new_empty(0, q.shape[1], value_cache.shape[3])
    args = (q, key_cache, value_cache, block_tables, query_starts, seq_lens)
    options = (scaling, sliding_window, softcap, sinks)
    if q.is_cuda:
        from peqa_kernels.paged_attention.gpu import paged_attention_gpu

        return paged_attention_gpu(*args, *options, plan)
    # The C library computes in float32; it is None where no compiler was found at installation.
    ops = native.load() if q.dtype == torch.float32 else None
    if ops is None or not ops.reads_caches(key_cache.dtype):
        return paged_attention_cpu(*args, *options)
    return ops.paged_attention(*args, *options)


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
    max_new: int,  # 0: no plan
    max_len: int,
    invariant: bool,
) -> Tensor:
    args = (q, key_cache, value_cache, block_tables, query_starts, seq_lens)
    plan = AttentionPlan(max_new, max_len, invariant) if max_new else None
    return _paged_attention(*args, scaling, sliding_window, softcap, sinks, plan)


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
    max_new: int,
    max_len: int,
    invariant: bool,
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
