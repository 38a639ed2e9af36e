"""What quant_matmul refuses, each with a sentence: wrong shapes, types and devices, and rows that no bank has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peqa_kernels.packing import BITS, packed_width

if TYPE_CHECKING:
    from peqa_kernels.quant_matmul import PreparedWeight
    from peqa_kernels.quant_matmul.weight import LinearBank, QuantizedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantMatmulInputError(ValueError):
    """Arguments that do not fit the weight or each other."""


def check_weight(weight: QuantizedWeight) -> None:
    """Check shapes, dtypes and devices of a weight's tensors; raises QuantMatmulInputError."""
    qweight, scales, zeros, k = weight.qweight, weight.scales, weight.zeros, weight.in_features
    if weight.bits not in BITS:
        _refuse(f"bits must be one of {BITS}, not {weight.bits}")
    if scales.dim() != 2 or scales.dtype != torch.float32 or not scales.shape[1]:
        _refuse(
            f"scales must be float32 [N, G] with one group at least, not {scales.dtype} of shape {list(scales.shape)}"
        )
    if zeros.shape != scales.shape or zeros.dtype != torch.float32:
        _refuse(
            f"zeros must be float32 {list(scales.shape)} as the scales, not {zeros.dtype} of shape {list(zeros.shape)}"
        )
    n, groups = scales.shape
    if k < 1 or k % groups:
        _refuse(f"in_features must be a multiple of the {groups} groups, not {k}")
    shape = (n, packed_width(k, weight.bits))
    if qweight.shape != shape or qweight.dtype != torch.uint8:
        _refuse(
            f"qweight must be uint8 {list(shape)}, {n} rows of {k} codes of {weight.bits} bits, not {qweight.dtype} of "
            f"shape {list(qweight.shape)}"
        )
    if not qweight.device == scales.device == zeros.device:
        _refuse(
            f"a weight's tensors must be on one device, not on {qweight.device}, {scales.device} and {zeros.device}"
        )


def check_segments(segments: tuple[int, ...], out_features: int) -> None:
    """Check the output sizes of fused siblings; raises QuantMatmulInputError."""
    if sum(segments) != out_features or min(segments, default=0) < 1:
        _refuse(
            f"segments must be sizes of 1 at least whose sum is the weight's {out_features} outputs, not {segments}"
        )


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


def check_scaled(
    x: Tensor,
    prepared: PreparedWeight,
    bias: Tensor | None,
    out_scale: Tensor | None,
    in_scale: Tensor | None,
    group_scale: Tensor | None,
) -> None:
    """Check what `scaled_linear` is given; raises QuantMatmulInputError."""
    n, k = prepared.out_features, prepared.in_features
    if x.dim() == 0 or x.shape[-1] != k:
        _refuse(f"x must be [..., {k}], not {list(x.shape)}")
    if x.dtype not in DTYPES:
        _refuse(f"x must be float32, bfloat16 or float16, not {x.dtype}")
    if x.device != prepared.device:
        _refuse(f"x is on {x.device}, the weight on {prepared.device}")
    if bias is not None:
        if bias.shape != (n,) or bias.dtype not in DTYPES:
            _refuse(
                f"bias must be float32, bfloat16 or float16 [{n}], not {bias.dtype} of shape {list(bias.shape)}"
            )
        if bias.device != x.device:
            _refuse(f"bias is on {bias.device}, x on {x.device}")
    check_task_scales(prepared.weight, prepared.device, out_scale, in_scale, group_scale)


def check_task_scales(
    weight: QuantizedWeight,
    device: torch.device,
    out_scale: Tensor | None,
    in_scale: Tensor | None,
    group_scale: Tensor | None,
) -> None:
    """Check a task's scales, float32 [N], [K] and [G, N] on `device`, of any strides; raises QuantMatmulInputError."""
    n, k = weight.out_features, weight.in_features
    for name, scales, shape in (
        ("out_scale", out_scale, (n,)),
        ("in_scale", in_scale, (k,)),
        ("group_scale", group_scale, (weight.groups, n)),
    ):
        if scales is None:
            continue
        if scales.shape != shape or scales.dtype != torch.float32:
            _refuse(f"{name} must be float32 {list(shape)}, not {scales.dtype} of shape {list(scales.shape)}")
        if scales.device != device:
            _refuse(f"{name} is on {scales.device}, the weight on {device}")


def check_panel(weight: QuantizedWeight, panel: Tensor, row: int, column: int) -> None:
    """Check that codes in host memory can fill `panel` from [row, column] on; raises QuantMatmulInputError."""
    if weight.qweight.device.type != "cpu" or panel.device.type != "cpu":
        _refuse(f"weight and panel must be on the CPU, not on {weight.qweight.device} and {panel.device}")
    if panel.dim() != 2 or not panel.is_contiguous() or panel.dtype not in (torch.float32, torch.bfloat16):
        _refuse(
            "the panel must be float32 or bfloat16 [rows, columns], contiguous, not "
            f"{panel.dtype} of shape {list(panel.shape)}"
        )
    n, k = weight.out_features, weight.in_features
    if row < 0 or column < 0 or column % 8 or row + panel.shape[0] > n or column + panel.shape[1] > k:
        _refuse(
            f"a panel {list(panel.shape)} from [{row}, {column}] on must lie within the weight's [{n}, {k}] and begin "
            "at a multiple of 8 columns"
        )


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
