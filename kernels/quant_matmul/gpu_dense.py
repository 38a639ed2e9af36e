"""Long batches on a GPU: floats are made of the codes a panel at a time, and torch's own product multiplies them.

Unpacked in its registers, a code costs every tile of activations the same instructions again; from about a thousand
activations on it is cheaper to pay once. A panel is small enough to stay in the second-level cache between the kernel
that writes it and the product that reads it. Weights under the base's scales are rounded to the activations' dtype;
what differs from task to task is multiplied in fp32 afterwards.
"""

# A Triton kernel's arguments have no Python types, and its tuples grow.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code=assignment

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from peqa_kernels.device import launching_on
from peqa_kernels.quant_matmul.gpu_inputs import rows_of, scaled_inputs
from peqa_kernels.quant_matmul.gpu_kernel import FRACTIONAL, INTEGER
from peqa_kernels.quant_matmul.gpu_layout import Layout
from peqa_kernels.quant_matmul.gpu_unpack import load_words, run_of, taken_away, unpack

if TYPE_CHECKING:
    from peqa_kernels.quant_matmul.gpu import TritonGpu

PANEL = 1 << 24  # floats of a panel: 32 MB in 16 bits, half of an H200's second-level cache
OUTPUTS = 64  # of a program that unpacks: half a panel of the layout at most
FINISH_TILE = (8, 512)  # rows and outputs of a program that multiplies task scales in


@triton.jit
def unpack_kernel(
    words, scales, zeros, floats, at, count, padded,
    BITS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    ZEROS: tl.constexpr, ASM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN outputs of one tile as floats [count, K] from padded output `at` on. Grid: (tiles, outputs / BN)."""
    CODES: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    WORDS: tl.constexpr = BK // CODES
    STRIDE: tl.constexpr = (3 if BITS == 3 else 1) * WORDS
    SUBS: tl.constexpr = GROUPS // TILES if GROUPS > TILES else 1
    PER_GROUP: tl.constexpr = TILES // GROUPS if TILES > GROUPS else 1
    PAIRS: tl.constexpr = CODES // 2 // SUBS
    PART: tl.constexpr = BK // SUBS
    dtype: tl.constexpr = floats.dtype.element_ty
    tile = tl.program_id(0)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    source = at + rn
    loaded = load_words(words + tl.cast(tile, tl.int64) * padded * STRIDE, source, padded, BITS, BN, WORDS)
    away = (taken_away(tl.full((BN,), 1 << (BITS - 1), tl.int32), dtype, ASM),)
    if ZEROS == INTEGER:
        away = ()
        for sub in tl.static_range(SUBS):
            g = tile * SUBS + sub if SUBS > 1 else tile // PER_GROUP
            away += (taken_away(tl.load(zeros + g * padded + source).to(tl.int32), dtype, ASM),)
        values = unpack(loaded, away, dtype, BITS, SUBS, BN, WORDS, ASM)
    else:
        values = unpack(loaded, away, dtype, BITS, 1, BN, WORDS, ASM)
    for sub in tl.static_range(SUBS):
        g = tile * SUBS + sub if SUBS > 1 else tile // PER_GROUP
        k = (0 if PER_GROUP == 1 else (tile % PER_GROUP) * BK) + tl.arange(0, PART)
        w = run_of(values, sub * PAIRS, PAIRS, BN, WORDS).to(tl.float32)
        if ZEROS == FRACTIONAL:
            w -= tl.load(zeros + g * padded + source)[:, None]
        w *= tl.load(scales + g * padded + source).to(tl.float32)[:, None]
        place = floats + rn.to(tl.int64)[:, None] * (GROUPS * SIZE) + (g * SIZE + k)[None, :]
        tl.store(place, w.to(dtype), mask=(rn < count)[:, None] & (k < SIZE)[None, :])


@triton.jit(do_not_specialize=["rows", "bank_rows"])
def finish_kernel(
    y, out, bias, row, rows, N, first, count, bank_rows,
    HAS_OUT: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Multiply outputs first .. first + count - 1 by their rows' task scales and add the bias, in place."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    live = (rm < rows)[:, None] & (rn < count)[None, :]
    place = y + rm.to(tl.int64)[:, None] * N + (first + rn)[None, :]
    value = tl.load(place, mask=live, other=0.0).to(tl.float32)
    if HAS_OUT:
        task = rows_of(row, rm, rm < rows, bank_rows).to(tl.int64)
        value *= tl.load(out + task[:, None] * N + (first + rn)[None, :], mask=live, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + first + rn, mask=rn < count, other=0.0).to(tl.float32)[None, :]
    tl.store(place, value.to(y.dtype.element_ty), mask=live)


def dense_matmul(
    weight: TritonGpu,
    x: Tensor,  # [M, K]
    bias: Tensor | None,  # [N]
    out: Tensor | None,  # [rows, N]
    into: Tensor | None,  # [rows, S, K]
    row: Tensor | None,  # int32 [M], where `out` or `into` is given
) -> Tensor:
    """Compute quant_matmul without group scales, [M, N] in x.dtype; bit for bit the same from run to run."""
    layout, n = weight.layout, weight.out_features
    y = x.new_empty((x.shape[0], n))
    copies = None
    if into is not None:
        assert row is not None
        copies = scaled_inputs(x, into, row)
    cuts = list(dense_panels(layout, by_segment=into is not None))
    floats = x.new_empty((max(count for _, _, count, _ in cuts), layout.in_features))
    rows, outputs = FINISH_TILE
    for at, first, count, segment in cuts:
        with launching_on(x.device):
            unpack_kernel[(layout.tiles, triton.cdiv(count, OUTPUTS))](
                weight.words, weight.scales, weight.zeros, floats, at, count, layout.padded,
                **unpack_constants(layout, weight.zeros_mode, weight.device.assembly and x.dtype != torch.float32),
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        inputs = x if copies is None else copies[segment]
        torch.mm(inputs, floats[:count].t(), out=y[:, first : first + count])
        if out is not None or bias is not None:
            grid = (triton.cdiv(x.shape[0], rows), triton.cdiv(count, outputs))
            with launching_on(x.device):
                finish_kernel[grid](
                    y, y if out is None else out, y if bias is None else bias, y if row is None else row,
                    x.shape[0], n, first, count, 0 if out is None else len(out),
                    HAS_OUT=out is not None, HAS_BIAS=bias is not None, BM=rows, BN=outputs,
                    num_warps=4, enable_fp_fusion=True,
                )  # fmt: skip
    return y


def unpack_constants(layout: Layout, zeros_mode: int, assembly: bool) -> dict[str, int | bool]:
    """What `unpack_kernel` is compiled for."""
    return {
        **{"BITS": layout.bits, "GROUPS": layout.groups, "SIZE": layout.group_size},
        **{"BK": layout.step, "TILES": layout.tiles, "ZEROS": zeros_mode},
        **{"ASM": assembly and layout.bits != 8, "BN": OUTPUTS},
    }


def dense_panels(layout: Layout, *, by_segment: bool) -> Iterator[tuple[int, int, int, int]]:
    """Give (padded first, first, how many outputs, segment) of equal panels of at most PANEL floats.

    `by_segment`: none reaches across two segments, which may have inputs of their own.
    """
    most = max(128, PANEL // layout.in_features)
    whole = layout.padded == sum(layout.segments) and not by_segment
    padded = first = 0
    for segment, size in enumerate((sum(layout.segments),) if whole else layout.segments):
        step = -(-size // (-(-size // most)))
        step += -step % 128
        for start in range(0, size, step):
            yield padded + start, first + start, min(step, size - start), segment
        padded += -(-size // layout.panel) * layout.panel
        first += size
