"""Checks of the Triton kernel against the reference: python quant_matmul_triton_checks.py cpu|cuda.

On "cpu" TRITON_INTERPRET=1 must be set. Exits non-zero at the first difference.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch

from peqa_kernels.quant_matmul import (
    LinearBank,
    QuantizedWeight,
    prepare,
    quant_matmul,
    quant_matmul_reference,
)

_spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("test_quant_matmul.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
sys.modules["cases"] = cases
_spec.loader.exec_module(cases)

# (segments, K, groups): g32, per channel with a step that K does not fill, odd sizes, g128, g256 (two steps a group)
SHAPES = [((70, 10, 33), 64, 2), ((96,), 100, 1), ((5,), 36, 3), ((66,), 256, 2), ((64, 64), 512, 2)]
LIMIT = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def check(device: str, dtype: torch.dtype, *, integers: bool, kinds: tuple[str, ...] = cases.KINDS) -> int:
    """Every bit width × shape × kind, 21 rows of five tasks; with integers the answer is exact."""
    count = 0
    for bits, (segments, k, groups), kind in itertools.product((2, 3, 4, 8), SHAPES, kinds):
        n = sum(segments)
        rows = 21 if count % 3 else 5
        weight = move_weight(cases.make_weight(n, k, groups, bits, integers=integers), device)
        bank = move_bank(cases.make_bank(weight, kind, segments, integers=integers), device)
        bias = torch.arange(float(n), device=device) if count % 2 else None
        x = cases.make_x(rows, k, dtype, integers=integers).to(device)
        row, group_row = (None if r is None else r.to(device) for r in cases.make_rows(rows, kind))
        prepared = prepare(weight, segments=segments, backend="gpu")
        got = quant_matmul(x, prepared, bias=bias, bank=bank, row=row, group_row=group_row)
        want = quant_matmul_reference(x, weight, bias, bank, row, group_row)
        name = f"{bits} bit {segments}x{k} G{groups} {kind} {dtype} integers={integers}"
        if integers:
            assert got.dtype == dtype, name
            assert torch.equal(got, want.to(dtype)), f"{name}: not exact"
        else:
            cases.assert_close(name, got, want, LIMIT[dtype])
        count += 1
    return count


def move_weight(weight: QuantizedWeight, device: str) -> QuantizedWeight:
    """The same weight on `device`."""
    names = ("qweight", "scales", "zeros")
    return replace(weight, **{name: getattr(weight, name).to(device) for name in names})


def move_bank(bank: LinearBank, device: str) -> LinearBank:
    """The same bank on `device`."""
    tensors = {name: getattr(bank, name) for name in ("out_scale", "in_scale", "group_scale")}
    return replace(bank, **{name: t.to(device) for name, t in tensors.items() if t is not None})


if __name__ == "__main__":
    where = sys.argv[1]
    assert where != "cpu" or "triton" not in sys.modules, "importing the op must not import triton"
    done = check(where, torch.float32, integers=False)
    done += check(where, torch.float32, integers=True, kinds=("channel", "mixed"))
    done += check(where, torch.float16, integers=False, kinds=("channel", "mixed"))
    if where == "cuda":  # the interpreter multiplies bfloat16 wrongly
        done += check(where, torch.bfloat16, integers=False) + check(where, torch.bfloat16, integers=True)
    print(f"{done} checks passed")
