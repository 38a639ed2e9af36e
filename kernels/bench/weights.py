"""Random weights, as many as outlast the caches, in our layout and in those of the kernels they are held against."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from peqa_kernels.bench.timing import Call, Way
from peqa_kernels.packing import packed_width
from peqa_kernels.quant_matmul import (
    LinearBank,
    PreparedWeight,
    QuantizedWeight,
    lay_together,
    prepare,
    quant_matmul,
)

if TYPE_CHECKING:
    from peqa_kernels.quant_matmul.gpu_layout import Layout

PEER_GROUPS = (256, 128, 64, 32)  # group sizes of torch's int4 ops, the cheapest first
INNER_K_TILES = 8  # of the CUDA op's layout: its widest loads


@dataclass(frozen=True)
class Shape:
    """One linear, fused siblings as segments."""

    segments: tuple[int, ...]
    in_features: int
    bits: int = 4
    group_size: int | None = None  # None: per channel
    fractional: bool = False  # zero points between the codes, as GGUF's Q4_1 has them
    halves: bool = False  # scales that fp16 holds exactly, the base's as quantizers write them and the tasks'

    @property
    def out_features(self) -> int:
        """N."""
        return sum(self.segments)

    @property
    def groups(self) -> int:
        """G."""
        return 1 if self.group_size is None else self.in_features // self.group_size

    @property
    def name(self) -> str:
        """For row names: N x K."""
        return f"{self.out_features}x{self.in_features}"

    @property
    def format(self) -> str:
        """For row names: bits and grouping."""
        return f"int{self.bits}-" + ("channel" if self.group_size is None else f"g{self.group_size}")

    @property
    def weight_bytes(self) -> int:
        """Codes, group scales and (where they are not the middle code) zero points, as they are kept."""
        side = self.out_features * self.groups * self.scale_bytes
        return self.out_features * packed_width(self.in_features, self.bits) + side * (
            2 if self.fractional else 1
        )

    @property
    def scale_bytes(self) -> int:
        """Of one scale."""
        return 2 if self.halves else 4

    def step_bytes(self, rows: int, tasks: int, *, activation: int, group_sets: bool = False) -> int:
        """Bytes that a call moves at least; `activation`: bytes of one input or output number."""
        task = self.scale_bytes * self.out_features * (self.groups if group_sets else 1)
        return self.weight_bytes + tasks * task + rows * (self.in_features + self.out_features) * activation

    def flops(self, rows: int) -> float:
        """2 M N K."""
        return 2.0 * rows * self.out_features * self.in_features


def random_weight(shape: Shape, device: torch.device) -> QuantizedWeight:
    """Random codes and scales; zero points are the middle code, or lie within one of it."""
    n, k = shape.out_features, shape.in_features
    qweight = torch.randint(0, 256, (n, packed_width(k, shape.bits)), dtype=torch.uint8, device=device)
    scales = torch.rand(n, shape.groups, device=device) * 0.01 + 0.001
    if shape.halves:
        scales = scales.half().float()
    zeros = torch.full_like(scales, float(1 << (shape.bits - 1)))
    if shape.fractional:
        zeros += torch.rand_like(zeros) - 0.5
        if shape.halves:
            zeros = (scales * zeros).half().float() / scales
    return QuantizedWeight(qweight, scales, zeros, shape.bits, k)


def layout(shape: Shape) -> Layout:
    """How a GPU's kernel cuts such a weight up."""
    from peqa_kernels.quant_matmul.gpu_layout import layout_of

    empty = partial(torch.empty, device="meta")
    qweight = empty((shape.out_features, packed_width(shape.in_features, shape.bits)), dtype=torch.uint8)
    scales = empty((shape.out_features, shape.groups))
    return layout_of(QuantizedWeight(qweight, scales, scales, shape.bits, shape.in_features), shape.segments)


def rotation(shape: Shape, device: torch.device, span: int) -> list[PreparedWeight]:
    """Weights that take `span` bytes together, two at least. Their codes are the same, their memory is not."""
    return prepared(random_weight(shape, device), shape.segments, copies(shape.weight_bytes, span))


def prepared(weight: QuantizedWeight, segments: tuple[int, ...], count: int) -> list[PreparedWeight]:
    """Lay a weight out `count` times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # many small operations: on busy cores each barrier between two threads costs more
    try:
        made = [prepare(weight, segments=segments) for _ in range(count)]
    finally:
        torch.set_num_threads(threads)
    lay_together(made)  # as a server does
    return made


def dense_rotation(shape: Shape, device: torch.device, span: int) -> list[Tensor]:
    """Random bf16 weights [N, K] that take `span` bytes together, two at least."""
    size = (shape.out_features, shape.in_features)
    return [torch.randn(size, device=device).bfloat16() for _ in range(copies(2 * size[0] * size[1], span))]


def copies(size: int, span: int) -> int:
    """How many things of `size` bytes fill `span`."""
    return max(2, -(-span // size))


def channel_bank(shape: Shape, tasks: int, device: torch.device) -> LinearBank:
    """Output scales around 1 for the base and `tasks` tasks."""
    out = 1 + 0.1 * torch.randn(tasks + 1, shape.out_features, device=device)
    out[0] = 1
    return LinearBank(shape.segments, out.half() if shape.halves else out)


def group_bank(shape: Shape, tasks: int, device: torch.device) -> LinearBank:
    """Output scales of the base only, group scales around 1 for the base and `tasks` tasks."""
    group = 1 + 0.1 * torch.randn(tasks + 1, shape.groups, shape.out_features, device=device)
    group[0] = 1
    if shape.halves:
        group = group.half()
    return LinearBank(shape.segments, torch.ones_like(group[:1, 0]), None, group)


def task_rows(rows: int, tasks: int, device: torch.device) -> Tensor:
    """Bank row of each activation, int32 [rows]: `tasks` tasks in turn, as they arrive in a mixed batch."""
    return (1 + torch.arange(rows, device=device) % tasks).to(torch.int32)


def ours(
    x: Tensor,  # [M, K]
    weights: list[PreparedWeight],
    banks: list[LinearBank],
    row: Tensor | None = None,
    group_row: Tensor | None = None,
) -> list[Call]:
    """One call of quant_matmul per weight, each with its own bank as in a model."""

    def call(weight: PreparedWeight, bank: LinearBank) -> Call:
        return lambda: quant_matmul(x, weight, bank=bank, row=row, group_row=group_row)

    return [call(weight, bank) for weight, bank in zip(weights, banks, strict=True)]


def dense(x: Tensor, weights: list[Tensor]) -> list[Call]:
    """One call of F.linear per bf16 weight [N, K]."""

    def call(weight: Tensor) -> Call:
        return lambda: F.linear(x, weight)

    return [call(weight) for weight in weights]


def offered(name: str, make: Callable[[], list[Call]]) -> list[Way]:
    """A peer as a way to compute; none, with a warning that says why, where torch does not offer it on this machine.

    `make` gives its calls, one of which is tried.
    """
    try:
        calls = make()
        calls[0]()
    except (
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"{name} is left out: {type(error).__name__}: {reason}", RuntimeWarning, stacklevel=2)
        return []
    return [Way(name, calls)]


class Int4Pack:
    """torch's own int4 matmul, packed when first called for: `_weight_int4pack_mm` or its CPU form."""

    def __init__(self, shape: Shape, device: torch.device, span: int, *, count: int = 0) -> None:
        """`count` random weights, or as many as fill `span` bytes.

        A weight that is per channel gets the widest groups that the op takes.
        """
        n, k = shape.out_features, shape.in_features
        self._sizes, self._device = (n, k), device
        self._count = count or copies(n * k // 2, span)
        self.group = shape.group_size or next(g for g in PEER_GROUPS if k % g == 0)
        self._cpu = device.type == "cpu"
        self._side = torch.rand(k // self.group, n, 2, device=device).bfloat16()  # scale and offset

    def calls(self, x: Tensor) -> list[Call]:  # x: bf16 [M, K]
        """One call per weight."""
        op = torch.ops.aten._weight_int4pack_mm_for_cpu if self._cpu else torch.ops.aten._weight_int4pack_mm

        def call(packed: Tensor) -> Call:
            return lambda: op(x, packed, self.group, self._side)

        return [call(packed) for packed in self._packed]

    @cached_property
    def _packed(self) -> list[Tensor]:
        return [self._pack(*self._sizes) for _ in range(self._count)]

    def _pack(self, n: int, k: int) -> Tensor:
        if self._cpu:
            codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
            packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, INNER_K_TILES)
            return packed
        pairs = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=self._device)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_K_TILES)
        return packed
