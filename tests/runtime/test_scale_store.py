"""The store on disk: histories, rollbacks, preconditions, names, other bases, and writers at the same time."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest
import torch
from store_cases import MANIFEST, OTHER_BASE, A, B, C, D, files, history, new_store, place, set_of

from peqa_runtime.errors import (
    InvalidTaskName,
    NoSuchRevision,
    RevisionConflict,
    StoreError,
    UnknownTask,
    WrongBase,
)
from peqa_runtime.scales.scale_set import ScaleSet


def test_a_put_survives_a_new_start(store_folder: Path) -> None:
    scale_set = set_of(0.9, task="noted", prompt_format="{prompt}\n", note={"lr": 0.003})
    info = new_store(store_folder).put("sql", scale_set)
    again = new_store(store_folder)
    assert again.tasks() == ["sql"]
    assert again.info("sql") == info
    assert (info.task, info.revision, info.kind, info.num_revisions) == (
        "sql",
        scale_set.revision,
        "channel",
        1,
    )
    assert (info.prompt_format, dict(info.note)) == ("{prompt}\n", {"lr": 0.003})
    assert info.num_bytes == len(scale_set.to_bytes())
    loaded = again.load("sql")
    assert loaded.revision == scale_set.revision
    assert all(torch.equal(loaded.tensors[n], t) for n, t in scale_set.tensors.items())


def test_content_is_what_was_uploaded(store_folder: Path) -> None:
    data = A.to_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(dict(reversed(json.loads(data[8:end]).items()))).encode()  # another writer's order
    other_order = len(header).to_bytes(8, "little") + header + data[end:]
    store = new_store(store_folder)
    parsed = ScaleSet.parse(other_order, MANIFEST)
    store.put("sql", parsed, other_order)
    store.put("sql", B)
    assert store.content("sql", parsed.revision) == other_order
    assert store.content("sql") == B.to_bytes()


def test_upload_appends_and_rollback_moves_the_position(store_folder: Path) -> None:
    store = new_store(store_folder)
    for scale_set in (A, B, C):
        store.put("sql", scale_set)
    assert store.rollback("sql").revision == B.revision
    assert history(store, "sql") == [A.revision, f"[{B.revision}]", C.revision]
    store.put("sql", D)
    assert history(new_store(store_folder), "sql") == [A.revision, B.revision, C.revision, f"[{D.revision}]"]
    assert store.rollback("sql", A.revision).revision == A.revision
    assert store.rollback("sql", C.revision).revision == C.revision
    assert store.rollback("sql", C.revision).revision == C.revision
    assert history(new_store(store_folder), "sql") == [A.revision, B.revision, f"[{C.revision}]", D.revision]


def test_rollback_refuses_what_is_not_kept(store_folder: Path) -> None:
    store = new_store(store_folder)
    store.put("sql", A)
    before = files(store_folder)
    with pytest.raises(NoSuchRevision, match="no revision before"):
        store.rollback("sql")
    with pytest.raises(NoSuchRevision, match=f"kept: {A.revision[:12]}"):
        store.rollback("sql", B.revision)
    with pytest.raises(UnknownTask, match="known: sql"):
        store.rollback("slots")
    assert files(store_folder) == before


def test_rollback_goes_to_another_revision(store_folder: Path) -> None:
    """A, B, back to A, B again: the entry before the current B is B too, and rolling back to it would do nothing."""
    store = new_store(store_folder)
    store.put("sql", A)
    store.put("sql", B)
    store.rollback("sql")
    store.put("sql", B)
    assert store.rollback("sql").revision == A.revision


def test_equal_content_makes_no_new_entry(store_folder: Path) -> None:
    store = new_store(store_folder)
    first = store.put("sql", A)
    before = files(store_folder)
    assert store.put("sql", set_of(0.8, task="another-name")) == first
    assert files(store_folder) == before


def test_equal_scales_with_another_prompt_format_replace_the_entry(store_folder: Path) -> None:
    store = new_store(store_folder)
    store.put("sql", B)
    store.put("sql", set_of(0.8, prompt_format="old"))
    store.put("slots", set_of(0.8, prompt_format="mine", note={"x": 1}))
    assert store.put("sql", set_of(0.8, prompt_format="new")).prompt_format == "new"
    again = new_store(store_folder)
    assert history(again, "sql") == [B.revision, f"[{A.revision}]"]
    assert again.info("sql").prompt_format == "new"
    assert again.info("slots").prompt_format == "mine"
    for task, prompt_format in (("sql", "new"), ("slots", "mine")):
        parsed = ScaleSet.parse(again.content(task), MANIFEST)
        assert (parsed.prompt_format, parsed.revision) == (prompt_format, A.revision)


def test_if_match_must_be_the_current_revision(store_folder: Path) -> None:
    store = new_store(store_folder)
    with pytest.raises(RevisionConflict, match="does not exist"):
        store.put("sql", A, if_match="*")
    assert files(store_folder) == {}
    store.put("sql", A)
    before = files(store_folder)
    for change in (
        lambda: store.put("sql", B, if_match=C.revision),
        lambda: store.put("sql", A, if_match=""),
        lambda: store.rollback("sql", if_match=C.revision),
        lambda: store.delete("sql", if_match=C.revision),
    ):
        with pytest.raises(RevisionConflict, match=f"is at revision {A.revision}"):
            change()
    assert files(store_folder) == before
    store.put("sql", B, if_match=A.revision)
    store.put("sql", C, if_match="*")
    store.rollback("sql", if_match=C.revision)
    store.delete("sql", if_match=B.revision)
    assert store.tasks() == []


def test_only_the_last_revisions_are_kept(store_folder: Path) -> None:
    store = new_store(store_folder, keep=3)
    sets = [set_of(0.8 + 0.01 * i) for i in range(6)]
    for scale_set in sets:
        store.put("sql", scale_set)
    assert history(store, "sql") == [sets[3].revision, sets[4].revision, f"[{sets[5].revision}]"]
    assert set(files(store_folder)) == {
        "sql/history.json",
        *(f"sql/{s.revision}.safetensors" for s in sets[3:]),
    }


def test_delete_removes_the_task_with_its_files(store_folder: Path) -> None:
    store = new_store(store_folder)
    store.put("sql", A)
    store.put("sql", B)
    store.put("slots", B)
    store.delete("sql")
    for s in (store, new_store(store_folder)):
        assert s.tasks() == ["slots"]
        with pytest.raises(UnknownTask):
            s.info("sql")
        with pytest.raises(UnknownTask):
            s.delete("sql")
    assert set(files(store_folder)) == {f"slots/{B.revision}.safetensors", "slots/history.json"}
    assert not place(store_folder, "sql").exists()


@pytest.mark.parametrize(
    "name", ["../x", "", "a/b", ".hidden", "UPPER", "a\0b", "x" * 65, "base", "é", "a\n"]
)
def test_a_name_never_becomes_another_path(store_folder: Path, name: str) -> None:
    store = new_store(store_folder)
    for change in (lambda: store.put(name, A), lambda: store.delete(name), lambda: store.rollback(name)):
        with pytest.raises(InvalidTaskName):
            change()
    assert files(store_folder) == {}
    assert sorted(p.name for p in store_folder.parent.iterdir()) == ["store"]


def test_sets_of_another_base_are_listed_and_stay(
    store_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = new_store(store_folder, OTHER_BASE)
    foreign.put("old", set_of(0.7, OTHER_BASE))
    with pytest.raises(WrongBase):
        foreign.put("sql", A)
    with caplog.at_level(logging.WARNING):
        store = new_store(store_folder)
    assert "'old'" in caplog.text
    assert store.tasks() == []
    assert "e2e2e2e2e2e2" in store.unusable()["old"]
    with pytest.raises(UnknownTask, match="cannot be used: it belongs to base e2e2"):
        store.info("old")
    with pytest.raises(WrongBase):
        store.content("old")
    store.put("old", A)
    assert store.unusable() == {}
    with pytest.raises(NoSuchRevision, match="belongs to base e2e2"):
        store.rollback("old")
    assert store.info("old").revision == A.revision
    assert new_store(store_folder, OTHER_BASE).unusable().keys() == {"old"}


def test_a_change_by_another_process_is_seen_by_the_next_change(store_folder: Path) -> None:
    one, two = new_store(store_folder), new_store(store_folder)
    one.put("sql", A)
    two.put("sql", B)
    with pytest.raises(RevisionConflict):
        one.put("sql", C, if_match=A.revision)
    one.put("sql", C)
    assert history(one, "sql") == [A.revision, B.revision, f"[{C.revision}]"]


def test_threads_and_stores_write_one_after_the_other(store_folder: Path) -> None:
    stores = [new_store(store_folder, keep=100) for _ in range(2)]
    sets = [set_of(0.5 + 0.01 * i) for i in range(24)]

    def upload(start: int) -> None:
        for scale_set in sets[start::4]:
            stores[start % 2].put("sql", scale_set)

    threads = [threading.Thread(target=upload, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    seen = [r.revision for r in new_store(store_folder).revisions("sql")]
    assert sorted(seen) == sorted(s.revision for s in sets)


def test_a_busy_store_is_a_named_error(store_folder: Path) -> None:
    store = new_store(store_folder, lock_timeout=0)
    with (
        new_store(store_folder)._writing("held"),
        pytest.raises(StoreError, match="in use by another process"),
    ):
        store.put("sql", A)


def test_a_folder_that_cannot_be_used_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be opened"):
        new_store(tmp_path / "file")
