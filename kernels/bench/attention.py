"""Decode attention over long sequences: against the bytes of its keys and values, and the cost of equal bits.

Runs on any device; the mode that it prices exists on a GPU only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from peqa_kernels.bench.case import Case
from peqa_kernels.bench.machine import Machine
from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Call, Timer, Way
from peqa_kernels.paged_attention import AttentionPlan, paged_attention

BLOCK = 16


@dataclass(frozen=True)
class AttentionShape:
    """Sequences that decode one token each over `context` keys, and the layer's heads."""

    sequences: int
    context: int
    heads: int = 32
    kv_heads: int = 8
    d: int = 128

    @property
    def name(self) -> str:
        """For row names."""
        return f"{self.sequences}-sequences-{self.context}-keys"


SHAPES = (AttentionShape(1, 8192), AttentionShape(32, 2048))


def cases(shapes: tuple[AttentionShape, ...]) -> list[Case]:
    """A case per shape."""
    return [Case(f"gpu attention {shape.name}", partial(_decode, shape)) for shape in shapes]


def _decode(shape: AttentionShape, machine: Machine, timer: Timer) -> list[Row]:
    ways = [
        Way(name, [_call(shape, machine.device, invariant=name == "invariant")])
        for name in ("plain", "invariant")
    ]
    times = timer.compare(f"attention {shape.name}", *ways)
    keys = shape.sequences * shape.context
    moved = 2 * 2 * keys * shape.kv_heads * shape.d  # keys and values, bf16
    flops = 4.0 * keys * shape.heads * shape.d
    facts = {"rows": shape.sequences, **machine.facts(times["plain"].median, moved, flops)}
    cost = times["invariant"].median / times["plain"].median
    name = f"gpu/attention/decode/{shape.name}"
    return [
        Row(f"{name}/of-floor", facts["of_floor"], "x", ">=", None, facts),
        Row(f"{name}/cost-of-equal-bits", cost, "x", "<=", None, facts),
    ]


def _call(shape: AttentionShape, device: torch.device, *, invariant: bool) -> Call:
    """Attention over blocks of its own: a whole cache of them outlasts the L2 for all but small shapes."""
    width = -(-shape.context // BLOCK)
    size = (shape.sequences * width, BLOCK, shape.kv_heads, shape.d)
    keys, values = (torch.randn(size, device=device).bfloat16() for _ in range(2))
    q = torch.randn(shape.sequences, shape.heads, shape.d, device=device).bfloat16()
    if device.type == "cpu":
        q, keys, values = q.float(), keys.float(), values.float()
    ints = partial(torch.arange, dtype=torch.int32, device=device)
    tables = ints(shape.sequences * width).view(shape.sequences, width)
    starts = ints(shape.sequences + 1)
    lengths = torch.full((shape.sequences,), shape.context, dtype=torch.int32, device=device)
    plan = AttentionPlan(max_new=1, max_len=shape.context, invariant=invariant)
    return lambda: paged_attention(q, keys, values, tables, starts, lengths, scaling=shape.d**-0.5, plan=plan)
