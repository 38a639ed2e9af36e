"""Checks of the Triton kernels against the reference: python paged_attention_triton_checks.py cpu|cuda.

On "cpu" TRITON_INTERPRET=1 must be set. Exits non-zero at the first difference.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch

from peqa_kernels.paged_attention import paged_attention_reference, write_kv_reference
from peqa_kernels.paged_attention.gpu import paged_attention_gpu, write_kv_gpu

_spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("test_paged_attention.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["cases"] = cases
_spec.loader.exec_module(cases)

OPTIONS = [{}, {"sliding_window": 20, "softcap": 2.0, "sinks": True}]
MIXES = [[(1, 1), (1, 70), (1, 33), (1, 16)], [(1, 5), (40, 40), (0, 3), (19, 90), (3, 65)]]
HEADS = [(6, 2, 64, 64), (5, 1, 96, 96), (4, 4, 64, 32), (9, 3, 64, 64)]


def check_attention(device: str) -> int:
    """Every mix × heads × options × dtype; NaN stands wherever no sequence owns the slot."""
    dtypes = [torch.float16] if device == "cpu" else [torch.float16, torch.bfloat16, torch.float32]
    ratio = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
    count = 0
    for mix, (heads, kv_heads, d, d_v), options, dtype in itertools.product(MIXES, HEADS, OPTIONS, dtypes):
        case = cases.make_case(mix, heads=heads, kv_heads=kv_heads, d=d, d_v=d_v, dtype=dtype, device=device)
        options = cases.options_for(case, options)
        got = paged_attention_gpu(*case.args, **options)
        assert got.dtype == dtype
        assert not got.isnan().any(), (mix, heads, options)
        cases.close(got, paged_attention_reference(*case.args, **options), ratio[dtype])
        count += 1
    return count


def check_nothing_foreign_is_read(device: str) -> int:
    """A neighbour full of NaN, and blocks behind the window given back, change no bit."""
    case = cases.make_case(MIXES[1], dtype=torch.float16, device=device)
    want = paged_attention_gpu(*case.args, scaling=0.125)
    bad = case.block_tables[4, :5].long()
    keys, values, q = case.key_cache.clone(), case.value_cache.clone(), case.q.clone()
    keys[bad], values[bad], q[-3:] = float("nan"), float("nan"), float("nan")
    got = paged_attention_gpu(*replace(case, q=q, key_cache=keys, value_cache=values).args, scaling=0.125)
    assert torch.equal(got[:-3], want[:-3])

    case = cases.make_case([(1, 100), (3, 100)], dtype=torch.float16, device=device)
    want = paged_attention_gpu(*case.args, scaling=0.125, sliding_window=20)
    case.block_tables[:, :4] = 0  # positions 0..63 given back: block 0 is NaN
    assert torch.equal(paged_attention_gpu(*case.args, scaling=0.125, sliding_window=20), want)
    return 2


def check_queries_as_they_come(device: str) -> int:
    """Queries of another dtype than the cache, features not side by side, heads of 8."""
    case = cases.make_case(MIXES[0], heads=4, kv_heads=2, d=8, d_v=8, dtype=torch.float16, device=device)
    q = case.q.float().transpose(1, 2).contiguous().transpose(1, 2)
    got = paged_attention_gpu(*replace(case, q=q).args, scaling=0.3)
    assert got.dtype == torch.float32
    cases.close(got, paged_attention_reference(*case.args, scaling=0.3), 1e-3)
    return 1


def check_write(device: str) -> int:
    """Slots, skipped tokens, key as a strided view."""
    packed = torch.randn(6, 5, 80, device=device).half()
    key, value = packed[:, 1:4], torch.randn(6, 3, 32, device=device).half()
    slots = torch.tensor([5, 31, -1, 16, 0, -1], device=device)
    caches = [torch.zeros(2, 16, 3, n, device=device).half() for n in (80, 32)]
    want = [cache.clone() for cache in caches]
    write_kv_reference(key, value, *want, slots)
    write_kv_gpu(key, value, *caches, slots)
    assert torch.equal(caches[0], want[0])
    assert torch.equal(caches[1], want[1])
    return 1


if __name__ == "__main__":
    where = sys.argv[1]
    done = check_write(where) + check_attention(where) + check_nothing_foreign_is_read(where)
    done += check_queries_as_they_come(where)
    print(f"{done} checks passed")
