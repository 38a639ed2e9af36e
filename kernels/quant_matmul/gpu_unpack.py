"""Words of the GPU layout to weights, within registers: the order of the codes is gpu_layout's.

A code becomes a float without a conversion: OR-ed into the low mantissa bits of a power of two it is that number plus
the code, in both halves of a word at once, and one fused multiply-add takes away the power together with the group's
zero point (or, where zero points are no integers, the middle code). Exact: the result is a small integer. The same
function exists as plain arithmetic, for Triton's interpreter, other makes of GPU, 8 bits and fp32.
"""

# A Triton kernel's arguments have no Python types, and its tuples grow.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

CODES_PER_WORD = {2: 16, 3: 32, 4: 8, 8: 4}  # at 3 bits: of three words, one in each plane
PLANES = {2: 1, 3: 3, 4: 1, 8: 1}


@triton.constexpr_function
def assembly(bits, bf16, runs):
    """PTX that turns the word(s) of 32 / bits codes (32 at 3 bits) into floats code - zero, in pairs (low, high).

    Operands: the floats out, the words in, and for each of `runs` equal parts of the pairs `taken_away` of its zero.
    sm_80 has no subtraction of bf16 pairs, hence the multiply-add by one.
    """
    codes = 32 if bits == 3 else 32 // bits
    planes = 3 if bits == 3 else 1
    base, one, kind = (0x43004300, 0x3F803F80, "bf16x2") if bf16 else (0x64006400, 0x3C003C00, "f16x2")
    mask = ((1 << bits) - 1) * 0x00010001
    per_run = codes // 2 // runs
    text = [f"{{ .reg .b32 r,q,i,s,n,t; mov.u32 i,{one:#x};"]
    if bits == 4 and not bf16:
        # Every other code stays four bits up, worth 16: 1024 + 16 q, times 1/16, minus 64 + zero. No shift for it.
        text.append("mov.u32 s,0x2c002c00; mov.u32 t,0x63806380;")
        for pair in range(4):
            away = f"${codes + 1 + pair // per_run}"
            source = f"${codes}" if pair < 2 else "r"
            if pair == 2:
                text.append(f"shr.u32 r,${codes},8;")
            if pair % 2:
                text.append(f"add.rn.f16x2 n,{away},t; lop3.b32 q,{source},0x00f000f0,{base:#x},0xea;")
                text.append("fma.rn.f16x2 q,q,s,n;")
            else:
                text.append(f"lop3.b32 q,{source},0x000f000f,{base:#x},0xea; fma.rn.f16x2 q,q,i,{away};")
            text.append(f"mov.b32 {{${2 * pair},${2 * pair + 1}}},q;")
        return " ".join(text) + " }"
    for pair in range(codes // 2):
        away = f"${codes + planes + pair // per_run}"
        if pair < planes * (16 // bits):
            source, shift = f"${codes + pair // (16 // bits)}", bits * (pair % (16 // bits))
            if shift:
                text.append(f"shr.u32 r,{source},{shift};")
                source = "r"
            text.append(f"lop3.b32 q,{source},{mask:#x},{base:#x},0xea;")
        else:  # the sixteenth pair of 3 bits: one bit of it in bit 15 of each half of each word
            text.append(f"shr.u32 r,${codes},15; and.b32 q,r,0x00010001;")
            text.append(f"shr.u32 r,${codes + 1},14; lop3.b32 q,r,0x00020002,q,0xea;")
            text.append(f"shr.u32 r,${codes + 2},13; lop3.b32 q,r,0x00040004,q,0xea; or.b32 q,q,{base:#x};")
        text.append(f"fma.rn.{kind} q,q,i,{away}; mov.b32 {{${2 * pair},${2 * pair + 1}}},q;")
    return " ".join(text) + " }"


@triton.constexpr_function
def constraints(bits, runs):
    """Registers of `assembly`: 16 bits each out, 32 bits each in."""
    codes = 32 if bits == 3 else 32 // bits
    return ",".join(["=h"] * codes + ["r"] * ((3 if bits == 3 else 1) + runs))


@triton.jit
def taken_away(zero, dtype: tl.constexpr, ASM: tl.constexpr):
    """Integer zero points 0 .. 127 (int32) -> what `unpack` subtracts: a pair of floats in a word, or an fp32."""
    if not ASM:
        return zero.to(tl.float32) + 8388608.0
    elif dtype == tl.bfloat16:
        return zero * 0x00010001 - 0x3CFF3D00  # -(128 + zero) twice: the bits 0xC300 + zero
    else:
        return zero * 0x00010001 - 0x1BFF1C00  # -(1024 + zero) twice: the bits 0xE400 + zero


@triton.jit
def _in_order(words, BN: tl.constexpr, WORDS: tl.constexpr):
    """Words as stored (in the order of the threads that own them) to words in the order of their inputs."""
    RUN: tl.constexpr = 4 if WORDS >= 4 else WORDS
    words = tl.reshape(words, (BN, RUN, WORDS // RUN))
    return tl.reshape(tl.permute(words, (0, 2, 1)), (BN, WORDS))


@triton.jit
def load_words(words, at, padded, BITS: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr):
    """Load the words of one tile, [BN, WORDS] of each plane, for the outputs `at` [BN]; they pass once."""
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    found = ()
    for plane in tl.static_range(PLANES):
        run = (at + plane * padded)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        found += (tl.load(words + run, eviction_policy="evict_first"),)
    return found


@triton.jit
def _float_of(code, away, dtype: tl.constexpr):
    """A code minus its zero point: the bits of the float 2**23 + code, minus 2**23 + zero."""
    return ((code | 0x4B000000).to(tl.float32, bitcast=True) - away[:, None]).to(dtype)


@triton.jit
def _arithmetic(words, away, BITS: tl.constexpr, RUNS: tl.constexpr, dtype: tl.constexpr):
    """What the assembly does, in its order."""
    MASK: tl.constexpr = (1 << BITS) - 1
    EACH: tl.constexpr = 16 // BITS
    PER_RUN: tl.constexpr = (16 if BITS == 3 else 16 // BITS) // RUNS
    values = ()
    for plane in tl.static_range(len(words)):
        for pair in tl.static_range(EACH):
            for half in tl.static_range(2):
                code = (words[plane] >> (BITS * pair + 16 * half)) & MASK
                values += (_float_of(code, away[(plane * EACH + pair) // PER_RUN], dtype),)
    if BITS == 3:
        for half in tl.static_range(2):
            code = (words[0] >> (15 + 16 * half)) & 1
            code |= (words[1] >> (14 + 16 * half)) & 2
            code |= (words[2] >> (13 + 16 * half)) & 4
            values += (_float_of(code, away[RUNS - 1], dtype),)
    return values


@triton.jit
def unpack(
    words, away, dtype: tl.constexpr,
    BITS: tl.constexpr, RUNS: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Words as loaded -> codes minus zero points as `dtype`: tensors [BN, WORDS] that `run_of` puts in order.

    `away` are `taken_away`'s results [BN], one for each of RUNS equal parts of the tile's inputs. ASM: the assembly of
    NVIDIA GPUs, for bf16 and fp16 at 2 to 4 bits; without it, plain arithmetic.
    """
    ordered = ()
    for plane in tl.static_range(len(words)):
        ordered += (_in_order(words[plane], BN, WORDS),)
    if ASM:
        for run in tl.static_range(RUNS):
            ordered += (tl.broadcast_to(away[run][:, None], (BN, WORDS)),)
        if dtype == tl.bfloat16:
            return _as_bf16(ordered, BITS, RUNS)
        else:
            return _as_fp16(ordered, BITS, RUNS)
    else:
        return _arithmetic(ordered, away, BITS, RUNS, dtype)


@triton.jit
def _as_bf16(words, BITS: tl.constexpr, RUNS: tl.constexpr):
    text: tl.constexpr = assembly(BITS, True, RUNS)
    registers: tl.constexpr = constraints(BITS, RUNS)
    if BITS == 4:
        return tl.inline_asm_elementwise(text, registers, words, (tl.bfloat16,) * 8, is_pure=True, pack=1)
    elif BITS == 2:
        return tl.inline_asm_elementwise(text, registers, words, (tl.bfloat16,) * 16, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(text, registers, words, (tl.bfloat16,) * 32, is_pure=True, pack=1)


@triton.jit
def _as_fp16(words, BITS: tl.constexpr, RUNS: tl.constexpr):
    text: tl.constexpr = assembly(BITS, False, RUNS)
    registers: tl.constexpr = constraints(BITS, RUNS)
    if BITS == 4:
        return tl.inline_asm_elementwise(text, registers, words, (tl.float16,) * 8, is_pure=True, pack=1)
    elif BITS == 2:
        return tl.inline_asm_elementwise(text, registers, words, (tl.float16,) * 16, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(text, registers, words, (tl.float16,) * 32, is_pure=True, pack=1)


@triton.jit
def _pairs(values, FIRST: tl.constexpr, EVERY: tl.constexpr, COUNT: tl.constexpr):
    """Join every EVERY-th pair from FIRST on, COUNT of them: [BN, WORDS, 2], and one more 2 for each halving."""
    if COUNT == 1:
        return tl.join(values[2 * FIRST], values[2 * FIRST + 1])
    else:
        even = _pairs(values, FIRST, 2 * EVERY, COUNT // 2)
        return tl.join(even, _pairs(values, FIRST + EVERY, 2 * EVERY, COUNT // 2))


@triton.jit
def run_of(values, FIRST: tl.constexpr, COUNT: tl.constexpr, BN: tl.constexpr, WORDS: tl.constexpr):
    """Pairs FIRST .. FIRST + COUNT - 1 of `unpack`'s result: COUNT * 2 * WORDS inputs in a row, [BN, that many]."""
    joined = _pairs(values, FIRST, 1, COUNT)
    if COUNT == 1:
        return tl.reshape(joined, (BN, 2 * WORDS))
    elif COUNT == 2:
        return tl.reshape(tl.permute(joined, (0, 3, 1, 2)), (BN, 4 * WORDS))
    elif COUNT == 4:
        return tl.reshape(tl.permute(joined, (0, 3, 4, 1, 2)), (BN, 8 * WORDS))
    elif COUNT == 8:
        return tl.reshape(tl.permute(joined, (0, 3, 4, 5, 1, 2)), (BN, 16 * WORDS))
    else:
        return tl.reshape(tl.permute(joined, (0, 3, 4, 5, 6, 1, 2)), (BN, 32 * WORDS))
