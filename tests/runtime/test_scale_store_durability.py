"""Changes to the store are atomic: SIGKILL and a full disk at every step, and the order of writes and syncs."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_cases import A, B, C, D, files, history, new_store, place

from peqa_runtime.errors import StoreError
from peqa_runtime.scales.scale_store import ScaleStore


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


def test_content_is_on_disk_before_the_name_that_refers_to_it(store_folder: Path) -> None:
    store = new_store(store_folder)
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
