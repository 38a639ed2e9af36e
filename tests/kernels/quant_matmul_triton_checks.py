"""Checks of the Triton kernel against the reference: python quant_matmul_triton_checks.py cpu|cuda [BITS ...].

All widths, unless some are named. On "cpu" TRITON_INTERPRET=1 must be set. Exits non-zero at the first difference.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from peqa_kernels.bench.timing import Way
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

# (segments, K, groups): g32 and siblings of odd sizes; a last tile that K does not fill; groups of 12; g64 of a K that
# has no tile of 128, as SmolLM2; two groups a tile; a group of two tiles
SHAPES = [
    ((70, 10, 33), 64, 2),
    ((96,), 100, 1),
    ((5,), 36, 3),
    ((66,), 192, 3),
    ((128,), 256, 4),
    ((40, 24), 512, 2),
]
WIDTHS = tuple(int(bits) for bits in sys.argv[2:]) or (2, 3, 4, 8)
LIMIT = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


class Problem:
    """A weight, activations of many tasks and the right answer, on `device`."""

    def __init__(
        self, device: str, bits: int, segments: tuple[int, ...], k: int, groups: int, kind: str,
        rows: int, dtype: torch.dtype, *, integers: bool, bias: bool = False,
    ) -> None:  # fmt: skip
        n = sum(segments)
        self.name = f"{bits} bit {segments}x{k} G{groups} {kind} {rows} rows {dtype} integers={integers}"
        self.weight = move_weight(cases.make_weight(n, k, groups, bits, integers=integers), device)
        self.bank = move_bank(cases.make_bank(self.weight, kind, segments, integers=integers), device)
        self.bias = torch.arange(float(n), device=device) if bias else None
        self.x = cases.make_x(rows, k, dtype, integers=integers).to(device)
        self.row, self.group_row = (None if r is None else r.to(device) for r in cases.make_rows(rows, kind))
        self.integers = integers
        self.prepared = prepare(self.weight, segments=segments, backend="gpu")

    def arguments(self) -> tuple[object, ...]:
        """Of a launch: all but the weight and the tile."""
        return self.x, self.bias, self.bank, self.row, self.group_row

    def check(self, got: torch.Tensor, note: object = "") -> None:
        """Compare with the reference: exactly, where all numbers are whole."""
        want = quant_matmul_reference(self.x, self.weight, *self.arguments()[1:])
        assert got.dtype == self.x.dtype, self.name
        if self.integers:
            assert torch.equal(got, want.to(got.dtype)), f"{self.name}: not exact {note}"
        else:
            cases.assert_close(f"{self.name} {note}", got, want, LIMIT[got.dtype])


def check_kinds(
    device: str, dtype: torch.dtype, *, integers: bool, kinds: tuple[str, ...] = cases.KINDS
) -> int:
    """Every bit width × shape × kind, 5 or 21 rows of five tasks."""
    count = 0
    for bits, (segments, k, groups), kind in itertools.product(WIDTHS, SHAPES, kinds):
        rows = 21 if count % 3 == 1 else 5
        problem = Problem(
            device, bits, segments, k, groups, kind, rows, dtype, integers=integers, bias=count % 2 == 1
        )
        x, bias, bank, row, group_row = problem.arguments()
        problem.check(quant_matmul(x, problem.prepared, bias=bias, bank=bank, row=row, group_row=group_row))
        count += 1
    return count


def check_tiles(device: str, dtype: torch.dtype) -> int:
    """Tiles that the rule would not choose: K split and added up, or in turn, task by task, halves of a panel."""
    from peqa_kernels.quant_matmul.gpu import launch
    from peqa_kernels.quant_matmul.tuning import Tile

    tiles = [
        Tile(8, 128, 4, 1, splits=2),
        Tile(16, 64, 4, 2, splits=2),
        Tile(16, 128, 4, 2, splits=2, in_turn=True),
        Tile(16, 128, 4, 1, taskwise=True),
        Tile(32, 64, 4, 3, taskwise=True),
        Tile(8, 256, 8, 2, splits=2),
        Tile(32, 256, 8, 2, splits=2),
        Tile(32, 256, 8, 2, taskwise=True),
    ]
    count = 0
    for (bits, groups), (tile, kind) in itertools.product(
        [(bits, groups) for bits, groups in ((4, 1), (4, 8), (3, 2)) if bits in WIDTHS],
        zip(
            tiles,
            ["channel", "mixed", "group", "mixed", "group", "channel+input", "channel", "group"],
            strict=True,
        ),
    ):
        if tile.outputs == 256 and groups > 1:
            continue  # not chosen there
        segments, rows = ((256, 256), 11) if tile.outputs == 256 else ((128, 120), 37)
        problem = Problem(device, bits, segments, 256, groups, kind, rows, dtype, integers=True)
        for _ in range(2):  # twice: the counters of a split must be as before
            problem.check(launch(problem.prepared.impl, tile, *problem.arguments()), tile)
        count += 1
    return count


def check_dense(device: str, dtype: torch.dtype) -> int:
    """Floats made a panel at a time: every width, shape and kind of zero point; panels that cut a segment."""
    from peqa_kernels.quant_matmul import gpu_dense
    from peqa_kernels.quant_matmul.gpu import launch
    from peqa_kernels.quant_matmul.tuning import Tile

    tile, count, panel = Tile(128, 64, 4, 3, dense=True), 0, gpu_dense.PANEL
    for bits, shape, fractional in itertools.product(WIDTHS, [*SHAPES, ((384,), 256, 2)], (False, True)):
        kind = ("base", "channel", "channel+input")[count % 3]
        segments, k, groups = shape
        problem = Problem(
            device, bits, segments, k, groups, kind, 11, dtype, integers=not fractional, bias=count % 2 == 1
        )
        if problem.bank is not None and count % 2:
            problem.bank = half_bank(problem.bank)
        problem.x /= 64  # whole scales would take sums past the end of fp16
        gpu_dense.PANEL = k * 128 if count % 2 else panel
        got = launch(problem.prepared.impl, tile, *problem.arguments())
        want = quant_matmul_reference(problem.x, problem.weight, *problem.arguments()[1:])
        assert got.dtype == dtype
        cases.assert_close(problem.name, got, want, 2 * LIMIT[dtype])  # a weight and a sum are rounded, too
        count += 1
    gpu_dense.PANEL = panel
    return count


def check_half_banks(device: str, dtype: torch.dtype) -> int:
    """Scales in fp16, as the bank of a GPU holds them, to the same bits as the fp32 that they round to."""
    count = 0
    for kind, bits in itertools.product(cases.KINDS[1:], WIDTHS):
        problem = Problem(device, bits, (70, 58), 256, 4, kind, 19, dtype, integers=False)
        x, _, bank, row, group_row = problem.arguments()
        half = half_bank(bank)
        full = half_bank(bank, torch.float32, half)
        answers = [
            quant_matmul(x, problem.prepared, bank=b, row=row, group_row=group_row) for b in (half, full)
        ]
        assert torch.equal(*answers), problem.name
        count += 1
    return count


def half_bank(
    bank: LinearBank, dtype: torch.dtype = torch.float16, of: LinearBank | None = None
) -> LinearBank:
    """The bank `of`, or `bank` itself, in `dtype`."""
    tensors = {name: getattr(of or bank, name) for name in ("out_scale", "in_scale", "group_scale")}
    return replace(bank, **{name: None if t is None else t.to(dtype) for name, t in tensors.items()})


def check_empty_and_strided(device: str) -> int:
    """No rows, rows of a wider matrix, and features that are not neighbours."""
    problem = Problem(device, 4, (64,), 128, 2, "channel", 6, torch.float16, integers=True)
    x, _, bank, row, _ = problem.arguments()
    wide = torch.cat([x, x], 1)[:, :128]
    turned = x.t().contiguous().t()
    for given in (wide, turned):
        problem.check(quant_matmul(given, problem.prepared, bank=bank, row=row))
    assert quant_matmul(x[:0], problem.prepared, bank=bank, row=row[:0]).shape == (0, 64)
    return 3


def check_single_rows(device: str, dtype: torch.dtype) -> int:
    """In the invariant mode a row's bits depend neither on how many rows run with it nor on which.

    The interpreter's products depend on a row's place in the tile: there they are of whole numbers, and only what
    follows is rounded.
    """
    from peqa_kernels.quant_matmul.gpu import launch

    count = 0
    for groups, kind in ((1, "channel"), (1, "mixed"), (4, "mixed")):
        problem = Problem(device, 4, (128, 56), 512, groups, kind, 90, dtype, integers=False)
        problem.prepared.set_row_invariant(True)
        x, _, bank, row, group_row = problem.arguments()
        if device == "cpu":
            x = x.copy_(cases.make_x(*x.shape, dtype, integers=True))
            bank.in_scale = None if bank.in_scale is None else bank.in_scale.ceil()
        weight = problem.prepared.impl
        answers = []
        for some in (slice(0, 90), slice(0, 1), slice(89, 90), slice(3, 20), slice(20, 90)):
            rows = [None if r is None else r[some] for r in (row, group_row)]
            scales = "channel" if group_row is None else "group"
            split = weight.tile(len(x[some]), dtype, scales)._replace(splits=4, in_turn=len(x[some]) > 64)
            chosen = quant_matmul(x[some], problem.prepared, bank=bank, row=rows[0], group_row=rows[1])
            answers.append((chosen, launch(weight, split, x[some], None, bank, *rows)))
            for got, every in zip(answers[-1], answers[0], strict=True):
                assert torch.equal(got, every[some]), f"{problem.name} rows {some}"
                count += 1
        problem.check(answers[0][0])
        base = quant_matmul(x[:9], problem.prepared)
        zeros = torch.zeros_like(row[:9])
        rows = (zeros, None if group_row is None else zeros)
        same = quant_matmul(x[:9], problem.prepared, bank=bank, row=rows[0], group_row=rows[1])
        assert torch.equal(base, same), f"{problem.name}: row 0 is the base"
    return count


def check_rows_outside_the_bank() -> int:
    """Asserted on the device under TRITON_DEBUG=1; here by the interpreter."""
    from triton.runtime.interpreter import interpreter_builder

    from peqa_kernels.quant_matmul.gpu import launch
    from peqa_kernels.quant_matmul.tuning import Tile

    problem = Problem("cpu", 4, (64,), 128, 2, "mixed", 6, torch.float16, integers=True)
    x, _, bank, row, group_row = problem.arguments()
    options = replace(interpreter_builder.options, debug=True)
    for wrong in (-1, 5):
        bad = torch.full_like(row, wrong)
        for rows, tile in (
            ((bad, group_row), Tile(16, 64, 4, 2)),
            ((row, bad), Tile(16, 64, 4, 2)),
            ((row, bad), Tile(16, 64, 4, 2, taskwise=True)),
            ((bad, None), Tile(16, 64, 4, 2, dense=True)),
        ):
            with (
                patch.object(interpreter_builder, "options", options),
                pytest.raises(Exception, match="a row that the bank does not have"),
            ):
                launch(problem.prepared.impl, tile, x, None, bank, *rows)
    return 8


def check_released_weight(device: str) -> int:
    """A weight that keeps nothing beside the kernel's layout multiplies as before, and says what it cannot any more."""
    problem = Problem(device, 3, (64, 40), 256, 2, "mixed", 5, torch.float32, integers=True)
    x, _, bank, row, group_row = problem.arguments()
    prepared = problem.prepared
    assert prepared.release()
    problem.check(quant_matmul(x, prepared, bank=bank, row=row, group_row=group_row))
    assert prepared.weight.qweight.is_meta
    with pytest.raises(RuntimeError, match="load the base anew"):
        prepared.dense()
    with pytest.raises(RuntimeError, match="load the base anew"):
        quant_matmul(x.clone().requires_grad_(), prepared)
    return 1


def check_search(device: str) -> int:
    """All is compiled before anything is timed; a second search times nothing, and finds the same."""
    from peqa_kernels.bench.timing import Timing
    from peqa_kernels.quant_matmul.gpu_compile import Compilers, Job, compiled, job_of
    from peqa_kernels.quant_matmul.gpu_tune import Search, Wanted, lines
    from peqa_kernels.quant_matmul.tuning import Measured, Tile

    events: list[object] = []

    class Recorded(Compilers):
        def compile(self, jobs: Iterable[Job]) -> list[str]:
            events.extend(job.tile for job in jobs)
            return []

    class Stages:
        """Fewer stages are faster, whatever else a tile is."""

        def compare(self, label: str, *ways: Way) -> dict[str, Timing]:
            events.append(label)
            return {way.name: Timing(float(way.name.split("stages=")[1][0]), 0.0, 1) for way in ways}

    problem = Problem(device, 4, (256,), 256, 1, "channel", 3, torch.float16, integers=False)
    weight, wanted = problem.prepared.impl, [Wanted(5, torch.float16), Wanted(16, torch.float16)]
    measured = Measured()
    found = list(lines(Search(weight, Recorded(), measured, Stages()), wanted))
    assert [line["rows"] for line in found] == [8, 16]
    assert [line["tile"][3] for line in found] == [4, 2], "two fewer than the rule has"
    timings = [place for place, event in enumerate(events) if isinstance(event, str)]
    assert [events[place] for place in timings] == ["8 rows", "16 rows", "8 rows", "16 rows"]
    assert timings[1] == timings[0] + 1
    assert timings[3] == timings[2] + 1 == len(events) - 1
    events.clear()
    assert list(lines(Search(weight, Recorded(), measured, Stages()), wanted)) == found
    assert events == []
    for tile in (None, Tile(16, 128, 4, 2, splits=2)):
        assert compiled(job_of(weight, 16, torch.float16, "channel+input", tile)) == ""
    no_such_width = job_of(weight, 16, torch.float16, "channel", Tile(16, 32, 4, 2))
    with Compilers(1) as compilers:
        (reason,) = compilers.compile([no_such_width, no_such_width._replace(tile=None)])
    assert "KeyError" in reason
    return 5


def check_warm_up(device: str) -> int:
    """Each kernel once; the exactness trial, which passes here; a broken tile is replaced, with a warning."""
    from peqa_kernels.quant_matmul.gpu_check import is_exact
    from peqa_kernels.quant_matmul.gpu_tune import warm_up

    problem = Problem(device, 4, (64, 64), 256, 2, "mixed", 3, torch.float16, integers=False)
    weight, dtype = problem.prepared.impl, torch.float16
    weights = [
        (problem.prepared, None),
        (prepare(problem.weight, backend="reference"), None),
        (problem.prepared, None),
    ]
    assert warm_up(weights, (1, 5, 16), dtype, ("base", "group")) == 4
    for rows, scales in ((3, "base"), (16, "channel"), (80, "channel+input"), (80, "group")):
        assert is_exact(weight, weight.tile(rows, dtype, scales), rows, dtype, scales), (rows, scales)
    return 5


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
    half = torch.float16 if where == "cpu" else torch.bfloat16  # the interpreter multiplies bfloat16 wrongly
    done = check_kinds(where, half, integers=True)
    done += check_kinds(where, torch.float16, integers=False, kinds=("mixed",))
    done += check_kinds(where, torch.float32, integers=False, kinds=("mixed",))
    done += (
        check_tiles(where, half)
        + check_dense(where, half)
        + check_half_banks(where, half)
        + check_empty_and_strided(where)
    )
    if 4 in WIDTHS:  # these are of 4 bits
        done += check_single_rows(where, half) + check_warm_up(where) + check_search(where)
    done += check_released_weight(where)
    if where == "cpu":
        done += check_rows_outside_the_bank()
    if where == "cuda":
        done += check_kinds(where, torch.bfloat16, integers=False) + check_kinds(
            where, torch.float32, integers=True
        )
        done += check_tiles(where, torch.float16) + check_single_rows(where, torch.float16)
    print(f"{done} checks passed")
