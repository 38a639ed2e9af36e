"""Checks of the elementwise kernels against torch's own operations: python elementwise_triton_checks.py cpu|cuda.

On "cpu" TRITON_INTERPRET=1 must be set; the kernels are then put in the place of the reference by hand. Exits non-zero
at the first difference.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from unittest.mock import patch

import torch

import peqa_kernels.elementwise as ops
from peqa_kernels.elementwise import gpu
from peqa_kernels.elementwise.gpu_check import DecoderSizes, Numbers, agrees, pairs

SIZES = [
    DecoderSizes(576, 1536, 9, 3, 64, head_norms=False),
    DecoderSizes(1536, 11008, 4, 1, 80, head_norms=True),
    DecoderSizes(64, 160, 3, 3, 24, head_norms=True),
    DecoderSizes(4096, 2048, 2, 2, 256, head_norms=False),
    DecoderSizes(1000, 72, 5, 1, 96, head_norms=False),
]
EPS = 1e-5


def on(device: str) -> list[torch.dtype]:
    """The interpreter cuts numbers off where they should be rounded to bfloat16."""
    if device == "cuda":
        return [torch.float16, torch.bfloat16, torch.float32]
    return [torch.float16, torch.float32]


def check_numbers(device: str) -> int:
    """Every op at every size; in fp16 rotations and norms differ in no bit from torch on the CPU."""
    count = 0
    for dtype in on(device):
        for sizes in SIZES:
            assert agrees(sizes, dtype, torch.device(device)), (sizes, dtype)
            count += 1
    if device == "cpu":
        for sizes in SIZES:
            found = pairs(sizes, Numbers(torch.float16, torch.device(device)))
            off = [float((got != want).float().mean()) for got, want in found]
            assert all(share < 1e-3 for share in off), (sizes, off)
            count += 1
    return count


def check_the_check(device: str) -> int:
    """What rounds otherwise is found out."""
    sizes, dtype, where = SIZES[0], torch.float16, torch.device(device)

    def unrounded(x, weight, eps):
        return torch.nn.functional.rms_norm(x.float(), x.shape[1:], weight.float(), eps).to(x.dtype)

    def silu(gate_up):
        gate, up = gate_up.float().chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)

    for name, wrong in (("rms_norm", unrounded), ("silu_mul", silu)):
        with patch(f"peqa_kernels.elementwise.gpu_check.{name}", wrong):
            assert not agrees(sizes, dtype, where), name
    return 2


def check_rows(device: str) -> int:
    """A row alone gives the bits that it gives among others; what nobody writes stays, NaN stays in its row."""
    numbers = Numbers(torch.float16, torch.device(device))
    x, y, weight = numbers.draw(7, 1000), numbers.draw(7, 1000), numbers.draw(1000)
    x[3] = float("nan")
    total, normed = ops.add_rms_norm(x, y, weight, EPS)
    gates = ops.silu_mul(x)
    heads, kv_heads, d = 3, 1, 80
    qkv, norms = numbers.draw(7, (heads + 2 * kv_heads) * d), numbers.draw(2, d)
    cosines, sines = numbers.draw(9, d // 2), numbers.draw(9, d // 2)
    positions = torch.tensor([0, 8, 1, 2, 3, 4, 5], device=device)
    slots = torch.tensor([3, -1, 9, 0, -1, 7, 11], device=device)

    def turned(rows: slice) -> list[torch.Tensor]:
        caches = [torch.full((3, 4, kv_heads, d), 7.0, device=device).half() for _ in range(2)]
        angles = (cosines, sines, positions[rows])
        q = ops.rotate_and_write(qkv[rows], *angles, *caches, slots[rows], norms, EPS)
        return [q, *(cache.view(-1, kv_heads, d) for cache in caches)]

    together = turned(slice(0, 7))
    for i in range(7):
        row = slice(i, i + 1)
        alone = ops.add_rms_norm(x[row], y[row], weight, EPS)
        for got, want in zip(
            (*alone, ops.silu_mul(x[row])), (total[row], normed[row], gates[row]), strict=True
        ):
            assert torch.equal(got.view(torch.int16), want.view(torch.int16)), i
            assert bool(got.isnan().any()) == (i == 3)
        q, *written = turned(row)
        assert torch.equal(q, together[0][row])
        slot = int(slots[i])
        for cache, whole in zip(written, together[1:], strict=True):
            others = torch.arange(12) != slot
            assert (cache[others] == 7.0).all()
            assert slot < 0 or torch.equal(cache[slot], whole[slot])
    untouched = [slot for slot in range(12) if slot not in slots.tolist()]
    assert all((cache[untouched] == 7.0).all() for cache in together[1:])
    return 7


def check_no_rows(device: str) -> int:
    """Nothing in, nothing out."""
    x, weight = torch.zeros(0, 64, device=device), torch.ones(64, device=device)
    assert ops.rms_norm(x, weight, EPS).shape == (0, 64)
    assert ops.silu_mul(x).shape == (0, 32)
    return 1


if __name__ == "__main__":
    where = sys.argv[1]
    with ExitStack() as stack:
        if where == "cpu":
            for name in ("rms_norm", "add_rms_norm", "rotate_and_write", "silu_mul"):
                kernel = getattr(gpu, f"{name}_gpu")
                reference = getattr(ops, f"{name}_reference")
                call = lambda x, *more, k=kernel, r=reference: k(x, *more) if len(x) else r(x, *more)  # noqa: E731
                stack.enter_context(patch.object(ops, f"{name}_reference", call))
        checks = (check_numbers, check_the_check, check_rows, check_no_rows)
        print(f"{sum(check(where) for check in checks)} checks passed")
