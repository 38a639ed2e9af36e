"""A kept revision by name, "sql@1a2b": what is leased, what is refused, and that nothing else changes by it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from peqa_runtime import Engine, EngineConfig, SamplingParams
from peqa_runtime.core import BaseManifest, Blend, LinearShape
from peqa_runtime.errors import (
    InvalidRequest,
    NoSuchRevision,
    StoreError,
    TaskQuarantined,
    TaskUnusable,
    UnknownTask,
)
from peqa_runtime.model import read_manifest
from peqa_runtime.scales.revision_name import matching, split_revision
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.set_layout import expected_shapes
from peqa_runtime.scales.task_library import TaskLibrary
from peqa_runtime.scales.task_registry import STRIKES, TaskRegistry

MANIFEST = BaseManifest("Tiny-Model", "d1" * 32, {"l0": LinearShape(6, 8, 2)})


def file_of(value: float, kind: str = "channel", **options: object) -> bytes:
    tensors = {n: torch.full(s, value) for n, s in expected_shapes(kind, MANIFEST).items()}
    return ScaleSet.build(kind, tensors, MANIFEST, **options).to_bytes()


@pytest.fixture
def library(tmp_path: Path) -> TaskLibrary:
    """A task with three revisions, of which only the current one fits into host memory."""
    registry = TaskRegistry(rows=4, group_rows=1)
    library = TaskLibrary(ScaleStore(tmp_path / "store", MANIFEST, keep=3), registry, host_bytes=1)
    for value in (0.7, 0.8, 0.9):
        library.upload("sql", file_of(value, prompt_format=f"{value}: {{prompt}}"))
    return library


def value_of(library: TaskLibrary, revision: str) -> float:
    return round(float(library.scale_set(revision).tensors["l0.out_scale"][0]), 3)


def revisions(library: TaskLibrary) -> list[str]:
    return [row.revision for row in library.revisions("sql")]


@pytest.mark.parametrize("digits", [4, 12, 64])
def test_a_kept_revision_is_leased_while_another_stays_current(library: TaskLibrary, digits: int) -> None:
    newest, middle, oldest = revisions(library)
    lease = library.acquire(f"sql@{oldest[:digits]}")
    assert (lease.task, lease.revision, lease.prompt_format) == ("sql", oldest, "0.7: {prompt}")
    assert value_of(library, oldest) == 0.7
    current = library.acquire("sql")
    assert (current.revision, library.info("sql").revision) == (newest, newest)
    assert library.registry.place(oldest, "channel") != library.registry.place(newest, "channel")
    library.release(lease)
    library.release(current)
    assert library.registry.counts().leases == 0
    assert middle not in library.registry.resident()


def test_a_lease_outlives_the_revision(library: TaskLibrary) -> None:
    oldest = revisions(library)[-1]
    lease = library.acquire(f"sql@{oldest[:8]}")
    library.upload("sql", file_of(1.1))  # three are kept
    assert oldest not in revisions(library)
    assert value_of(library, oldest) == 0.7
    library.release(lease)
    with pytest.raises(NoSuchRevision, match=oldest[:8]):
        library.acquire(f"sql@{oldest[:8]}")
    library.delete("sql")
    with pytest.raises(UnknownTask):
        library.acquire(f"sql@{oldest[:8]}")
    assert library.registry.counts().leases == 0


def test_the_current_revision_by_name_is_the_current_one(library: TaskLibrary) -> None:
    newest = revisions(library)[0]
    lease = library.acquire(f"sql@{newest[:6]}")
    assert lease == library.registry.peek("sql")
    for _ in range(STRIKES):
        library.registry.strike(newest)
    with pytest.raises(TaskQuarantined):
        library.acquire(f"sql@{newest[:6]}")
    library.release(library.acquire(f"sql@{revisions(library)[1][:6]}"))
    library.release(lease)


def test_blends_name_revisions_too(library: TaskLibrary) -> None:
    newest, _, oldest = revisions(library)
    lease = library.acquire(Blend.of({f"sql@{oldest[:10]}": 0.5, "sql": 0.25, "base": 0.25}))
    assert value_of(library, lease.revision) == round(0.5 * 0.7 + 0.25 * 0.9 + 0.25, 3)
    same = library.acquire(Blend.of({f"sql@{oldest[:4]}": 0.5, f"sql@{newest[:4]}": 0.25, "base": 0.25}))
    assert same.revision == lease.revision, "a blend is what it is made of, however that was named"
    library.release(lease)
    library.release(same)
    assert library.registry.counts().leases == 0


def test_what_is_no_revision_is_refused(library: TaskLibrary) -> None:
    for name in ("sql@", "sql@1a2", "sql@1A2B", "sql@xyzw", "sql@" + "a" * 65, "sql@1a2b@1a2b", "sql@ 1a2b"):
        with pytest.raises(InvalidRequest, match="at least 4"):
            library.acquire(name)
    with pytest.raises(UnknownTask):
        library.acquire("nope@1a2b")
    missing = next(
        p for p in ("0000", "ffff", "abcd") if not any(r.startswith(p) for r in revisions(library))
    )
    with pytest.raises(NoSuchRevision, match=revisions(library)[0][:12]):
        library.acquire(f"sql@{missing}")
    assert library.registry.counts().leases == 0


def test_several_revisions_with_one_beginning_are_listed() -> None:
    one, two = "abcd1" + "0" * 59, "abcd2" + "0" * 59
    with pytest.raises(InvalidRequest, match=r"abcd10.*abcd20.*more digits"):
        matching("sql", [one, two, one], "abcd")
    assert matching("sql", [one, two, one], "abcd1") == one
    assert split_revision("sql") == ("sql", None)
    assert split_revision("sql@abcd") == ("sql", "abcd")


def test_a_kept_revision_that_cannot_be_used_says_why(library: TaskLibrary, tmp_path: Path) -> None:
    oldest = revisions(library)[-1]
    path = next((tmp_path / "store" / "tasks").glob(f"*/sql/{oldest}.safetensors"))
    path.write_bytes(b"damaged")
    with pytest.raises(StoreError):
        library.acquire(f"sql@{oldest[:8]}")
    assert library.acquire("sql").revision == revisions(library)[0], "the task goes on"
    wider = TaskLibrary(library.store, TaskRegistry(rows=4, group_rows=2), host_bytes=1)
    wider.upload("sql", file_of(1.2, kind="group"))
    wider.upload("sql", file_of(1.3))
    group = next(r.revision for r in wider.revisions("sql") if r.kind == "group")
    with pytest.raises(TaskUnusable, match="no rows for kind 'group'"):
        library.acquire(f"sql@{group[:8]}")


def test_a_set_that_left_and_came_back_while_it_was_read_is_read_again(
    library: TaskLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.upload("other", file_of(1.4))
    library.upload("sql", file_of(1.5))  # what is in memory now
    load, failures = library.store.load, [StoreError("its file is missing")]

    def failing(task: str, revision: str | None = None) -> ScaleSet:
        if failures:
            raise failures.pop()
        return load(task, revision)

    monkeypatch.setattr(library.store, "load", failing)
    lease = library.acquire("other")
    assert value_of(library, lease.revision) == 1.4
    library.release(lease)
    library.upload("sql", file_of(1.6))
    failures += [StoreError("again"), StoreError("and again")]
    with pytest.raises(StoreError, match="again"):
        library.acquire("other")
    assert library.registry.counts().leases == 0


def test_a_lease_that_nobody_waits_for_any_more_is_given_back(library: TaskLibrary) -> None:
    oldest = revisions(library)[-1]
    coming = [library.acquire_soon(f"sql@{oldest[:8]}") for _ in range(50)]
    cancelled = [future.cancel() for future in coming]
    for future, gone in zip(coming, cancelled, strict=True):
        if not gone:
            library.release(future.result(10))
    deadline = time.monotonic() + 5
    while library.registry.holders(oldest):  # by threads that had begun when their futures were cancelled
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_offline_a_task_is_asked_for_in_an_older_revision(tiny_base: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_base)
    generator = torch.Generator().manual_seed(5)
    first, second = (
        ScaleSet.build(
            "channel",
            {
                name: 1 + 0.3 * torch.rand(shape, generator=generator)
                for name, shape in expected_shapes("channel", manifest).items()
            },
            manifest,
        )
        for _ in range(2)
    )
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with Engine(
        tiny_base, tmp_path / "store", EngineConfig(num_blocks=64, task_rows=4), device="cpu"
    ) as engine:
        old = engine.tasks.upload("sql", first.to_bytes()).revision
        (before,) = engine.generate(["the cat"], params, "sql")
        engine.tasks.upload("sql", second.to_bytes())
        now, then = engine.generate(["the cat"] * 2, params, ["sql", f"sql@{old[:7]}"])
        assert (then.token_ids, then.revision, then.task) == (before.token_ids, old, "sql")
        assert now.token_ids != then.token_ids
        assert engine.tasks.registry.counts().leases == 0
