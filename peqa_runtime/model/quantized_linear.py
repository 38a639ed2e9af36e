"""Modules over integer codes: linear, embedding, tied head. Codes, scales and zeros are frozen Parameters.

(Parameters, not buffers: DDP re-broadcasts buffers at every step.) Scales and zeros stay fp32 whatever dtype the
model is cast to; activations decide the dtype of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from peqa_kernels.packing import packed_width, unpack_codes
from peqa_kernels.quant_matmul import PreparedWeight, prepare, quant_matmul
from peqa_kernels.quant_matmul.backward import scaled_linear
from peqa_kernels.quant_matmul.weight import LinearBank, QuantizedWeight
from peqa_runtime.core import ScaleKind
from peqa_runtime.errors import UnsupportedModel


@dataclass
class StepRows:
    """Which bank row each token of the current step uses; one per engine, set before each forward.

    `row` int32 [tokens] for output and input scales, `group_row` int32 [tokens] for group scales; None = the base.
    """

    row: Tensor | None = None
    group_row: Tensor | None = None


@dataclass
class TunedParts:
    """Which set of trainable scales each row of the next forward is under; one per model in training.

    `parts` holds (set, rows) in the order of the rows, set None being the base; empty means that all rows are under
    set 0. Set before each forward, and left as it is until its backward is done (checkpointing computes again).
    """

    parts: tuple[tuple[int | None, int], ...] = ()


class TunedScales(nn.Module):
    """One task's trainable scales of one linear, fp32 and relative to the base, in the shapes of a scale set."""

    out_scale: nn.Parameter | None  # float32 [N]
    in_scale: nn.Parameter | None  # float32 [K]
    group_scale: nn.Parameter | None  # float32 [N, G]

    def __init__(self, kind: ScaleKind, base_scales: Tensor, in_features: int) -> None:
        """All ones, which is the base. `base_scales` [N, G] gives shapes and device."""
        super().__init__()
        shapes: dict[str, tuple[int, ...]] = {
            "out_scale": (base_scales.shape[0],) if kind in ("channel", "channel+input") else (),
            "in_scale": (in_features,) if kind == "channel+input" else (),
            "group_scale": tuple(base_scales.shape) if kind == "group" else (),
        }
        for name, shape in shapes.items():
            ones = nn.Parameter(torch.ones(shape, device=base_scales.device)) if shape else None
            self.register_parameter(name, ones)


class _Codes(nn.Module):
    """Codes [N, K] with scales and zeros [N, G], as files hold them. Empty until loaded."""

    qweight: nn.Parameter  # uint8 [N, ceil(K * bits / 8)]
    scales: nn.Parameter  # float32 [N, G]
    zeros: nn.Parameter  # float32 [N, G]

    def __init__(self, rows: int, columns: int, bits: int, group_size: int) -> None:
        super().__init__()
        self.bits = bits
        self.group_size = columns if group_size == -1 else group_size
        assert columns % self.group_size == 0, (columns, group_size)
        groups = columns // self.group_size
        self.qweight = _frozen(torch.zeros(rows, packed_width(columns, bits), dtype=torch.uint8))
        self.scales = _frozen(torch.ones(rows, groups, dtype=torch.float32))
        self.zeros = _frozen(torch.zeros(rows, groups, dtype=torch.float32))
        self._columns = columns
        self._prepared: PreparedWeight | None = None
        self.serving = False

    def weight_codes(self) -> QuantizedWeight:
        """The frozen weight, in the form that files and kernels share."""
        return QuantizedWeight(self.qweight.data, self.scales.data, self.zeros.data, self.bits, self._columns)

    def prepare(self) -> PreparedWeight:
        """Lay the codes out for their device, once; called by the first forward if by nobody else."""
        if self._prepared is None:
            self._prepared = prepare(self.weight_codes(), segments=self._segments())
        return self._prepared

    def serve(self) -> None:
        """`prepare`, and keep nothing beside what the kernels read: there is no room for a model twice.

        Codes, scales and zeros have only their shapes from now on (the device "meta"): whoever wants them loads the
        base anew. On a CPU products round activations to 16 bits, as the fast kernels do; else fp32 stays fp32.
        """
        self.serving = True
        if self.prepare().release():
            for name in ("qweight", "scales", "zeros"):
                setattr(self, name, _frozen(getattr(self, name).data.to("meta")))

    def exact(self, x: Tensor) -> bool:
        """Whether a product with x is to be one of floats: outside of a server, in fp32 on a CPU."""
        return not self.serving and x.dtype == torch.float32 and x.device.type == "cpu"

    def _segments(self) -> tuple[int, ...]:
        return (self.scales.shape[0],)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves follow the model; a change of dtype does not touch codes, scales, zeros and tuned scales."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype:
                self._cast(moved.dtype)
                return tensor.to(moved.device)
            return moved

        self._prepared = None
        return super()._apply(move, recurse)

    def _cast(self, dtype: torch.dtype) -> None:
        """The model was cast to `dtype`."""


class QuantizedLinear(_Codes):
    """y = x W^T + b with W = scales * (codes - zeros), under the scales of each row's task.

    Three ways to run: base only (as loaded), rows of a scale bank (`attach`, for serving) or sets of trainable
    scales (`tune`, for training and evaluation in fp32). `sizes` are the output sizes of fused siblings.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        bias: bool = False,
        *,
        sizes: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(out_features, in_features, bits, group_size)
        self.in_features = in_features
        self.out_features = out_features
        self.sizes = (out_features,) if sizes is None else sizes
        assert sum(self.sizes) == out_features
        self.bias = _frozen(torch.zeros(out_features)) if bias else None
        self.tuned: nn.ModuleList | None = None
        self._parts = TunedParts()
        self._bank: LinearBank | None = None
        self._rows: StepRows | None = None

    def attach(self, bank: LinearBank, rows: StepRows) -> None:
        """From now on every token runs under the bank row that `rows` names at that moment."""
        assert bank.segments == self.sizes, (bank.segments, self.sizes)
        self._bank, self._rows = bank, rows
        self.serving = True

    @property
    def bank(self) -> LinearBank | None:
        """What `attach` was given."""
        return self._bank

    def tune(self, kind: ScaleKind | None, sets: int = 1, parts: TunedParts | None = None) -> None:
        """Create `sets` sets of trainable scales of `kind`, all ones (= the base); None removes them.

        `parts` says under which set each row of a forward is; without it all rows are under the first.
        """
        self.tuned = (
            nn.ModuleList(TunedScales(kind, self.scales, self.in_features) for _ in range(sets))
            if kind is not None
            else None
        )
        self._parts = parts or TunedParts()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in x.dtype."""
        prepared = self._prepared or self.prepare()
        rows = x.reshape(-1, self.in_features)
        if self.tuned is not None:
            y = self._under_tuned(rows, prepared)
        elif self.exact(x) or (x.requires_grad and torch.is_grad_enabled()):
            y = scaled_linear(_autocast(rows), prepared, self.bias)
        elif self._rows is None:
            y = quant_matmul(rows, prepared, bias=self.bias)
        else:
            step = self._rows
            y = quant_matmul(
                rows, prepared, bias=self.bias, bank=self._bank, row=step.row, group_row=step.group_row
            )
        return y.view(*x.shape[:-1], self.out_features)

    def _under_tuned(self, rows: Tensor, prepared: PreparedWeight) -> Tensor:
        """[M, N], each part of the rows [M, K] under its own set: its gradient reaches that set only."""
        parts = self._parts.parts or ((0, rows.shape[0]),)
        if sum(count for _, count in parts) != rows.shape[0]:
            raise UnsupportedModel(
                f"a linear was given {rows.shape[0]} rows where the batch has {sum(n for _, n in parts)} tokens: "
                "this model routes tokens, so its tasks must be tuned one at a time"
            )
        products: list[Tensor] = []
        for (index, _), part in zip(parts, rows.split([count for _, count in parts]), strict=True):
            scales: list[Tensor | None] = [None, None, None]
            if index is not None:
                assert self.tuned is not None
                own = cast(TunedScales, self.tuned[index])
                group = None if own.group_scale is None else own.group_scale.t()
                scales = [own.out_scale, own.in_scale, group]
            products.append(scaled_linear(_autocast(part), prepared, self.bias, *scales))
        return products[0] if len(products) == 1 else torch.cat(products)

    def extra_repr(self) -> str:
        """Sizes, for printing a model."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )

    def _segments(self) -> tuple[int, ...]:
        return self.sizes


class QuantizedEmbedding(_Codes):
    """A lookup table of codes: row t is scales[t] * (codes[t] - zeros[t]), exact in fp32, given in `dtype`."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, bits: int, group_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, bits, group_size)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.dtype = dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [...] -> [..., K]."""
        ids = token_ids.reshape(-1)
        codes = self.qweight[ids]
        if self.bits != 8:
            codes = unpack_codes(codes, self.bits, self.embedding_dim)
        grouped = codes.view(len(ids), -1, self.group_size)
        values = (grouped.to(torch.float32) - self.zeros[ids][..., None]) * self.scales[ids][..., None]
        return values.to(self.dtype).view(*token_ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Sizes, for printing a model."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group_size={self.group_size}"

    def _cast(self, dtype: torch.dtype) -> None:
        if dtype.is_floating_point:
            self.dtype = dtype


class TiedHead(nn.Module):
    """The output head that multiplies by its embedding's own codes: no second copy, no task scales."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        # Kept out of the module tree: the codes belong to the embedding, in the state dict and in every move.
        object.__setattr__(self, "embedding", embedding)
        self.in_features = embedding.embedding_dim
        self.out_features = embedding.num_embeddings

    embedding: QuantizedEmbedding

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., K] -> logits [..., vocab], in hidden.dtype."""
        prepared = self.embedding.prepare()
        rows = hidden.reshape(-1, self.in_features)
        if self.embedding.exact(hidden) or (hidden.requires_grad and torch.is_grad_enabled()):
            y = scaled_linear(_autocast(rows), prepared, None, None, None, None)
        else:
            y = quant_matmul(rows, prepared)
        return y.view(*hidden.shape[:-1], self.out_features)


def _autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on (training): cast here, backward multiplies in that dtype too."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
