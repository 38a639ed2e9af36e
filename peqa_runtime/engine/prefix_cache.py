"""Which block holds which tokens: the keys under which computed blocks are found again. No tensors.

A key is a chain: BLAKE2b of the previous block's key and this block's tokens; the first link is seeded with the base's
digest, the scale set's revision (its content, never a task's name) and the tenant's salt. So equal keys mean equal
keys and values: the same tokens from position 0 on, computed by the same weights, for tenants that agreed to share.
An upload changes the revision and with it every key; a rollback brings the old keys, and what is left of their
blocks, back.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b

from peqa_runtime.core import Request
from peqa_runtime.engine.sequence import Sequence

_KEY_BYTES = 32  # no two prompts meet by chance or by intent


class PrefixCache:
    """Keys of computed blocks. A keyed block without an owner is idle: kept until its place is needed.

    It knows no owners; the `BlockManager` says when a block loses its last one (`keep`) and gets one (`take`).
    """

    def __init__(self, base_digest: str, block_size: int) -> None:
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._base_digest = base_digest
        self._block_size = block_size
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # the one to give up first, first

    @property
    def num_blocks(self) -> int:
        """Blocks that can be found, with owners and without."""
        return len(self._keys)

    @property
    def num_idle(self) -> int:
        """Blocks that nobody owns, kept to be found again."""
        return len(self._idle)

    def stats(self) -> dict[str, float]:
        """Numbers for metrics: blocks that can be found; tokens of prompts looked up, and found, since the start."""
        return {
            "prefix_cache_blocks": self.num_blocks,
            "prefix_cache_queries_total": self.num_queried_tokens,
            "prefix_cache_hits_total": self.num_hit_tokens,
        }

    def inherit_counts(self, before: PrefixCache) -> None:
        """Go on counting where the cache that this one replaces stopped."""
        self.num_queried_tokens = before.num_queried_tokens
        self.num_hit_tokens = before.num_hit_tokens

    def find(self, sequence: Sequence, max_blocks: int) -> list[int]:
        """The longest run of cached blocks, at most `max_blocks`, that the sequence's tokens begin with."""
        found: list[int] = []
        for key in self.keys(sequence, max_blocks):
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """Keys of the sequence's first `count` blocks, which its tokens fill; computed once."""
        keys = sequence.block_keys
        size = self._block_size
        assert count * size <= sequence.num_tokens, (count, sequence.num_tokens)
        parent = keys[-1] if keys else self._seed(sequence.request)
        for start in range(len(keys) * size, count * size, size):
            tokens = array("I", sequence.token_ids[start : start + size])
            parent = blake2b(parent + tokens.tobytes(), digest_size=_KEY_BYTES).digest()
            keys.append(parent)
        return keys[:count]

    def publish(self, sequence: Sequence) -> None:
        """Make the sequence's computed full blocks findable. Of two blocks with one content the first stays."""
        count = sequence.num_computed_tokens // self._block_size
        if count <= sequence.num_published_blocks:
            return
        keys = self.keys(sequence, count)
        for i in range(sequence.num_published_blocks, count):
            block = sequence.block_table[i]
            if keys[i] not in self._blocks:
                assert block not in self._keys, "a block is written once between two publications"
                self._blocks[keys[i]] = block
                self._keys[block] = keys[i]
        sequence.num_published_blocks = count

    def keep(self, block: int) -> bool:
        """Take a block that lost its last owner; False when it has no key and is simply free."""
        if block not in self._keys:
            return False
        self._idle[block] = None
        return True

    def take(self, block: int) -> None:
        """An idle block has an owner again."""
        del self._idle[block]

    def evict(self) -> int:
        """Forget the block that has been idle longest, and return it."""
        block, _ = self._idle.popitem(last=False)
        self.forget(block)
        return block

    def forget(self, block: int) -> None:
        """Make an owned block unfindable: what it holds is not to be shared. Nothing happens without a key."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._blocks[key]

    def check_integrity(self, owners: list[int], free: list[int]) -> None:
        """Assert that keys and blocks match, that idle blocks have a key and no owner, free ones neither."""
        assert self._blocks == {key: block for block, key in self._keys.items()}, "keys and blocks differ"
        assert not self._keys.keys() & set(free), "a free block can be found"
        unowned = {block for block in self._keys if owners[block] == 0}
        assert unowned == set(self._idle), "a cached block without an owner is idle, and no other"

    def key_of(self, block: int) -> bytes | None:
        """The key under which a block is found; None when it is not."""
        return self._keys.get(block)

    def _seed(self, request: Request) -> bytes:
        # Digests are hexadecimal, so NUL ends them; the salt comes last and may hold anything.
        seed = f"{self._base_digest}\0{request.revision}\0{request.cache_salt}"
        return blake2b(seed.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest()
