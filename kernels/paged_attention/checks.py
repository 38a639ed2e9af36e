"""What a call of paged attention must look like: shapes, dtypes, layouts, and where each sequence's queries begin.

Those are read on a CPU, and on a GPU where no plan came with them: there the host has to wait for the device, which a
step that the host has planned never does.
"""

from __future__ import annotations

import itertools
from typing import NoReturn

import torch
from torch import Tensor

from peqa_kernels.native.kv_layout import layout_of
from peqa_kernels.paged_attention.plan import AttentionPlan

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class AttentionInputError(ValueError):
    """A call of `paged_attention` or `write_kv` whose tensors do not fit together; the sentence says which."""


def check_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    plan: AttentionPlan | None,
) -> None:
    """Raise AttentionInputError for arguments that no path can take."""
    _check_caches(key_cache, value_cache)
    if q.dim() != 3 or q.shape[2] != key_cache.shape[3]:
        _refuse(f"q must be [tokens, heads, {key_cache.shape[3]}] as the key cache, not {_shape(q)}")
    if q.shape[1] == 0 or q.shape[1] % key_cache.shape[2]:
        _refuse(f"{q.shape[1]} query heads must be a multiple of the cache's {key_cache.shape[2]} heads")
    if q.dtype not in _FLOATS:
        _refuse(f"q must be float32, float16 or bfloat16, not {q.dtype}")
    for name, tensor, dims in (
        ("block_tables", block_tables, 2),
        ("query_starts", query_starts, 1),
        ("seq_lens", seq_lens, 1),
    ):
        if tensor.dtype != torch.int32 or tensor.dim() != dims or tensor.stride(-1) != 1:
            _refuse(
                f"{name} must be int32 with {dims} dimension(s), the last one contiguous, not {tensor.dtype} of shape "
                f"{_shape(tensor)} and strides {tensor.stride()}"
            )
        _same_device(name, tensor, key_cache)
    _same_device("q", q, key_cache)
    seqs = seq_lens.shape[0]
    if block_tables.shape[0] != seqs or query_starts.shape[0] != seqs + 1:
        _refuse(
            f"{seqs} sequences want {seqs} block tables and {seqs + 1} query starts, not {block_tables.shape[0]} and "
            f"{query_starts.shape[0]}"
        )
    if sliding_window is not None and sliding_window < 1:
        _refuse(f"sliding_window must be None or at least 1, not {sliding_window}")
    if softcap is not None and not softcap > 0:
        _refuse(f"softcap must be None or above 0, not {softcap}")
    if sinks is not None:
        if sinks.shape != q.shape[1:2]:
            _refuse(f"sinks must be [{q.shape[1]}], one per query head, not {_shape(sinks)}")
        _same_device("sinks", sinks, key_cache)
    if plan is not None and not 1 <= plan.max_new <= plan.max_len:
        _refuse(f"a plan wants 1 <= max_new <= max_len, not {plan.max_new} and {plan.max_len}")
    if _may_read(query_starts, plan):
        check_starts(query_starts.tolist(), q.shape[0])


def check_starts(starts: list[int], tokens: int) -> None:
    """Raise AttentionInputError for queries that belong to no sequence, or to two: their rows would not be written."""
    if starts[0] == 0 and starts[-1] == tokens and starts == sorted(starts):
        return
    wrong = next(
        (s for s, (first, last) in enumerate(itertools.pairwise(starts)) if last < first or last > tokens),
        None,
    )
    if wrong is None:
        wrong = 0 if starts[0] != 0 else max(0, len(starts) - 2)
    _refuse(
        f"sequence {wrong} does not fit: query starts must rise from 0 to the {tokens} tokens, and they begin with "
        f"{starts[:4]} and end with {starts[-1]}"
    )


def check_tables(
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    key_cache: Tensor,
    tokens: int,
    sliding_window: int | None,
) -> None:
    """Read them as `peqa_attention_misfit` in C does; raises AttentionInputError for what points outside."""
    blocks, block_size = key_cache.shape[:2]
    width = block_tables.shape[1]
    length, new = seq_lens.long(), query_starts.long().diff()
    oldest = torch.zeros_like(length) if sliding_window is None else length - new - sliding_window + 1
    first = oldest.clamp(min=0) // block_size
    column = torch.arange(width)
    read = (column >= first[:, None]) & (column * block_size < length[:, None])
    outside = (read & ((block_tables < 0) | (block_tables >= blocks))).any(1)
    wrong = (new < 0) | (new > length) | ((new > 0) & (outside | (length > width * block_size)))
    if bool(wrong.any()):
        refuse_sequence(int(wrong.nonzero()[0]), tokens, blocks, width)


def refuse_sequence(sequence: int, tokens: int, blocks: int, width: int) -> NoReturn:
    """Raise AttentionInputError for a sequence whose query starts, length or table of `width` blocks do not fit."""
    _refuse(
        f"sequence {sequence} does not fit: query starts must rise from 0 to the {tokens} tokens, a sequence has at "
        f"least as many keys as new tokens, and each block of its keys must be one of the {blocks} in the cache and "
        f"stand in its table of {width}"
    )


def check_slots(slot_mapping: Tensor, key_cache: Tensor) -> None:
    """Read slots on the CPU; raises AttentionInputError for one that is neither -1 nor in the cache."""
    slots = key_cache.shape[0] * key_cache.shape[1]
    wrong = (slot_mapping < -1) | (slot_mapping >= slots)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        _refuse(
            f"slot_mapping[{at}] is {int(slot_mapping[at])}, but the caches have slots 0 to {slots - 1}, and -1 is for "
            "a token that is not written"
        )


def check_write(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Raise AttentionInputError for arguments that cannot be written."""
    _check_caches(key_cache, value_cache)
    for name, tensor, cache in (("key", key, key_cache), ("value", value, value_cache)):
        if tensor.dim() != 3 or tensor.shape[1:] != cache.shape[2:]:
            _refuse(f"{name} must be [tokens, {cache.shape[2]}, {cache.shape[3]}], not {_shape(tensor)}")
        _same_device(name, tensor, cache)
    if slot_mapping.dtype != torch.int64:
        _refuse(f"slot_mapping must be int64, not {slot_mapping.dtype}")
    if not slot_mapping.shape == key.shape[:1] == value.shape[:1]:
        _refuse(
            f"slot_mapping {_shape(slot_mapping)} must name one slot for each of {key.shape[0]} keys and "
            f"{value.shape[0]} values"
        )
    _same_device("slot_mapping", slot_mapping, key_cache)


def _check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    if key_cache.dim() != 4 or value_cache.dim() != 4 or key_cache.shape[:3] != value_cache.shape[:3]:
        _refuse(
            "the caches must be [blocks, block_size, kv_heads, d] with equal first three sizes, not "
            f"{_shape(key_cache)} and {_shape(value_cache)}"
        )
    if key_cache.dtype not in _FLOATS or value_cache.dtype != key_cache.dtype:
        _refuse(
            "the caches must both be float32, float16 or bfloat16, not "
            f"{key_cache.dtype} and {value_cache.dtype}"
        )
    layout = layout_of(key_cache, value_cache)
    on_gpu = key_cache.is_cuda
    if layout is None or (on_gpu and not (key_cache.is_contiguous() and value_cache.is_contiguous())):
        _refuse("the caches must be contiguous, or on the CPU as `new_caches` lays them out")
    _same_device("value_cache", value_cache, key_cache)


def _may_read(tensor: Tensor, plan: AttentionPlan | None) -> bool:
    """Whether its values can be looked at without a wait that a launch must not have, or cannot."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return not tensor.is_cuda or (plan is None and not torch.cuda.is_current_stream_capturing())


def _same_device(name: str, tensor: Tensor, cache: Tensor) -> None:
    if tensor.device != cache.device:
        _refuse(f"{name} is on {tensor.device} and the key cache on {cache.device}")


def _refuse(sentence: str) -> NoReturn:
    raise AttentionInputError(sentence)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
