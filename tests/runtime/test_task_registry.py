"""The policy of names, leases and rows, against an oracle that is slow and plain."""

from __future__ import annotations

import random
import subprocess
import sys
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peqa_runtime.core import BASE_REVISION, Lease, Placement
from peqa_runtime.errors import UnknownTask
from peqa_runtime.scales.task_registry import TaskRegistry


def registry_with(*tasks: str, rows: int = 3, group_rows: int = 1) -> TaskRegistry:
    registry = TaskRegistry(rows=rows, group_rows=group_rows)
    for task in tasks:
        registry.set_current(task, f"{task}-1", "channel")
    return registry


def test_the_base_is_always_there_and_sits_in_row_zero() -> None:
    registry = TaskRegistry(rows=1)
    lease = registry.acquire("base")
    assert lease == Lease("base", BASE_REVISION, "channel")
    assert registry.place(lease.revision, lease.kind) == Placement(0, 0, write=False)
    registry.release(lease)
    assert registry.holders(BASE_REVISION) == 0


def test_a_lease_carries_the_prompt_format_of_its_moment() -> None:
    registry = TaskRegistry(rows=2)
    registry.set_current("x", "same", "channel", "X {prompt}")
    registry.set_current("y", "same", "channel", "Y {prompt}")
    lease = registry.acquire("x")
    registry.set_current("x", "same", "channel", "new {prompt}")
    assert lease.prompt_format == "X {prompt}"
    assert registry.acquire("x").prompt_format == "new {prompt}"
    assert registry.acquire("y").prompt_format == "Y {prompt}"


def test_unknown_task_names_the_known_ones() -> None:
    registry = registry_with(*"abcdefgh")
    with pytest.raises(UnknownTask, match=r"no task 'sqll'; known: base, a, b, c, d, e and 3 more"):
        registry.acquire("sqll")
    with pytest.raises(UnknownTask):
        registry.delete("sqll")
    assert registry.counts().leases == 0


def test_a_lease_outlives_replace_and_delete() -> None:
    registry = registry_with("sql")
    old = registry.acquire("sql")
    assert registry.place(old.revision, old.kind) == Placement(1, 0, write=True)
    registry.set_current("sql", "sql-2", "channel")
    assert registry.acquire("sql").revision == "sql-2"
    registry.delete("sql")
    with pytest.raises(UnknownTask):
        registry.acquire("sql")
    assert registry.place(old.revision, old.kind) == Placement(1, 0, write=False)
    assert registry.resident() == {"sql-1": Placement(1, 0)}
    registry.release(old)
    assert registry.resident() == {}


def test_rows_stay_warm_and_the_least_recently_used_goes() -> None:
    registry = registry_with("a", "b", "c")
    for task in ("a", "b", "a"):
        lease = registry.acquire(task)
        assert registry.place(lease.revision, lease.kind) is not None
        registry.release(lease)
    lease = registry.acquire("c")
    assert registry.place(lease.revision, lease.kind) == Placement(2, 0, write=True)
    assert list(registry.resident()) == ["a-1", "c-1"]


def test_no_row_while_all_are_leased() -> None:
    registry = registry_with("a", "b", "c")
    leases = [registry.acquire(task) for task in ("a", "b", "c")]
    assert registry.place("a-1", "channel") is not None
    assert registry.place("b-1", "channel") is not None
    assert registry.place("c-1", "channel") is None
    registry.release(leases[0])
    assert registry.place("c-1", "channel") == Placement(1, 0, write=True)


def test_a_retained_lease_counts_by_itself() -> None:
    registry = registry_with("sql")
    first = registry.acquire("sql")
    second = registry.retain(first)
    registry.set_current("sql", "sql-2", "channel")
    registry.release(first)
    assert registry.holders("sql-1") == 1
    assert registry.place(second.revision, second.kind) is not None
    registry.release(second)
    with pytest.raises(AssertionError):
        registry.retain(second)


def test_a_lease_that_only_waits_gives_its_row_to_one_that_runs() -> None:
    registry = registry_with("a", "b", "c", rows=3)
    a, b, c = (registry.acquire(task) for task in "abc")
    for lease in (a, b):
        registry.place(lease.revision, lease.kind)
    assert registry.place(c.revision, c.kind) is None
    assert registry.place(c.revision, c.kind, in_use={a.revision, b.revision}) is None
    assert registry.place(c.revision, c.kind, in_use={a.revision}) == Placement(2, 0, write=True)
    assert registry.place(a.revision, a.kind) == Placement(1, 0, write=False)
    registry.release(c)
    assert registry.place(b.revision, b.kind, in_use=()) == Placement(2, 0, write=True), (
        "unleased ones go first"
    )


def test_equal_content_shares_a_row_and_keeps_it_until_the_last_name_goes() -> None:
    registry = TaskRegistry(rows=3)
    for task in ("x", "y"):
        registry.set_current(task, "same", "channel")
    first, second = registry.acquire("x"), registry.acquire("y")
    assert registry.place(first.revision, "channel") == Placement(1, 0, write=True)
    assert registry.place(second.revision, "channel") == Placement(1, 0, write=False)
    registry.release(first)
    registry.release(second)
    registry.delete("x")
    assert registry.resident() == {"same": Placement(1, 0)}
    registry.delete("y")
    assert registry.resident() == {}


def test_setting_the_same_revision_again_keeps_its_row() -> None:
    registry = registry_with("a")
    lease = registry.acquire("a")
    registry.place(lease.revision, "channel")
    registry.release(lease)
    registry.set_current("a", "a-1", "channel")
    assert list(registry.resident()) == ["a-1"]


def test_group_sets_take_a_row_of_both_banks_or_none() -> None:
    registry = TaskRegistry(rows=4, group_rows=2)
    registry.set_current("g", "g-1", "group")
    registry.set_current("h", "h-1", "group")
    registry.set_current("c", "c-1", "channel")
    lease = registry.acquire("g")
    held = registry.acquire("h")
    registry.acquire("c")
    assert registry.place("c-1", "channel") == Placement(1, 0, write=True)
    assert registry.place("g-1", "group") == Placement(2, 1, write=True)
    assert registry.place("h-1", "group") is None
    assert registry.counts().rows_used == 2
    registry.release(lease)
    assert registry.place(held.revision, "group") == Placement(2, 1, write=True)
    assert registry.counts().group_rows_used == 1


def test_kinds_that_can_never_be_placed_are_known() -> None:
    assert not TaskRegistry(rows=1).can_ever_place("channel")
    assert not TaskRegistry(rows=2).can_ever_place("group")
    assert TaskRegistry(rows=2, group_rows=2).can_ever_place("group")


def test_an_unwritten_row_is_asked_for_again() -> None:
    registry = registry_with("a", "b")
    for task in ("a", "b"):
        registry.acquire(task)
        registry.place(f"{task}-1", "channel")
    registry.mark_unwritten("a-1")
    assert registry.place("a-1", "channel") == Placement(1, 0, write=True)
    assert registry.place("a-1", "channel") == Placement(1, 0, write=False)
    assert registry.place("b-1", "channel") == Placement(2, 0, write=False)
    registry.mark_unwritten()
    assert registry.place("b-1", "channel") == Placement(2, 0, write=True)


def test_releasing_twice_or_placing_without_a_lease_is_a_bug() -> None:
    registry = registry_with("a")
    lease = registry.acquire("a")
    registry.release(lease)
    with pytest.raises(AssertionError):
        registry.release(lease)
    with pytest.raises(AssertionError):
        registry.place("a-1", "channel")


TASKS = st.sampled_from(["a", "b", "c", "d"])
REVISIONS = st.sampled_from([f"r{i}" for i in range(6)])


class RegistryAgainstOracle(RuleBasedStateMachine):
    """Every operation also happens to plain lists; after each one the two must agree."""

    @initialize(rows=st.integers(1, 4), group_rows=st.integers(1, 3))
    def start(self, rows: int, group_rows: int) -> None:
        self.rows, self.group_rows = rows, group_rows
        self.registry = TaskRegistry(rows=rows, group_rows=group_rows)
        self.current: dict[str, str] = {}
        self.leases: list[Lease] = []
        self.placed: list[tuple[str, Placement]] = []  # least recently used first

    @staticmethod
    def kind(revision: str) -> str:
        return "group" if revision in ("r4", "r5") else "channel"

    def leased(self, revision: str) -> bool:
        return any(lease.revision == revision for lease in self.leases)

    def drop_stale(self) -> None:
        self.placed = [p for p in self.placed if p[0] in self.current.values() or self.leased(p[0])]

    @rule(task=TASKS, revision=REVISIONS)
    def set_current(self, task: str, revision: str) -> None:
        self.registry.set_current(task, revision, self.kind(revision))
        self.current[task] = revision
        self.drop_stale()

    @rule(task=TASKS)
    def delete(self, task: str) -> None:
        if task in self.current:
            self.registry.delete(task)
            del self.current[task]
            self.drop_stale()
        else:
            with pytest.raises(UnknownTask):
                self.registry.delete(task)

    @rule(task=TASKS)
    def acquire(self, task: str) -> None:
        if task in self.current:
            lease = self.registry.acquire(task)
            assert lease == Lease(task, self.current[task], self.kind(self.current[task]))
            self.leases.append(lease)
        else:
            with pytest.raises(UnknownTask):
                self.registry.acquire(task)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.leases) - 1))
        self.registry.release(self.leases.pop(index))
        self.drop_stale()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def place(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        placement = self.registry.place(lease.revision, lease.kind)
        known = [entry for entry in self.placed if entry[0] == lease.revision]
        if known:
            assert placement == Placement(known[0][1].row, known[0][1].group_row, write=False)
            self.placed.remove(known[0])
            self.placed.append(known[0])
            return
        rows = {p.row for _, p in self.placed}
        group_rows = {p.group_row for _, p in self.placed} - {0}
        evicted = self.expected_eviction(lease.kind, len(rows), len(group_rows))
        if evicted == "none to be had":
            assert placement is None
            return
        assert placement is not None
        assert placement.write
        self.placed = [entry for entry in self.placed if entry[0] != evicted]
        assert placement.row in set(range(1, self.rows)) - {p.row for _, p in self.placed}
        if lease.kind == "group":
            taken = {p.group_row for _, p in self.placed}
            assert placement.group_row in set(range(1, self.group_rows)) - taken
        else:
            assert placement.group_row == 0
        self.placed.append((lease.revision, placement))

    def expected_eviction(self, kind: str, rows_used: int, group_rows_used: int) -> str | None:
        unpinned = [entry for entry in self.placed if not self.leased(entry[0])]
        if kind == "group" and group_rows_used == self.group_rows - 1:
            unpinned = [entry for entry in unpinned if entry[1].group_row]
        elif rows_used < self.rows - 1:
            return None
        return unpinned[0][0] if unpinned else "none to be had"

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "registry"):
            return
        resident = self.registry.resident()
        assert [(r, p.row, p.group_row) for r, p in resident.items()] == [
            (r, p.row, p.group_row) for r, p in self.placed
        ]
        counts = self.registry.counts()
        assert counts.tasks == len(self.current)
        assert counts.leases == len(self.leases)
        assert counts.rows_used == len(self.placed) <= counts.rows == self.rows - 1
        assert counts.group_rows_used == sum(1 for _, p in self.placed if p.group_row) <= self.group_rows - 1
        assert len({p.row for p in resident.values()}) == len(resident)
        assert self.registry.tasks() == sorted(self.current)


TestRegistryAgainstOracle = RegistryAgainstOracle.TestCase
TestRegistryAgainstOracle.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_threads_never_see_a_row_that_changes_under_a_lease() -> None:
    """Four threads acquire, place, read "the row", release; one replaces revisions: who reads, reads its own."""
    registry = registry_with("a", "b", "c", "d", rows=3)
    content: dict[int, str] = {}
    engine = threading.Lock()  # the engine places and writes from one thread at a time
    failures: list[str] = []
    stop = threading.Event()

    def replace() -> None:
        for version in range(2000):
            task = "abcd"[version % 4]
            registry.set_current(task, f"{task}-{version}", "channel")
        stop.set()

    def serve(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            lease = registry.acquire(rng.choice("abcd"))
            with engine:
                placement = registry.place(lease.revision, lease.kind)
                if placement is not None and placement.write:
                    content[placement.row] = lease.revision
            for _ in range(3):
                if placement is not None and content[placement.row] != lease.revision:
                    failures.append(f"{lease} saw {content[placement.row]}")
            registry.release(lease)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    threads.append(threading.Thread(target=replace))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not failures
    assert registry.counts().leases == 0
    assert set(registry.resident()) <= {registry.current(task) for task in "abcd"}


def test_the_policy_needs_no_torch() -> None:
    code = "import sys, peqa_runtime.scales.task_registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
