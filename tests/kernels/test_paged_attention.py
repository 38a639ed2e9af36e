"""Paged attention: every path against the reference, bits independent of the company, nothing foreign is read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from peqa_kernels import paged_attention as op
from peqa_kernels.paged_attention.cpu import paged_attention_cpu, write_kv_cpu

BLOCK_SIZE = 16


@dataclass
class Case:
    """A filled cache and the queries of one call."""

    q: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    owned: Tensor  # bool [blocks, block_size]: slots that belong to some sequence

    @property
    def args(self) -> tuple[Tensor, ...]:
        return (self.q, self.key_cache, self.value_cache, self.block_tables, self.query_starts, self.seq_lens)


def make_case(
    sequences: list[tuple[int, int]],  # (new tokens, length with them)
    *,
    heads: int = 6,
    kv_heads: int = 2,
    d: int = 64,
    d_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    poison: bool = True,
    device: str = "cpu",
    block_size: int = BLOCK_SIZE,
) -> Case:
    """Sequences in scattered blocks; what nobody owns is NaN, and table entries that nobody needs point at it."""
    gen = torch.Generator().manual_seed(seed)
    d_v = d_v or d
    needed = [-(-length // block_size) for _, length in sequences]
    blocks = sum(needed) + 3
    order = torch.randperm(blocks - 1, generator=gen) + 1  # block 0 belongs to nobody
    shape = (blocks, block_size, kv_heads)
    key_cache = torch.randn(*shape, d, generator=gen)
    value_cache = torch.randn(*shape, d_v, generator=gen)
    owned = torch.zeros(blocks, block_size, dtype=torch.bool)
    tables = torch.zeros(len(sequences), max(needed) + 2, dtype=torch.int32)
    at = 0
    for s, (_, length) in enumerate(sequences):
        tables[s, : needed[s]] = order[at : at + needed[s]].int()
        for p in range(length):
            owned[tables[s, p // block_size], p % block_size] = True
        at += needed[s]
    if poison:
        key_cache[~owned], value_cache[~owned] = float("nan"), float("nan")
    new = torch.tensor([0] + [n for n, _ in sequences])
    q = torch.randn(int(new.sum()), heads, d, generator=gen)
    return Case(
        q.to(dtype).to(device),
        key_cache.to(dtype).to(device),
        value_cache.to(dtype).to(device),
        tables.to(device),
        new.cumsum(0).int().to(device),
        torch.tensor([length for _, length in sequences], dtype=torch.int32, device=device),
        owned,
    )


def close(got: Tensor, want: Tensor, ratio: float) -> None:
    """RMS of the error against RMS of the signal."""
    got, want = got.double().cpu(), want.double().cpu()
    error = ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()
    assert error <= ratio, f"relative error {error:.2e} > {ratio:.0e}"


MIX = [(1, 1), (1, 130), (7, 7), (5, 40), (1, 33), (19, 147)]
OPTIONS = [
    {},
    {"sliding_window": 9},
    {"sliding_window": 1},
    {"softcap": 1.5},
    {"sinks": True},
    {"sliding_window": 20, "softcap": 2.0, "sinks": True},
]


def options_for(case: Case, options: dict) -> dict:
    """Fill in the sinks: one different value per head."""
    options = {"scaling": case.q.shape[-1] ** -0.5, **options}
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-1.0, 2.0, case.q.shape[1], device=case.q.device)
    return options


def dense(case: Case, options: dict) -> Tensor:
    """Attention of each sequence alone by torch's own function: an independent check of the reference."""
    out = []
    for s in range(len(case.seq_lens)):
        first, last = case.query_starts[s : s + 2].tolist()
        length = int(case.seq_lens[s])
        slots = [
            int(case.block_tables[s, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)
        ]
        k = case.key_cache.flatten(0, 1)[slots].transpose(0, 1)
        v = case.value_cache.flatten(0, 1)[slots].transpose(0, 1)
        seen = torch.ones(last - first, length, dtype=torch.bool).tril(length - (last - first))
        if window := options.get("sliding_window"):
            seen &= ~torch.ones(last - first, length, dtype=torch.bool).tril(length - (last - first) - window)
        y = torch.nn.functional.scaled_dot_product_attention(
            case.q[first:last].transpose(0, 1)[None],
            k[None],
            v[None],
            seen,
            scale=options["scaling"],
            enable_gqa=True,
        )
        out.append(y[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_reference_is_torch_attention(options: dict) -> None:
    case = make_case(MIX)
    options = options_for(case, options)
    close(op.paged_attention_reference(*case.args, **options), dense(case, options), 1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (9, 3), (5, 1)])
def test_cpu_equals_reference(options: dict, heads: int, kv_heads: int) -> None:
    case = make_case(MIX, heads=heads, kv_heads=kv_heads)
    options = options_for(case, options)
    want = op.paged_attention_reference(*case.args, **options)
    close(paged_attention_cpu(*case.args, **options), want, 1e-6)
    close(op.paged_attention(*case.args, **options), want, 1e-6)


@pytest.mark.parametrize(("d", "d_v"), [(64, 32), (96, 96), (128, 64), (80, 80), (256, 256)])
def test_head_sizes(d: int, d_v: int) -> None:
    case = make_case(MIX, d=d, d_v=d_v)
    options = options_for(case, {"sliding_window": 30})
    want = op.paged_attention_reference(*case.args, **options)
    assert want.shape == (case.q.shape[0], 6, d_v)
    close(paged_attention_cpu(*case.args, **options), want, 1e-6)
    close(op.paged_attention(*case.args, **options), want, 1e-6)


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
def test_half_types(dtype: torch.dtype, ratio: float) -> None:
    case = make_case(MIX, dtype=dtype)
    got = op.paged_attention(*case.args, scaling=0.125)
    assert got.dtype == dtype
    close(got, op.paged_attention_reference(*case.args, scaling=0.125), ratio)


@pytest.mark.parametrize("path", ["op", "torch"])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[5]], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (4, 4, 128)])
def test_bits_do_not_depend_on_company_or_chunks(
    path: str, options: dict, heads: int, kv_heads: int, d: int
) -> None:
    """Each token alone (as a decode step), in chunks of many sizes, and in one mixed call: the same bits."""
    run = op.paged_attention if path == "op" else paged_attention_cpu
    case = make_case(
        [(n, n) for n in (3, 70, 141, 1, 22, 9, 16, 5, 2, 31)], heads=heads, kv_heads=kv_heads, d=d
    )
    options = options_for(case, options)
    whole = run(*case.args, **options)
    assert not whole.isnan().any()
    for s in (1, 2, 4):
        first, last = case.query_starts[s : s + 2].tolist()
        for chunk in (1, 2, 5, 16, 64):
            for at in range(0, last - first, max(chunk, 13)):
                end = min(at + chunk, last - first)
                part = run(
                    case.q[first + at : first + end],
                    case.key_cache,
                    case.value_cache,
                    case.block_tables[s : s + 1],
                    torch.tensor([0, end - at], dtype=torch.int32),
                    torch.tensor([end], dtype=torch.int32),
                    **options,
                )
                assert torch.equal(part, whole[first + at : first + end]), (s, chunk, at)


def test_bits_do_not_depend_on_what_others_hold() -> None:
    case = make_case(MIX)
    other = make_case(MIX, seed=1)
    want = op.paged_attention(*case.args, scaling=0.125)
    first, last = case.query_starts[3:5].tolist()
    blocks = case.block_tables[3, :3].long()
    keys, values, q = case.key_cache * 50, case.value_cache * 50, other.q.clone()
    keys[blocks], values[blocks] = case.key_cache[blocks], case.value_cache[blocks]
    q[first:last] = case.q[first:last]
    changed = replace(case, q=q, key_cache=keys, value_cache=values)
    assert torch.equal(op.paged_attention(*changed.args, scaling=0.125)[first:last], want[first:last])


def test_a_neighbour_full_of_nan_changes_nothing() -> None:
    case = make_case(MIX)
    want = op.paged_attention(*case.args, scaling=0.125)
    bad = case.block_tables[5, :10].long()
    case.key_cache[bad], case.value_cache[bad] = float("nan"), float("nan")
    first, last = case.query_starts[5:7].tolist()
    case.q[first:last] = float("nan")
    got = op.paged_attention(*case.args, scaling=0.125)
    assert got[first:last].isnan().all()
    assert torch.equal(got[:first], want[:first])


def test_blocks_behind_the_window_are_not_read() -> None:
    case = make_case([(1, 100), (3, 100)])
    want = op.paged_attention_reference(*case.args, scaling=0.125, sliding_window=20)
    case.block_tables[:, :4] = 0  # positions 0..63 given back: block 0 is NaN
    close(op.paged_attention(*case.args, scaling=0.125, sliding_window=20), want, 1e-6)
    close(paged_attention_cpu(*case.args, scaling=0.125, sliding_window=20), want, 1e-6)


@pytest.mark.parametrize("write", [op.write_kv, write_kv_cpu], ids=["op", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_write_kv(write, dtype: torch.dtype) -> None:
    kv = torch.randn(2, 7, 3, 64)
    key, value = kv[0], kv[1, :, :, :32].contiguous()
    packed = torch.randn(7, 5, 64)
    packed[:, 1:4] = key
    slots = torch.tensor([5, 31, -1, 16, 0, -1, 47])
    caches = op.new_caches(3, BLOCK_SIZE, 3, 64, 32, dtype=dtype, device=torch.device("cpu"))
    want = [cache.clone(memory_format=torch.contiguous_format) for cache in caches]
    op.write_kv_reference(key, value, *want, slots)
    write(
        packed[:, 1:4].to(dtype), value.to(dtype), *caches, slots
    )  # key comes as a view, as from a fused q/k/v
    assert torch.equal(caches[0], want[0])
    assert torch.equal(caches[1], want[1])
    write(packed[:, 1:4], value, *caches, slots)  # of another dtype
    assert torch.equal(caches[0], want[0])
    assert torch.equal(caches[1], want[1])
    assert int((caches[0] != 0).any(-1).any(-1).sum()) == 5


@pytest.mark.parametrize("write", [op.write_kv, op.write_kv_reference])
def test_what_fp16_cannot_hold_becomes_its_ends_but_infinity_and_nan_stay(write) -> None:
    inf, end = float("inf"), 65504.0
    given = [0.1, 65519.0, 65520.0, 3e38, -7e4, inf, -inf, float("nan"), 2.0**-24, 1e-9]
    #  1 + 2^-11 and 1 + 3 * 2^-11 stand between two numbers: to the even one
    given += [1 + 2.0**-11, 1 + 3 * 2.0**-11]
    want = [0.0999755859375, end, end, end, -end, inf, -inf, float("nan"), 2.0**-24, 0.0, 1.0, 1 + 2.0**-9]
    x = torch.tensor(given).view(1, 1, -1)
    caches = op.new_caches(1, 2, 1, len(given), len(given), dtype=torch.float16, device=torch.device("cpu"))
    write(x, x, *caches, torch.tensor([1]))
    for cache in caches:
        torch.testing.assert_close(cache[0, 1, 0].float(), torch.tensor(want), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_torch_path_reads_caches_of_any_layout(dtype: torch.dtype) -> None:
    """Fp16 ones with queries of fp32, too, and computes in fp32."""
    case = make_case(MIX)
    case = replace(case, key_cache=case.key_cache.to(dtype), value_cache=case.value_cache.to(dtype))
    caches = op.new_caches(
        *case.key_cache.shape, case.value_cache.shape[3], dtype=dtype, device=torch.device("cpu")
    )
    for mine, theirs in zip(caches, (case.key_cache, case.value_cache), strict=True):
        mine.copy_(theirs)
    arguments = (case.q, *caches, case.block_tables, case.query_starts, case.seq_lens)
    assert torch.equal(
        paged_attention_cpu(*arguments, scaling=0.125), paged_attention_cpu(*case.args, scaling=0.125)
    )
    assert torch.equal(
        op.paged_attention(*arguments, scaling=0.125), op.paged_attention(*case.args, scaling=0.125)
    )
    want = op.paged_attention_reference(*case.args, scaling=0.125)
    assert want.dtype == torch.float32
    close(op.paged_attention(*arguments, scaling=0.125), want, 1e-6)
    close(paged_attention_cpu(*arguments, scaling=0.125), want, 1e-6)


def test_no_token_is_no_work() -> None:
    case = make_case([(0, 5), (0, 20)])
    assert op.paged_attention(*case.args, scaling=1.0).shape == (0, 6, 64)


def test_a_sequence_without_new_tokens_is_skipped() -> None:
    case = make_case([(2, 9), (0, 5), (3, 20)])
    want = op.paged_attention_reference(*case.args, scaling=0.125)
    close(op.paged_attention(*case.args, scaling=0.125), want, 1e-6)


def test_compiles_as_one_graph() -> None:
    case = make_case(MIX)
    key, value = torch.randn(2, 2, 64), torch.randn(2, 2, 64)
    slots = torch.tensor([3, -1])

    def step(*args: Tensor) -> Tensor:
        op.write_kv(key, value, args[1], args[2], slots)
        return op.paged_attention(*args, scaling=0.125) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    again = replace(case, key_cache=case.key_cache.clone(), value_cache=case.value_cache.clone())
    assert torch.equal(compiled(*case.args), step(*again.args))
    assert torch.equal(case.key_cache.nan_to_num(), again.key_cache.nan_to_num())
    assert torch.equal(case.key_cache[0, 3], key[0])


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("q", lambda t: t[..., :32], "q must be"),
        ("q", lambda t: t[:, :5], "multiple of the cache's 2 heads"),
        ("q", lambda t: t.double(), "q must be float32"),
        ("key_cache", lambda t: t.half(), "the caches must both be"),
        ("key_cache", lambda t: t[..., :32].contiguous(), "q must be"),
        ("key_cache", lambda t: t.transpose(1, 2), "equal first three sizes"),
        ("value_cache", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "contiguous"),
        ("block_tables", lambda t: t.long(), "block_tables must be int32"),
        ("block_tables", lambda t: t[:-1], "6 sequences want 6 block tables"),
        ("query_starts", lambda t: t[:-1], "7 query starts"),
        ("seq_lens", lambda t: t.float(), "seq_lens must be int32"),
        ("sinks", lambda t: torch.zeros(5), "one per query head"),
        ("sliding_window", lambda t: 0, "sliding_window must be None or at least 1"),
        ("softcap", lambda t: -1.0, "softcap must be None or above 0"),
        ("plan", lambda t: op.AttentionPlan(5, 3), "max_new <= max_len"),
        ("plan", lambda t: op.AttentionPlan(0, 3), "max_new <= max_len"),
    ],
)
def test_what_does_not_fit_is_named(name: str, change, sentence: str) -> None:
    names = ("q", "key_cache", "value_cache", "block_tables", "query_starts", "seq_lens")
    arguments = dict(zip(names, make_case(MIX).args, strict=True))
    arguments[name] = change(arguments.get(name))
    tensors = [arguments.pop(n) for n in names]
    with pytest.raises(op.AttentionInputError, match=sentence):
        op.paged_attention(*tensors, scaling=1.0, **arguments)


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (3, lambda t: t[5, 2].fill_(10_000)),  # a block that the cache has not
        (3, lambda t: t[1, 0].fill_(-1)),
        (4, lambda t: t[6].fill_(99)),  # more queries than tokens
        (4, lambda t: t[2].fill_(0)),  # starts that fall
        (4, lambda t: t[0].fill_(1)),  # a first token of no sequence
        (5, lambda t: t[2].fill_(3)),  # fewer keys than new tokens
        (5, lambda t: t[0].fill_(4000)),  # more keys than the table has room for
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("library", [True, False], ids=["library", "no library"])
def test_tables_that_point_outside_are_named_on_the_cpu(
    index: int, change, dtype: torch.dtype, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        monkeypatch.setattr(op.native, "load", lambda: None)
    case = make_case(MIX, dtype=dtype)
    op.paged_attention(*case.args, scaling=1.0)
    change(case.args[index])
    with pytest.raises(op.AttentionInputError, match=r"sequence \d does not fit"):
        op.paged_attention(*case.args, scaling=1.0)


def test_both_paths_find_the_same_misfit() -> None:
    ops = op.native.load()
    assert ops is not None, "the compiled kernels are not there"
    found = []
    for window, (index, place, value) in itertools.product(
        (None, 9),
        (
            *((3, (s, column), entry) for s in range(6) for column in range(12) for entry in (-1, 24)),
            *((5, (s,), length) for s in range(6) for length in (0, 3, 12 * BLOCK_SIZE, 12 * BLOCK_SIZE + 1)),
        ),
    ):
        case = make_case(MIX, heads=2, d=8, poison=False)
        assert case.block_tables.shape == (6, 12)
        case.args[index][place] = value
        named = []
        for path in (ops.paged_attention, paged_attention_cpu):
            try:
                path(*case.args, 1.0, window)
                named.append("")
            except op.AttentionInputError as error:
                named.append(str(error))
        assert named[0] == named[1], (window, index, place, value)
        found.append(bool(named[0]))
    assert 0.1 < sum(found) / len(found) < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tokens_before_the_first_sequence_are_named(dtype: torch.dtype) -> None:
    """Their rows of the answer would be whatever the memory held."""
    case = make_case([(3, 20)], dtype=dtype)
    q = torch.cat([case.q[:2], case.q])
    starts = torch.tensor([2, 5], dtype=torch.int32)
    for plan in (None, op.AttentionPlan(3, 20)):
        with pytest.raises(
            op.AttentionInputError, match=r"rise from 0 to the 5 tokens, and they begin with \[2, 5\]"
        ):
            op.paged_attention(q, *case.args[1:4], starts, case.seq_lens, scaling=1.0, plan=plan)


@pytest.mark.parametrize("starts", [[1, 2, 4], [0, 3, 2, 4], [0, 2, 3], [0, 5, 4], [0, 1, 5]])
def test_query_starts_rise_from_0_to_the_number_of_tokens(starts: list[int]) -> None:
    from peqa_kernels.paged_attention.checks import check_starts

    check_starts([0, 1, 1, 4], 4)
    check_starts([0], 0)
    with pytest.raises(op.AttentionInputError, match=r"sequence \d does not fit"):
        check_starts(starts, 4)


def test_on_a_gpu_query_starts_are_read_where_no_plan_says_that_the_host_knows_them() -> None:
    from types import SimpleNamespace
    from typing import Any
    from unittest.mock import patch

    from peqa_kernels.paged_attention.checks import _may_read

    there: Any = SimpleNamespace(is_cuda=True, is_meta=False)
    with patch("torch.cuda.is_current_stream_capturing", lambda: False):
        assert _may_read(there, None)
        assert not _may_read(there, op.AttentionPlan(1, 1))
    with patch("torch.cuda.is_current_stream_capturing", lambda: True):
        assert not _may_read(there, None)


@pytest.mark.parametrize("path", [op.paged_attention, paged_attention_cpu], ids=["op", "torch"])
def test_entries_that_are_not_read_may_hold_anything(path) -> None:
    case = make_case([(1, 100), (3, 100), (0, 40)])
    want = path(*case.args, scaling=0.125, sliding_window=20)
    case.block_tables[:2, :4] = -7  # behind the window
    case.block_tables[:2, 7:] = 10_000
    case.block_tables[2] = -1  # a sequence without new tokens
    assert torch.equal(path(*case.args, scaling=0.125, sliding_window=20), want)


@pytest.mark.parametrize(
    ("index", "change", "sentence"),
    [
        (0, lambda t: t[:, :1], "key must be"),
        (1, lambda t: t[:3], "one slot for each"),
        (4, lambda t: t.int(), "slot_mapping must be int64"),
    ],
)
def test_writes_that_do_not_fit_are_named(index: int, change, sentence: str) -> None:
    caches = torch.zeros(2, 3, BLOCK_SIZE, 2, 64)
    arguments = [torch.zeros(4, 2, 64), torch.zeros(4, 2, 64), *caches, torch.arange(4)]
    arguments[index] = change(arguments[index])
    with pytest.raises(op.AttentionInputError, match=sentence):
        op.write_kv(*arguments)


@pytest.mark.parametrize("write", [op.write_kv, write_kv_cpu], ids=["op", "torch"])
@pytest.mark.parametrize("slot", [-2, -(2**40), 3 * BLOCK_SIZE, 2**40])
def test_slots_that_the_caches_do_not_have_are_named_and_nothing_is_written(write, slot: int) -> None:
    caches = torch.zeros(2, 3, BLOCK_SIZE, 2, 64)
    x = torch.ones(4, 2, 64)
    with pytest.raises(
        op.AttentionInputError, match=rf"slot_mapping\[2\] is {slot}, .* slots 0 to 47, and -1"
    ):
        write(x, x, *caches, torch.tensor([0, -1, slot, 47]))
    assert not caches.any()
    write(x, x, *caches, torch.tensor([0, -1, -1, 47]))
    write(x[:0], x[:0], *caches, torch.tensor([], dtype=torch.int64))
    assert caches.any(-1).any(-1).sum(-1).tolist() == [[1, 0, 1]] * 2
