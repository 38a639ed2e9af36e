"""A store of the first layout: opened, it has every task and revision that it had, once and for all."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from peqa_runtime.core import BaseManifest, LinearShape
from peqa_runtime.scales import earlier_layout
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.synthetic import synthetic_sets
from peqa_runtime.scales.task_history import HistoryEntry

MANIFEST = BaseManifest("tiny", "d1" * 32, {"l": LinearShape(6, 8, 2)})
SETS = [scale_set for _, scale_set, _ in synthetic_sets(MANIFEST, 3)]


def write_earlier(folder: Path, tasks: dict[str, list[ScaleSet]]) -> None:
    """As the first version wrote it; its entries had no digest of the file."""
    (folder / "blobs").mkdir(parents=True)
    (folder / "tasks").mkdir()
    (folder / "blobs" / f"{'0' * 64}.safetensors").write_bytes(b"no task needs this")
    for task, sets in tasks.items():
        entries = []
        for number, s in enumerate(sets):
            (folder / "blobs" / f"{s.revision}.safetensors").write_bytes(s.to_bytes())
            entry = HistoryEntry(
                s.revision, s.kind, len(s.to_bytes()), float(number), s.base_digest, "{prompt}"
            )
            entries.append({k: v for k, v in asdict(entry).items() if k != "file_digest"})
        record = {"format_version": 1, "task": task, "position": len(sets) - 1, "history": entries}
        (folder / "tasks" / f"{task}.json").write_text(json.dumps(record))


def check(folder: Path) -> None:
    for _ in range(2):  # the second start finds today's layout
        store = ScaleStore(folder, MANIFEST)
        assert store.tasks() == ["slots", "sql"]
        assert [r.revision for r in store.revisions("sql")] == [SETS[1].revision, SETS[0].revision]
        assert store.load("sql").revision == store.load("slots").revision == SETS[1].revision
        assert store.load("sql", SETS[0].revision).revision == SETS[0].revision
        assert store.info("slots").prompt_format == "{prompt}"
        assert not (folder / "blobs").exists()
        assert "record is damaged" in store.unusable()["torn"]
    assert store.rollback("sql").revision == SETS[0].revision
    assert store.put("slots", SETS[2]).num_revisions == 2


def test_a_store_of_the_first_layout_keeps_everything(tmp_path: Path) -> None:
    write_earlier(tmp_path, {"sql": SETS[:2], "slots": [SETS[1]]})
    (tmp_path / "tasks" / "torn.json").write_text("{")
    check(tmp_path)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_interrupted_move_goes_on_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    write_earlier(tmp_path, {"sql": SETS[:2], "slots": [SETS[1]]})
    (tmp_path / "tasks" / "torn.json").write_text("{")
    calls, replace = [], earlier_layout.os.replace

    def cut(source: object, target: object) -> None:
        calls.append(source)
        if len(calls) == at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(earlier_layout.os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            ScaleStore(tmp_path, MANIFEST)
    check(tmp_path)
