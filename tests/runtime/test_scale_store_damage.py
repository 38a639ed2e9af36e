"""Damaged sets and records: set aside and named, while the rest serves and an upload replaces them."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_cases import A, B, C, blob, files, history, new_store, place

from peqa_runtime.errors import NoSuchRevision, StoreError, TaskUnusable


def flip_a_byte(path: Path, position: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "header", "remove"])
def test_a_damaged_set_is_moved_aside_and_the_rest_serves(store_folder: Path, damage: str) -> None:
    store = new_store(store_folder)
    for task, sets in {"sql": (A, B), "slots": (C,)}.items():
        for scale_set in sets:
            store.put(task, scale_set)
    damaged = blob(store_folder, "sql", B)
    if damage == "flip":
        flip_a_byte(damaged)
    elif damage == "header":
        flip_a_byte(damaged, 20)
    elif damage == "remove":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[: 100 if damage == "truncate" else 0])
    again = new_store(store_folder)
    if damage in ("flip", "header"):  # found when it is used, not at the start
        assert again.tasks() == ["slots", "sql"]
        with pytest.raises(StoreError, match=r"cannot be read: its file is (damaged|missing)"):
            again.load("sql")
    assert again.tasks() == ["slots"]
    assert list(again.unusable()) == ["sql"]
    assert len([name for name in files(store_folder) if name.startswith("quarantine")]) == (
        damage != "remove"
    )
    assert again.load("slots").revision == C.revision
    with pytest.raises(TaskUnusable, match="'sql' cannot be used: its file is"):
        again.info("sql")
    assert again.rollback("sql").revision == A.revision
    assert again.tasks() == ["slots", "sql"]
    with pytest.raises(NoSuchRevision, match="cannot be used: its file is missing"):
        again.rollback("sql", B.revision)
    again.put("sql", B)
    assert again.rollback("sql", A.revision).revision == A.revision
    assert again.rollback("sql", B.revision).revision == B.revision


def test_uploading_again_heals_a_damaged_set(store_folder: Path) -> None:
    new_store(store_folder).put("sql", A)
    flip_a_byte(blob(store_folder, "sql", A))
    store = new_store(store_folder)
    with pytest.raises(StoreError):
        store.load("sql")
    assert store.tasks() == []
    store.put("sql", A)
    assert store.tasks() == ["sql"]
    assert new_store(store_folder).content("sql") == A.to_bytes()


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"{",
        b"[]",
        b'{"format_version": 2}',
        b'{"format_version": 1, "task": "other", "position": 0, "history": []}',
        b'{"format_version": 1, "task": "sql", "position": 0, "history": []}',
        b'{"format_version": 1, "task": "sql", "position": 0, "history": [{"revision": "../../x"}]}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_record_is_reported_and_replaced_by_an_upload(store_folder: Path, record: bytes) -> None:
    store = new_store(store_folder)
    store.put("slots", B)
    store.put("sql", A)
    (place(store_folder, "sql") / "history.json").write_bytes(record)
    (store_folder / "tasks" / "NOT A TASK").write_bytes(b"")
    (place(store_folder, "sql").parent / "NOT A TASK").mkdir()
    again = new_store(store_folder)
    assert again.tasks() == ["slots"]
    assert "record is damaged" in again.unusable()["sql"]
    assert f"sql/{A.revision}.safetensors" in files(store_folder)
    again.put("sql", C)
    assert history(new_store(store_folder), "sql") == [f"[{C.revision}]"]
    again.delete("sql")
    assert again.unusable() == {}


def test_a_damaged_record_can_be_deleted(store_folder: Path) -> None:
    store = new_store(store_folder)
    store.put("sql", A)
    (place(store_folder, "sql") / "history.json").write_bytes(b"{")
    new_store(store_folder).delete("sql")
    assert new_store(store_folder).unusable() == {}
