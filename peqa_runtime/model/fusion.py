"""Sibling linears (q/k/v, gate/up) as one matmul. Files and scale sets keep the original names.

Where `q_proj` stood, a thin part stands: the first part that sees an input runs the group's one matmul, the others
take their columns of it. Codes, scales, zeros and biases run along N, so putting siblings together loses nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peqa_runtime.core import FusedLinear
from peqa_runtime.model.quantized_linear import QuantizedLinear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that multiply the same input, by the names that transformers uses."""


@dataclass(frozen=True)
class LinearSpec(FusedLinear):
    """One launch of a loaded model, and the module that makes it: `attach` a bank to it to serve tasks."""

    module: QuantizedLinear


class SiblingGroup:
    """The shared matmul. No Module, so the model's tree keeps the original names.

    It holds one input and its result at a time: one forward of a model at once.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        self.linear = linear
        self.sizes = list(linear.sizes)
        self.x: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()


class SiblingPart(nn.Module):
    """Stands in the place of the sibling with this index. Right in any order of calls, one matmul in theirs."""

    def __init__(self, group: SiblingGroup, index: int) -> None:
        super().__init__()
        self.group = group
        self.index = index
        self.in_features = group.linear.in_features
        self.out_features = group.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., sizes[index]]; a view of the group's result."""
        group = self.group
        if self.index == 0 or group.x is not x:
            group.x, group.parts = x, group.linear(x).split(group.sizes, dim=-1)
        y = group.parts[self.index]
        if self.index == len(group.sizes) - 1:
            group.x, group.parts = None, ()  # no activation outlives its layer
        return y


def fuse_siblings(model: nn.Module, names: Collection[str], *, fuse: bool = True) -> list[LinearSpec]:
    """Fuse siblings in place; one LinearSpec per launch, in the model's order, covering all of `names`.

    `names`: the linears that carry task scales (`BaseManifest.linears`). Siblings whose in_features, bits, group size
    or "has a bias" differ stay apart, as do all with `fuse=False`. Call when the model is on its device.
    """
    specs: list[LinearSpec] = []
    done: set[str] = set()
    for name, module in list(model.named_modules()):
        if name not in names or name in done:
            continue
        assert isinstance(module, QuantizedLinear), name
        family = _family(model, name, names) if fuse else (name,)
        linears = [model.get_submodule(sibling) for sibling in family]
        done.update(family)
        if len(family) > 1:
            module = _concatenate([linear for linear in linears if isinstance(linear, QuantizedLinear)])
            group = SiblingGroup(module)
            for index, sibling in enumerate(family):
                parent, _, leaf = sibling.rpartition(".")
                setattr(model.get_submodule(parent), leaf, SiblingPart(group, index))
        specs.append(LinearSpec(family, module.sizes, module.in_features, module.scales.shape[1], module))
    assert done == set(names), sorted(set(names) - done)[:5]
    return specs


def _family(model: nn.Module, name: str, names: Collection[str]) -> tuple[str, ...]:
    """The siblings that `name` is the first of and can be fused with, itself included."""
    parent, _, leaf = name.rpartition(".")
    for siblings in SIBLINGS:
        if leaf != siblings[0]:
            continue
        family = tuple(f"{parent}.{sibling}" if parent else sibling for sibling in siblings)
        if all(sibling in names for sibling in family):
            shapes = {_kind(model.get_submodule(sibling)) for sibling in family}
            if len(shapes) == 1:
                return family
    return (name,)


def _kind(module: nn.Module) -> tuple[int, int, int, bool]:
    assert isinstance(module, QuantizedLinear)
    return module.in_features, module.bits, module.group_size, module.bias is not None


def _concatenate(linears: list[QuantizedLinear]) -> QuantizedLinear:
    first = linears[0]
    sizes = tuple(linear.out_features for linear in linears)
    with torch.device("meta"):
        fused = QuantizedLinear(
            first.in_features,
            sum(sizes),
            first.bits,
            first.group_size,
            first.bias is not None,
            sizes=sizes,
        )
    for leaf in ("qweight", "scales", "zeros", "bias"):
        tensors = [getattr(linear, leaf) for linear in linears]
        if tensors[0] is not None:
            joined = torch.cat([tensor.data for tensor in tensors])
            setattr(fused, leaf, nn.Parameter(joined, requires_grad=False))
    return fused
