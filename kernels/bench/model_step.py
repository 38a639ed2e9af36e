"""The linears and the head of one step of a small model, in our form and in those of the peers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from peqa_kernels import native
from peqa_kernels.bench.timing import Call, Timer, Way
from peqa_kernels.bench.weights import (
    Int4Pack,
    Shape,
    channel_bank,
    offered,
    prepared,
    random_weight,
    task_rows,
)
from peqa_kernels.native import kv_layout
from peqa_kernels.native.decoder import KINDS, DecoderLayer, DecoderLinear, DecoderSpec, NativeDecoder
from peqa_kernels.quant_matmul import LinearBank, PreparedWeight, lay_together, quant_matmul
from peqa_kernels.quant_matmul.cpu import NativeCpu

CPU = torch.device("cpu")
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Model:
    """A small model of the Llama family: the linears of a layer (q/k/v, out, gate/up, down), and its head."""

    name: str
    linears: tuple[Shape, Shape, Shape, Shape]
    layers: int
    kv_heads: int
    head: Shape

    @property
    def parts(self) -> list[Shape]:
        """Every linear of one step, in order."""
        return [*self.linears] * self.layers + [self.head]

    @property
    def d(self) -> int:
        """Width of an attention head."""
        return self.linears[0].segments[1] // self.kv_heads


class ModelStep:
    """The linears of one step; one call is a whole step.

    Ours run as they do in a server: inside a decoder's step, one call into the C library, whose own clock tells what
    its linears and its head take. Where the library is not there they are called one after the other, as the peers are.
    """

    def __init__(self, model: Model, span: int, tasks: int) -> None:
        """Random weights, as many steps' as take `span` bytes, with banks of `tasks` tasks."""
        self._model = model
        parts = model.parts
        turns = -(-span // sum(shape.weight_bytes for shape in parts))  # steps until a weight comes again
        codes = {shape: random_weight(shape, CPU) for shape in {*parts}}
        self._weights = [
            [prepared(codes[shape], shape.segments, 1)[0] for shape in parts] for _ in range(turns)
        ]
        for weights in self._weights:
            lay_together(weights)
        self._banks = [channel_bank(shape, tasks, CPU) for shape in parts[:-1]]
        self._bf16 = [torch.randn(s.out_features, s.in_features).bfloat16() for s in parts]
        self._packs = {
            shape: Int4Pack(shape, CPU, 0, count=turns * model.layers) for shape in {*model.linears}
        }
        self._caches: dict[int, tuple[Tensor, Tensor]] = {}
        head = model.head
        self._int8_head = torch.randint(-128, 128, (head.out_features, head.in_features), dtype=torch.int8)
        self._int8_scale = torch.rand(head.out_features).bfloat16()

    @property
    def weights(self) -> list[PreparedWeight]:
        """All of them."""
        return [weight for turn in self._weights for weight in turn]

    def ours(self, rows: int, tasks: int, *, head: bool = True) -> Way:
        """A step per turn; the head belongs to no task."""
        row = task_rows(rows, tasks, CPU)
        if native.load() is not None:
            return self._decoders(rows, row, head)
        x = self._inputs(rows, torch.float32)

        def step(weights: list[PreparedWeight]) -> None:
            for weight, bank in zip(weights, self._banks, strict=False):
                quant_matmul(x[weight.in_features], weight, bank=bank, row=row)
            if head:
                quant_matmul(x[self._model.head.in_features], weights[-1])

        return Way("ours", [partial(step, weights) for weights in self._weights])

    def _decoders(self, rows: int, row: Tensor, head: bool) -> Way:
        """Each row is the first token of a sequence of its own: attention has little to do, and is not counted."""
        caches = self._caches_for(rows)
        decoders = [_decoder(self._model, weights, self._banks, caches, head) for weights in self._weights]
        number = torch.arange(rows)
        starts = torch.arange(rows + 1, dtype=torch.int32)
        step = (
            *(
                number % 2,
                torch.zeros_like(number),
                number * BLOCK_SIZE,
                number,
            ),  # ids, positions, slots, outputs
            *(starts[:-1, None].contiguous(), starts, torch.ones(rows, dtype=torch.int32)),
            *(row, None),
        )
        counted = [KINDS.index("matmul"), KINDS.index("head")]
        per_tick = decoders[0].seconds_per_tick()

        def clock() -> float:
            return per_tick * sum(decoder.ticks()[kind] for decoder in decoders for kind in counted)

        return Way("ours", [partial(decoder.run, *step) for decoder in decoders], clock)

    def _caches_for(self, rows: int) -> tuple[Tensor, Tensor]:
        """Room for `rows` sequences of one token, kept: a decoder only points to it. All layers write to the same."""
        if rows not in self._caches:
            kv_heads, d = self._model.kv_heads, self._model.d
            size = (rows, BLOCK_SIZE, kv_heads, d, d)
            self._caches[rows] = kv_layout.new_caches(kv_layout.HEADS_FIRST, *size, torch.zeros)
        return self._caches[rows]

    def dense(self, rows: int, *, head: bool = True) -> list[Call]:
        """F.linear in bf16."""
        x = self._inputs(rows, torch.bfloat16)
        weights = self._bf16 if head else self._bf16[:-1]

        def step() -> None:
            for weight in weights:
                F.linear(x[weight.shape[1]], weight)

        return [step]

    def int4pack(self, rows: int, timer: Timer) -> list[Call]:
        """torch's int4 op; its head, which must keep 8 bits, is whichever of torch's two ways is faster here."""
        x = self._inputs(rows, torch.bfloat16)
        linears = [self._packs[shape].calls(x[shape.in_features]) for shape in self._model.linears]
        into = x[self._model.head.in_features]
        int8pack = partial(torch.ops.aten._weight_int8pack_mm, into, self._int8_head, self._int8_scale)
        ways = [
            *offered("int8pack", lambda: [int8pack]),
            Way("linear", [partial(F.linear, into, self._bf16[-1])]),
        ]
        times = timer.compare(f"{rows} rows, heads", *ways)
        head = min(ways, key=lambda way: times[way.name].median).calls[0]

        layers = list(zip(*linears, strict=True))

        def step(turn: int) -> None:
            for layer in layers[turn * self._model.layers :][: self._model.layers]:
                for call in layer:
                    call()
            head()

        return [partial(step, turn) for turn in range(len(self._weights))]

    def _inputs(self, rows: int, dtype: torch.dtype) -> dict[int, Tensor]:
        """Activations [rows, K] by K."""
        return {k: torch.randn(rows, k).to(dtype) for k in {shape.in_features for shape in self._model.parts}}


def _decoder(
    model: Model,
    weights: list[PreparedWeight],
    banks: list[LinearBank],
    caches: tuple[Tensor, Tensor],
    head: bool,
) -> NativeDecoder:
    """A decoder of these weights."""
    ops = native.load()
    assert ops is not None
    linears = [_linear(weight) for weight in weights]
    hidden = model.head.in_features
    ones = torch.ones(hidden)
    fours = zip(*(iter(linears[:-1]),) * 4, strict=True)
    layers = tuple(DecoderLayer(qkv, out, gate_up, down, ones, ones) for qkv, out, gate_up, down in fours)
    d = model.d
    spec = DecoderSpec(
        layers=layers,
        embedding=torch.randn(2, hidden),
        norm=ones,
        head=linears[-1] if head else None,
        cosines=torch.ones(1, d // 2),
        sines=torch.zeros(1, d // 2),
        heads=model.linears[0].segments[0] // d,
        kv_heads=model.kv_heads,
        d=d,
        eps=1e-5,
        scaling=d**-0.5,
    )
    decoder = NativeDecoder(ops, spec)
    for layer in range(model.layers):
        decoder.bind_caches(layer, *caches)
        for linear in range(4):
            decoder.bind_bank(layer, linear, banks[4 * layer + linear])
    return decoder


def _linear(weight: PreparedWeight) -> DecoderLinear:
    assert isinstance(weight.impl, NativeCpu)
    return DecoderLinear(weight.impl.packed)
