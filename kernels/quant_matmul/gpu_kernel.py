"""The quant_matmul kernel of GPUs: BN outputs by BM activations, weights unpacked in registers, tasks mixed.

The weights are the left operand of the product, as register-operand wgmma wants them: codes minus zero points, exact
in 16 bits. All scaling happens after the sum of a group, in fp32; the task's output scale comes at the very end. K may
be split over programs: each leaves its fp32 sums in `parts`, and whoever comes last adds them up, first split first,
so the result depends on no order of arrival. In turn (`IN_TURN`) one program does all splits, with the same bits.

On Hopper a launch may begin while the one before it still ends (`AHEAD`): its programs then bring their first weights,
which no launch writes, into the second-level cache, and wait before they read anything else.
"""

# A Triton kernel's arguments have no Python types, and its tuples grow.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from peqa_kernels.quant_matmul.gpu_inputs import rows_of
from peqa_kernels.quant_matmul.gpu_unpack import load_words, run_of, taken_away, unpack

# How zero points are held: all the middle code; integers, as bytes; or fp32, minus the middle code.
MIDDLE = tl.constexpr(0)
INTEGER = tl.constexpr(1)
FRACTIONAL = tl.constexpr(2)
# Task scales of inputs: none; multiplied in on the way; or x has a copy for every segment, already multiplied.
UNSCALED = tl.constexpr(0)
BY_ROW = tl.constexpr(1)
COPIES = tl.constexpr(2)
# Task scales of groups: none; each activation its own; or one task after the other, rows of other tasks idle.
NO_GROUPS = tl.constexpr(0)
MIXED = tl.constexpr(1)
TASKWISE = tl.constexpr(2)
# Row tiles that take turns before the next panel does, so that codes are read from memory once.
TOGETHER = tl.constexpr(8)


@triton.constexpr_function
def _prefetch(size):
    """PTX that asks for `size` bytes to be brought into the second-level cache, once for all threads."""
    return (
        "{ .reg .pred p; .reg .b32 t; mov.u32 t,%tid.x; setp.eq.u32 p,t,0; "
        f"@p cp.async.bulk.prefetch.L2.global [$1],{size}; mov.u32 $0,t; }}"
    )


@triton.jit
def _begin_early(
    words, start, padded, BITS: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr,
    TILES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Ask for the weights of AHEAD tiles from `start` on; then wait for all that earlier launches write.

    The next launch may follow only then, so two are under way at a time, and of buffers that launches share (parts,
    counters, recycled memory) none is touched by two of them.
    """
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    code: tl.constexpr = _prefetch(BN * WORDS * 4)
    for step in tl.static_range(AHEAD):
        tile = tl.cast(tl.minimum(start + step, TILES - 1), tl.int64)
        for plane in tl.static_range(PLANES):
            at = (words + (tile * PLANES + plane) * padded * WORDS).to(tl.int64)
            tl.inline_asm_elementwise(code, "=r,l", [at], tl.int32, is_pure=False, pack=1)
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()


@triton.jit
def _dot(w, xt, acc):
    """Add w @ xt [BN, BM]. The codes are exact in tf32, so fp32 inputs need two products: 11 + 11 bits."""
    if xt.dtype == tl.float32:
        high = (xt.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        acc = tl.dot(w, xt - high, acc, input_precision="tf32")
        return tl.dot(w, high, acc, input_precision="tf32")
    else:
        return tl.dot(w, xt, acc)


@triton.jit
def _inputs(xp, ip, k, left, live, BK: tl.constexpr, EVEN: tl.constexpr, INPUTS: tl.constexpr):
    """Load BK inputs from k on of each activation, times its task's input scales: [BK, BM], zero past the group."""
    rk = tl.arange(0, BK)
    mask = live[None, :] if EVEN else live[None, :] & (rk < left)[:, None]
    tile = tl.load(xp[None, :] + (k + rk)[:, None], mask=mask, other=0.0, eviction_policy="evict_last")
    if INPUTS == BY_ROW:
        scale = tl.load(ip[None, :] + (k + rk)[:, None], mask=mask, other=0.0)
        tile = (tile.to(tl.float32) * scale.to(tl.float32)).to(tile.dtype)
    return tile


@triton.jit
def _group_zeros(
    zeros, tile, padded, dtype: tl.constexpr, SUBS: tl.constexpr, PER_GROUP: tl.constexpr, ASM: tl.constexpr
):
    """Load the integer zero points of a tile's groups, ready for `unpack`."""
    found = ()
    for sub in tl.static_range(SUBS):
        g = tile * SUBS + sub if SUBS > 1 else tile // PER_GROUP
        found += (taken_away(tl.load(zeros + g * padded).to(tl.int32), dtype, ASM),)
    return found


@triton.jit
def _sums(
    xp, ip, tp, gp, words, scales, zeros, live, store, start, steps, padded, N,
    BITS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    INPUTS: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum over `steps` tiles of the inputs from tile `start` on: [BN, BM], under the groups' scales if G > 1.

    `words`, `scales` and `zeros` point at the tile's first output, `gp` [BM] (or a scalar) at the group scales', `tp`
    [BM] at the totals of each activation's groups, where zero points are no integers.
    """
    CODES: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    WORDS: tl.constexpr = BK // CODES
    STRIDE: tl.constexpr = (3 if BITS == 3 else 1) * WORDS  # words of one output in a tile
    SUBS: tl.constexpr = GROUPS // TILES if GROUPS > TILES else 1  # groups in a tile
    PER_GROUP: tl.constexpr = TILES // GROUPS if TILES > GROUPS else 1  # tiles in a group
    PAIRS: tl.constexpr = CODES // 2 // SUBS
    EVEN: tl.constexpr = GROUPS * SIZE == TILES * BK
    # A tile of which two are to share a processor unpacks a quarter at a time: 103 registers, where it took 177.
    PARTS: tl.constexpr = 4 if BN == 256 and BM == 32 and BITS == 4 and BK == 128 else 1
    dtype: tl.constexpr = xp.dtype.element_ty
    rn = tl.arange(0, BN)
    words += tl.cast(start, tl.int64) * padded * STRIDE
    away = (taken_away(tl.full((BN,), 1 << (BITS - 1), tl.int32), dtype, ASM),)
    if ZEROS == INTEGER and GROUPS == 1:
        away = (taken_away(tl.load(zeros + rn).to(tl.int32), dtype, ASM),)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        tile = start + step
        loaded = load_words(words, rn, padded, BITS, BN, WORDS)
        words += padded * STRIDE
        if GROUPS == 1:
            values = unpack(loaded, away, dtype, BITS, 1, BN, WORDS, ASM)
            for part in tl.static_range(PARTS):
                k = tile * BK + part * (BK // PARTS)
                w = run_of(values, part * (PAIRS // PARTS), PAIRS // PARTS, BN, WORDS)
                acc = _dot(w, _inputs(xp, ip, k, SIZE - k, live, BK // PARTS, EVEN, INPUTS), acc)
        else:
            if ZEROS == INTEGER:
                of_groups = _group_zeros(zeros + rn, tile, padded, dtype, SUBS, PER_GROUP, ASM)
                values = unpack(loaded, of_groups, dtype, BITS, SUBS, BN, WORDS, ASM)
            else:
                values = unpack(loaded, away, dtype, BITS, 1, BN, WORDS, ASM)
            for sub in tl.static_range(SUBS):
                g = tile * SUBS + sub if SUBS > 1 else tile // PER_GROUP
                done = 0 if PER_GROUP == 1 else (tile % PER_GROUP) * BK
                w = run_of(values, sub * PAIRS, PAIRS, BN, WORDS)
                xt = _inputs(xp, ip, g * SIZE + done, SIZE - done, live, BK // SUBS, EVEN, INPUTS)
                part = _dot(w, xt, tl.zeros((BN, BM), tl.float32))
                if ZEROS == FRACTIONAL:
                    total = tl.load(tp + g, mask=live, other=0.0)
                    if PER_GROUP > 1:
                        total = tl.where(
                            done == 0, total, 0.0
                        )  # the group's first tile takes it away for all
                    part -= tl.load(zeros + g * padded + rn)[:, None] * total[None, :]
                scale = tl.load(scales + g * padded + rn).to(tl.float32)
                if GROUPED == MIXED:
                    own = gp[None, :] + g * N + rn[:, None]
                    part *= tl.load(own, mask=store, other=0.0).to(tl.float32)
                elif GROUPED == TASKWISE:
                    scale *= tl.load(gp + g * N + rn, mask=tl.max(store.to(tl.int32), 1) > 0, other=0.0).to(
                        tl.float32
                    )
                acc += part * scale[:, None]
    return acc


@triton.jit
def _split_sums(
    split, xp, ip, tp, gp, words, scales, zeros, live, store, padded, N,
    BITS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    SPLITS: tl.constexpr, INPUTS: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_sums` over one of SPLITS parts of the tiles; the last part may be shorter, but has a tile."""
    PER: tl.constexpr = (TILES + SPLITS - 1) // SPLITS
    start = split * PER
    steps = PER
    if TILES % PER != 0:
        steps = tl.minimum(PER, TILES - start)
        tl.assume(steps >= 1)  # a loop that may be empty makes ptxas serialise its wgmma
    return _sums(
        xp, ip, tp, gp, words, scales, zeros, live, store, start, steps, padded, N,
        BITS, GROUPS, SIZE, BK, TILES, INPUTS, GROUPED, ZEROS, ASM, BM, BN, STAGES,
    )  # fmt: skip


@triton.jit
def _added_up(acc, parts, counters, number, split, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Leave this split's sums; the last of them to come gets all, added in their order. Give (sums, am I the last)."""
    mine = parts + number.to(tl.int64) * (SPLITS * BN * BM)
    cell = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    tl.store(mine + split * (BN * BM) + cell, acc, cache_modifier=".cg")
    tl.debug_barrier()  # every thread's sums are written before one thread says so
    last = tl.atomic_add(counters + number, 1, sem="acq_rel") == SPLITS - 1
    if last:
        acc = tl.load(mine + cell, cache_modifier=".cg")
        for other in tl.static_range(1, SPLITS):
            acc += tl.load(mine + other * (BN * BM) + cell, cache_modifier=".cg")
        tl.store(counters + number, 0)  # for the next launch
    return acc, last


@triton.jit
def _finish(
    acc, y, scales, zeros, bias, tp, op, gp, wide, live, store, first, outputs, N,
    GROUPS: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr, HAS_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Scale what no group has scaled, add the bias, write."""
    rn = tl.arange(0, BN)
    if GROUPS == 1:
        if ZEROS == FRACTIONAL:
            acc -= tl.load(zeros + rn)[:, None] * tl.load(tp, mask=live, other=0.0)[None, :]
        acc *= tl.load(scales + rn).to(tl.float32)[:, None]
        if GROUPED == MIXED:
            acc *= tl.load(gp[None, :] + rn[:, None], mask=store, other=0.0).to(tl.float32)
        elif GROUPED == TASKWISE:
            acc *= tl.load(gp + rn, mask=rn < outputs, other=0.0).to(tl.float32)[:, None]
    if HAS_OUT:  # with input scales, the only thing that the kernel knows of tasks on a channel set
        acc *= tl.load(op[None, :] + rn[:, None], mask=store, other=0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + first + rn, mask=rn < outputs, other=0.0).to(tl.float32)[:, None]
    tl.store(y + (wide * N + first)[None, :] + rn[:, None], acc.to(y.dtype.element_ty), mask=store)


@triton.jit(do_not_specialize=["M", "bank_rows", "group_rows"])
def quant_matmul_kernel(
    x, totals, words, scales, zeros, panels, bias, out, into, group, row, group_row, y, parts, counters,
    M, N, padded, stride, bank_rows, group_rows,
    BITS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    SEGMENTS: tl.constexpr, PLAIN: tl.constexpr, ALIGNED: tl.constexpr, SPLITS: tl.constexpr,
    IN_TURN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OUT: tl.constexpr, INPUTS: tl.constexpr,
    GROUPED: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BN outputs for BM activations over one split of the inputs. PLAIN: no output is filling, and no panel table.

    ALIGNED: outputs per segment are multiples of 16, so that runs of them are loaded in 16 bytes.
    """
    K: tl.constexpr = GROUPS * SIZE
    WORDS: tl.constexpr = BK // (32 if BITS == 3 else 32 // BITS)
    row_tiles = tl.cdiv(M, BM)
    number = tl.program_id(0)
    width = TOGETHER * (tl.num_programs(0) // row_tiles)
    block = number // width
    here = tl.minimum(row_tiles - block * TOGETHER, TOGETHER)
    row_tile = block * TOGETHER + (number % width) % here
    panel = (number % width) // here
    rn = tl.arange(0, BN)
    at, first, outputs, segment = panel * BN, panel * BN, BN, 0
    if not PLAIN:
        at = tl.multiple_of(tl.load(panels + 4 * panel), BN)
        first = tl.load(panels + 4 * panel + 1)
        if ALIGNED:
            first = tl.multiple_of(first, 16)
        outputs = tl.load(panels + 4 * panel + 2)
        segment = tl.load(panels + 4 * panel + 3)
    words += at.to(tl.int64) * WORDS
    if AHEAD > 0:
        PER: tl.constexpr = (TILES + SPLITS - 1) // SPLITS
        _begin_early(words, tl.program_id(1) * PER, padded, BITS, BN, WORDS, TILES, min(AHEAD, PER))
    rm = row_tile * BM + tl.arange(0, BM)
    live = rm < M
    wide = rm.to(tl.int64)
    store = live[None, :] & (rn < outputs)[:, None]
    xp = x + wide * stride
    ip = xp
    tp = totals + wide * GROUPS
    op = xp
    gp = xp
    # Two programs of this tile share a processor: the tasks' registers are needed in the loop, see PARTS.
    LATE: tl.constexpr = BN == 256 and BM == 32 and INPUTS != BY_ROW and GROUPED != TASKWISE
    if (HAS_OUT and not LATE) or INPUTS == BY_ROW:
        task = rows_of(row, rm, live, bank_rows).to(tl.int64)
        op = out + task * N + first
        if INPUTS == BY_ROW:
            ip = into + (task * SEGMENTS + segment) * K
    if INPUTS == COPIES:
        xp += (segment * M).to(tl.int64) * K
        tp += (segment * M).to(tl.int64) * GROUPS
    scales += at
    zeros += at
    if GROUPED == MIXED:
        gp = group + rows_of(group_row, rm, live, group_rows).to(tl.int64) * (GROUPS * N) + first

    if GROUPED == TASKWISE:
        task_group = rows_of(group_row, rm, live, group_rows)
        waiting = live
        while (
            tl.max(waiting.to(tl.int32), axis=0) > 0
        ):  # once for each task in the tile: rows come sorted by task
            now = tl.min(tl.where(waiting, task_group, 0x7FFFFFFF), axis=0)
            mine = waiting & (task_group == now)
            gq = group + now.to(tl.int64) * (GROUPS * N) + first
            acc = _sums(
                xp, ip, tp, gq, words, scales, zeros, live, store, 0, TILES, padded, N,
                BITS, GROUPS, SIZE, BK, TILES, INPUTS, GROUPED, ZEROS, ASM, BM, BN, STAGES,
            )  # fmt: skip
            _finish(
                acc, y, scales, zeros, bias, tp, op, gq, wide, live, store & mine[None, :], first, outputs, N,
                GROUPS, GROUPED, ZEROS, HAS_OUT, HAS_BIAS, BN,
            )  # fmt: skip
            waiting = waiting & (task_group != now)
    else:
        split = tl.program_id(1)
        acc = _split_sums(
            split, xp, ip, tp, gp, words, scales, zeros, live, store, padded, N,
            BITS, GROUPS, SIZE, BK, TILES, SPLITS, INPUTS, GROUPED, ZEROS, ASM, BM, BN, STAGES,
        )  # fmt: skip
        if HAS_OUT and LATE:
            op = out + rows_of(row, rm, live, bank_rows).to(tl.int64) * N + first
        last = split == split
        if SPLITS > 1:
            if IN_TURN:
                for other in tl.range(1, SPLITS, num_stages=1):
                    acc += _split_sums(
                        other, xp, ip, tp, gp, words, scales, zeros, live, store, padded, N,
                        BITS, GROUPS, SIZE, BK, TILES, SPLITS, INPUTS, GROUPED, ZEROS, ASM, BM, BN, STAGES,
                    )  # fmt: skip
            else:
                acc, last = _added_up(acc, parts, counters, number, split, SPLITS, BM, BN)
        if last:
            _finish(
                acc, y, scales, zeros, bias, tp, op, gp, wide, live, store, first, outputs, N,
                GROUPS, GROUPED, ZEROS, HAS_OUT, HAS_BIAS, BN,
            )  # fmt: skip
