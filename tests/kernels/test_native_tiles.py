"""The build for matrix tiles (AMX), on emulated tiles: it must give the very bits of the other builds."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from native_cases import make_bank, make_weight, rows_of, run
from torch import Tensor

from peqa_kernels import native
from peqa_kernels.native import NativeOps, compile
from peqa_kernels.native.isa import Isa, builds, usable
from peqa_kernels.native.tile_check import tiles_agree
from peqa_kernels.quant_matmul import LinearBank

pytestmark = pytest.mark.slow  # compiles the library

PLAIN = [build for build in usable() if build.name != "amx"]
SHAPES = [  # N's segments, K, group
    ((64,), 64, 32),
    ((7, 33, 50), 96, 96),
    ((40, 8), 160, 20),
    ((130,), 600, 300),
    ((96, 40, 40), 576, 32),
    ((64,), 256, 128),
    ((33,), 384, 192),
]


def build_of(folder: Path, flags: tuple[str, ...], name: str) -> NativeOps:
    """A build of the sources with more flags than its instruction set's."""
    failures = []
    for compiler in compile.compilers():
        target = folder / "built.so"
        error = compile._compile(compiler, {target: (*flags, "-O1")}, Path(native.__file__).parent)[target]
        if not error:
            return NativeOps(target, Isa(name, (), frozenset()))
        failures.append(error)
    pytest.fail("\n".join(failures))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> NativeOps:
    flags = (*PLAIN[0].compiler_flags, "-DPEQA_EMULATED_TILES")
    return build_of(tmp_path_factory.mktemp("tiles"), flags, "amx")


@pytest.fixture(scope="module")
def plain() -> NativeOps:
    found = native.load(PLAIN[0].name)
    assert found is not None
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_of_the_other_builds(
    tiles: NativeOps, plain: NativeOps, bits: int, shape: tuple[tuple[int, ...], int, int]
) -> None:
    torch.manual_seed(bits)
    segments, k, group = shape
    n = sum(segments)
    for centred in (False, True):
        weight = make_weight(n, k, bits, group)
        if centred:
            weight.zeros[:] = 2 ** (bits - 1)
        packed = [ops.pack(weight, segments) for ops in (tiles, plain)]
        bank = make_bank(weight, segments)
        for m in (4, 5, 16, 17, 33, 97):
            x, bias, row, group_row = torch.randn(m, k), torch.randn(n), rows_of(m), rows_of(m)
            bare = LinearBank(segments, bank.out_scale)
            for use in ((None, None, None, None), (bias, bare, row, None), (bias, bank, row, group_row)):
                for activation_bits in (8, 16):
                    for p in packed:
                        p.set_activation_bits(activation_bits)
                    got, want = (run(ops, x, p, *use) for ops, p in zip((tiles, plain), packed, strict=True))
                    assert torch.equal(got, want), (m, centred, activation_bits)


def test_a_row_alone_and_in_any_batch(tiles: NativeOps) -> None:
    torch.manual_seed(1)
    weight = make_weight(96, 576, 4, 32)
    packed, bank = tiles.pack(weight), make_bank(weight, (96,))
    x, row = torch.randn(40, 576), rows_of(40)
    bare = LinearBank((96,), bank.out_scale)
    alone = torch.cat([run(tiles, x[i : i + 1], packed, None, bare, row[i : i + 1], None) for i in range(40)])
    for size, begin in itertools.product((3, 5, 15, 16, 18, 39), (0, 1)):
        pick = torch.randperm(40)[begin : begin + size]
        assert torch.equal(run(tiles, x[pick], packed, None, bare, row[pick], None), alone[pick])


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_rows_of_several_passes(tiles: NativeOps, plain: NativeOps, activation_bits: int) -> None:
    """A pass takes 192 rows, and 576 are packed before they are multiplied."""
    torch.manual_seed(2)
    segments = (40, 33)
    weight = make_weight(73, 64, 4, 32)
    packed = [ops.pack(weight, segments) for ops in (tiles, plain)]
    bank = make_bank(weight, segments)
    x, bias, row, group_row = torch.randn(700, 64), torch.randn(73), rows_of(700), rows_of(700)
    for p in packed:
        p.set_activation_bits(activation_bits)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for own, groups in ((LinearBank(segments, bank.out_scale), None), (bank, group_row)):

            def of(
                which: int, first: int, last: int, own: LinearBank = own, groups: Tensor | None = groups
            ) -> Tensor:
                some = slice(first, last)
                group = None if groups is None else groups[some]
                return run((tiles, plain)[which], x[some], packed[which], bias, own, row[some], group)

            alone = torch.cat([of(0, i, i + 1) for i in range(700)])
            for rows in (193, 400, 577, 700):
                got = of(0, 0, rows)
                assert torch.equal(got, of(1, 0, rows)), rows
                assert torch.equal(got, alone[:rows]), rows
    finally:
        torch.set_num_threads(before)


def test_the_check_at_load(tiles: NativeOps, plain: NativeOps, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiles_agree(tiles, plain)
    assert not tiles_agree(tiles, None)
    right = tiles.quant_matmul
    monkeypatch.setattr(tiles, "quant_matmul", lambda *args: right(*args) + 1e-5)
    assert not tiles_agree(tiles, plain)


@pytest.mark.skipif("amx" not in {build.name for build in builds()}, reason="a build for x86 only")
def test_the_real_build_has_the_instructions(tmp_path: Path) -> None:
    amx = next(build for build in builds() if build.name == "amx")
    library = Path(native.__file__).parent / amx.file_name
    if not library.is_file():
        pytest.skip("no compiler here knows AMX")
    code = library.read_bytes()
    # VEX.128 prefix and opcode 5E: TDPBUUD has no prefix byte in pp (00), TDPBSUD F3 (10).
    found = {code[i + 2] & 3 for i in range(len(code) - 5) if code[i] == 0xC4 and code[i + 3] == 0x5E}
    assert {0, 2} <= found
