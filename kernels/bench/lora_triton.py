"""LoRA's shrink and expand in Triton for rows that each have an adapter of their own.

Two launches beside the base matmul, as multi-LoRA servers make them. Inputs are split so that few rows still fill a
GPU; the parts are summed in the expand, in order, which spares the zeroing and the atomics that those servers need.
"""

# A Triton kernel's arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS = 8  # programs that share one row's inputs: 32 rows of 3 siblings make 768, over five for each SM of an H200
SHRINK_INPUTS = 256  # a step of 16 x 256 bf16 numbers is 8 KiB in flight for each program
EXPAND_OUTPUTS = 256


@triton.jit
def shrink_kernel(
    x, a, row, part, M, K,
    SEGMENTS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """part[split, m, segment, :] = A[row[m], segment] @ x[m], over the split's inputs."""
    m, segment, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    task = tl.load(row + m).to(tl.int64)
    rank = tl.arange(0, RANK)
    wide = K // SPLITS
    inputs = split * wide + tl.arange(0, BK)
    end = (split + 1) * wide
    if split == SPLITS - 1:
        end = K
    own = a + (task * SEGMENTS + segment) * RANK * K
    total = tl.zeros((RANK,), tl.float32)
    for _ in range(0, tl.cdiv(end - split * wide, BK)):
        live = inputs < end
        values = tl.load(x + m * K + inputs, mask=live, other=0.0).to(tl.float32)
        down = tl.load(own + rank[:, None] * K + inputs[None, :], mask=live[None, :], other=0.0)
        total += tl.sum(down.to(tl.float32) * values[None, :], axis=1)
        inputs += BK
    tl.store(part + ((split * M + m) * SEGMENTS + segment) * RANK + rank, total)


@triton.jit
def expand_kernel(
    y, b, row, part, segment_of, M, N,
    SEGMENTS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[m, n] += B[row[m], n] @ (the sum of the parts of n's segment)."""
    m, block = tl.program_id(0), tl.program_id(1)
    task = tl.load(row + m).to(tl.int64)
    rank = tl.arange(0, RANK)
    outputs = block * BN + tl.arange(0, BN)
    live = outputs < N
    segment = tl.load(segment_of + block)
    low = tl.zeros((RANK,), tl.float32)
    for split in tl.static_range(SPLITS):
        low += tl.load(part + ((split * M + m) * SEGMENTS + segment) * RANK + rank)
    up = tl.load(b + (task * N + outputs)[:, None] * RANK + rank[None, :], mask=live[:, None], other=0.0)
    old = tl.load(y + m * N + outputs, mask=live, other=0.0).to(tl.float32)
    new = old + tl.sum(up.to(tl.float32) * low[None, :], axis=1)
    tl.store(y + m * N + outputs, new.to(y.dtype.element_ty), mask=live)


def add_lora(
    y: Tensor,  # [M, N], added to in place
    x: Tensor,  # [M, K] contiguous
    a: Tensor,  # [tasks, segments, rank, K]
    b: Tensor,  # [tasks, N, rank]
    row: Tensor,  # int32 [M]
    segment_of: Tensor,  # int32 [N / EXPAND_OUTPUTS]: segment of each block of outputs
) -> None:
    """Add each row's adapter to its outputs. A block of outputs lies within one segment."""
    (rows, k), n = x.shape, y.shape[1]
    _, segments, rank, _ = a.shape
    part = torch.empty(SPLITS, rows, segments, rank, device=x.device, dtype=torch.float32)
    shrink_kernel[(rows, segments, SPLITS)](
        x, a, row, part, rows, k, SEGMENTS=segments, RANK=rank, SPLITS=SPLITS, BK=SHRINK_INPUTS
    )
    expand_kernel[(rows, triton.cdiv(n, EXPAND_OUTPUTS))](
        y, b, row, part, segment_of, rows, n,
        SEGMENTS=segments, RANK=rank, SPLITS=SPLITS, BN=EXPAND_OUTPUTS,
    )  # fmt: skip
