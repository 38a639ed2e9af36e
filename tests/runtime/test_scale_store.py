"""The store on disk: histories, refusals, damage, a full disk, and SIGKILL at every step of every change."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from peqa_runtime.core import BaseManifest, LinearShape
from peqa_runtime.errors import (
    InvalidTaskName,
    NoSuchRevision,
    RevisionConflict,
    StoreError,
    TaskUnusable,
    UnknownTask,
    WrongBase,
)
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.set_layout import expected_shapes

MANIFEST = BaseManifest("tiny", "d1" * 32, {f"l{i}": LinearShape(6, 8, 2) for i in range(3)})
OTHER_BASE = BaseManifest("tiny2", "e2" * 32, MANIFEST.linears)


def set_of(value: float, manifest: BaseManifest = MANIFEST, **options: object) -> ScaleSet:
    tensors = {n: torch.full(s, value) for n, s in expected_shapes("channel", manifest).items()}
    return ScaleSet.build("channel", tensors, manifest, **options)


A, B, C, D = (set_of(value) for value in (0.8, 0.9, 1.1, 1.2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def new_store(folder: Path, manifest: BaseManifest = MANIFEST, **options: int) -> ScaleStore:
    return ScaleStore(folder, manifest, **options)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of tasks and quarantine, with its bytes; the two hex digits of a task's place left out."""
    return {
        str(p.relative_to(folder)).replace(f"tasks/{p.parent.parent.name}/", ""): p.read_bytes()
        for room in ("tasks", "quarantine")
        for p in (folder / room).rglob("*")
        if p.is_file()
    }


def place(folder: Path, task: str) -> Path:
    """The task's folder."""
    return folder / "tasks" / hashlib.sha256(task.encode()).hexdigest()[:2] / task


def blob(folder: Path, task: str, scale_set: ScaleSet) -> Path:
    return place(folder, task) / f"{scale_set.revision}.safetensors"


def history(store: ScaleStore, task: str) -> list[str]:
    """Revisions, oldest first; the current one in brackets."""
    return [f"[{r.revision}]" if r.current else r.revision for r in reversed(store.revisions(task))]


def test_a_put_survives_a_new_start(folder: Path) -> None:
    scale_set = set_of(0.9, task="noted", prompt_format="{prompt}\n", note={"lr": 0.003})
    info = new_store(folder).put("sql", scale_set)
    again = new_store(folder)
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


def test_content_is_what_was_uploaded(folder: Path) -> None:
    data = A.to_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(dict(reversed(json.loads(data[8:end]).items()))).encode()  # another writer's order
    other_order = len(header).to_bytes(8, "little") + header + data[end:]
    store = new_store(folder)
    parsed = ScaleSet.parse(other_order, MANIFEST)
    store.put("sql", parsed, other_order)
    store.put("sql", B)
    assert store.content("sql", parsed.revision) == other_order
    assert store.content("sql") == B.to_bytes()


def test_upload_appends_and_rollback_moves_the_position(folder: Path) -> None:
    store = new_store(folder)
    for scale_set in (A, B, C):
        store.put("sql", scale_set)
    assert store.rollback("sql").revision == B.revision
    assert history(store, "sql") == [A.revision, f"[{B.revision}]", C.revision]
    store.put("sql", D)
    assert history(new_store(folder), "sql") == [A.revision, B.revision, C.revision, f"[{D.revision}]"]
    assert store.rollback("sql", A.revision).revision == A.revision
    assert store.rollback("sql", C.revision).revision == C.revision
    assert store.rollback("sql", C.revision).revision == C.revision
    assert history(new_store(folder), "sql") == [A.revision, B.revision, f"[{C.revision}]", D.revision]


def test_rollback_refuses_what_is_not_kept(folder: Path) -> None:
    store = new_store(folder)
    store.put("sql", A)
    before = files(folder)
    with pytest.raises(NoSuchRevision, match="no revision before"):
        store.rollback("sql")
    with pytest.raises(NoSuchRevision, match=f"kept: {A.revision[:12]}"):
        store.rollback("sql", B.revision)
    with pytest.raises(UnknownTask, match="known: sql"):
        store.rollback("slots")
    assert files(folder) == before


def test_rollback_goes_to_another_revision(folder: Path) -> None:
    """A, B, back to A, B again: the entry before the current B is B too, and rolling back to it would do nothing."""
    store = new_store(folder)
    store.put("sql", A)
    store.put("sql", B)
    store.rollback("sql")
    store.put("sql", B)
    assert store.rollback("sql").revision == A.revision


def test_equal_content_makes_no_new_entry(folder: Path) -> None:
    store = new_store(folder)
    first = store.put("sql", A)
    before = files(folder)
    assert store.put("sql", set_of(0.8, task="another-name")) == first
    assert files(folder) == before


def test_equal_scales_with_another_prompt_format_replace_the_entry(folder: Path) -> None:
    store = new_store(folder)
    store.put("sql", B)
    store.put("sql", set_of(0.8, prompt_format="old"))
    store.put("slots", set_of(0.8, prompt_format="mine", note={"x": 1}))
    assert store.put("sql", set_of(0.8, prompt_format="new")).prompt_format == "new"
    again = new_store(folder)
    assert history(again, "sql") == [B.revision, f"[{A.revision}]"]
    assert again.info("sql").prompt_format == "new"
    assert again.info("slots").prompt_format == "mine"
    for task, prompt_format in (("sql", "new"), ("slots", "mine")):
        parsed = ScaleSet.parse(again.content(task), MANIFEST)
        assert (parsed.prompt_format, parsed.revision) == (prompt_format, A.revision)


def test_if_match_must_be_the_current_revision(folder: Path) -> None:
    store = new_store(folder)
    with pytest.raises(RevisionConflict, match="does not exist"):
        store.put("sql", A, if_match="*")
    assert files(folder) == {}
    store.put("sql", A)
    before = files(folder)
    for change in (
        lambda: store.put("sql", B, if_match=C.revision),
        lambda: store.put("sql", A, if_match=""),
        lambda: store.rollback("sql", if_match=C.revision),
        lambda: store.delete("sql", if_match=C.revision),
    ):
        with pytest.raises(RevisionConflict, match=f"is at revision {A.revision}"):
            change()
    assert files(folder) == before
    store.put("sql", B, if_match=A.revision)
    store.put("sql", C, if_match="*")
    store.rollback("sql", if_match=C.revision)
    store.delete("sql", if_match=B.revision)
    assert store.tasks() == []


def test_only_the_last_revisions_are_kept(folder: Path) -> None:
    store = new_store(folder, keep=3)
    sets = [set_of(0.8 + 0.01 * i) for i in range(6)]
    for scale_set in sets:
        store.put("sql", scale_set)
    assert history(store, "sql") == [sets[3].revision, sets[4].revision, f"[{sets[5].revision}]"]
    assert set(files(folder)) == {
        "sql/history.json",
        *(f"sql/{s.revision}.safetensors" for s in sets[3:]),
    }


def test_delete_removes_the_task_with_its_files(folder: Path) -> None:
    store = new_store(folder)
    store.put("sql", A)
    store.put("sql", B)
    store.put("slots", B)
    store.delete("sql")
    for s in (store, new_store(folder)):
        assert s.tasks() == ["slots"]
        with pytest.raises(UnknownTask):
            s.info("sql")
        with pytest.raises(UnknownTask):
            s.delete("sql")
    assert set(files(folder)) == {f"slots/{B.revision}.safetensors", "slots/history.json"}
    assert not place(folder, "sql").exists()


@pytest.mark.parametrize(
    "name", ["../x", "", "a/b", ".hidden", "UPPER", "a\0b", "x" * 65, "base", "é", "a\n"]
)
def test_a_name_never_becomes_another_path(folder: Path, name: str) -> None:
    store = new_store(folder)
    for change in (lambda: store.put(name, A), lambda: store.delete(name), lambda: store.rollback(name)):
        with pytest.raises(InvalidTaskName):
            change()
    assert files(folder) == {}
    assert sorted(p.name for p in folder.parent.iterdir()) == ["store"]


def test_sets_of_another_base_are_listed_and_stay(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign = new_store(folder, OTHER_BASE)
    foreign.put("old", set_of(0.7, OTHER_BASE))
    with pytest.raises(WrongBase):
        foreign.put("sql", A)
    with caplog.at_level(logging.WARNING):
        store = new_store(folder)
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
    assert new_store(folder, OTHER_BASE).unusable().keys() == {"old"}


def flip_a_byte(path: Path, position: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "header", "remove"])
def test_a_damaged_set_is_moved_aside_and_the_rest_serves(folder: Path, damage: str) -> None:
    store = new_store(folder)
    for task, sets in {"sql": (A, B), "slots": (C,)}.items():
        for scale_set in sets:
            store.put(task, scale_set)
    damaged = blob(folder, "sql", B)
    if damage == "flip":
        flip_a_byte(damaged)
    elif damage == "header":
        flip_a_byte(damaged, 20)
    elif damage == "remove":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[: 100 if damage == "truncate" else 0])
    again = new_store(folder)
    if damage in ("flip", "header"):  # found when it is used, not at the start
        assert again.tasks() == ["slots", "sql"]
        with pytest.raises(StoreError, match=r"cannot be read: its file is (damaged|missing)"):
            again.load("sql")
    assert again.tasks() == ["slots"]
    assert list(again.unusable()) == ["sql"]
    assert len([name for name in files(folder) if name.startswith("quarantine")]) == (damage != "remove")
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


def test_uploading_again_heals_a_damaged_set(folder: Path) -> None:
    new_store(folder).put("sql", A)
    flip_a_byte(blob(folder, "sql", A))
    store = new_store(folder)
    with pytest.raises(StoreError):
        store.load("sql")
    assert store.tasks() == []
    store.put("sql", A)
    assert store.tasks() == ["sql"]
    assert new_store(folder).content("sql") == A.to_bytes()


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
def test_a_damaged_record_is_reported_and_replaced_by_an_upload(folder: Path, record: bytes) -> None:
    store = new_store(folder)
    store.put("slots", B)
    store.put("sql", A)
    (place(folder, "sql") / "history.json").write_bytes(record)
    (folder / "tasks" / "NOT A TASK").write_bytes(b"")
    (place(folder, "sql").parent / "NOT A TASK").mkdir()
    again = new_store(folder)
    assert again.tasks() == ["slots"]
    assert "record is damaged" in again.unusable()["sql"]
    assert f"sql/{A.revision}.safetensors" in files(folder)
    again.put("sql", C)
    assert history(new_store(folder), "sql") == [f"[{C.revision}]"]
    again.delete("sql")
    assert again.unusable() == {}


def test_a_damaged_record_can_be_deleted(folder: Path) -> None:
    store = new_store(folder)
    store.put("sql", A)
    (place(folder, "sql") / "history.json").write_bytes(b"{")
    new_store(folder).delete("sql")
    assert new_store(folder).unusable() == {}


def test_a_change_by_another_process_is_seen_by_the_next_change(folder: Path) -> None:
    one, two = new_store(folder), new_store(folder)
    one.put("sql", A)
    two.put("sql", B)
    with pytest.raises(RevisionConflict):
        one.put("sql", C, if_match=A.revision)
    one.put("sql", C)
    assert history(one, "sql") == [A.revision, B.revision, f"[{C.revision}]"]


def test_threads_and_stores_write_one_after_the_other(folder: Path) -> None:
    stores = [new_store(folder, keep=100) for _ in range(2)]
    sets = [set_of(0.5 + 0.01 * i) for i in range(24)]

    def upload(start: int) -> None:
        for scale_set in sets[start::4]:
            stores[start % 2].put("sql", scale_set)

    threads = [threading.Thread(target=upload, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    seen = [r.revision for r in new_store(folder).revisions("sql")]
    assert sorted(seen) == sorted(s.revision for s in sets)


def test_a_busy_store_is_a_named_error(folder: Path) -> None:
    store = new_store(folder, lock_timeout=0)
    with new_store(folder)._writing("held"), pytest.raises(StoreError, match="in use by another process"):
        store.put("sql", A)


def test_a_folder_that_cannot_be_used_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be opened"):
        new_store(tmp_path / "file")


class Fault:
    """Counts the calls that change or sync the disk and strikes at the n-th."""

    CALLS = ("fsync", "replace", "unlink")

    def __init__(self, at: int, strike: Callable[[str, tuple], None]) -> None:
        self.at = at
        self.calls: list[str] = []
        self._strike = strike

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in self.CALLS:
            patch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, original: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            self.calls.append(name)
            if len(self.calls) == self.at:
                self._strike(name, arguments)
            return original(*arguments, **options)

        return call


def lose_what_was_not_synced_and_die(name: str, arguments: tuple) -> None:
    if name == "fsync" and stat.S_ISREG(os.fstat(arguments[0]).st_mode):
        os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full(name: str, arguments: tuple) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


CHANGES: dict[str, Callable[[ScaleStore], object]] = {
    "first put": lambda store: store.put("new", C),
    "put": lambda store: store.put("sql", C),
    "put that drops an old revision": lambda store: store.put("full", D),
    "rollback": lambda store: store.rollback("sql"),
    "delete": lambda store: store.delete("sql"),
    "start": lambda store: new_store(store.directory, keep=2),
}


def prepared(folder: Path) -> ScaleStore:
    store = new_store(folder, keep=2)
    for task, scale_set in (("sql", A), ("sql", B), ("full", A), ("full", B), ("still", A)):
        store.put(task, scale_set)
    (folder / "unfinished" / "left.tmp").write_bytes(b"half")
    (place(folder, "still") / f"{'0' * 64}.safetensors").write_bytes(b"no task needs this")
    (folder / "unfinished" / "change-still").touch()
    (place(folder, "begun")).mkdir(parents=True)
    (place(folder, "begun") / f"{'0' * 64}.safetensors").write_bytes(b"a first put that was killed")
    return store


def state(store: ScaleStore) -> dict[str, tuple[list[str], bytes]]:
    return {task: (history(store, task), store.content(task)) for task in store.tasks()}


def strikes(change: Callable[[ScaleStore], object], tmp_path: Path) -> Iterator[int]:
    """1, 2 ... up to the number of disk calls that the change makes."""
    fault = Fault(0, disk_full)
    store = prepared(tmp_path / "counted")
    with pytest.MonkeyPatch.context() as patch:
        fault.install(patch)
        change(store)
    assert len(fault.calls) >= 2
    yield from range(1, len(fault.calls) + 1)


@pytest.mark.parametrize("name", CHANGES)
def test_sigkill_at_every_step_leaves_the_old_or_the_new_state(tmp_path: Path, name: str) -> None:
    change = CHANGES[name]
    outcomes = []
    for at in strikes(change, tmp_path):
        folder = tmp_path / f"killed-{at}"
        old = state(prepared(folder))
        child = os.fork()
        if child == 0:
            try:
                store = new_store(folder, keep=2) if name != "start" else None
                Fault(at, lose_what_was_not_synced_and_die).install(pytest.MonkeyPatch())
                change(store) if store else new_store(folder, keep=2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        after_kill = new_store(folder, keep=2)
        found = state(after_kill)
        assert after_kill.unusable() == {}
        assert list((folder / "unfinished").iterdir()) == []
        assert list((folder / "quarantine").iterdir()) == []
        kept = {
            f"{task}/{name}"
            for task in after_kill.tasks()
            for name in ("history.json", *(f"{r.revision}.safetensors" for r in after_kill.revisions(task)))
        }
        assert set(files(folder)) == kept
        change(reference := prepared(tmp_path / f"reference-{at}"))
        new = state(reference)
        assert found in (old, new)
        outcomes.append(found == new)
        change_again = new_store(folder, keep=2)
        change_again.put("sql", C)
        assert change_again.info("sql").revision == C.revision
    assert outcomes == sorted(outcomes), "once the new state is there it stays"
    if name != "start":
        assert set(outcomes) == {False, True}


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "start"])
def test_a_full_disk_at_any_step_leaves_the_old_state_or_only_garbage(tmp_path: Path, name: str) -> None:
    change = CHANGES[name]
    for at in strikes(change, tmp_path):
        folder = tmp_path / f"full-{at}"
        store = prepared(folder)
        old, fault = state(store), Fault(at, disk_full)
        with pytest.MonkeyPatch.context() as patch:
            fault.install(patch)
            try:
                change(store)
            except StoreError as error:
                refused = True
                assert "No space left" in str(error)  # noqa: PT017
                assert str(folder) not in str(error)  # noqa: PT017
                assert list((folder / "unfinished").glob(".*")) == []
            else:
                refused = False  # only the removal of what nobody needs failed; the next start repeats it
                assert fault.calls[at - 1] == "unlink"
        expected = old
        if not refused:
            change(reference := prepared(tmp_path / f"reference-{at}"))
            expected = state(reference)
        assert state(store) == expected
        assert state(new_store(folder, keep=2)) == expected
        store.put("sql", C)
        assert store.info("sql").revision == C.revision


def test_content_is_on_disk_before_the_name_that_refers_to_it(folder: Path) -> None:
    store = new_store(folder)
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def kind_of(descriptor: int) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        return room(path) if path.is_dir() else "file"

    def room(path: Path) -> str:
        return "shard" if len(path.name) == 2 else path.name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (order.append(f"sync {kind_of(fd)}"), fsync(fd))[1])
        patch.setattr(
            os, "replace", lambda a, b: (order.append(f"rename to {room(Path(b).parent)}"), replace(a, b))[1]
        )
        store.put("sql", A)
    assert order == [
        "sync tasks",
        "sync shard",
        "sync file",
        "rename to sql",
        "sync sql",
        "sync file",
        "rename to sql",
        "sync sql",
    ]
