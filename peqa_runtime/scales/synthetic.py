"""Generated tasks, to try out how many of them a machine serves: scales at random around 1, all of them different."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peqa_runtime.core import BaseManifest
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.set_file import content_digest, parse_header
from peqa_runtime.scales.set_layout import layout_of

SPREAD = 0.05
"""Scales reach from 1 - SPREAD to 1 + SPREAD: the model still writes words, though no better ones."""


def synthetic_sets(
    manifest: BaseManifest, count: int, *, seed: int = 0
) -> Iterator[tuple[str, ScaleSet, bytes]]:
    """Yield `count` tasks of kind "channel" as (name, set, file), named `synthetic-00000` and so on.

    The same seed gives the same sets. One takes about a millisecond for a model of 150 000 output rows.
    """
    layout = layout_of("channel", manifest)
    ones = {name: torch.ones(shape) for name, shape in zip(layout.names, layout.shapes, strict=True)}
    template = ScaleSet.build("channel", ones, manifest, note={"synthetic": True, "seed": seed})
    head = template.to_bytes()[: -template.num_bytes]  # equal shapes, equal header: only the numbers differ
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        values = torch.rand(sum(layout.sizes), generator=generator)
        flat = (1 + SPREAD * (2 * values - 1)).half()
        data = head + flat.numpy().tobytes()
        revision = content_digest(parse_header(head, len(data)), data)
        scale_set = ScaleSet(
            "channel", manifest.base_digest, flat, layout, revision, template.task, "", template.note
        )
        yield f"synthetic-{number:05d}", scale_set, data


def fill_store(store: ScaleStore, count: int, *, seed: int = 0) -> Iterator[str]:
    """Put `count` generated tasks into the store and yield the name of each. Raises `StoreError`."""
    for name, scale_set, data in synthetic_sets(store.manifest, count, seed=seed):
        store.put(name, scale_set, data)
        yield name
