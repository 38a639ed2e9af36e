"""Where the scale sets live on the device: one row per task, written in place.

Every tensor is allocated once and never replaced, so addresses stay valid (CUDA graphs hold them) and a swap is a
copy of one row. `out_scale` is there from the start; `in_scale` and `group_scale` are allocated for all linears
when the first set needs them (or at once, with `kinds`): `allocated` changes then, and whoever captured a graph
without them captures anew.

    out_scale   [rows, N]               row 0 and every unused row: ones
    in_scale    [rows, segments, K]     one segment per fused sibling
    group_scale [group_rows, G, N]      group row 0: ones

Not thread-safe, but for `arranged`: the engine's thread writes between two forwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from peqa_kernels.quant_matmul.weight import LinearBank
from peqa_runtime.core import ScaleKind
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.set_layout import SUFFIXES, SetLayout


class FusedLinearLike(Protocol):
    """What the bank needs to know of a launch: `peqa_runtime.core.FusedLinear` or anything with its fields."""

    @property
    def names(self) -> tuple[str, ...]:
        """Checkpoint names of the sibling linears, in order."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Their output sizes; the sum is N."""

    @property
    def in_features(self) -> int:
        """K."""

    @property
    def groups(self) -> int:
        """G, groups per row."""


class ScaleBank:
    """The device rows of all linears; `banks` is in the order of `linears`.

    `rows` and `group_rows` count row 0, which is the base. One task costs (sum of N) values of `dtype` in `out_scale`;
    values of another dtype are rounded to the nearest (around 1.0, float16 errs by at most 0.00049).
    """

    def __init__(
        self,
        linears: Sequence[FusedLinearLike],
        *,
        rows: int,
        group_rows: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kinds: Iterable[ScaleKind] = ("channel",),
    ) -> None:
        assert rows >= 1
        assert group_rows >= 1
        self.linears = tuple(linears)
        self.rows = rows
        self.group_rows = group_rows
        self.device = torch.device(device)
        self.dtype = dtype
        self.banks = [
            LinearBank(segments=tuple(linear.sizes), out_scale=self._ones(rows, sum(linear.sizes)))
            for linear in self.linears
        ]
        self._layouts: dict[ScaleKind, SetLayout] = {}  # in the order of the launches
        self._has_in_scale = False
        self._has_group_scale = False
        for kind in kinds:
            self._allocate(kind)

    @property
    def allocated(self) -> tuple[ScaleKind, ...]:
        """Kinds that have their tensors; it only ever grows."""
        kinds: list[ScaleKind] = ["channel"]
        if self._has_in_scale:
            kinds.append("channel+input")
        if self._has_group_scale:
            kinds.append("group")
        return tuple(kinds)

    @property
    def num_bytes(self) -> int:
        """Device memory of all rows, in bytes."""
        tensors = [t for b in self.banks for t in (b.out_scale, b.in_scale, b.group_scale) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def arranged(self, scale_set: ScaleSet) -> ScaleSet:
        """Return the set with its tensors in the order in which `write` needs them; the set itself when it is so.

        Done where a set comes into host memory, it leaves a write between two forwards with nothing but copies.
        """
        if scale_set.kind not in self._layouts:
            self._layouts[scale_set.kind] = self._layout(scale_set.layout)
        layout = self._layouts[scale_set.kind]
        if scale_set.layout is layout:
            return scale_set
        parts = scale_set.flat.split(scale_set.layout.sizes)
        index = {name: i for i, name in enumerate(scale_set.layout.names)}
        ordered = [parts[index[name]] for name in layout.names]
        return replace(scale_set, flat=torch.cat(ordered), layout=layout)

    @torch.no_grad()
    def write(self, row: int, group_row: int | None, scale_set: ScaleSet) -> None:
        """Copy `scale_set` into `row` (and `group_row`, for kind "group"); what the set does not have becomes 1."""
        assert 0 < row < self.rows, "row 0 is the base"
        self._allocate(scale_set.kind)
        flat = self.arranged(scale_set).flat
        if self.device.type != "cpu":  # one transfer; of one dtype, the copies are one launch
            flat = flat.to(self.device).to(self.dtype)
        if scale_set.kind == "group":
            assert group_row is not None
            assert 0 < group_row < self.group_rows, "group row 0 is the base"
            self.clear(row)
            rows = [b.group_scale[group_row] for b in self.banks if b.group_scale is not None]  # [G, N] each
            parts = flat.split([target.numel() for target in rows])
            sources = [part.view(target.shape[::-1]).t() for part, target in zip(parts, rows, strict=True)]
            torch._foreach_copy_(rows, sources)
            return
        rows = [bank.out_scale[row] for bank in self.banks]
        if scale_set.kind == "channel+input":
            rows += [bank.in_scale[row].view(-1) for bank in self.banks if bank.in_scale is not None]
        elif self._has_in_scale:
            for bank in self.banks:
                assert bank.in_scale is not None
                bank.in_scale[row].fill_(1)
        torch._foreach_copy_(rows, flat.split([target.numel() for target in rows]))

    @torch.no_grad()
    def clear(self, row: int, group_row: int | None = None) -> None:
        """Make `row` (and `group_row`, when given) ones again, as the base."""
        assert 0 < row < self.rows, "row 0 is the base"
        for bank in self.banks:
            bank.out_scale[row].fill_(1)
            if bank.in_scale is not None:
                bank.in_scale[row].fill_(1)
            if group_row and bank.group_scale is not None:
                bank.group_scale[group_row].fill_(1)

    def _allocate(self, kind: ScaleKind) -> None:
        if kind == "channel+input" and not self._has_in_scale:
            for bank, linear in zip(self.banks, self.linears, strict=True):
                bank.in_scale = self._ones(self.rows, len(linear.sizes), linear.in_features)
            self._has_in_scale = True
        if kind == "group" and not self._has_group_scale:
            for bank, linear in zip(self.banks, self.linears, strict=True):
                bank.group_scale = self._ones(self.group_rows, linear.groups, sum(linear.sizes))
            self._has_group_scale = True

    def _ones(self, *shape: int) -> Tensor:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
            return torch.ones(shape, device=self.device, dtype=self.dtype)

    def _layout(self, given: SetLayout) -> SetLayout:
        """A layout of the same tensors: one suffix after the other, launch by launch, sibling by sibling."""
        names = [
            f"{name}.{suffix}"
            for suffix in SUFFIXES[given.kind]
            for linear in self.linears
            for name in linear.names
        ]
        return given.in_order(names)
