"""Generated tasks: all different, all valid, the same again for the same seed."""

from __future__ import annotations

from pathlib import Path

import torch

from peqa_runtime.core import BaseManifest, LinearShape
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.synthetic import SPREAD, fill_store, synthetic_sets

MANIFEST = BaseManifest("tiny", "d1" * 32, {f"l{i}": LinearShape(30, 8, 2) for i in range(3)})


def test_every_set_is_valid_and_unlike_the_others() -> None:
    made = list(synthetic_sets(MANIFEST, 50))
    assert [name for name, _, _ in made] == [f"synthetic-{i:05d}" for i in range(50)]
    for _, scale_set, data in made:
        parsed = ScaleSet.parse(data, MANIFEST)
        assert parsed.revision == scale_set.revision
        assert torch.equal(parsed.flat, scale_set.flat)
        assert float((parsed.flat - 1).abs().max()) <= SPREAD + 1e-3
    assert len({scale_set.revision for _, scale_set, _ in made}) == 50
    again = [scale_set.revision for _, scale_set, _ in synthetic_sets(MANIFEST, 50)]
    assert again == [scale_set.revision for _, scale_set, _ in made]
    assert next(synthetic_sets(MANIFEST, 1, seed=1))[1].revision not in again


def test_filling_twice_changes_nothing_the_second_time(tmp_path: Path) -> None:
    store = ScaleStore(tmp_path, MANIFEST, durable=False)
    assert len(list(fill_store(store, 5))) == 5
    list(fill_store(store, 7))
    assert len(store.tasks()) == 7
    assert store.info("synthetic-00003").num_revisions == 1
    list(fill_store(store, 1, seed=1))
    assert store.info("synthetic-00000").num_revisions == 2
    assert store.load("synthetic-00000").revision == next(synthetic_sets(MANIFEST, 1, seed=1))[1].revision
