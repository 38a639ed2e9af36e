"""Where each tensor of a scale set lies when all of them are one flat tensor.

    [ a.in_scale | a.out_scale | b.in_scale | ... ]     elements, not bytes

One layout serves every set of a kind, so that ten thousand sets do not hold ten thousand tables of names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from peqa_runtime.core import BaseManifest, LinearShape, ScaleKind

SUFFIXES: Mapping[ScaleKind, tuple[str, ...]] = MappingProxyType(
    {"channel": ("out_scale",), "channel+input": ("out_scale", "in_scale"), "group": ("group_scale",)}
)
"""Tensors per linear, by kind."""


@dataclass(frozen=True)
class SetLayout:
    """Names in the order of the flat tensor, with their shapes and numbers of elements."""

    kind: ScaleKind
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: list[int]

    def in_order(self, names: Iterable[str]) -> SetLayout:
        """Return the layout with the same tensors in the order of `names`."""
        shapes = dict(zip(self.names, self.shapes, strict=True))
        ordered = tuple(names)
        assert sorted(ordered) == sorted(self.names)
        return _layout(self.kind, {name: shapes[name] for name in ordered})


class SetLayouts:
    """The layouts of one base, made when they are first asked for."""

    def __init__(self, manifest: BaseManifest) -> None:
        self._manifest = manifest
        self._layouts: dict[ScaleKind, SetLayout] = {}

    def __getitem__(self, kind: ScaleKind) -> SetLayout:
        """The layout of a kind."""
        if kind not in self._layouts:
            self._layouts[kind] = layout_of(kind, self._manifest)
        return self._layouts[kind]


def expected_shapes(kind: ScaleKind, manifest: BaseManifest) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that a set of this kind has, no more and no less."""
    return {
        f"{linear}.{suffix}": _shape_of(suffix, shape)
        for linear, shape in manifest.linears.items()
        for suffix in SUFFIXES[kind]
    }


def layout_of(kind: ScaleKind, manifest: BaseManifest) -> SetLayout:
    """Return the layout of a kind of set for the manifest's base, names ascending, as its files have them."""
    return _layout(kind, dict(sorted(expected_shapes(kind, manifest).items())))


def _layout(kind: ScaleKind, shapes: Mapping[str, tuple[int, ...]]) -> SetLayout:
    return SetLayout(kind, tuple(shapes), tuple(shapes.values()), [prod(shape) for shape in shapes.values()])


def _shape_of(suffix: str, shape: LinearShape) -> tuple[int, ...]:
    if suffix == "out_scale":
        return (shape.out_features,)
    if suffix == "in_scale":
        return (shape.in_features,)
    return (shape.out_features, shape.groups)
