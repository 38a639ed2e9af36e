"""Packing: exact for every bit width and any K, and in GPTQ's bit order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peqa_kernels.packing import pack_codes, packed_width, unpack_codes


def random_codes(rows: int, width: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * bits + width)
    return torch.randint(0, 1 << bits, (rows, width), generator=generator, dtype=torch.uint8)


def bit_stream(codes: torch.Tensor, bits: int) -> np.ndarray:
    """Independent statement of the format, one bit at a time."""
    as_bits = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    return np.packbits(as_bits.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 8, 9, 31, 32, 33, 100, 576])
def test_packs_as_the_bit_stream_and_back(bits: int, width: int) -> None:
    codes = random_codes(5, width, bits)
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, packed_width(width, bits))
    assert np.array_equal(packed.numpy(), bit_stream(codes, bits))
    assert torch.equal(unpack_codes(packed, bits, width), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_is_gptq_order_in_int32_words(bits: int) -> None:
    codes = random_codes(3, 96, bits)
    words = pack_codes(codes, bits).numpy().view("<u4")
    stream = [sum(int(c) << (bits * k) for k, c in enumerate(row)) for row in codes.tolist()]
    for row, value in enumerate(stream):
        assert [int(w) for w in words[row]] == [
            (value >> (32 * i)) & 0xFFFFFFFF for i in range(words.shape[1])
        ]


def test_reads_transposed_and_sliced_codes() -> None:
    codes = random_codes(24, 10, 3).t()
    assert torch.equal(unpack_codes(pack_codes(codes, 3), 3, 24), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.full((1, 4), 8, dtype=torch.uint8), 3, "does not fit"),
        (torch.zeros((1, 4), dtype=torch.uint8), 5, "bits must be"),
        (torch.zeros((1, 4), dtype=torch.int32), 4, "uint8"),
        (torch.zeros(4, dtype=torch.uint8), 4, "uint8"),
    ],
)
def test_refuses_what_it_cannot_pack(codes: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_codes(codes, bits)


def test_refuses_a_wrong_width() -> None:
    with pytest.raises(ValueError, match="take 6 bytes"):
        unpack_codes(torch.zeros((2, 5), dtype=torch.uint8), 3, 16)
