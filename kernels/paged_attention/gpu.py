"""Launches of the attention kernels: which tiles, how many programs. Nothing here waits for the device.

torch.nn.attention.varlen is not called: up to torch 2.13 its `block_table` works only through FlashAttention 3 on
Hopper (4 on Blackwell), packages that torch does not bring, and it has neither softcap nor sinks. Whether it is faster
where it works is not measured yet: the rows `vs-torch-varlen` of `make bench-kernels` say so where a package is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from peqa_kernels.device import launching_on
from peqa_kernels.paged_attention import attend
from peqa_kernels.paged_attention.plan import AttentionPlan
from peqa_kernels.paged_attention.tiles import LEAST_WIDTH, Tile, decode_tile, most_splits, prefill_tile
from peqa_kernels.paged_attention.write import write_kernel

_LOG2E = 1.4426950408889634
_PROGRAMS = 4  # of a decode step, for each processor: as many as its registers and shared memory hold


def paged_attention_gpu(
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
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Attend from packed queries to each sequence's own blocks; arguments and result as `paged_attention`.

    Takes fp16, bf16 and fp32 caches (fp32 is multiplied as tf32x3); accumulates in fp32. Queries of another dtype than
    the cache's are rounded to it: the keys beside them were. A sequence with one new token goes to the decode kernel,
    any other to the prefill kernel, whatever its neighbours are.
    """
    tokens, heads, d = q.shape
    seqs = seq_lens.shape[0]
    block_size, kv_heads, d_v = value_cache.shape[1:]
    if plan is None:
        plan = AttentionPlan(tokens, max(tokens, block_tables.shape[1] * block_size))
    q = _rows(q)
    out = torch.empty(tokens, heads, d_v, dtype=q.dtype, device=q.device)
    sink = q if sinks is None else sinks.contiguous()  # a kernel without sinks reads none
    inputs = (q, key_cache, value_cache, block_tables, query_starts, seq_lens, sink, out)
    # Scores in units of log2; under a softcap the kernel wants 2 x / softcap for its tanh.
    scale = scaling * _LOG2E if softcap is None else 2.0 * scaling / softcap * _LOG2E
    numbers = (scale, (softcap or 0.0) * _LOG2E, sliding_window or 0)
    strides = (block_tables.stride(0), q.stride(0), q.stride(1))
    shape: dict[str, Any] = {
        **{"heads": heads, "kv_heads": kv_heads, "block_size": block_size, "d": d, "d_v": d_v},
        **{"HAS_SINKS": sinks is not None, "HAS_CAP": softcap is not None},
        "HAS_WINDOW": sliding_window is not None,
    }
    widest, dtype, wgmma = max(d, d_v), key_cache.dtype, _has_wgmma(q.device)
    early = begins_early(q.device)
    with launching_on(q.device):
        if plan.max_new > 1:
            tile = prefill_tile(widest, dtype, invariant=plan.invariant, wgmma=wgmma)
            packed, chunks = packing(heads // kv_heads, tile)
            # At most this many tiles: each sequence ends with one partly filled.
            grid = (tokens // (tile.rows // packed) + seqs, kv_heads * chunks)
            constants = {**shape, **_tile_constants(tile, packed, d, d_v), "SPLITS": plan.invariant}
            attend.prefill_kernel[grid](*inputs, *numbers, seqs, *strides, **constants, **_options(tile))
        tile = decode_tile(heads // kv_heads, widest, dtype, invariant=plan.invariant, wgmma=wgmma)
        packed, chunks = packing(heads // kv_heads, tile)
        splits = most_splits(plan.max_len, sliding_window)
        parts = torch.empty(seqs, splits, heads, d_v, dtype=torch.float32, device=q.device)
        stats = torch.empty(seqs, splits, heads, 2, dtype=torch.float32, device=q.device)
        programs = split_programs(seqs * kv_heads * chunks, splits, _processors(q.device))
        attend.decode_kernel[(seqs, kv_heads * chunks, programs)](
            *inputs, parts, stats, *numbers, splits, *strides,
            **shape, **_tile_constants(tile, packed, d, d_v), **_options(tile), **early,
        )  # fmt: skip
        if splits > 1:
            attend.combine_kernel[(seqs, heads)](
                parts, stats, query_starts, seq_lens, sink, out, numbers[2], splits,
                heads=heads, d_v=d_v, HAS_SINKS=shape["HAS_SINKS"], HAS_WINDOW=shape["HAS_WINDOW"],
                D_V=triton.next_power_of_2(d_v), num_warps=1, enable_fp_fusion=False, **early,
            )  # fmt: skip
    return out


def split_programs(others: int, splits: int, processors: int) -> int:
    """Programs among which the splits of each sequence and key/value head are dealt out, `others` being those.

    A CUDA graph is launched for the longest sequences that it may meet: one program for each split would mean
    thousands that find nothing to do, and each of them keeps a place on a processor until it knows. So no more than
    fill the processors a few times; where all sequences are short, the first program has all the work.
    """
    return max(1, min(splits, -(-_PROGRAMS * processors // others)))


def packing(repeat: int, tile: Tile) -> tuple[int, int]:
    """Query heads in one tile, and tiles for the `repeat` query heads of one key/value head."""
    chunks = -(-repeat // tile.rows)
    return -(-repeat // chunks), chunks


def write_kv_gpu(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Copy each token's key and value to its slot; in place; arguments as `write_kv`."""
    tokens, kv_heads, d = key.shape
    d_v = value.shape[2]
    key, value = _rows(key), _rows(value)
    if tokens == 0:
        return
    with launching_on(key.device):
        write_kernel[(tokens, kv_heads)](
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            *key.stride()[:2],
            *value.stride()[:2],
            kv_heads=kv_heads,
            d=d,
            d_v=d_v,
            D=triton.next_power_of_2(d),
            D_V=triton.next_power_of_2(d_v),
            num_warps=1,  # one head of one token: a few hundred bytes
            enable_fp_fusion=False,
            **begins_early(key.device),
        )


def warm_up(
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    heads: int,
    dtype: torch.dtype,
    scaling: float = 1.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    invariant: bool = False,
) -> None:
    """Compile and load every kernel that serving from these caches will launch, before the first request does.

    Takes seconds per new combination and milliseconds where Triton's cache has it. Reads block 0 and writes nothing.

    Args:
        key_cache: [blocks, block_size, kv_heads, d], on the GPU.
        value_cache: [blocks, block_size, kv_heads, d_v].
        heads: query heads of the layer.
        dtype: of the queries, keys and values that the model makes.
        scaling, sliding_window, softcap, sinks, invariant: as the layer will use them.
    """
    kv_heads, d = key_cache.shape[2:]
    d_v, device = value_cache.shape[3], key_cache.device
    q = torch.zeros(3, heads, d, dtype=dtype, device=device)
    key = torch.zeros(3, kv_heads, d, dtype=dtype, device=device)
    value = torch.zeros(3, kv_heads, d_v, dtype=dtype, device=device)
    nowhere = torch.full((3,), -1, dtype=torch.int64, device=device)
    write_kv_gpu(key, value, key_cache, value_cache, nowhere)
    table = torch.zeros(2, 1, dtype=torch.int32, device=device)
    starts = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
    lens = torch.tensor([1, min(2, key_cache.shape[1])], dtype=torch.int32, device=device)
    # A bound of two splits launches the combination too, which finds nothing to do.
    plan = AttentionPlan(max_new=2, max_len=1 << 13, invariant=invariant)
    caches = (key_cache, value_cache, table, starts, lens)
    paged_attention_gpu(q, *caches, scaling, sliding_window, softcap, sinks, plan)


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors. (No GPU: the interpreter in a test, few, so that its programs take several splits.)"""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _has_wgmma(device: torch.device) -> bool:
    """Hopper, as later generations have other instructions in its place. (No GPU: the interpreter in a test.)"""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def begins_early(device: torch.device) -> dict[str, bool]:
    """Options of the launches of a decode step, a few microseconds each.

    On Hopper and later they begin while the one before ends, and wait on the device for what it writes.
    """
    early = device.type == "cuda" and torch.version.hip is None
    early = early and torch.cuda.get_device_capability(device)[0] >= 9
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def _rows(x: Tensor) -> Tensor:
    """x [tokens, heads, d] with each head's features side by side, as the kernels read them."""
    return x if x.stride(2) == 1 else x.contiguous()


def _tile_constants(tile: Tile, packed: int, d: int, d_v: int) -> dict[str, int]:
    """The kernels' compile-time sizes."""
    return {
        **{"PACKED": packed, "ROWS": tile.rows, "KEYS": tile.keys},
        "D": max(LEAST_WIDTH, triton.next_power_of_2(d)),
        "D_V": max(LEAST_WIDTH, triton.next_power_of_2(d_v)),
    }


def _options(tile: Tile) -> dict[str, Any]:
    """Launch options. No fusing of multiply-adds by the compiler: it could fuse otherwise in each kernel.

    Left alone, ptxas takes 128 registers for some kernels of 8 warps and spills one; 255 is what 8 warps may have.
    """
    wide = {"maxnreg": 255} if tile.warps == 8 else {}
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False, **wide}
