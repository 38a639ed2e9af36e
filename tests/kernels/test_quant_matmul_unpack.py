"""The assembly that makes floats of codes, under an emulator: Triton's interpreter takes the arithmetic instead."""

from __future__ import annotations

import numpy as np
import ptx_emulator
import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl

from peqa_kernels.quant_matmul import gpu, gpu_dense, gpu_layout, gpu_unpack
from peqa_kernels.quant_matmul.tuning import Tile

DTYPES = {"bf16": (torch.bfloat16, tl.bfloat16), "fp16": (torch.float16, tl.float16)}


@pytest.mark.parametrize("runs", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_assembly_gives_codes_minus_zero_points(bits: int, dtype: str, runs: int) -> None:
    """Every code at every place under every zero point that is held as an integer, beside random others."""
    torch_dtype, triton_dtype = DTYPES[dtype]
    codes = per_word(bits)
    zeros = np.arange(128)[:, None] + 5 * np.arange(runs)
    rows = np.array([(zero, code) for zero in range(128) for code in range(1 << bits)])
    of_rows = torch.randint(0, 1 << bits, (codes, len(rows), codes), dtype=torch.uint8)
    for place in range(codes):
        of_rows[place, :, place] = torch.from_numpy(rows[:, 1])
    of_rows = of_rows.view(-1, codes)
    away = zeros[np.tile(rows[:, 0], codes)] % 128
    got = unpacked(of_rows, away, bits, triton_dtype == tl.bfloat16)
    want = of_rows.numpy().astype(np.int64) - away.repeat(codes // runs, axis=1)
    floats = torch.from_numpy(got.view(np.int16)).view(torch_dtype)
    assert torch.equal(floats.double(), torch.from_numpy(want).double())


def per_word(bits: int) -> int:
    """Codes of one block of the assembly."""
    return gpu_unpack.CODES_PER_WORD[bits]


def unpacked(codes: torch.Tensor, zeros: np.ndarray, bits: int, bf16: bool, text: str = "") -> np.ndarray:
    """uint8 [rows, codes], zeros [rows, runs] -> 16-bit floats [rows, codes] in the order of the inputs."""
    one = per_word(bits)
    layout = gpu_layout.Layout(bits, 1, one, one, 1, 64, (len(codes),))
    words = gpu_layout._tile_words(codes, layout)[:, :, 0].numpy().view(np.uint32)
    away = gpu_unpack.taken_away.fn(zeros, tl.bfloat16 if bf16 else tl.float16, True) & 0xFFFFFFFF
    text = text or str(gpu_unpack.assembly(bits, bf16, zeros.shape[1]))
    return np.stack(ptx_emulator.run(text, one, [*words, *away.astype(np.uint32).T]), axis=1)


@pytest.mark.parametrize(
    ("old", "new"), [("shr.u32", "shf.u32"), ("fma.rn.bf16x2", "fma.rz.bf16x2"), ("q,q,i", "q,q,x")]
)
def test_what_the_emulator_does_not_know_is_an_error(old: str, new: str) -> None:
    text = str(gpu_unpack.assembly(4, True, 1))
    assert old in text
    with pytest.raises(ValueError, match=r"not known|before it is written"):
        unpacked(
            torch.zeros((1, 8), dtype=torch.uint8),
            np.zeros((1, 1), np.int64),
            4,
            True,
            text.replace(old, new),
        )


@pytest.mark.parametrize(("old", "new"), [("0xea", "0xe8"), ("0xf000f", "0xe000f"), (",4;", ",3;")])
def test_a_wrong_instruction_gives_wrong_floats(old: str, new: str) -> None:
    codes, zeros = torch.arange(16, dtype=torch.uint8)[:, None].repeat(1, 8), np.full((16, 1), 8)
    text = str(gpu_unpack.assembly(4, True, 1))
    assert old in text
    wrong = unpacked(codes, zeros, 4, True, text.replace(old, new))
    assert not np.array_equal(wrong, unpacked(codes, zeros, 4, True))


def test_eight_bits_take_no_assembly() -> None:
    """They fill a bf16's mantissa: plain arithmetic, which the interpreter runs."""
    layout = gpu_layout.Layout(8, 1, 128, 128, 1, 64, (64,))
    assert not gpu.constants(layout, Tile(16, 64, 4, 3), 1, True)["ASM"]
    assert not gpu_dense.unpack_constants(layout, 1, True)["ASM"]
