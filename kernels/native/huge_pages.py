"""Memory in huge pages: reads that go over many megabytes in every step then miss the processor's TLB less.

Linux gives them only to who asks (`madvise` in /sys/kernel/mm/transparent_hugepage/enabled, as most systems have it).
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86-64 and on arm64 with pages of 4 KiB
_LINE = 64  # bytes of a line of the processor's caches


def zeros(nbytes: int) -> Tensor:
    """Zeros, uint8 [nbytes], aligned to 64 bytes, whose pages the system provides when they are first written.

    Huge pages are those that lie wholly within, so never more than `nbytes` is taken. Where the system knows no
    huge pages, or has none left, they are plain ones. Raises MemoryError where there is no room.
    """
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            return _mapped(nbytes)
    plain = torch.from_numpy(np.zeros(nbytes + _LINE, dtype=np.uint8))
    start = -plain.data_ptr() % _LINE
    return plain[start : start + nbytes]


def _mapped(nbytes: int) -> Tensor:
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    everything = torch.frombuffer(
        memory, dtype=torch.uint8
    )  # keeps the mapping for as long as a view of it lives
    start = -everything.data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // HUGE_PAGE * HUGE_PAGE)
    return everything[start : start + nbytes]


class Arena:
    """One piece of memory in huge pages for many tensors that are read one after the other."""

    def __init__(self, nbytes: int) -> None:
        """Room for tensors whose `room` is `nbytes` together."""
        self._memory = zeros(nbytes)
        self._used = 0

    @staticmethod
    def room(tensor: Tensor) -> int:
        """Bytes that a copy of `tensor` takes."""
        return -(-tensor.nbytes // _LINE) * _LINE

    def copy(self, tensor: Tensor) -> Tensor:
        """Give a contiguous copy of `tensor` that lies behind the one before."""
        first, self._used = self._used, self._used + self.room(tensor)
        assert self._used <= len(self._memory), (self._used, len(self._memory))
        place = self._memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)
