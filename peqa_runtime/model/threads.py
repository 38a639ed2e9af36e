"""Thread count for work made of many small tensor operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block's tensor operations on one thread.

    Packing and loading are thousands of operations of some microseconds. On two threads each one ends in a barrier,
    and when another process holds a core every barrier waits for the scheduler: measured on two busy cores, laying out
    SmolLM2's codes took 19 s on two threads and 0.5 s on one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
