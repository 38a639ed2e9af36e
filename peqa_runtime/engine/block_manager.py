"""Who owns which block of the KV cache. A block holds `block_size` tokens of one sequence, for every layer."""

from __future__ import annotations

from collections.abc import Iterable

from peqa_runtime.core import Sequence


class BlockManager:
    """Hands blocks to sequences and takes them back. No tensors: a block is a number in `[0, num_blocks)`.

    A recycled block is not cleaned. Its stale content is never read: attention reads position p of a sequence
    only for p < the sequence's length, and every such slot was written by that sequence itself (tokens are
    computed from 0 up, a slot is written before the attention of the same step reads it). The kernels mask the
    rest before it enters a sum, so not even a NaN left behind gets through; a test poisons the cache to show it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0, num_blocks
        assert block_size > 0, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last is used next, so an idle server touches (and keeps resident) few pages.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that no sequence owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that sequences own."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a sequence of `num_tokens` occupies."""
        return -(-num_tokens // self.block_size)

    def missing(self, sequence: Sequence) -> int:
        """Blocks that the sequence still lacks to hold all its known tokens."""
        return max(0, self.blocks_for(sequence.num_tokens) - len(sequence.block_table))

    def grow(self, sequence: Sequence) -> bool:
        """Give the sequence blocks for all its known tokens; False (and nothing given) when too few are free."""
        missing = self.missing(sequence)
        if missing > len(self._free):
            return False
        sequence.block_table.extend(self._free.pop() for _ in range(missing))
        return True

    def free(self, sequence: Sequence) -> None:
        """Take back every block of the sequence."""
        self._free.extend(reversed(sequence.block_table))
        sequence.block_table.clear()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert that every block is free or owned by exactly one of `sequences` (for tests and idle checks)."""
        owned = [block for sequence in sequences for block in sequence.block_table]
        assert sorted(owned + self._free) == list(range(self.num_blocks)), "a block leaked or is shared"
