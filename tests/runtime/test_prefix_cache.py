"""Blocks are found by content alone: base, revision, salt and all tokens before; and given up oldest first."""

from __future__ import annotations

import pytest

from peqa_runtime.core import Request, TokenLogprobs
from peqa_runtime.engine.block_manager import BlockManager
from peqa_runtime.engine.prefix_cache import PrefixCache
from peqa_runtime.engine.sequence import Sequence
from peqa_runtime.sampling_params import SamplingParams

SIZE = 4


def manager(blocks: int = 16, base: str = "ab" * 32) -> BlockManager:
    return BlockManager(blocks, SIZE, PrefixCache(base, SIZE))


def sequence(
    tokens: int | list[int],
    revision: str = "",
    salt: str = "",
    task: str = "base",
    prompt_logprobs: int | None = None,
) -> Sequence:
    ids = list(range(tokens)) if isinstance(tokens, int) else tokens
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    return Sequence(Request("r", tuple(ids), params, task, revision, cache_salt=salt), list(ids))


def compute(m: BlockManager, s: Sequence, up_to: int | None = None) -> list[int]:
    """Begin with what is found, and compute as far as `up_to`; the blocks that were found."""
    found = m.find(s)
    m.begin(s, found)
    s.num_computed_tokens = max(s.num_computed_tokens, s.num_tokens if up_to is None else up_to)
    m.computed(s)
    return found


def test_full_computed_blocks_are_found_by_the_next_with_the_same_beginning() -> None:
    m = manager()
    a = sequence(10)
    assert compute(m, a) == []
    b = sequence([*range(8), 50, 51, 52])
    assert compute(m, b) == a.block_table[:2]
    assert b.num_computed_tokens == 11
    assert set(a.block_table) & set(b.block_table) == set(a.block_table[:2])
    m.check_integrity([a, b])
    m.free(a)
    m.check_integrity([b])
    c = sequence(9)
    assert m.find(c) == b.block_table[:2], "also while only somebody else owns them"
    m.free(b)
    assert m.num_used == 0
    assert m.find(c) == m.find(sequence(9)), "and when nobody does"


@pytest.mark.parametrize(
    ("other", "blocks"),
    [
        (sequence(12), 2),  # the last token is computed again, for its logits
        (sequence(13), 3),
        (sequence([*range(11), 99, 98]), 2),
        (sequence([99, *range(1, 12), 98]), 0),
        (sequence([*range(4, 12), 1]), 0),  # the second block's tokens, at another place
        (sequence(13, revision="cd" * 32), 0),
        (sequence(13, salt="tenant"), 0),
        (sequence(13, task="another"), 3),  # two tasks on one revision compute the same
        (sequence(13, prompt_logprobs=0), 0),
    ],
)
def test_what_must_be_equal_to_share(other: Sequence, blocks: int) -> None:
    m = manager()
    a = sequence(12)
    compute(m, a)
    assert m.find(other) == a.block_table[:blocks]


def test_revision_and_salt_do_not_run_into_each_other() -> None:
    m = manager()
    compute(m, sequence(12, revision="ab", salt="c"))
    assert not m.find(sequence(12, revision="a", salt="bc"))
    assert not m.find(sequence(12, revision="abc", salt=""))
    assert not m.find(sequence(12, revision="", salt="abc"))
    assert m.find(sequence(12, revision="ab", salt="c"))
    assert m.find(sequence(12, revision="ab", salt="\ud800")) == [], "any text can be a salt"


def test_another_base_has_other_keys() -> None:
    a, b = sequence(12), sequence(12)
    assert manager(base="ab").cache.keys(a, 3) != manager(base="cd").cache.keys(b, 3)  # type: ignore[union-attr]


def test_only_what_is_computed_is_found() -> None:
    m = manager()
    a = sequence(12)
    m.begin(a, [])
    assert m.find(sequence(12)) == [], "given, but not computed"
    a.num_computed_tokens = 7
    m.computed(a)
    assert m.find(sequence(12)) == a.block_table[:1]
    first = a.block_table[0]
    m.free(a)  # as an abort in the middle of the prompt does
    m.check_integrity([])
    assert m.find(sequence(12)) == [first]
    assert m.cache is not None
    assert m.cache.num_blocks == 1


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    m = manager()
    a = sequence(6)
    compute(m, a)
    for token in (70, 71, 72):
        a.token_ids.append(token)
        assert m.grow(a)
        a.num_computed_tokens = len(a.token_ids)
        m.computed(a)
    table = list(a.block_table)
    m.free(a)
    assert m.find(sequence([*range(6), 70, 71, 72, 1, 2])) == table[:2]


def test_of_two_that_computed_the_same_the_first_stays() -> None:
    m = manager()
    a, b = sequence(9), sequence(9)
    m.begin(a, m.find(a))
    m.begin(b, m.find(b))
    for s in (a, b):
        s.num_computed_tokens = 9
        m.computed(s)
    assert m.find(sequence(9)) == a.block_table[:2]
    m.free(b)
    m.check_integrity([a])
    m.free(a)
    m.check_integrity([])
    assert m.num_free == 16


def test_the_longest_idle_is_given_up_first_and_ends_before_beginnings() -> None:
    m = manager(blocks=6)
    old, new = sequence(12), sequence([*range(50, 62)])
    for s in (old, new):
        compute(m, s)
    for s in (old, new):
        m.free(s)
    assert m.num_free == 6
    third = sequence([*range(80, 88)])
    m.begin(third, [])  # needs two
    assert len(m.find(sequence(13))) == 1, "the beginning of the older one is left"
    assert len(m.find(sequence([*range(50, 63)]))) == 3
    m.check_integrity([third])


def test_finding_again_makes_it_young() -> None:
    m = manager(blocks=4)
    a, b = sequence(8), sequence([*range(50, 58)])
    for s in (a, b):
        compute(m, s)
        m.free(s)
    again = sequence(9)
    assert len(compute(m, again)) == 2  # and takes one of b's for the rest
    m.free(again)
    assert len(m.find(sequence(9))) == 2
    assert len(m.find(sequence([*range(50, 59)]))) == 1


def test_free_blocks_go_before_cached_ones() -> None:
    m = manager(blocks=4)
    a = sequence(8)
    compute(m, a)
    m.free(a)
    m.begin(sequence([90, 91, 92, 93, 94]), [])
    assert len(m.find(sequence(9))) == 2


def test_cost_counts_found_blocks_that_nobody_owns() -> None:
    m = manager(blocks=4)
    a = sequence(8)
    compute(m, a)
    b = sequence(12)
    assert m.cost(b, m.find(b)) == 1
    m.free(a)
    assert m.cost(b, m.find(b)) == 3
    m.begin(b, m.find(b))
    assert m.num_free == 1
    m.check_integrity([b])


def test_a_faulty_sequence_leaves_nothing_to_find_not_even_what_others_share() -> None:
    m = manager()
    a, b = sequence(12), sequence(14)
    compute(m, a)
    compute(m, b)
    b.faulty = True
    m.free(b)
    assert m.find(sequence(13)) == []
    m.check_integrity([a])
    m.free(a)
    assert m.num_free == 16
    m.check_integrity([])


def test_prompt_logprobs_already_reported_need_no_logits_again() -> None:
    m = manager()
    compute(m, sequence(12))
    s = sequence(12, prompt_logprobs=0)
    assert m.find(s) == []
    s.prompt_logprobs = [None, *(TokenLogprobs(i, -1.0) for i in range(1, 6))]  # as after a preemption
    assert len(m.find(s)) == 1, "positions 0 to 4 are reported"
    s.prompt_logprobs += [TokenLogprobs(i, -1.0) for i in range(6, 12)]
    assert len(m.find(s)) == 2


def test_counts_are_tokens_of_prompts_looked_up_and_found() -> None:
    m = manager()
    assert m.cache is not None
    for tokens in (9, 9, 9):
        s = sequence(tokens)
        compute(m, s)
        m.free(s)
    scored = sequence(9, prompt_logprobs=0)
    compute(m, scored)
    m.free(scored)
    resumed = sequence(9)
    resumed.num_preemptions = 1
    compute(m, resumed)
    assert m.cache.stats() == {
        "prefix_cache_blocks": 2,
        "prefix_cache_queries_total": 27,
        "prefix_cache_hits_total": 16,
    }
    assert resumed.num_cached_tokens == 0


def test_integrity_sees_a_block_that_is_found_by_wrong_tokens() -> None:
    m = manager()
    a, b = sequence(9), sequence([*range(50, 59)])
    compute(m, a)
    compute(m, b)
    a.block_table, b.block_table = b.block_table, a.block_table
    with pytest.raises(AssertionError, match="does not hold"):
        m.check_integrity([a, b])
