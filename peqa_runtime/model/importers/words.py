"""Codes out of int32 words: dense streams of bits, and words that hold whole codes only."""

from __future__ import annotations

import torch
from torch import Tensor

from peqa_kernels.packing import pack_codes, packed_width, unpack_codes


def words_of(count: int, bits: int, *, dense: bool = True) -> int:
    """Words that a row of `count` codes takes. Not `dense`: a word holds 32 // bits codes, and what is left is lost."""
    return -(-count * bits // 32) if dense else -(-count // (32 // bits))


def unpack_words(words: Tensor, bits: int, count: int, *, dense: bool = True) -> Tensor:
    """int32 [R, words_of(count)] -> uint8 codes [R, count], the lowest bits of a word first.

    A dense row is one stream of bits, in which a code may lie across two words.
    """
    if dense or 32 % bits == 0:
        stream = words.reshape(-1).view(torch.uint8).view(len(words), -1)
        return unpack_codes(stream[:, : packed_width(count, bits)].contiguous(), bits, count)
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :count].to(torch.uint8)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, count] -> dense int32 words [R, words_of(count)]; bits that no code fills are zero."""
    stream = pack_codes(codes, bits)
    padded = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4))
    return padded.reshape(-1).view(torch.int32).view(len(codes), -1)
