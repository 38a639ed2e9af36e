"""Checks of the Triton kernels against the reference: python paged_attention_triton_checks.py cpu|cuda.

On "cpu" TRITON_INTERPRET=1 must be set. Exits non-zero at the first difference. NaN stands wherever no sequence owns
the slot.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from peqa_kernels.paged_attention import AttentionPlan, paged_attention_reference, write_kv_reference
from peqa_kernels.paged_attention.gpu import paged_attention_gpu, warm_up, write_kv_gpu

_spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("test_paged_attention.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["cases"] = cases
_spec.loader.exec_module(cases)

ALL = {"sliding_window": 20, "softcap": 2.0, "sinks": True}
DECODES = [(1, 1), (1, 70), (1, 33), (1, 16), (1, 300), (1, 530)]
MIX = [(1, 5), (40, 40), (0, 3), (19, 290), (3, 65), (1, 700)]
HEADS = [(6, 2, 64, 64), (5, 1, 96, 96), (4, 4, 64, 32), (4, 2, 80, 80)]  # GQA, MQA, MHA, odd sizes
RATIO = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}


def attend(case, invariant: bool = False, **options) -> Tensor:
    """One call with the tightest plan."""
    new = case.query_starts.diff()
    plan = AttentionPlan(max(1, int(new.max())), int(case.seq_lens.max()), invariant)
    return paged_attention_gpu(*case.args, **options, plan=plan)


def compare(case, options: dict, dtype: torch.dtype, invariant: bool) -> None:
    """Against the reference."""
    options = cases.options_for(case, options)
    got = attend(case, invariant, **options)
    assert got.dtype == dtype
    assert not got.isnan().any(), (case.seq_lens, options)
    cases.close(got, paged_attention_reference(*case.args, **options), RATIO[dtype])


def check_attention(device: str) -> int:
    """Every mix, kind of heads, option and mode; then wide heads, long sequences and other block sizes."""
    dtypes = [torch.float16] if device == "cpu" else list(RATIO)
    count = 0
    for mix, (heads, kv_heads, d, d_v), options, invariant, dtype in itertools.product(
        (DECODES, MIX), HEADS, ({}, ALL), (False, True), dtypes
    ):
        made = cases.make_case(mix, heads=heads, kv_heads=kv_heads, d=d, d_v=d_v, dtype=dtype, device=device)
        compare(made, options, dtype, invariant)
        count += 1
    for invariant, dtype in itertools.product((False, True), dtypes):
        narrow = {"heads": 2, "kv_heads": 1, "dtype": dtype, "device": device}
        for made, options in (
            (cases.make_case([(2, 70), (1, 600)], d=256, **narrow), {"softcap": 3.0}),
            (cases.make_case([(2, 4500), (1, 4700)], d=16, **narrow), {}),  # beyond the first level of splits
            (cases.make_case([(2, 4500), (1, 4700)], d=16, **narrow), {"sliding_window": 700}),
            (cases.make_case([(70, 130), (1, 300)], d=32, block_size=64, **narrow), {"sliding_window": 50}),
            (cases.make_case([(70, 130), (1, 300)], d=32, block_size=5, **narrow), {}),
            (
                cases.make_case([(3, 40), (1, 300)], **{**narrow, "heads": 71}, d=16),
                {"sinks": True},
            ),  # more heads than rows
        ):
            compare(made, options, dtype, invariant)
            count += 1
    return count


def check_bits(device: str) -> int:
    """A sequence alone and among others, under loose bounds or none: the same bits, in both modes."""
    case = cases.make_case(MIX, dtype=torch.float16, device=device)
    for options, invariant in itertools.product(({}, ALL), (False, True)):
        options = cases.options_for(case, options)
        whole = attend(case, invariant, **options)
        loose = paged_attention_gpu(*case.args, **options, plan=AttentionPlan(99, 9999, invariant))
        assert torch.equal(loose, whole)
        if not invariant:
            assert torch.equal(paged_attention_gpu(*case.args, **options), whole)
        for s in range(len(MIX)):
            first, last = case.query_starts[s : s + 2].tolist()
            if first == last:
                continue
            alone = replace(
                case,
                q=case.q[first:last],
                block_tables=case.block_tables[s : s + 1],
                query_starts=case.query_starts[s : s + 2] - first,
                seq_lens=case.seq_lens[s : s + 1],
            )
            assert torch.equal(attend(alone, invariant, **options), whole[first:last]), (s, options)
    return 4


def check_programs(device: str) -> int:
    """The same bits however many programs the splits are dealt out to: where keys are cut hangs on no launch."""
    from peqa_kernels.paged_attention import gpu

    narrow = {"heads": 2, "kv_heads": 1, "d": 16, "dtype": torch.float16, "device": device}
    case = cases.make_case([(1, 1500), (1, 700), (1, 40), (2, 300)], **narrow)
    for options, invariant in itertools.product(({}, {"sliding_window": 600}), (False, True)):
        options = cases.options_for(case, options)
        answers, launched = [], []
        for processors in (1, 5, 1000):
            with patch.object(gpu, "_processors", lambda _, processors=processors: processors):
                answers.append(attend(case, invariant, **options))
            launched.append(gpu.split_programs(4, 6, processors))
        assert launched == [1, 5, 6]
        assert torch.equal(answers[0], answers[1]), options
        assert torch.equal(answers[0], answers[2]), options
        cases.close(answers[0], paged_attention_reference(*case.args, **options), RATIO[torch.float16])
    return 4


def check_chunks(device: str) -> int:
    """In the invariant mode a prompt's bits do not hang on how it is cut: whole, in chunks, token by token.

    NumPy's float32 products, unlike a GPU's, depend on the place of a row in its matrix: here they are rounded from
    float64.
    """
    multiply = np.matmul

    def rounded(a: np.ndarray, b: np.ndarray, dtype: type) -> np.ndarray:
        return multiply(a, b, dtype=np.float64).astype(dtype)

    with patch.object(np, "matmul", rounded) if device == "cpu" else nullcontext():
        return _compare_chunks(device)


def _compare_chunks(device: str) -> int:
    for options, heads in itertools.product(({}, {**ALL, "sliding_window": 90}), (2, 3)):
        case = cases.make_case(
            [(290, 290)], heads=heads, kv_heads=1, d=32, dtype=torch.float16, device=device
        )
        options = cases.options_for(case, options)
        whole = attend(case, True, **options)
        at = 0
        for chunk in (1, 7, 64, 1, 1, 100, 82, 33, 1):
            part = replace(
                case,
                q=case.q[at : at + chunk],
                query_starts=torch.tensor([0, chunk], dtype=torch.int32, device=device),
                seq_lens=torch.tensor([at + chunk], dtype=torch.int32, device=device),
            )
            assert torch.equal(attend(part, True, **options), whole[at : at + chunk]), (at, chunk, options)
            at += chunk
        assert at == 290
    return 4


def check_nothing_foreign_is_read(device: str) -> int:
    """A neighbour full of NaN, and blocks behind the window given back, change no bit."""
    case = cases.make_case(MIX, dtype=torch.float16, device=device)
    want = paged_attention_gpu(*case.args, scaling=0.125)
    bad = case.block_tables[4, :5].long()
    keys, values, q = case.key_cache.clone(), case.value_cache.clone(), case.q.clone()
    keys[bad], values[bad], q[-4:-1] = float("nan"), float("nan"), float("nan")
    got = paged_attention_gpu(*replace(case, q=q, key_cache=keys, value_cache=values).args, scaling=0.125)
    assert got[-4:-1].isnan().all()
    got[-4:-1] = want[-4:-1]
    assert torch.equal(got, want)

    case = cases.make_case([(1, 100), (3, 100)], dtype=torch.float16, device=device)
    want = paged_attention_gpu(*case.args, scaling=0.125, sliding_window=20)
    case.block_tables[:, :4] = 0  # positions 0..63 given back: block 0 is NaN
    assert torch.equal(paged_attention_gpu(*case.args, scaling=0.125, sliding_window=20), want)
    return 2


def check_queries_as_they_come(device: str) -> int:
    """Queries of another dtype than the cache, features not side by side, heads of 8."""
    case = cases.make_case(DECODES, heads=4, kv_heads=2, d=8, d_v=8, dtype=torch.float16, device=device)
    q = case.q.float().transpose(1, 2).contiguous().transpose(1, 2)
    got = paged_attention_gpu(*replace(case, q=q).args, scaling=0.3)
    assert got.dtype == torch.float32
    cases.close(got, paged_attention_reference(*case.args, scaling=0.3), 1e-3)
    return 1


def check_write(device: str) -> int:
    """Slots, skipped tokens, key as a strided view; the warm-up writes nothing."""
    packed = torch.randn(6, 5, 80, device=device).half()
    key, value = packed[:, 1:4], torch.randn(6, 3, 32, device=device).half()
    slots = torch.tensor([5, 31, -1, 16, 0, -1], device=device)
    caches = [torch.zeros(2, 16, 3, n, device=device).half() for n in (80, 32)]
    want = [cache.clone() for cache in caches]
    write_kv_reference(key, value, *want, slots)
    write_kv_gpu(key, value, *caches, slots)
    warm_up(*caches, heads=6, dtype=torch.float16, softcap=2.0, invariant=True)
    assert torch.equal(caches[0], want[0])
    assert torch.equal(caches[1], want[1])
    return 1


if __name__ == "__main__":
    where = sys.argv[1]
    checks = (
        check_write,
        check_attention,
        check_bits,
        check_programs,
        check_chunks,
        check_nothing_foreign_is_read,
        check_queries_as_they_come,
    )
    print(f"{sum(check(where) for check in checks)} checks passed")
