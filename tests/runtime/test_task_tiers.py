"""Device rows, host memory, disk: who waits for which load, what one failed load costs, and what is dropped first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from peqa_runtime.core import BaseManifest, Blend, LinearShape
from peqa_runtime.errors import StoreError, TaskUnusable, UnknownTask
from peqa_runtime.scales.host_cache import HostCache
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.set_layout import expected_shapes
from peqa_runtime.scales.task_folder import TaskFolders
from peqa_runtime.scales.task_library import TaskLibrary
from peqa_runtime.scales.task_registry import TaskRegistry

MANIFEST = BaseManifest("tiny", "d1" * 32, {f"l{i}": LinearShape(6, 8, 2) for i in range(3)})
WAIT = 20


def set_of(value: float) -> ScaleSet:
    tensors = {n: torch.full(s, value) for n, s in expected_shapes("channel", MANIFEST).items()}
    return ScaleSet.build("channel", tensors, MANIFEST)


SETS = {f"t{i}": set_of(0.5 + 0.05 * i) for i in range(6)}


@pytest.fixture
def library(tmp_path: Path) -> TaskLibrary:
    """Six tasks, all cold."""
    store = ScaleStore(tmp_path / "store", MANIFEST, durable=False)
    for task, scale_set in SETS.items():
        store.put(task, scale_set)
    return TaskLibrary(store, TaskRegistry(rows=3), host_bytes=2 * SETS["t0"].num_bytes)


@contextmanager
def held_loads(monkeypatch: pytest.MonkeyPatch, *tasks: str) -> Iterator[tuple[list[str], threading.Event]]:
    """Reads of these tasks hang until the event is set; the list has every task that was read."""
    read, go_on, load = [], threading.Event(), TaskFolders.load

    def slow(self: TaskFolders, task: str, entry: object) -> ScaleSet:
        read.append(task)
        if task in tasks:
            assert go_on.wait(WAIT)
        return load(self, task, entry)

    monkeypatch.setattr(TaskFolders, "load", slow)
    try:
        yield read, go_on
    finally:
        go_on.set()


def test_a_cold_task_waits_for_its_own_load_alone(
    library: TaskLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.release(library.acquire("t1"))
    with held_loads(monkeypatch, "t0") as (_, go_on):
        slow = library.acquire_soon("t0")
        assert library.acquire_soon("t1").done(), "warm: at once"
        assert library.acquire_soon("t2").result(WAIT).revision == SETS["t2"].revision
        assert library.acquire_soon("base").done()
        assert not slow.done()
        go_on.set()
        assert slow.result(WAIT).revision == SETS["t0"].revision


def test_many_who_want_one_cold_task_share_one_load(
    library: TaskLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_loads(monkeypatch, "t0") as (read, go_on):
        futures = [library.acquire_soon("t0") for _ in range(40)]
        assert library.acquire_soon("t3").result(WAIT), "forty that wait occupy one thread"
        go_on.set()
        leases = [future.result(WAIT) for future in futures]
    assert read.count("t0") == 1
    assert library.registry.holders(SETS["t0"].revision) == 40
    assert library.stats()["set_loads_total"] == 2
    for lease in leases:
        library.release(lease)
    assert library.registry.holders(SETS["t0"].revision) == 0


def test_who_stops_waiting_leaves_no_lease(library: TaskLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_loads(monkeypatch, "t0") as (_, go_on):
        gone, stays = library.acquire_soon("t0"), library.acquire_soon("t0")
        assert gone.cancel()
        go_on.set()
        library.release(stays.result(WAIT))
    assert library.registry.counts().leases == 0


def test_a_failed_load_fails_its_own_task_only(library: TaskLibrary) -> None:
    (file,) = library.store.directory.glob("tasks/*/t0/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    futures = {task: library.acquire_soon(task) for task in ("t0", "t1", "t2")}
    assert futures["t1"].result(WAIT).revision == SETS["t1"].revision
    assert futures["t2"].result(WAIT).revision == SETS["t2"].revision
    with pytest.raises(TaskUnusable, match="'t0' cannot be used: its file is damaged"):
        futures["t0"].result(WAIT)
    with pytest.raises(TaskUnusable, match="'t0' cannot be used: its file is damaged"):
        library.acquire_soon("t0")
    with pytest.raises(TaskUnusable):
        library.acquire_soon(Blend.of({"t0": 0.5, "t1": 0.5}))
    assert library.stats()["set_load_failures_total"] == 1
    library.upload("t0", SETS["t0"].to_bytes())
    assert library.acquire("t0").revision == SETS["t0"].revision


def test_a_damaged_member_fails_the_blend(library: TaskLibrary) -> None:
    (file,) = library.store.directory.glob("tasks/*/t0/*.safetensors")
    file.unlink()
    with pytest.raises(TaskUnusable, match="'t0' cannot be used: its file is missing"):
        library.acquire(Blend.of({"t0": 0.5, "t1": 0.5}))
    assert library.registry.counts().leases == 0
    assert library.acquire("t1").revision == SETS["t1"].revision


def test_a_disk_error_is_told_to_all_who_wait(library: TaskLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> ScaleSet:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(TaskFolders, "load", broken)
        futures = [library.acquire_soon("t0") for _ in range(3)]
        for future in futures:
            with pytest.raises(StoreError, match="Input/output error"):
                future.result(WAIT)
    assert library.registry.counts().leases == 0
    assert library.acquire("t0").revision == SETS["t0"].revision


def test_a_task_deleted_while_it_loads(library: TaskLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_loads(monkeypatch, "t0") as (_, go_on):
        future = library.acquire_soon("t0")
        library.delete("t0")
        go_on.set()
        with pytest.raises(UnknownTask, match="no task 't0'"):
            future.result(WAIT)
    assert library.registry.counts().leases == 0


def test_a_task_replaced_while_it_loads_gives_the_new_revision(
    library: TaskLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.store._keep = 1  # the replaced revision's file goes at once
    new = set_of(1.5)
    with held_loads(monkeypatch, "t0") as (_, go_on):
        future = library.acquire_soon("t0")
        library.upload("t0", new.to_bytes())
        go_on.set()
        assert future.result(WAIT).revision == new.revision
    assert library.registry.counts().leases == 1


def test_the_least_recently_used_set_that_nobody_uses_is_dropped() -> None:
    in_use: set[str] = set()
    size = SETS["t0"].num_bytes
    cache = HostCache(3 * size, in_use.__contains__)
    revisions = [s.revision for s in SETS.values()]
    for scale_set in list(SETS.values())[:3]:
        cache.put(scale_set)
    assert cache.get(revisions[0]) is not None
    in_use.add(revisions[1])
    cache.put(SETS["t3"])
    assert [cache.get(r) is not None for r in revisions[:4]] == [True, True, False, True]
    in_use.update(revisions)
    cache.put(SETS["t4"])
    cache.put(SETS["t5"])
    assert cache.counts() == (5, 5 * size), "what is in use stays, beyond the limit"
    in_use.clear()
    cache.shrink()
    assert cache.counts() == (3, 3 * size)


def test_the_bank_gets_sets_in_its_own_order(library: TaskLibrary) -> None:
    seen: list[str] = []
    library.arrange = lambda scale_set: seen.append(scale_set.revision) or scale_set  # type: ignore[func-returns-value]
    library.acquire("t0")
    library.upload("new", set_of(1.4).to_bytes())
    assert seen == [SETS["t0"].revision, set_of(1.4).revision]
