"""Memory for keys and values: one pair of tensors per layer, cut into blocks that the BlockManager hands out.

On a CPU all that a block number has in all layers lies together: pages come as blocks are first used, and a huge page
then holds a few whole blocks, where tensors one behind the other would take 2 MiB per layer for the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from peqa_kernels.native import huge_pages
from peqa_kernels.paged_attention import new_caches

_GIB = 2**30
_LINE = 64  # bytes
_CPU_LIMIT = 2 * _GIB  # a server on a laptop must leave the laptop usable
_CPU_SHARE = 0.25
_GPU_SHARE = 0.85  # the rest: activations, logits and what the allocator cannot use


class LayerShape(Protocol):
    """What a layer stores per token (the loader's `KVSpec`)."""

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""

    @property
    def d_k(self) -> int:
        """Width of a key."""

    @property
    def d_v(self) -> int:
        """Width of a value."""


class KVCache:
    """Keys and values of every layer: `layers[i]` = (key_cache [blocks, block_size, kv_heads, d_k], value_cache).

    Behind the `num_blocks` that requests get lie `spare_blocks` more, for who computes beside them; `spare`: their ids.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        num_blocks: int,
        spare_blocks: int = 0,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.num_blocks = num_blocks
        self.spare = range(num_blocks, num_blocks + spare_blocks)
        self.block_size = block_size
        self.dtype = dtype
        shapes = [(self.spare.stop, block_size, layer.kv_heads, layer.d_k, layer.d_v) for layer in layers]
        make = _Interleaved(shapes, dtype).part if device.type == "cpu" else None
        self.layers: list[tuple[Tensor, Tensor]] = [
            new_caches(*shape, dtype=dtype, device=device, make=make) for shape in shapes
        ]

    @property
    def num_bytes(self) -> int:
        """Address space of all blocks; on the CPU only blocks that were used take memory."""
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)


def bytes_per_block(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    return block_size * dtype.itemsize * sum(s.kv_heads * (s.d_k + s.d_v) for s in layers)


def fitting_blocks(
    layers: Sequence[LayerShape],
    *,
    block_size: int,
    dtype: torch.dtype,
    available_bytes: int,
    device: torch.device,
    max_model_len: int,
    max_sequences: int,
) -> int:
    """Blocks to allocate: a share of what is available, at least one and at most `max_sequences` full contexts.

    Raises `ValueError` when not even one context of `max_model_len` tokens fits into the available memory.
    """
    per_block = bytes_per_block(layers, block_size, dtype)
    per_context = -(-max_model_len // block_size)
    if per_context * per_block > available_bytes:
        raise ValueError(
            f"one context of {max_model_len} tokens needs {per_context * per_block / _GIB:.1f} GiB for keys and "
            f"values, but {available_bytes / _GIB:.1f} GiB are available; choose a smaller max_model_len"
        )
    if device.type == "cpu":
        budget = min(_CPU_LIMIT, int(available_bytes * _CPU_SHARE))
    else:
        budget = int(available_bytes * _GPU_SHARE)
    return max(per_context, min(budget // per_block, per_context * max_sequences))


def most_blocks(
    layers: Sequence[LayerShape],
    block_size: int,
    dtype: torch.dtype,
    available_bytes: int,
    device: torch.device,
) -> int:
    """Blocks that a large share of what is available holds. `ValueError` when it holds none."""
    share = _GPU_SHARE if device.type == "cuda" else 2 * _CPU_SHARE
    found = int(available_bytes * share) // bytes_per_block(layers, block_size, dtype)
    if found < 1:
        raise ValueError(f"{available_bytes / _GIB:.1f} GiB are available: too little for keys and values")
    return found


def available_memory(device: torch.device) -> int:
    """Bytes that can be had now on the device; on the CPU within this container's limit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading used for a moment is still held by torch's allocator
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available = _meminfo_available()
    limit, used = (_read_int(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def _meminfo_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 4 * _GIB  # not Linux: assume a small machine


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such limit ("max")
        return None


class _Interleaved:
    """Zeros for the keys and values of all layers, block by block, that take memory as they are written."""

    def __init__(self, shapes: Sequence[tuple[int, int, int, int, int]], dtype: torch.dtype) -> None:
        """`shapes`: (blocks, block_size, kv_heads, d_k, d_v) of each layer, in the order in which parts are taken."""
        blocks = shapes[0][0]
        sizes = (block_size * heads * d for _, block_size, heads, *widths in shapes for d in widths)
        self._line = _LINE // dtype.itemsize
        width = sum(self._padded(size) for size in sizes)
        self._rows = huge_pages.zeros(blocks * width * dtype.itemsize).view(dtype).view(blocks, width)
        self._used = 0

    def part(self, shape: tuple[int, ...]) -> Tensor:
        """The next piece of every block: `shape` [blocks, …], contiguous within a block."""
        size = math.prod(shape[1:])
        first, self._used = self._used, self._used + self._padded(size)
        return self._rows[:, first : first + size].view(shape)

    def _padded(self, numbers: int) -> int:
        """Up to whole lines of the processor's caches."""
        return -(-numbers // self._line) * self._line
