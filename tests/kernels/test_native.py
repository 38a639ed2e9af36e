"""The compiled CPU kernels: every build that runs here against the formula, and the promise of equal bits per row."""

from __future__ import annotations

import itertools

import pytest
import torch
from native_cases import make_bank, make_weight, rows_of, run
from torch import Tensor

from peqa_kernels import native
from peqa_kernels.native import NativeOps
from peqa_kernels.native.isa import usable
from peqa_kernels.quant_matmul import LinearBank, dequantize, quant_matmul_reference

BUILDS = [build.name for build in usable()]
MAKE = "the C library is not built: python -m peqa_kernels.native.compile"


@pytest.fixture(params=BUILDS)
def ops(request: pytest.FixtureRequest) -> NativeOps:
    """Each build that this CPU can run."""
    found = native.load(request.param)
    assert found is not None, MAKE
    return found


SHAPES = [  # N's segments, K, group
    ((64,), 64, 32),
    ((7, 33, 50), 96, 96),  # tails in every segment, per channel
    ((40, 8), 160, 20),  # a group that fills no whole word at 2 bit
    ((31,), 35, 35),  # odd K
    ((130,), 600, 300),  # a group longer than one piece
]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_agrees_with_the_reference(
    ops: NativeOps, bits: int, shape: tuple[tuple[int, ...], int, int]
) -> None:
    torch.manual_seed(bits)
    segments, k, group = shape
    weight = make_weight(sum(segments), k, bits, group)
    packed = ops.pack(weight, segments)
    bank = make_bank(weight, segments)
    for m in (1, 2, 3, 4, 5, 12, 13, 40):
        x, bias, row, group_row = torch.randn(m, k), torch.randn(sum(segments)), rows_of(m), rows_of(m)
        bare = LinearBank(segments, bank.out_scale)
        for use in itertools.product(
            (None, bias), ((None, None, None), (bare, row, None), (bank, row, group_row))
        ):
            with_bias, (with_bank, r, g) = use
            got = run(ops, x, packed, with_bias, with_bank, r, g)
            want = quant_matmul_reference(x, weight, with_bias, with_bank, r, g)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rows", [9, 70])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_whole_numbers_give_the_exact_answer(ops: NativeOps, bits: int, rows: int, centred: bool) -> None:
    torch.manual_seed(0)
    weight = make_weight(70, 96, bits, 32, whole_zeros=True)
    if centred:  # such weights have no offsets
        weight.zeros[:] = 1 << (bits - 1)
    weight.scales[:] = 2.0 ** torch.randint(-2, 2, weight.scales.shape)
    x = torch.randint(-8, 9, (rows, 96)).float()
    assert torch.equal(
        run(ops, x, ops.pack(weight), None, None, None, None), quant_matmul_reference(x, weight)
    )


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 576), (2, 64), (3, 192), (8, 32)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    ops: NativeOps, bits: int, group: int, centred: bool
) -> None:
    torch.manual_seed(1)
    segments = (96, 40, 40)
    weight = make_weight(sum(segments), 576, bits, group)
    if centred:
        weight.zeros[:] = 1 << (bits - 1)
    packed, bank = ops.pack(weight, segments), make_bank(weight, segments)
    x, row, bias = torch.randn(200, 576), rows_of(200), torch.randn(sum(segments))
    for groups in (rows_of(200), None):

        def of(pick: Tensor, groups: Tensor | None = groups) -> Tensor:
            own = None if groups is None else groups[pick]
            return run(ops, x[pick], packed, bias, bank, row[pick], own)

        alone = torch.cat([of(torch.tensor([i])) for i in range(200)])
        for size in (2, 3, 4, 5, 7, 11, 12, 13, 24, 25, 33, 40, 64, 65, 192, 193, 200):
            pick = torch.randperm(200)[:size]
            assert torch.equal(of(pick), alone[pick]), (groups is None, size)


def test_the_base_row_has_the_bits_of_no_bank(ops: NativeOps) -> None:
    torch.manual_seed(2)
    segments = (64, 20)
    weight = make_weight(84, 128, 4, 32)
    packed, bank, bias = ops.pack(weight, segments), make_bank(weight, segments), torch.randn(84)
    zero = torch.zeros(21, dtype=torch.int32)
    x = torch.randn(21, 128)
    plain = run(ops, x, packed, bias, None, None, None)
    assert torch.equal(run(ops, x, packed, bias, bank, zero, zero), plain)
    assert torch.equal(run(ops, x, packed, bias, LinearBank(segments, bank.out_scale), zero, None), plain)


def test_bits_do_not_depend_on_the_number_of_threads(ops: NativeOps) -> None:
    torch.manual_seed(3)
    weight = make_weight(1000, 256, 4, 64)
    packed = ops.pack(weight)
    before = torch.get_num_threads()
    try:
        for m in (1, 30, 400):
            x = torch.randn(m, 256)
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(run(ops, x, packed, None, None, None, None))
            assert all(torch.equal(result, results[0]) for result in results[1:]), m
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 128), (2, 64)])
def test_rows_of_several_passes_have_the_bits_of_each_row_alone(
    ops: NativeOps, bits: int, group: int, activation_bits: int
) -> None:
    """One pass takes 64 or 192 rows, and 576 are packed before they are multiplied."""
    torch.manual_seed(6)
    segments, rows = (40, 33, 70), 1200
    weight = make_weight(143, 128, bits, group)
    packed, bank = ops.pack(weight, segments), make_bank(weight, segments)
    packed.set_activation_bits(activation_bits)
    x, bias, row, group_row = torch.randn(rows, 128), torch.randn(143), rows_of(rows), rows_of(rows)
    before = torch.get_num_threads()
    for own, groups in (
        (LinearBank(segments, bank.out_scale), None),
        (LinearBank(segments, bank.out_scale, bank.in_scale), None),
        (LinearBank(segments, bank.out_scale, None, bank.group_scale), group_row),
    ):

        def of(first: int, last: int, own: LinearBank = own, groups: Tensor | None = groups) -> Tensor:
            some = slice(first, last)
            return run(ops, x[some], packed, bias, own, row[some], None if groups is None else groups[some])

        alone = torch.cat([of(i, i + 1) for i in range(rows)])
        torch.set_num_threads(3)
        try:
            for first, last in ((0, 577), (600, 1200), (0, 1200)):
                assert torch.equal(of(first, last), alone[first:last]), (first, last)
        finally:
            torch.set_num_threads(before)


def test_many_rows_and_a_row_stride(ops: NativeOps) -> None:
    torch.manual_seed(4)
    weight = make_weight(96, 128, 4, 32)
    wide = torch.randn(500, 200)
    x = wide[:, 30:158]
    got = run(ops, x, ops.pack(weight), None, None, None, None)
    want = quant_matmul_reference(x, weight)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert run(ops, x[:0], ops.pack(weight), None, None, None, None).shape == (0, 96)


def rounded(x: Tensor, group: int) -> Tensor:
    """x [M, K] as 8-bit activations hold it: each block's largest magnitude is 127 steps; in float64."""
    width = -(-group // 32) * 32
    block = width * (128 // width) if width < 128 else 128
    padded = torch.nn.functional.pad(x.view(len(x), -1, group), (0, width - group))
    pieces = padded.flatten(1).split(block, 1) if width < 128 else [
        piece for part in padded.unbind(1) for piece in part.split(block, 1)
    ]  # fmt: skip
    tops = [piece.abs().amax(1, keepdim=True).clamp(min=1e-18) for piece in pieces]
    whole = torch.cat(
        [(p * (127 / t)).round().double() * t / 127 for p, t in zip(pieces, tops, strict=True)], 1
    )
    return whole.view(padded.shape)[:, :, :group].flatten(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_of_8_bits(ops: NativeOps, bits: int, shape: tuple[tuple[int, ...], int, int]) -> None:
    torch.manual_seed(bits)
    segments, k, group = shape
    weight = make_weight(sum(segments), k, bits, group)
    packed, bank = ops.pack(weight, segments), make_bank(weight, segments)
    x, row, group_row = torch.randn(40, k), rows_of(40), rows_of(40)
    x[:, 0] *= 30  # the block that it is in has coarse steps, the others not
    x[3] = 0
    exact = run(ops, x, packed, None, None, None, None)
    packed.set_activation_bits(8)
    dense = dequantize(weight).double()
    want = rounded(x, group) @ dense.T
    got = run(ops, x, packed, None, None, None, None)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))
    alone = torch.cat([run(ops, x[i : i + 1], packed, None, bank, row[i : i + 1], group_row[i : i + 1])
                       for i in range(40)])  # fmt: skip
    for m in (2, 5, 12, 13, 40):
        assert torch.equal(run(ops, x[:m], packed, None, bank, row[:m], group_row[:m]), alone[:m]), m
    packed.set_activation_bits(16)
    assert not torch.equal(got, exact)
    assert torch.equal(run(ops, x, packed, None, None, None, None), exact)


def test_a_bank_of_halves_gives_the_bits_of_the_same_values_in_floats(ops: NativeOps) -> None:
    if not ops.halves:
        pytest.skip("this build reads no fp16")
    torch.manual_seed(5)
    segments = (7, 33, 50)  # panels that a segment's end cuts short
    weight = make_weight(90, 96, 4, 32)
    packed, bank = ops.pack(weight, segments), make_bank(weight, segments)
    assert bank.in_scale is not None
    assert bank.group_scale is not None
    halves = LinearBank(segments, bank.out_scale.half(), bank.in_scale.half(), bank.group_scale.half())
    floats = LinearBank(
        segments,
        *(t.float() for t in (halves.out_scale, halves.in_scale, halves.group_scale) if t is not None),
    )
    for m in (1, 5, 13, 40, 70):
        x, bias, row, group_row = torch.randn(m, 96), torch.randn(90), rows_of(m), rows_of(m)
        for with_groups in (group_row, None):
            got = run(ops, x, packed, bias, halves, row, with_groups)
            assert torch.equal(got, run(ops, x, packed, bias, floats, row, with_groups))


@pytest.mark.parametrize("group", [32, 128])
def test_a_tile_says_how_many_products_it_made(ops: NativeOps, group: int) -> None:
    packed = ops.pack(make_weight(32, 128, 4, group))
    made = ops.tile_products(packed, 3)
    if ops.isa.name == "amx":
        assert made == 0
        return
    assert made > 0
    assert made % (3 * torch.get_num_threads() * 128) == 0
    assert ops.tile_products(packed, 6) == 2 * made
