"""The doctor's look at home, base and store: whole, and with something broken."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from findings import is_broken

from peqa_server.doctor import probe, storage
from peqa_server.doctor.finding import Asked


def test_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fine,) = storage.home(Asked(tmp_path / "a" / "b"))
    assert fine.state == "ok"
    assert "will be made" in fine.found
    assert not (tmp_path / "a").exists()
    file = tmp_path / "file"
    file.touch()
    is_broken(storage.home(Asked(file))[0], "problem", "no folder")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
        is_broken(storage.home(Asked(tmp_path))[0], "problem", "cannot be written", "chown")
    usage = storage.shutil.disk_usage(tmp_path)
    for free, state in ((1 << 20, "problem"), (200 << 20, "warning")):
        monkeypatch.setattr(storage.shutil, "disk_usage", lambda _, n=free: usage._replace(free=n))
        is_broken(storage.home(Asked(tmp_path))[0], state, "make room")


def test_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(
        _: str, home: str, base: str, store: str, *, seconds: float
    ) -> dict[str, Any]:  # the same without a process
        from peqa_runtime.diagnosis import served_facts

        return served_facts(Path(home), Path(base) if base else None, Path(store) if store else None)

    monkeypatch.setattr(probe, "facts", here)
    (demo,) = storage.base_and_store(Asked(tmp_path))
    assert demo.state == "note"
    assert "98 MB" in demo.found
    (missing,) = storage.base_and_store(Asked(tmp_path, base=tmp_path / "nope"))
    is_broken(missing, "problem", "does not exist", "base folder")
    floats = tmp_path / "floats"
    floats.mkdir()
    is_broken(
        storage.base_and_store(Asked(tmp_path, base=floats))[0], "problem", "config.json", "base folder"
    )
    (floats / "config.json").write_text("{}")
    (made,) = storage.base_and_store(Asked(tmp_path, base=floats))
    assert (made.state, "makes a base of it" in made.found) == ("note", True)
    usage = storage.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    is_broken(storage._demo(tmp_path), "problem", "make room")


@pytest.fixture
def filled(tiny_base: Path, tmp_path: Path) -> Path:
    """A store with two tasks."""
    from peqa_runtime.model import read_manifest
    from peqa_runtime.scales.scale_store import ScaleStore
    from peqa_runtime.scales.synthetic import fill_store

    store = ScaleStore(tmp_path / "store", read_manifest(tiny_base), durable=False)
    assert len(list(fill_store(store, 2))) == 2
    store.close()
    return tmp_path / "store"


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_whole_store_is_read_and_not_touched(filled: Path, tiny_base: Path) -> None:
    from peqa_runtime.diagnosis import served_facts

    before = tree(filled)
    facts = served_facts(filled.parent, tiny_base, filled)
    assert tree(filled) == before
    assert (facts["store"]["tasks"], facts["store"]["read"], facts["store"]["num_unusable"]) == (2, 2, 0)
    (finding,) = storage.store(filled, facts["store"])
    assert (finding.state, "2 tasks" in finding.found) == ("ok", True)


def test_a_copy_of_the_tasks_is_a_backup(filled: Path, tiny_base: Path, tmp_path: Path) -> None:
    from peqa_runtime import diagnosis
    from peqa_runtime.model import read_manifest
    from peqa_runtime.scales.scale_store import ScaleStore

    shutil.copytree(filled / "tasks", tmp_path / "copy" / "tasks")
    facts = diagnosis.store_facts(tmp_path / "copy", tiny_base)
    assert (facts["tasks"], facts["num_unusable"]) == (2, 0)
    restored = ScaleStore(tmp_path / "copy", read_manifest(tiny_base))
    before = ScaleStore(filled, read_manifest(tiny_base))
    assert [restored.load(task).revision for task in restored.tasks()] == [
        before.load(task).revision for task in before.tasks()
    ]


def test_a_store_with_everything_wrong(
    filled: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peqa_runtime import diagnosis

    one, two = sorted(filled.rglob("*.safetensors"))
    data = bytearray(one.read_bytes())
    data[-1] ^= 1
    one.write_bytes(data)
    two.unlink()
    (filled / "quarantine" / "old.safetensors").touch()
    facts = diagnosis.store_facts(filled, tiny_base)
    assert facts["num_unusable"] == 2
    reasons = " ".join(facts["unusable"].values())
    assert "damaged" in reasons
    assert "missing" in reasons
    counted, *faults = storage.store(filled, facts)
    assert counted.state == "ok"
    for fault in faults:
        is_broken(fault, "warning", "again")
    assert "1 damaged files" in faults[-1].found
    quick = diagnosis.store_facts(filled, tiny_base, read_seconds=-1)  # sizes only
    assert (quick["read"], quick["num_unusable"]) == (0, 1)
    many = facts | {"unusable": {f"t{i}": "gone" for i in range(20)}, "num_unusable": 500}
    assert any("480 more" in finding.found for finding in storage.store(filled, many))
    future = storage.store(filled, facts | {"latest": time.time() + 1e6})[0]
    is_broken(future, "warning", "future", "clock")
    is_broken(storage.store(filled, {"error": "input/output error"})[0], "problem", "backup")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "lock")
    is_broken(storage.store(filled, facts)[0], "problem", "lock cannot be written", "chown")


def test_a_store_of_another_base(filled: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peqa_runtime import diagnosis, model

    manifest = model.read_manifest(tiny_base)
    other = dataclasses.replace(manifest, base_digest="ff" * 32)
    monkeypatch.setattr(model, "read_manifest", lambda _: other)
    facts = diagnosis.store_facts(filled, tiny_base)
    assert facts["num_unusable"] == 2
    assert manifest.base_digest[:12] in next(iter(facts["unusable"].values()))
