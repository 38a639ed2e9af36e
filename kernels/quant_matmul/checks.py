"""What quant_matmul refuses, each with a sentence: wrong shapes, types and devices, and rows that no bank has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peqa_kernels.quant_matmul.weight import LinearBank

if TYPE_CHECKING:
    from peqa_kernels.quant_matmul import PreparedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantMatmulInputError(ValueError):
    """Arguments that do not fit the weight or each other."""


def check_inputs(
    x: Tensor,
    prepared: PreparedWeight,
    bias: Tensor | None,
    bank: LinearBank | None,
    row: Tensor | None,
    group_row: Tensor | None,
) -> None:
    """Check all that can be known without reading a tensor; raises QuantMatmulInputError."""
    if x.dim() != 2 or x.shape[1] != prepared.in_features:
        _refuse(f"x must be [rows, {prepared.in_features}], not {list(x.shape)}")
    if x.dtype not in DTYPES:
        _refuse(f"x must be float32, bfloat16 or float16, not {x.dtype}")
    device = prepared.device
    if x.device != device:
        _refuse(f"x is on {x.device}, the weight on {device}")
    if bias is not None and (bias.shape != (prepared.out_features,) or not bias.is_contiguous()):
        _refuse(f"bias must be [{prepared.out_features}], contiguous, not {list(bias.shape)}")
    if bias is not None and bias.device != device:
        _refuse(f"bias is on {bias.device}, x on {x.device}")
    if row is not None:
        _check_rows("row", row, x)
    if group_row is not None:
        _check_rows("group_row", group_row, x)
    if bank is not None:
        if bank.segments != prepared.segments:
            _refuse(f"the bank has segments {bank.segments}, the weight {prepared.segments}")
        seen = prepared.seen_bank  # a step brings the same tensors again and again
        out, into, group = bank.out_scale, bank.in_scale, bank.group_scale
        if seen is None or seen[0] is not out or seen[1] is not into or seen[2] is not group:
            _check_bank(bank, prepared)
            prepared.seen_bank = out, into, group


def _check_bank(bank: LinearBank, prepared: PreparedWeight) -> None:
    dtype = bank.out_scale.dtype
    if dtype not in prepared.bank_dtypes:
        names = " or ".join(str(allowed).removeprefix("torch.") for allowed in prepared.bank_dtypes)
        _refuse(f"out_scale must be {names}, not {dtype}")
    n, k = prepared.out_features, prepared.in_features
    for name, scales, shape in (
        ("out_scale", bank.out_scale, (n,)),
        ("in_scale", bank.in_scale, (len(prepared.segments), k)),
        ("group_scale", bank.group_scale, (prepared.weight.groups, n)),
    ):
        if scales is not None:
            _check_scales(name, scales, shape, dtype, prepared.device)


def check_rows_exist(bank: LinearBank, row: Tensor | None, group_row: Tensor | None) -> None:
    """Read the rows on the CPU; raises QuantMatmulInputError for one that the bank does not have."""
    for name, rows, tensors in (
        ("row", row, (bank.out_scale, bank.in_scale)),
        ("group_row", group_row, (bank.group_scale,)),
    ):
        limit = min((len(scales) for scales in tensors if scales is not None), default=0)
        if rows is not None and limit:
            outside = ((rows < 0) | (rows >= limit)).nonzero()
            check_range(int(outside[0]) if len(outside) else -1, name, rows, limit)


def check_range(found: int, name: str, row: Tensor, limit: int) -> None:
    """Raise QuantMatmulInputError when `found` is a place in `row` (one of a value outside of 0 .. limit - 1)."""
    if found >= 0:
        _refuse(f"{name}[{found}] is {int(row[found])}, but the bank has rows 0 to {limit - 1}")


def _check_rows(name: str, rows: Tensor, x: Tensor) -> None:
    if rows.dtype != torch.int32 or rows.shape != x.shape[:1] or not rows.is_contiguous():
        layout = "" if rows.is_contiguous() else ", not contiguous"
        _refuse(
            f"{name} must be int32 [{x.shape[0]}], contiguous, not {rows.dtype} {list(rows.shape)}{layout}"
        )
    if rows.device != x.device:
        _refuse(f"{name} is on {rows.device}, x on {x.device}")


def _check_scales(
    name: str, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if scales.dtype != dtype or not scales.is_contiguous():
        _refuse(
            f"{name} must be contiguous and of out_scale's {dtype}, not {scales.dtype} of strides "
            f"{scales.stride()}"
        )
    if scales.shape[1:] != shape or not scales.shape[0]:
        wanted = ", ".join(map(str, shape))
        _refuse(f"{name} must be [rows, {wanted}] with one row at least, not {list(scales.shape)}")
    if scales.device != device:
        _refuse(f"{name} is on {scales.device}, the weight on {device}")


def _refuse(sentence: str) -> None:
    raise QuantMatmulInputError(sentence)
