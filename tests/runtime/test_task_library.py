"""The one door to tasks: what an upload promises, what a lease keeps, and what threads may do at once."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peqa_runtime.core import BASE_REVISION, BaseManifest, LinearShape
from peqa_runtime.errors import (
    InvalidScaleSet,
    InvalidTaskName,
    NoSuchRevision,
    RevisionConflict,
    StoreError,
    UnknownTask,
    WrongBase,
)
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.set_layout import expected_shapes
from peqa_runtime.scales.task_library import TaskLibrary
from peqa_runtime.scales.task_registry import TaskRegistry

MANIFEST = BaseManifest("Tiny-Model", "d1" * 32, {f"l{i}": LinearShape(6, 8, 2) for i in range(3)})


def file_of(
    value: float, kind: str = "channel", manifest: BaseManifest = MANIFEST, **options: object
) -> bytes:
    tensors = {n: torch.full(s, value) for n, s in expected_shapes(kind, manifest).items()}
    return ScaleSet.build(kind, tensors, manifest, **options).to_bytes()


def revision_of(data: bytes) -> str:
    return ScaleSet.parse(data, MANIFEST).revision


A, B, C = file_of(0.8), file_of(0.9), file_of(1.1)
SET_BYTES = ScaleSet.parse(A, MANIFEST).num_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def new_library(folder: Path, *, rows: int = 4, group_rows: int = 2, **options: object) -> TaskLibrary:
    return TaskLibrary(
        ScaleStore(folder, MANIFEST), TaskRegistry(rows=rows, group_rows=group_rows), **options
    )


def value_of(library: TaskLibrary, revision: str) -> float:
    return round(float(library.scale_set(revision).tensors["l0.out_scale"][0]), 3)


def test_an_upload_is_live_and_durable_when_it_returns(folder: Path) -> None:
    library = new_library(folder)
    info = library.upload("sql", A)
    lease = library.acquire("sql")
    assert lease.revision == info.revision == revision_of(A)
    assert value_of(library, lease.revision) == 0.8
    assert [i.task for i in library.page()] == ["sql"]
    assert (library.has("sql"), library.has("qa")) == (True, False)
    again = new_library(folder)
    assert again.acquire("sql").revision == info.revision
    assert again.content("sql") == A


def test_upload_takes_a_path(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "spooled").write_bytes(A)
    library = new_library(folder)
    assert library.upload("sql", tmp_path / "spooled").revision == revision_of(A)
    (tmp_path / "spooled").unlink()
    assert library.content("sql") == A
    with pytest.raises(InvalidScaleSet, match="No such file"):
        library.upload("sql", tmp_path / "spooled")


def test_the_base_is_acquired_without_a_file(folder: Path) -> None:
    library = new_library(folder)
    lease = library.acquire("base")
    assert lease.revision == BASE_REVISION
    library.release(lease)
    assert library.registry.counts().leases == 0


def test_a_lease_keeps_its_revision_and_its_tensors(folder: Path) -> None:
    library = new_library(folder, host_bytes=0)
    library.upload("sql", A)
    old = library.acquire("sql")
    library.upload("sql", B)
    new = library.acquire("sql")
    library.delete("sql")
    with pytest.raises(UnknownTask):
        library.acquire("sql")
    assert (value_of(library, old.revision), value_of(library, new.revision)) == (0.8, 0.9)
    library.release(old)
    library.release(new)
    assert library.host_counts() == (0, 0)
    with pytest.raises(NoSuchRevision, match="acquire its task first"):
        library.scale_set(old.revision)


def test_rollback_and_named_rollback(folder: Path) -> None:
    library = new_library(folder)
    for data in (A, B, C):
        library.upload("sql", data)
    assert library.rollback("sql").revision == revision_of(B) == library.acquire("sql").revision
    assert (
        library.rollback("sql", revision_of(A)).revision == library.acquire("sql").revision == revision_of(A)
    )
    assert [r.current for r in library.revisions("sql")] == [False, False, True]
    with pytest.raises(NoSuchRevision):
        library.rollback("sql")
    assert library.acquire("sql").revision == revision_of(A)
    with pytest.raises(UnknownTask):
        library.rollback("slots")


def test_an_equal_upload_changes_nothing(folder: Path) -> None:
    library = new_library(folder)
    first = library.upload("sql", A)
    assert library.upload("sql", A) == first
    assert len(library.revisions("sql")) == 1


def test_a_lease_carries_the_prompt_format_also_of_equal_scales(folder: Path) -> None:
    library = new_library(folder)
    library.upload("x", file_of(0.8, prompt_format="X {prompt}"))
    library.upload("y", file_of(0.8, prompt_format="Y {prompt}"))
    assert library.acquire("x").prompt_format == "X {prompt}"
    assert library.acquire("y").prompt_format == "Y {prompt}"
    library.upload("x", file_of(0.8, prompt_format="new {prompt}"))
    assert library.acquire("x").prompt_format == "new {prompt}" == library.info("x").prompt_format
    assert new_library(folder).acquire("y").prompt_format == "Y {prompt}"


NAN = bytearray(A)
NAN[-2:] = b"\x00\x7e"


@pytest.mark.parametrize(
    ("task", "data", "error"),
    [
        ("sql", A[:-1], InvalidScaleSet),
        ("sql", bytes(NAN), InvalidScaleSet),
        ("sql", file_of(0.9, prompt_format="no place for it"), InvalidScaleSet),
        ("sql", file_of(0.9, prompt_format="{prompt}{prompt}"), InvalidScaleSet),
        ("sql", file_of(0.9, prompt_format="{prompt}" + "x" * 8192), InvalidScaleSet),
        ("sql", file_of(1, manifest=BaseManifest("b", "e" * 64, MANIFEST.linears)), WrongBase),
        ("base", B, InvalidTaskName),
        ("tiny-model", B, InvalidTaskName),
        ("../x", B, InvalidTaskName),
    ],
)
def test_a_refused_upload_changes_nothing(
    folder: Path, task: str, data: bytes, error: type[Exception]
) -> None:
    library = new_library(folder)
    library.upload("sql", A)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(error):
        library.upload(task, data)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [i.task for i in library.page()] == ["sql"]
    assert library.acquire("sql").revision == revision_of(A)


def test_a_set_of_conversations_is_taken(folder: Path) -> None:
    library = new_library(folder)
    assert library.upload("sql", file_of(0.9, prompt_format="{messages}")).prompt_format == "{messages}"


def test_if_match_and_a_full_disk_leave_the_old_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = new_library(folder)
    library.upload("sql", A)
    for change in (
        lambda: library.upload("sql", B, if_match=revision_of(C)),
        lambda: library.rollback("sql", revision_of(A), if_match=revision_of(C)),
        lambda: library.delete("sql", if_match=revision_of(C)),
    ):
        with pytest.raises(RevisionConflict):
            change()

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        with pytest.raises(StoreError, match="No space left"):
            library.upload("sql", B)
    assert library.acquire("sql").revision == revision_of(A) == library.info("sql").revision
    library.upload("sql", B, if_match=revision_of(A))
    assert library.acquire("sql").revision == revision_of(B)


def test_the_check_runs_before_the_commit(folder: Path) -> None:
    def refuse_large(scale_set: ScaleSet) -> None:
        if float(scale_set.tensors["l0.out_scale"][0]) > 1:
            raise InvalidScaleSet("the trial run gave NaN")

    library = new_library(folder, check=refuse_large)
    library.upload("sql", A)
    with pytest.raises(InvalidScaleSet, match="trial run"):
        library.upload("sql", C)
    assert library.acquire("sql").revision == revision_of(A)
    assert len(library.revisions("sql")) == 1


def test_a_kind_without_rows_is_refused_not_left_waiting(folder: Path) -> None:
    library = new_library(folder)
    library.upload("wide", file_of(1.2, "group"))
    library.upload("sql", A)
    library.upload("sql", file_of(1.2, "group"))
    library.upload("sql", B)
    small = new_library(folder, group_rows=1)
    with pytest.raises(InvalidScaleSet, match="0 for kind 'group'"):
        small.upload("other", file_of(1.3, "group"))
    with pytest.raises(UnknownTask, match="finds no place"):
        small.acquire("wide")
    with pytest.raises(UnknownTask, match="finds no place"):
        small.info("wide")
    assert list(small.unusable()) == ["wide"]
    with pytest.raises(NoSuchRevision, match="no rows"):
        small.rollback("sql")
    assert small.acquire("sql").revision == revision_of(B)
    small.upload("wide", C)
    assert small.unusable() == {}
    assert small.acquire("wide").revision == revision_of(C)


def test_host_memory_is_bounded_and_what_is_leased_stays(folder: Path) -> None:
    library = new_library(folder, host_bytes=2 * SET_BYTES)
    for i in range(6):
        library.upload(f"t{i}", file_of(0.5 + 0.1 * i))
    assert library.host_counts() == (2, 2 * SET_BYTES)
    leases = [library.acquire(f"t{i}") for i in range(4)]
    assert library.host_counts() == (4, 4 * SET_BYTES)
    assert [value_of(library, lease.revision) for lease in leases] == [0.5, 0.6, 0.7, 0.8]
    for lease in leases:
        library.release(lease)
    assert library.host_counts() == (2, 2 * SET_BYTES)
    assert value_of(library, leases[3].revision) == 0.8


def test_sets_that_no_task_has_any_more_leave_host_memory(folder: Path) -> None:
    """Else a task that is changed often fills it, and what other tasks have goes to make room."""
    library = new_library(folder)
    for data in (A, B, C):
        library.upload("sql", data)
    assert library.host_counts() == (1, SET_BYTES)
    library.upload("other", C)
    library.delete("other")
    assert library.host_counts() == (1, SET_BYTES), "sql has it too"

    running = library.acquire("sql")
    library.upload("sql", A)
    assert library.host_counts() == (2, 2 * SET_BYTES)
    library.release(running)
    assert library.host_counts() == (1, SET_BYTES)

    running = library.acquire("sql")
    library.upload("sql", B)
    library.rollback("sql")
    library.release(running)
    assert library.in_memory("sql"), "the task has it again"
    assert library.host_counts() == (1, SET_BYTES)

    named = library.acquire(f"sql@{revision_of(B)[:12]}")
    library.release(named)
    assert library.host_counts() == (2, 2 * SET_BYTES), "asked for by name it stays like any other"
    library.delete("sql")
    assert library.host_counts() == (1, SET_BYTES)


def test_a_start_reads_no_tensors(folder: Path) -> None:
    library = new_library(folder)
    for task in ("a", "b"):
        library.upload(task, A)
    again = new_library(folder)
    assert [i.task for i in again.page()] == ["a", "b"]
    assert again.host_counts() == (0, 0)
    assert again.in_memory("base")
    assert not again.in_memory("b")
    again.acquire("b")
    assert again.in_memory("b")
    assert again.host_counts() == (1, SET_BYTES)


def test_a_set_that_is_damaged_later_names_its_task(folder: Path) -> None:
    library = new_library(folder)
    library.upload("sql", A)
    library.upload("sql", B)
    library.upload("slots", C)
    again = new_library(folder)
    (blob,) = folder.glob(f"tasks/*/sql/{revision_of(B)}.safetensors")
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    for _ in range(2):
        with pytest.raises(UnknownTask, match=r"'sql' cannot be used: its file is damaged"):
            again.acquire("sql")
    assert list(again.unusable()) == ["sql"]
    assert [i.task for i in again.page()] == ["slots"]
    assert again.registry.counts().leases == 0
    assert again.acquire("slots").revision == revision_of(C)
    assert again.rollback("sql").revision == again.acquire("sql").revision == revision_of(A)


def test_a_disk_that_fails_for_a_moment_makes_no_task_unusable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_library(folder).upload("sql", A)
    library = new_library(folder)

    def too_many_files(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr("peqa_runtime.scales.task_folder._read", too_many_files)
        with pytest.raises(StoreError, match="Too many open files"):
            library.acquire("sql")
    assert library.unusable() == {}
    assert library.registry.counts().leases == 0
    assert library.acquire("sql").revision == revision_of(A)


def run_threads(*work: Callable[[], None]) -> None:
    """Run all at once; the first exception of any of them is raised here."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if errors:
        raise errors[0]


def test_every_lease_is_one_revision_whole_while_uploads_run(folder: Path) -> None:
    """No sync to the disk here, so that the uploads come fast: 200, and after each the old one is never seen."""
    library = new_library(folder, host_bytes=0, rows=2)
    values = {revision_of(A): 0.8, revision_of(B): 0.9}
    library.upload("sql", A)
    stop = threading.Event()
    acquired = []

    def upload() -> None:
        try:
            for i in range(200):
                revision = library.upload("sql", (B, A)[i % 2]).revision
                lease = library.acquire("sql")
                assert lease.revision == revision
                library.release(lease)
        finally:
            stop.set()

    def serve() -> None:
        while not stop.is_set():
            lease = library.acquire("sql")
            for _ in range(3):
                found = library.scale_set(lease.revision)
                assert found.revision == lease.revision
                assert all(
                    bool((t == torch.tensor(values[lease.revision]).half()).all())
                    for t in found.tensors.values()
                )
            library.release(lease)
            acquired.append(lease.revision)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        run_threads(upload, serve, serve)
    assert set(acquired) <= set(values)
    assert library.registry.counts().leases == 0
    assert library.host_counts() == (0, 0)


def test_of_many_uploads_that_expect_the_same_revision_one_wins(folder: Path) -> None:
    library = new_library(folder)
    library.upload("sql", A)
    outcomes: list[str] = []
    barrier = threading.Barrier(6)
    files = [file_of(0.5 + 0.01 * i) for i in range(6)]

    def upload(data: bytes) -> None:
        barrier.wait()
        try:
            outcomes.append(library.upload("sql", data, if_match=revision_of(A)).revision)
        except RevisionConflict:
            outcomes.append("conflict")

    run_threads(*(lambda data=data: upload(data) for data in files))
    winners = [o for o in outcomes if o != "conflict"]
    assert len(outcomes) == 6
    assert len(winners) == 1
    assert [r.revision for r in library.revisions("sql")] == [winners[0], revision_of(A)]


def test_disk_and_registry_agree_after_a_storm_of_changes(folder: Path) -> None:
    library = new_library(folder, rows=3, host_bytes=SET_BYTES)
    files = [file_of(0.5 + 0.02 * i) for i in range(5)]

    def storm(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            task = rng.choice(["a", "b"])
            action = rng.random()
            try:
                if action < 0.4:
                    library.upload(task, rng.choice(files))
                elif action < 0.5:
                    library.rollback(task)
                elif action < 0.6:
                    library.delete(task)
                else:
                    lease = library.acquire(task)
                    assert library.scale_set(lease.revision).revision == lease.revision
                    library.release(lease)
            except (UnknownTask, NoSuchRevision):
                continue

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        run_threads(*(lambda seed=seed: storm(seed) for seed in range(4)))
    assert library.registry.counts().leases == 0
    on_disk = ScaleStore(folder, MANIFEST)
    assert on_disk.unusable() == {}
    assert library.registry.tasks() == on_disk.tasks() == [i.task for i in library.page()]
    for task in on_disk.tasks():
        assert library.acquire(task).revision == on_disk.info(task).revision


def test_acquire_does_not_wait_for_an_upload_that_writes(folder: Path) -> None:
    library = new_library(folder)
    library.upload("sql", A)
    inside, go_on = threading.Event(), threading.Event()

    def slow(_: int) -> None:
        inside.set()
        go_on.wait(10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", slow)
        thread = threading.Thread(target=library.upload, args=("sql", B))
        thread.start()
        assert inside.wait(10)
        start = time.perf_counter()
        assert library.acquire("sql").revision == library.info("sql").revision == revision_of(A)
        assert time.perf_counter() - start < 5
        go_on.set()
        thread.join(timeout=10)
    assert library.acquire("sql").revision == revision_of(B)
