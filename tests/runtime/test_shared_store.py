"""Two servers on one store: each sees what the other changes, and what the other does never spoils its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from peqa_runtime.core import BaseManifest, LinearShape
from peqa_runtime.errors import StoreError, TaskQuarantined, UnknownTask
from peqa_runtime.scales import change_log
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.set_layout import expected_shapes
from peqa_runtime.scales.task_folder import TaskFolders
from peqa_runtime.scales.task_library import TaskLibrary
from peqa_runtime.scales.task_registry import STRIKES, TaskRegistry

MANIFEST = BaseManifest("tiny", "d1" * 32, {"l": LinearShape(6, 8, 2)})


def set_of(value: float, **options: object) -> ScaleSet:
    tensors = {n: torch.full(s, value) for n, s in expected_shapes("channel", MANIFEST).items()}
    return ScaleSet.build("channel", tensors, MANIFEST, **options)


A, B, C = (set_of(value) for value in (0.8, 0.9, 1.1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def new_library(folder: Path) -> TaskLibrary:
    return TaskLibrary(ScaleStore(folder, MANIFEST, durable=False), TaskRegistry(rows=4))


def current(library: TaskLibrary) -> dict[str, str]:
    return {task: str(library.registry.current(task)) for task in library.registry.tasks()}


def test_every_change_of_the_other_is_taken_in(folder: Path) -> None:
    one, two = new_library(folder), new_library(folder)
    one.upload("sql", A.to_bytes())
    assert current(two) == {}
    two.refresh()
    assert current(two) == {"sql": A.revision}
    lease = two.acquire("sql")
    one.upload("sql", B.to_bytes())
    one.upload("slots", C.to_bytes())
    two.refresh()
    assert current(two) == {"sql": B.revision, "slots": C.revision}
    assert two.scale_set(lease.revision).revision == A.revision, "what runs keeps its revision"
    one.rollback("sql")
    one.delete("slots")
    two.refresh()
    assert current(two) == {"sql": A.revision}
    assert [info.revision for info in two.page()] == [A.revision]
    two.release(lease)
    two.delete("sql")
    one.refresh()
    assert current(one) == {}
    with pytest.raises(UnknownTask):
        one.acquire("sql")


def test_a_prompt_format_alone_is_a_change(folder: Path) -> None:
    one, two = new_library(folder), new_library(folder)
    one.upload("sql", A.to_bytes())
    two.refresh()
    one.upload("sql", set_of(0.8, prompt_format="Q {prompt}").to_bytes())
    two.refresh()
    assert two.acquire("sql").prompt_format == "Q {prompt}"


def test_a_quarantine_and_its_end_are_seen_by_the_other(folder: Path) -> None:
    one, two = new_library(folder), new_library(folder)
    one.upload("sql", A.to_bytes())
    one.upload("slots", B.to_bytes())
    two.refresh()
    lease = one.acquire("sql")
    assert [one.strike(lease.revision) for _ in range(STRIKES)] == [[], [], ["sql"]]
    one.release(lease)
    one.close()
    two.refresh()
    with pytest.raises(TaskQuarantined):
        two.acquire("sql")
    assert set(two.quarantined()) == {"sql"}
    two.upload("sql", A.to_bytes())
    one.refresh()
    assert one.quarantined() == two.quarantined() == {}
    one.release(one.acquire("sql"))


def test_a_quarantine_that_comes_too_late_for_the_disk_leaves_the_new_revision_alone(folder: Path) -> None:
    one = new_library(folder)
    one.upload("sql", A.to_bytes())
    one.store.quarantine("sql", B.revision)
    one.store.quarantine("gone", B.revision)
    assert not one.store.record("sql").quarantined
    one.store.quarantine("sql", A.revision)
    assert one.store.record("sql").quarantined
    assert [r.current for r in one.revisions("sql")] == [True]


def test_a_full_disk_leaves_the_quarantine_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = new_library(folder)
    one.upload("sql", A.to_bytes())
    lease = one.acquire("sql")
    with monkeypatch.context() as patch:
        patch.setattr("peqa_runtime.scales.task_folder.write_atomic", _no_space)
        for _ in range(STRIKES):
            one.strike(lease.revision)
        one.close()
    assert set(one.quarantined()) == {"sql"}
    assert "is forgotten at a restart" in caplog.text
    assert new_library(folder).quarantined() == {}


def test_no_news_costs_one_look(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = new_library(folder), new_library(folder)
    one.upload("sql", A.to_bytes())
    two.refresh()
    with monkeypatch.context() as patch:
        patch.setattr(ScaleStore, "_writing", None)  # no lock is taken, nothing is read
        two.refresh()
        one.refresh()


def test_a_change_heard_of_during_an_own_one_is_not_lost(folder: Path) -> None:
    one, two = new_library(folder), new_library(folder)
    one.upload("sql", A.to_bytes())
    two.upload("slots", B.to_bytes())
    two.refresh()
    assert current(two) == {"slots": B.revision, "sql": A.revision}


def test_a_change_given_up_half_way_shows_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = new_library(folder), new_library(folder)
    one.upload("sql", A.to_bytes())
    two.refresh()
    with monkeypatch.context() as patch:
        patch.setattr("peqa_runtime.scales.task_folder.write_atomic", _no_space)
        with pytest.raises(Exception, match="No space"):
            one.upload("sql", B.to_bytes())
    two.refresh()
    assert current(one) == current(two) == {"sql": A.revision}


def _no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_new_generation_of_the_log_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change_log, "MAX_BYTES", 40)
    one, two, late = new_library(folder), new_library(folder), new_library(folder)
    for i in range(12):
        (one, two)[i % 2].upload(f"t{i % 5}", set_of(0.5 + 0.01 * i).to_bytes())
        if i == 7:
            one.delete("t2")
        two.refresh()
    one.refresh()
    late.refresh()
    (folder / "changes").unlink()
    one.upload("t9", A.to_bytes())
    for library in (two, late):
        library.refresh()
    assert current(one) == current(two) == current(late) == current(new_library(folder))
    assert (folder / "changes").stat().st_size < 100


def test_news_that_could_not_be_read_are_read_the_next_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = new_library(folder), new_library(folder)
    for task in ("sql", "slots", "qa"):
        one.upload(task, A.to_bytes())
    read, history = [], TaskFolders.history

    def fails_in_between(self: TaskFolders, task: str) -> object:
        read.append(task)
        return _no_space() if len(read) == 2 else history(self, task)

    monkeypatch.setattr(TaskFolders, "history", fails_in_between)
    with pytest.raises(StoreError, match="No space"):
        two.refresh()
    two.refresh()
    assert current(two) == current(one)


def test_the_watch_sees_another_process_within_its_period(folder: Path) -> None:
    library = new_library(folder)
    library.watch(0.05)
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_shared_store import A, B, C, new_library
library = new_library(Path({str(folder)!r}))
for scale_set in (A, B):
    library.upload("sql", scale_set.to_bytes())
library.upload("slots", C.to_bytes())
library.rollback("sql")
"""
    try:
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
        deadline = time.monotonic() + 10
        while current(library) != {"slots": C.revision, "sql": A.revision}:
            assert time.monotonic() < deadline, current(library)
            time.sleep(0.01)
        lease = library.acquire("sql")
        assert library.scale_set(lease.revision).revision == A.revision
    finally:
        library.close()
    assert not [t for t in threading.enumerate() if t.name == "peqa-store-watch"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyError("a bug")], ids=["disk", "bug"])
def test_a_store_that_fails_for_a_while_is_watched_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    one, two = new_library(folder), new_library(folder)
    failures = []

    def broken(self: change_log.ChangeLog) -> bool:
        failures.append(1)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(change_log.ChangeLog, "moved", broken)
        two.watch(0.01)
        one.upload("sql", A.to_bytes())
        deadline = time.monotonic() + 10
        while len(failures) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    while not current(two):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    two.close()
    assert caplog.text.count("changes by other processes cannot be seen") == 1


def test_an_upload_lasts_as_long_as_its_process(folder: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_shared_store import new_library
store = new_library(Path({str(folder)!r})).store
(store.spool_folder() / "upload-1.tmp").write_bytes(b"half")
print(store.spool_folder(), flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
    try:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip()) / "upload-1.tmp"
        store = new_library(folder).store
        ours = store.spool_folder() / "upload-1.tmp"
        ours.write_bytes(b"half")
        os.utime(theirs, (1, 1))
        new_library(folder)
        assert theirs.exists(), "a start in another process"
        assert ours.exists(), "another store in the same process"
    finally:
        process.kill()
        process.communicate()
    assert theirs.exists(), "nobody was there to remove it"
    new_library(folder)
    assert not theirs.parent.exists(), "at the next start, at once"
    assert ours.exists()
    store.close()
    assert not list((folder / "incoming").iterdir()), "a clean end removes its own"
    assert store.spool_folder().is_dir(), "the store may be used on"
    store.close()


def test_only_who_takes_uploads_has_a_folder_for_them(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    incoming = folder / "incoming"
    library = new_library(folder)
    library.upload("sql", A.to_bytes())
    assert not list(incoming.iterdir())
    (incoming / "of-nobody").mkdir()
    (incoming / "upload-1.tmp").write_bytes(b"half")
    (incoming / "link").symlink_to(folder / "tasks")
    new_library(folder)
    assert not list(incoming.iterdir())
    assert (folder / "tasks").is_dir()
    assert not caplog.records
