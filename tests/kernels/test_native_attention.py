"""The compiled paged attention: every build that runs here against the formula, and equal bits however it is cut."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from peqa_kernels import native
from peqa_kernels.native import NativeOps
from peqa_kernels.native.isa import usable
from peqa_kernels.native.kv_layout import HEADS_FIRST, TOKENS_FIRST, layout_of, new_caches
from peqa_kernels.paged_attention import paged_attention_reference

MAKE = "the C library is not built: python -m peqa_kernels.native.compile"


@pytest.fixture(params=[build.name for build in usable()])
def ops(request: pytest.FixtureRequest) -> NativeOps:
    """Each build that this CPU can run."""
    found = native.load(request.param)
    assert found is not None, MAKE
    return found


def apart(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN, with 24 numbers that belong to others between two blocks."""
    size = math.prod(shape[1:])
    return torch.full((shape[0], size + 24), float("nan"), dtype=dtype)[:, :size].view(shape)


def skip_without_halves(ops: NativeOps, dtype: torch.dtype) -> None:
    if not ops.reads_caches(dtype):
        pytest.skip(f"{ops.isa.name} reads no fp16")


class Cache:
    """Keys and values of a few sequences in shuffled blocks; every slot that no sequence owns is NaN."""

    def __init__(
        self,
        lengths: list[int],
        kv_heads: int,
        d: int,
        d_v: int,
        block_size: int,
        layout: int = TOKENS_FIRST,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        counts = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(counts) + 3).to(torch.int32)
        self.keys, self.values = new_caches(
            layout, len(order), block_size, kv_heads, d, d_v, partial(apart, dtype=dtype)
        )
        self.tables = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
        used = 0
        for s, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            self.tables[s, :count] = order[used : used + count]
            used += count
            for p in range(length):
                slot = int(self.tables[s, p // block_size]), p % block_size
                self.keys[slot] = torch.randn(kv_heads, d)
                self.values[slot] = torch.randn(kv_heads, d_v)


def starts_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)


OPTIONS = [
    {},
    {"sliding_window": 37},
    {"softcap": 5.0},
    {"sinks": True},
    {"sliding_window": 3, "softcap": 2.0, "sinks": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", [TOKENS_FIRST, HEADS_FIRST])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "d_v", "block_size"),
    [
        *[(9, 3, 64, 64, 16), (4, 4, 80, 72, 5), (8, 1, 30, 33, 32), (60, 1, 16, 256, 7), (2, 2, 256, 8, 16)],
        (2, 2, 8, 8, 2),
    ],
)
def test_agrees_with_the_reference(
    ops: NativeOps,
    options: dict,
    heads: int,
    kv_heads: int,
    d: int,
    d_v: int,
    block_size: int,
    layout: int,
    dtype: torch.dtype,
) -> None:
    """Of fp16 caches: the formula on the numbers that they hold."""
    skip_without_halves(ops, dtype)
    torch.manual_seed(0)
    lengths, new = [1, 70, 130, 64, 200], [1, 70, 1, 13, 66]
    cache = Cache(lengths, kv_heads, d, d_v, block_size, layout, dtype)
    assert layout_of(cache.keys, cache.values) == layout
    q = torch.randn(sum(new), heads, d)
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.randn(heads)
    lens = torch.tensor(lengths, dtype=torch.int32)
    args = (q, cache.keys, cache.values, cache.tables, starts_of(new), lens, 1.3 * d**-0.5)
    got = ops.paged_attention(*args, **options)
    want = paged_attention_reference(*args, **options)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_sinks_may_be_a_part_of_a_larger_tensor(ops: NativeOps) -> None:
    cache = Cache([9], 2, 16, 16, 4)
    every_other = torch.randn(12)[::2]
    args = (torch.randn(9, 6, 16), cache.keys, cache.values, cache.tables, starts_of([9]))
    lens = torch.tensor([9], dtype=torch.int32)
    got = ops.paged_attention(*args, lens, 0.25, sinks=every_other)
    assert torch.equal(got, ops.paged_attention(*args, lens, 0.25, sinks=every_other.clone().contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 50}, {"softcap": 3.0, "sinks": torch.arange(6.0)}]
)
def test_bits_depend_neither_on_chunks_nor_on_neighbours_nor_on_the_layout(
    ops: NativeOps, options: dict, dtype: torch.dtype
) -> None:
    skip_without_halves(ops, dtype)
    torch.manual_seed(1)
    lengths = [150, 33, 97]
    cache = Cache(lengths, 2, 64, 64, 16, dtype=dtype)
    other = Cache(lengths, 2, 64, 64, 16, HEADS_FIRST, dtype)
    other.tables = cache.tables
    for mine, theirs in ((cache.keys, other.keys), (cache.values, other.values)):
        theirs.copy_(mine)
    q = [torch.randn(length, 6, 64) for length in lengths]

    def attend(parts: list[tuple[int, int, int]], cache: Cache = cache) -> Tensor:
        """Run queries from..to of several sequences in one call."""
        seqs = [s for s, _, _ in parts]
        return ops.paged_attention(
            torch.cat([q[s][first:last] for s, first, last in parts]),
            cache.keys,
            cache.values,
            cache.tables[seqs],
            starts_of([last - first for _, first, last in parts]),
            torch.tensor([last for _, _, last in parts], dtype=torch.int32),
            0.125,
            **options,
        )

    alone = [torch.cat([attend([(s, i, i + 1)]) for i in range(length)]) for s, length in enumerate(lengths)]
    whole = attend([(2, 0, 97), (0, 0, 150), (1, 0, 33)])
    assert torch.equal(whole, torch.cat([alone[2], alone[0], alone[1]]))
    for cut in (1, 16, 47, 96):
        mixed = attend([(0, cut, 150), (1, 32, 33), (2, 0, cut), (2, cut, 97)])
        assert torch.equal(mixed, torch.cat([alone[0][cut:], alone[1][32:], alone[2]])), cut
    assert torch.equal(attend([(2, 0, 97), (0, 0, 150), (1, 0, 33)], other), whole)
    assert torch.equal(attend([(0, 149, 150), (1, 3, 33)], other), torch.cat([alone[0][149:], alone[1][3:]]))


def test_strides_and_numbers_of_threads(ops: NativeOps) -> None:
    torch.manual_seed(2)
    cache = Cache([90], 3, 32, 32, 8)
    dense = torch.randn(1, 6, 90, 32)  # [1, heads, tokens, d], as models hold it
    view = dense[0].transpose(0, 1)
    tables, starts, lens = cache.tables, starts_of([90]), torch.tensor([90], dtype=torch.int32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for q in (view, view.contiguous()):
                results.append(ops.paged_attention(q, cache.keys, cache.values, tables, starts, lens, 0.2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    assert not results[0].isnan().any()


@pytest.mark.parametrize("layout", [TOKENS_FIRST, HEADS_FIRST])
def test_threads_take_what_others_have_left(ops: NativeOps, layout: int) -> None:
    """Sequences as unlike as they come, one with no new token, in more and in fewer threads than there are items."""
    torch.manual_seed(4)
    lengths, new = [300, 1, 2, 130, 77, 9], [1, 1, 2, 100, 0, 1]
    cache = Cache(lengths, 2, 64, 64, 16, layout)
    q, starts = torch.randn(sum(new), 6, 64), starts_of(new)
    lens = torch.tensor(lengths, dtype=torch.int32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            results.append(
                ops.paged_attention(q, cache.keys, cache.values, cache.tables, starts, lens, 0.125)
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    want = paged_attention_reference(q, cache.keys, cache.values, cache.tables, starts, lens, 0.125)
    torch.testing.assert_close(results[0], want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("block_size", [16, 6])
def test_fp16_caches_give_the_bits_of_fp32_caches_with_the_same_numbers(
    ops: NativeOps, block_size: int
) -> None:
    """Subnormal ones, too. What is computed is the same; only what is read is narrower."""
    skip_without_halves(ops, torch.float16)
    torch.manual_seed(3)
    half = Cache([130], 2, 64, 40, block_size, HEADS_FIRST, torch.float16)
    half.keys[int(half.tables[0, 3]), 1, :, ::2] *= 2.0**-18
    half.values[int(half.tables[0, 4])] *= 2.0**-20
    whole = (half.keys.float(), half.values.float())
    q = torch.randn(70, 4, 64)
    rest = (half.tables, starts_of([70]), torch.tensor([130], dtype=torch.int32), 0.125)
    want = ops.paged_attention(q, *whole, *rest)
    assert torch.equal(ops.paged_attention(q, half.keys, half.values, *rest), want)


def test_caches_that_no_build_reads_are_refused() -> None:
    keys, values = (torch.zeros(4, 3, 2, 8) for _ in range(2))
    assert layout_of(keys, values) == TOKENS_FIRST
    assert layout_of(keys[::2], values[::2]) == TOKENS_FIRST
    assert layout_of(keys[:, :, :, ::2], values[:, :, :, ::2]) is None
    assert layout_of(keys[:1].expand(4, -1, -1, -1), values) is None, "blocks that lie in each other"
