"""Blends: which weights are taken, what the mix is bit for bit, whose revision it has, and who may still use it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peqa_runtime.core import BASE_REVISION, BaseManifest, Blend, Lease, LinearShape, Request
from peqa_runtime.engine.engine import Engine
from peqa_runtime.errors import InvalidRequest, UnknownTask
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.set_layout import expected_shapes
from peqa_runtime.scales.task_library import TaskLibrary
from peqa_runtime.scales.task_registry import TaskRegistry

MANIFEST = BaseManifest("tiny", "d1" * 32, {f"l{i}": LinearShape(600, 8, 2) for i in range(3)})


def random_set(seed: int, kind: str = "channel", **options: object) -> ScaleSet:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        n: 0.5 + torch.rand(s, generator=generator) for n, s in expected_shapes(kind, MANIFEST).items()
    }
    return ScaleSet.build(kind, tensors, MANIFEST, **options)


@pytest.fixture
def library(tmp_path: Path) -> TaskLibrary:
    store = ScaleStore(tmp_path / "store", MANIFEST, durable=False)
    library = TaskLibrary(store, TaskRegistry(rows=3, group_rows=2))
    for seed, task in enumerate(("a", "b", "c")):
        library.upload(task, random_set(seed).to_bytes())
    return library


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "1 to 8 tasks, got 0"),
        ({f"t{i}": 1 / 9 for i in range(9)}, "1 to 8 tasks, got 9"),
        ({"a": 0.7, "b": 0.2}, "must sum to 1 .* got 0.9"),
        ({"a": 0.5, "b": 0.502}, "must sum to 1"),
        ({"a": 1.5, "b": -0.5}, "weight of 'b' must be a finite number greater than 0, got -0.5"),
        ({"a": 1.0, "b": 0.0}, "weight of 'b' must be a finite number greater than 0"),
        ({"a": "1"}, "weight of 'a' must be a finite number greater than 0, got '1'"),
        ({"a": True}, "weight of 'a' must be a finite number greater than 0, got True"),
        ({"a": float("nan"), "b": 1.0}, "weight of 'a' must be a finite number"),
        ({"a": float("inf")}, "weight of 'a' must be a finite number"),
    ],
)
def test_weights_that_are_no_mix_are_refused(weights: dict[str, float], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        Blend.of(weights)
    assert caught.value.param == "task"


def test_weights_are_sorted_and_normalised() -> None:
    assert Blend.of({"b": 0.3, "a": 0.7}) == Blend.of({"a": 0.7, "b": 0.3})
    assert Blend.of({"b": 0.3, "a": 0.7}).shares == (("a", 0.7), ("b", 0.3))
    near = Blend.of({"a": 0.7003, "b": 0.3003})
    assert sum(share for _, share in near.shares) == pytest.approx(1, abs=1e-15)
    assert near.name == "a:0.69988+b:0.30012"


def test_a_blend_is_the_weighted_sum_in_float32(library: TaskLibrary) -> None:
    lease = library.acquire(Blend.of({"a": 0.5, "b": 0.3, "base": 0.2}))
    mixed = library.scale_set(lease.revision)
    assert (lease.kind, mixed.kind, mixed.flat.dtype) == ("channel", "channel", torch.float32)
    for name, tensor in mixed.tensors.items():
        a, b = random_set(0).tensors[name].double(), random_set(1).tensors[name].double()
        assert torch.allclose(tensor.double(), 0.5 * a + 0.3 * b + 0.2, rtol=0, atol=2e-7)


@pytest.mark.parametrize("task", ["a", "b"])
def test_a_blend_of_one_task_has_its_bits(library: TaskLibrary, task: str) -> None:
    own = library.scale_set(library.acquire(task).revision)
    mixed = library.scale_set(library.acquire(Blend.of({task: 1.0})).revision)
    assert torch.equal(mixed.flat, own.flat.float())


def test_a_blend_of_the_base_alone_is_the_base(library: TaskLibrary) -> None:
    lease = library.acquire(Blend.of({"base": 1.0}))
    assert (lease.revision, lease.prompt_format) == (BASE_REVISION, "")
    library.release(lease)
    assert library.registry.counts().leases == 0


def test_the_revision_is_that_of_contents_and_weights(library: TaskLibrary) -> None:
    def revision(**weights: float) -> str:
        lease = library.acquire(Blend.of(weights))
        library.release(lease)
        return lease.revision

    first = revision(a=0.7, b=0.3)
    assert len(first) == 64
    assert revision(b=0.3, a=0.7) == first
    assert (
        len({first, revision(a=0.3, b=0.7), revision(a=0.7, c=0.3), revision(a=1.0), revision(a=0.5, b=0.5)})
        == 5
    )
    library.upload("copy", random_set(0).to_bytes())
    assert revision(copy=0.7, b=0.3) == first, "equal contents, equal revision"
    library.upload("a", random_set(9).to_bytes())
    assert revision(a=0.7, b=0.3) != first
    library.rollback("a")
    assert revision(a=0.7, b=0.3) == first


def test_equal_revisions_have_equal_bits_whatever_the_names(library: TaskLibrary) -> None:
    library.upload("z", random_set(0).to_bytes())
    one = library.acquire(Blend.of({"a": 0.2, "b": 0.5, "c": 0.3}))
    bits = library.scale_set(one.revision).flat.clone()
    library.release(one)
    fresh = TaskLibrary(library.store, TaskRegistry(rows=3))
    other = fresh.acquire(Blend.of({"z": 0.2, "c": 0.3, "b": 0.5}))
    assert other.revision == one.revision
    assert torch.equal(fresh.scale_set(other.revision).flat, bits)


def test_running_blends_keep_their_revision_when_a_member_changes(library: TaskLibrary) -> None:
    blend = Blend.of({"a": 0.7, "b": 0.3})
    old = library.acquire(blend)
    bits = library.scale_set(old.revision).flat.clone()
    library.upload("a", random_set(9).to_bytes())
    library.delete("b")
    assert torch.equal(library.scale_set(old.revision).flat, bits)
    with pytest.raises(UnknownTask, match="no task 'b'"):
        library.acquire(blend)
    library.upload("b", random_set(1).to_bytes())
    new = library.acquire(blend)
    assert new.revision != old.revision
    for lease in (old, new):
        library.release(lease)
    assert library.registry.counts().leases == 0


@pytest.mark.parametrize("kind", ["group", "channel+input"])
def test_other_kinds_are_refused(library: TaskLibrary, kind: str) -> None:
    library.upload("wide", random_set(5, kind).to_bytes())
    with pytest.raises(InvalidRequest, match=rf"'wide' is of kind '{re.escape(kind)}'.*'channel'"):
        library.acquire(Blend.of({"a": 0.5, "wide": 0.5}))
    assert library.registry.counts().leases == 0


def test_prompt_formats_agree_or_there_is_none(library: TaskLibrary) -> None:
    library.upload("q1", random_set(6, prompt_format="Q {prompt}").to_bytes())
    library.upload("q2", random_set(7, prompt_format="Q {prompt}").to_bytes())
    assert library.acquire(Blend.of({"q1": 0.5, "q2": 0.3, "base": 0.2})).prompt_format == "Q {prompt}"
    assert library.acquire(Blend.of({"a": 0.5, "b": 0.5})).prompt_format == ""
    assert library.acquire(Blend.of({"q1": 0.5, "a": 0.5})).prompt_format is None


def test_a_blend_keeps_its_row_while_nobody_needs_it() -> None:
    registry = TaskRegistry(rows=3)
    lease = registry.hold(lease_of("mix"))
    assert registry.place("mix", "channel").write
    registry.release(lease)
    again = registry.hold(lease_of("mix"))
    assert not registry.place("mix", "channel").write, "warm"
    registry.release(again)
    for name in ("x", "y"):
        registry.set_current(name, name * 2, "channel")
        registry.acquire(name)
        assert registry.place(name * 2, "channel").write
    assert "mix" not in registry.resident(), "the least recently used goes"
    assert not registry._blends
    registry.release(registry.hold(lease_of("never placed")))
    assert not registry._blends


def lease_of(revision: str) -> Lease:
    return Lease("x:1", revision)


def test_the_engine_computes_blends_beside_tasks(fake_engine: Callable[..., Engine]) -> None:
    """More blends and tasks than rows; the fake model's answer depends on every token's scale."""
    engine = fake_engine(tasks={"a": 0.5, "b": 1.5, "c": 1.25}, task_rows=3, max_sequences=6)
    model = engine.model
    params = SamplingParams(max_tokens=6, temperature=0.0)
    rng = random.Random(0)
    choices: list[tuple[str | Blend, float]] = [
        ("a", 0.5),
        ("base", 1.0),
        (Blend.of({"a": 1.0}), 0.5),
        (Blend.of({"a": 0.5, "b": 0.5}), 1.0),
        (Blend.of({"a": 0.25, "b": 0.75}), 1.25),
        (Blend.of({"c": 0.5, "base": 0.5}), 1.125),
    ]
    wanted, tokens = {}, {}
    for number in range(30):
        choice, scale = rng.choice(choices)
        prompt = tuple(rng.randrange(90) for _ in range(5))
        lease = engine.tasks.acquire(choice)
        request = Request(str(number), prompt, params, lease.task, lease.revision, lease.kind)
        engine.add_request(request)
        engine.tasks.release(lease)
        wanted[str(number)] = model.expected(list(prompt), 6, scale)
        tokens[str(number)] = []
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
    assert tokens == wanted
    assert engine.tasks.registry.counts().leases == 0
