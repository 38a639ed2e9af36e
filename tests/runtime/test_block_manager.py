"""Blocks are handed out once, come back whole, and a refusal changes nothing."""

from __future__ import annotations

import pytest

from peqa_runtime.core import Request
from peqa_runtime.engine.block_manager import BlockManager
from peqa_runtime.engine.sequence import Sequence
from peqa_runtime.sampling_params import SamplingParams


def sequence(num_tokens: int) -> Sequence:
    tokens = tuple(range(num_tokens))
    return Sequence(Request("r", tokens, SamplingParams()), list(tokens))


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_cover_the_tokens_and_no_more(tokens: int, blocks: int) -> None:
    manager = BlockManager(8, 4)
    s = sequence(tokens)
    assert manager.grow(s)
    assert len(s.block_table) == blocks == manager.num_used
    assert manager.cost(s, s.block_table) == 0
    manager.check_integrity([s])


def test_growing_asks_only_for_what_is_missing() -> None:
    manager = BlockManager(4, 4)
    s = sequence(4)
    manager.grow(s)
    first = list(s.block_table)
    s.token_ids.append(0)
    assert manager.grow(s)
    assert s.block_table[:1] == first
    assert len(s.block_table) == 2


def test_a_refusal_gives_nothing() -> None:
    manager = BlockManager(2, 4)
    s = sequence(9)
    assert not manager.grow(s)
    assert s.block_table == []
    assert manager.num_free == 2


def test_freed_blocks_are_the_next_to_be_used() -> None:
    manager = BlockManager(8, 4)
    a, b = sequence(8), sequence(8)
    manager.grow(a)
    table = list(a.block_table)
    manager.free(a)
    assert a.block_table == []
    manager.grow(b)
    assert b.block_table == table


def test_integrity_check_sees_a_shared_and_a_leaked_block() -> None:
    manager = BlockManager(4, 4)
    a, b = sequence(4), sequence(4)
    manager.grow(a)
    with pytest.raises(AssertionError):
        manager.check_integrity([b])
    b.block_table = list(a.block_table)
    with pytest.raises(AssertionError):
        manager.check_integrity([a, b])
