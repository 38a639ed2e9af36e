"""Who owns which block of the KV cache. A block holds `block_size` tokens, for every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items

from peqa_runtime.engine.prefix_cache import PrefixCache
from peqa_runtime.engine.sequence import Sequence


class BlockManager:
    """Hands blocks to sequences and takes them back. No tensors: a block is a number in `[0, num_blocks)`.

    With a prefix cache, full computed blocks are found again by their content and may have several owners. Nobody
    writes into a block with a second owner: a sequence that begins with found blocks computes from their end on,
    and only into blocks of its own. A block without an owner is free, or idle (kept to be found, given up when no
    free one is left); `num_free` counts both.

    A recycled block is not cleaned. Its stale content is never read: attention reads position p of a sequence
    only for p < the sequence's length, and every such slot was written by that sequence itself or found as
    computed (tokens are computed from 0 up, a slot is written before the attention of the same step reads it). The
    kernels mask the rest before it enters a sum, so not even a NaN left behind gets through; a test poisons the
    cache to show it.
    """

    def __init__(self, num_blocks: int, block_size: int, cache: PrefixCache | None = None) -> None:
        assert num_blocks > 0, num_blocks
        assert block_size > 0, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.cache = cache
        # A stack: the block freed last is used next, so an idle server touches (and keeps resident) few pages.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that no sequence owns."""
        return len(self._free) + (self.cache.num_idle if self.cache else 0)

    @property
    def num_used(self) -> int:
        """Blocks that sequences own."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a sequence of `num_tokens` occupies."""
        return -(-num_tokens // self.block_size)

    def find(self, sequence: Sequence) -> list[int]:
        """Computed blocks that a sequence without blocks can begin with.

        At least its last token is left to compute, for its logits; with prompt log-probabilities so is every
        position whose logits are still to be reported.
        """
        if self.cache is None:
            return []
        return self.cache.find(sequence, _skippable_tokens(sequence) // self.block_size)

    def cost(self, sequence: Sequence, found: Items[int]) -> int:
        """How many of the `num_free` blocks `begin` would take: new ones, and found ones that nobody owns yet."""
        new = self.blocks_for(sequence.num_tokens) - len(found)
        return new + sum(self._owners[block] == 0 for block in found)

    def found_soon(self, sequence: Sequence, found: Items[int], others: Iterable[Sequence]) -> int:
        """Tokens after the found blocks that one of `others`, whose prompts are in work, will have computed."""
        keys, first = sequence.block_keys, len(found)
        longest = 0
        for other in others:
            theirs = other.block_keys
            last = min(len(keys), len(theirs), _skippable_tokens(sequence) // self.block_size)
            if other.num_published_blocks <= first < last and keys[first] == theirs[first]:
                equal = next((i for i in range(first, last) if keys[i] != theirs[i]), last)
                longest = max(longest, equal - first)
        return longest * self.block_size

    def freed_by(self, sequence: Sequence, found: Items[int]) -> int:
        """Blocks that nobody owns once this sequence is preempted, besides the found ones."""
        return sum(self._owners[block] == 1 and block not in found for block in sequence.block_table)

    def begin(self, sequence: Sequence, found: Items[int]) -> None:
        """Give a sequence the found blocks, whose tokens then count as computed, and new ones for all the rest."""
        assert not sequence.block_table
        assert self.cost(sequence, found) <= self.num_free
        for block in found:
            if self._owners[block] == 0:
                assert self.cache is not None
                self.cache.take(block)
            self._owners[block] += 1
        sequence.block_table.extend(found)
        sequence.num_computed_tokens = len(found) * self.block_size
        sequence.num_published_blocks = len(found)
        if self.cache is not None and sequence.num_preemptions == 0 and _skippable_tokens(sequence) > 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.cache.num_queried_tokens += sequence.num_prompt_tokens
            self.cache.num_hit_tokens += sequence.num_cached_tokens
        grown = self.grow(sequence)
        assert grown

    def grow(self, sequence: Sequence) -> bool:
        """Give the sequence blocks for all its known tokens; False (and nothing given) when too few are free."""
        missing = self.blocks_for(sequence.num_tokens) - len(sequence.block_table)
        if missing <= 0:
            return True
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evicted()
            self._owners[block] = 1
            sequence.block_table.append(block)
        return True

    def computed(self, sequence: Sequence) -> None:
        """Its `num_computed_tokens` have grown: blocks that are full now can be found by others."""
        if self.cache is not None:
            self.cache.publish(sequence)

    def free(self, sequence: Sequence) -> None:
        """Take back every block of the sequence. A faulty one's can not be found any more."""
        # The end first, so that it is also given up before the beginning, without which nobody finds it.
        for block in reversed(sequence.block_table):
            if sequence.faulty and self.cache is not None:
                self.cache.forget(block)
            self._owners[block] -= 1
            if self._owners[block] == 0 and not (self.cache is not None and self.cache.keep(block)):
                self._free.append(block)
        sequence.block_table.clear()
        sequence.num_published_blocks = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert that every block is free, idle or owned, and shared by none but sequences with equal beginnings."""
        sequences = list(sequences)
        owners = Counter(block for sequence in sequences for block in sequence.block_table)
        assert owners == Counter(dict(enumerate(self._owners))), (
            "a block leaked or has a wrong number of owners"
        )
        idle = self.cache.num_idle if self.cache else 0
        assert len(self._free) == len(set(self._free)), "a block is free twice"
        assert all(owners[block] == 0 for block in self._free), "an owned block is free"
        assert len(owners) + len(self._free) + idle == self.num_blocks, "a block leaked"
        if self.cache is None:
            assert all(count == 1 for count in owners.values()), "a block is shared"
            return
        self.cache.check_integrity(self._owners, self._free)
        for sequence in sequences:
            full = sequence.num_tokens // self.block_size
            keys: list[bytes | None] = [*self.cache.keys(sequence, full), None]
            for i, block in enumerate(sequence.block_table):
                key = self.cache.key_of(block)
                assert key in (None, keys[min(i, full)]), "a block is found by tokens that it does not hold"
                assert owners[block] == 1 or i < sequence.num_computed_tokens // self.block_size, (
                    "a block is shared before it is computed"
                )

    def _evicted(self) -> int:
        assert self.cache is not None
        return self.cache.evict()


def _skippable_tokens(sequence: Sequence) -> int:
    """Tokens at the sequence's start whose logits nobody needs."""
    last = sequence.num_tokens - 1
    if sequence.request.params.prompt_logprobs is None:
        return last
    reported = max(0, len(sequence.prompt_logprobs) - 1)
    return reported if reported < sequence.num_prompt_tokens - 1 else last
