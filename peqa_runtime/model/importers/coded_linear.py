"""One linear of a foreign checkpoint: its tensors by name, and the checks that every layout needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from peqa_kernels.packing import pack_codes
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model.base_checkpoint import PER_CHANNEL, Precision

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class CodedLinear:
    """The tensors `<name>.<leaf>` of a linear [N, K] of the model; `shape` and `dtype` read headers only."""

    name: str
    out_features: int
    in_features: int
    handles: Mapping[str, Any]

    def __contains__(self, leaf: str) -> bool:
        """Whether there is such a tensor."""
        return f"{self.name}.{leaf}" in self.handles

    def shape(self, leaf: str) -> tuple[int, ...]:
        """Shape of a tensor; raises `InvalidCheckpoint` when it is missing."""
        return tuple(self._slice(leaf).get_shape())

    def dtype(self, leaf: str) -> str:
        """Dtype of a tensor, as safetensors spells it."""
        return str(self._slice(leaf).get_dtype())

    def tensor(self, leaf: str) -> Tensor:
        """A tensor as it is in the file."""
        self._slice(leaf)
        tensor: Tensor = self.handles[f"{self.name}.{leaf}"].get_tensor(f"{self.name}.{leaf}")
        return tensor

    def _slice(self, leaf: str) -> Any:
        if leaf not in self:
            raise InvalidCheckpoint(f"the checkpoint is incomplete: {self.name}.{leaf} is missing")
        return self.handles[f"{self.name}.{leaf}"].get_slice(f"{self.name}.{leaf}")

    def need(self, leaf: str, shape: tuple[int, ...], dtype: str | None = None) -> None:
        """Raise `InvalidCheckpoint` when a tensor has another shape, or another dtype than the one named."""
        found = (self.shape(leaf), self.dtype(leaf))
        if found[0] != shape or (dtype or found[1]) != found[1]:
            raise InvalidCheckpoint(
                f"{self.name}.{leaf} must be {dtype or 'floats'} {list(shape)}, not {found[1]} {list(found[0])}"
            )

    def refuse(self, reason: str) -> InvalidCheckpoint:
        """The error for this linear, to be raised."""
        return InvalidCheckpoint(f"{self.name}: {reason}")

    def precision(self, bits: int, groups: int) -> Precision:
        """The precision of `groups` groups; raises `InvalidCheckpoint` when they do not divide the inputs."""
        if bits not in BITS:
            raise self.refuse(f"{bits} bits cannot be imported; {', '.join(map(str, BITS))} can")
        if groups < 1 or self.in_features % groups:
            raise self.refuse(
                f"{groups} groups do not divide {self.in_features} inputs; groups of one size can be imported"
            )
        return Precision(bits, PER_CHANNEL if groups == 1 else self.in_features // groups)

    def weight(self, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> QuantizedWeight:
        """Codes uint8 [N, K], scales and zeros [N, G] of any float dtype, as a base has them.

        Raises `InvalidCheckpoint` for a scale or zero that is no finite number.
        """
        scales, zeros = (part.to(torch.float32).contiguous() for part in (scales, zeros))
        if not bool(torch.isfinite(scales).all() and torch.isfinite(zeros).all()):
            raise self.refuse("its scales or zeros hold NaN or infinity; the file is damaged")
        return QuantizedWeight(pack_codes(codes, bits), scales, zeros, bits, self.in_features)

    def check_groups_in_order(self, leaf: str, groups: int) -> None:
        """Raise `InvalidCheckpoint` when input k is not of group k // group size: inputs were sorted for GPTQ."""
        if leaf not in self:
            return
        self.need(leaf, (self.in_features,))
        in_order = torch.arange(self.in_features) // (self.in_features // groups)
        if not torch.equal(self.tensor(leaf).to(torch.int64), in_order):
            raise self.refuse(
                f"its {leaf} is permuted (desc_act, act-order without static groups): the inputs of a group lie "
                "scattered, which a base cannot hold; take a checkpoint made with desc_act=false, or quantize the "
                "16-bit model with `peqa quantize --method gptq`"
            )


class Layout(Protocol):
    """How one kind of checkpoint stores its linears."""

    @property
    def label(self) -> str:
        """Its name."""

    @property
    def marker(self) -> str:
        """The leaf that holds the codes."""

    @property
    def leaves(self) -> frozenset[str]:
        """All leaves that belong to the codes."""

    def precision(self, linear: CodedLinear) -> Precision:
        """Bits and groups, from shapes; raises `InvalidCheckpoint` when they cannot be imported."""

    def read(self, linear: CodedLinear) -> QuantizedWeight:
        """The codes, scales and zeros as they are."""
