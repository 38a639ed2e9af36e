"""Codes to packed bytes and back: the only place that knows the bit order.

A row of codes is one dense bit stream along K, little endian, lowest bit first: code k occupies bits
k * bits .. k * bits + bits - 1, and bit i of the stream is bit i % 8 of byte i // 8. Read as little-endian
int32 words this is GPTQ's order (AutoGPTQ `qweight`, there transposed to [K, N]).
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
_RUN = 8  # codes per run: eight codes always fill `bits` whole bytes, and fit one int64


def packed_width(in_features: int, bits: int) -> int:
    """Bytes that one row of `in_features` codes takes."""
    return (in_features * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [N, K] into uint8 [N, ceil(K * bits / 8)]; the last byte is filled with zero bits.

    Raises ValueError when `bits` is none of 2, 3, 4, 8 or a code does not fit into `bits` bits.
    """
    _check(codes, bits)
    rows, in_features = codes.shape
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit into {bits} bits")
    if bits == 8:
        return codes.contiguous().clone()
    runs = torch.nn.functional.pad(codes, (0, -in_features % _RUN)).view(rows, -1, _RUN)
    words = torch.zeros(runs.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(_RUN):
        words |= runs[..., i].to(torch.int64) << (bits * i)
    packed = torch.empty((rows, runs.shape[1], bits), dtype=torch.uint8, device=codes.device)
    for j in range(bits):
        packed[..., j] = (words >> (8 * j)) & 0xFF
    return packed.view(rows, runs.shape[1] * bits)[:, : packed_width(in_features, bits)].contiguous()


def unpack_codes(qweight: Tensor, bits: int, in_features: int) -> Tensor:
    """Unpack uint8 [N, ceil(K * bits / 8)] into uint8 codes [N, K], K = `in_features`.

    Raises ValueError when `bits` is none of 2, 3, 4, 8 or the width does not belong to `in_features`.
    """
    _check(qweight, bits)
    rows, width = qweight.shape
    if width != packed_width(in_features, bits):
        raise ValueError(
            f"{in_features} codes of {bits} bits take {packed_width(in_features, bits)} bytes, not {width}"
        )
    if bits == 8:
        return qweight.contiguous().clone()
    if 8 % bits == 0:  # no code straddles two bytes: a quarter of the time of the words below
        fields = [(qweight >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.stack(fields, -1).view(rows, -1)[:, :in_features].contiguous()
    runs = torch.nn.functional.pad(qweight, (0, -width % bits)).view(rows, -1, bits)
    words = torch.zeros(runs.shape[:2], dtype=torch.int64, device=qweight.device)
    for j in range(bits):
        words |= runs[..., j].to(torch.int64) << (8 * j)
    codes = torch.empty((rows, runs.shape[1], _RUN), dtype=torch.uint8, device=qweight.device)
    for i in range(_RUN):
        codes[..., i] = (words >> (bits * i)) & ((1 << bits) - 1)
    return codes.view(rows, runs.shape[1] * _RUN)[:, :in_features].contiguous()


def _check(tensor: Tensor, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, not {bits}")
    if tensor.dtype != torch.uint8 or tensor.dim() != 2:
        raise ValueError(f"expected a uint8 matrix, not {tensor.dtype} of shape {tuple(tensor.shape)}")
