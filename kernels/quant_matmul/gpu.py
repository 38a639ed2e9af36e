"""quant_matmul in Triton: one kernel for 2, 3, 4 and 8 bits and every kind of scale set, tasks mixed in one launch.

Layout: inputs are cut into steps (tuning.inputs_per_step), each group filled up to whole steps. A step of one output is
a run of int32 words, code k = slot * words + word at bits slot * width, so all lanes shift alike and no code is loaded
twice. 3 bits are two planes, 2 + 1, at exactly 3 bits per weight. Steps are outermost ([steps, outputs, words]), so the
words of a tile lie in one piece. Outputs are filled up to whole panels per segment: a tile has one input scale.

The weights are the left operand of the product, as register-operand wgmma wants them; zero points act through the sum
of the inputs, scales after the sum of a group, the task's output scale at the very end.
"""

# A Triton kernel's arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peqa_kernels.device import launching_on
from peqa_kernels.packing import unpack_codes
from peqa_kernels.quant_matmul.tuning import PANEL, inputs_per_step, tile_for
from peqa_kernels.quant_matmul.weight import LinearBank, QuantizedWeight

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # widths of the planes that the codes are stored in


class TritonGpu:
    """One weight in the kernel's layout, on its device."""

    def __init__(self, weight: QuantizedWeight, segments: tuple[int, ...]) -> None:
        """Lay `weight` out; `segments` are the output sizes of fused siblings."""
        device = weight.qweight.device
        self.bits, self.groups, self.group_size = weight.bits, weight.groups, weight.group_size
        self.out_features = weight.out_features
        self.segments = segments
        self.step = inputs_per_step(weight.group_size)
        self.steps = -(-weight.group_size // self.step)  # per group
        source, tiles = _panels(segments)
        self.tiles = tiles.to(device)
        source = source.to(device)
        self.planes = _planes(weight, source, self.step, self.steps)
        centre = float(1 << (weight.bits - 1))
        self.scales = weight.scales.float()[source].t().contiguous()  # [G, padded N]
        self.zeros = (weight.zeros.float()[source] - centre).t().contiguous()  # [G, padded N]
        self.has_zeros = bool(self.zeros.any())

    def matmul(
        self,
        x: Tensor,  # [M, K]
        bias: Tensor | None,
        bank: LinearBank | None,
        row: Tensor | None,
        group_row: Tensor | None,
    ) -> Tensor:
        """Compute quant_matmul, [M, N] in x.dtype; fp32 activations enter with 22 bits or more."""
        rows = x.shape[0]
        if x.stride(1) != 1:
            x = x.contiguous()
        y = x.new_empty((rows, self.out_features))
        if rows == 0:
            return y
        out = None if bank is None or row is None else bank.out_scale
        into = None if bank is None or row is None else bank.in_scale
        group = None if bank is None or group_row is None else bank.group_scale
        tile = tile_for(rows, x.dtype, self.bits, in_scale=into is not None, group_scale=group is not None)
        grid = (self.tiles.shape[0], triton.cdiv(rows, tile.rows))
        with launching_on(x.device):
            quant_matmul_kernel[grid](
                x,
                self.planes[0],
                self.planes[-1],
                self.scales,
                self.zeros,
                self.tiles,
                # A pointer that is not read still needs a tensor.
                *(x if tensor is None else tensor for tensor in (bias, out, into, group, row, group_row)),
                y,
                rows,
                self.out_features,
                self.scales.shape[1],
                x.stride(0),
                BITS=self.bits,
                GROUPS=self.groups,
                SIZE=self.group_size,
                STEPS=self.steps,
                SEGMENTS=len(self.segments),
                HAS_BIAS=bias is not None,
                HAS_OUT=out is not None,
                HAS_IN=into is not None,
                HAS_GROUP=group is not None,
                HAS_ZEROS=self.has_zeros,
                BM=tile.rows,
                BN=PANEL,
                BK=self.step,
                STAGES=tile.stages,
                num_warps=tile.warps,
            )
        return y


def _panels(segments: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Output of each padded one (0 in the filling), int64, and (first, outputs, segment) per panel, int32 [P, 3]."""
    source, tiles = [], []
    first = 0
    for segment, size in enumerate(segments):
        for start in range(0, size, PANEL):
            outputs = min(PANEL, size - start)
            lane = torch.arange(PANEL)
            source.append(torch.where(lane < outputs, lane + first + start, 0))
            tiles.append((first + start, outputs, segment))
        first += size
    return torch.cat(source), torch.tensor(tiles, dtype=torch.int32)


def _planes(weight: QuantizedWeight, source: Tensor, step: int, steps: int) -> list[Tensor]:
    """Lay the codes out plane by plane, int32 [G * steps, padded N, words] each."""
    codes = unpack_codes(weight.qweight, weight.bits, weight.in_features)[source]
    codes = codes.view(len(source), weight.groups, weight.group_size)
    codes = torch.nn.functional.pad(codes, (0, step * steps - weight.group_size))
    planes, low = [], 0
    for width in PLANES[weight.bits]:
        plane = (codes >> low) & ((1 << width) - 1)
        slots = plane.view(len(source), weight.groups * steps, 32 // width, step * width // 32)
        words = torch.zeros_like(slots[:, :, 0], dtype=torch.int32)
        for slot in range(32 // width):
            words |= slots[:, :, slot].to(torch.int32) << (slot * width)
        planes.append(words.transpose(0, 1).contiguous())
        low += width
    return planes


@triton.jit
def _unpack(words, WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Give the int32 values [BN, BK] of one plane's words [BN, BK * WIDTH / 32]."""
    shift = tl.arange(0, 32 // WIDTH) * WIDTH
    values = (words[:, None, :] >> shift[None, :, None]) & ((1 << WIDTH) - 1)
    return tl.reshape(values, (BN, BK))


@triton.jit
def _weight_tile(lo, hi, at, step, padded, dtype, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Load one step of BN outputs, codes minus 2 ** (BITS - 1) as `dtype` [BN, BK]."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = BK * WIDTH // 32
    run = at.to(tl.int64) + step * padded
    codes = _unpack(tl.load(lo + run[:, None] * WORDS + tl.arange(0, WORDS)[None, :]), WIDTH, BN, BK)
    if BITS == 3:
        HIGH: tl.constexpr = BK // 32
        high = tl.load(hi + run[:, None] * HIGH + tl.arange(0, HIGH)[None, :])
        codes |= _unpack(high, 1, BN, BK) << 2
    # Bits of the float 2**23 + code: one OR and one subtraction, where a conversion from int runs at a quarter speed.
    CENTRE: tl.constexpr = 8388608.0 + (1 << (BITS - 1))
    return ((codes | 0x4B000000).to(tl.float32, bitcast=True) - CENTRE).to(dtype)


@triton.jit
def _input_tile(x, into, k, left, live, BK: tl.constexpr, EVEN: tl.constexpr, HAS_IN: tl.constexpr):
    """Load inputs k.. of each activation, times its task's input scales, as [BK, BM]; zero past the group's end."""
    rk = tl.arange(0, BK)
    mask = live[None, :] if EVEN else live[None, :] & (rk < left)[:, None]
    tile = tl.load(x[None, :] + k + rk[:, None], mask=mask, other=0.0)
    if HAS_IN:
        scale = tl.load(into[None, :] + k + rk[:, None], mask=mask, other=0.0)
        tile = (tile.to(tl.float32) * scale).to(tile.dtype)
    return tile


@triton.jit
def _dot(w, xt, part):
    """Add w @ xt [BN, BM]. The codes are exact in tf32, so fp32 inputs need two products: 11 + 11 bits."""
    if xt.dtype == tl.float32:
        high = (xt.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        part = tl.dot(w, xt - high, part, input_precision="tf32")
        return tl.dot(w, high, part, input_precision="tf32")
    return tl.dot(w, xt, part)


@triton.jit
def _finish(
    acc, part, xsum, scales, zeros, group, at, live, lane, HAS_ZEROS: tl.constexpr, HAS_GROUP: tl.constexpr
):
    """Add one group's sum, corrected by its zero points and under base and task scale: acc [BN, BM]."""
    if HAS_ZEROS:
        part -= tl.load(zeros + at)[:, None] * xsum[None, :]
    part *= tl.load(scales + at)[:, None]
    if HAS_GROUP:
        part *= tl.load(group[None, :] + lane[:, None], mask=live, other=0.0)
    return acc + part


@triton.jit(do_not_specialize=["M"])
def quant_matmul_kernel(
    x, lo, hi, scales, zeros, tiles, bias, out, into, group, row, group_row, y,
    M, N, padded, stride,
    BITS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_OUT: tl.constexpr, HAS_IN: tl.constexpr, HAS_GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One panel of BN outputs for BM activations; GROUPS * SIZE = K."""
    K: tl.constexpr = GROUPS * SIZE  # a run-time K makes ptxas serialise the wgmma of the loop
    EVEN: tl.constexpr = SIZE == STEPS * BK
    tile = tl.program_id(0)
    first = tl.load(tiles + 3 * tile)
    outputs = tl.load(tiles + 3 * tile + 1)
    segment = tl.load(tiles + 3 * tile + 2)
    rn = tl.arange(0, BN)
    at = tile * BN + rn
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    live = rm < M
    store = live[None, :] & (rn < outputs)[:, None]
    dtype = x.dtype.element_ty
    wide = rm.to(tl.int64)
    xp = x + wide * stride
    ip = xp
    op = xp
    gp = xp
    if HAS_OUT or HAS_IN:
        task = tl.load(row + rm, mask=live, other=0).to(tl.int64)
        ip = into + (task * SEGMENTS + segment) * K
        op = out + task * N + first
    if HAS_GROUP:
        gp = group + tl.load(group_row + rm, mask=live, other=0).to(tl.int64) * GROUPS * N + first

    acc = tl.zeros((BN, BM), tl.float32)
    xsum = tl.zeros((BM,), tl.float32)
    if GROUPS == 1:
        part = tl.zeros((BN, BM), tl.float32)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            w = _weight_tile(lo, hi, at, step, padded, dtype, BITS, BN, BK)
            xt = _input_tile(xp, ip, step * BK, SIZE - step * BK, live, BK, EVEN, HAS_IN)
            part = _dot(w, xt, part)
            if HAS_ZEROS:
                xsum += tl.sum(xt.to(tl.float32), axis=0)
        acc = _finish(acc, part, xsum, scales, zeros, gp, at, store, rn, HAS_ZEROS, HAS_GROUP)
    else:
        for g in tl.range(0, GROUPS, num_stages=STAGES):
            part = tl.zeros((BN, BM), tl.float32)
            xsum = tl.zeros((BM,), tl.float32)
            for step in tl.static_range(STEPS):
                w = _weight_tile(lo, hi, at, g * STEPS + step, padded, dtype, BITS, BN, BK)
                xt = _input_tile(xp, ip, g * SIZE + step * BK, SIZE - step * BK, live, BK, EVEN, HAS_IN)
                part = _dot(w, xt, part)
                if HAS_ZEROS:
                    xsum += tl.sum(xt.to(tl.float32), axis=0)
            shift = g * padded
            acc = _finish(
                acc,
                part,
                xsum,
                scales + shift,
                zeros + shift,
                gp + g * N,
                at,
                store,
                rn,
                HAS_ZEROS,
                HAS_GROUP,
            )

    if HAS_OUT:  # with input scales, the only thing that the kernel knows of tasks on a channel set
        acc *= tl.load(op[None, :] + rn[:, None], mask=store, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + first + rn, mask=rn < outputs, other=0.0).to(tl.float32)[:, None]
    tl.store(y + wide[None, :] * N + first + rn[:, None], acc.to(dtype), mask=store)
