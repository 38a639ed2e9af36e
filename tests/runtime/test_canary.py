"""A set is tried out between two steps before it is a task's: nobody notices, and one that overflows is refused."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peqa_runtime.core import BASE_TASK, Request
from peqa_runtime.engine.async_engine import AsyncEngine
from peqa_runtime.engine.batch import Batch
from peqa_runtime.engine.canary import PROMPT_TOKENS, Trial
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.errors import EngineDead, InvalidScaleSet
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.set_layout import expected_shapes
from peqa_runtime.scales.task_registry import TaskRegistry

KINDS = ("channel", "channel+input", "group")


def random_set(engine: Engine, kind: Any, seed: int) -> ScaleSet:
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(kind, engine.model.manifest)
    tensors = {n: 0.7 + 0.6 * torch.rand(s, generator=generator) for n, s in shapes.items()}
    return ScaleSet.build(kind, tensors, engine.model.manifest)


def answers(engine: Engine, between: Callable[[], None]) -> dict[str, list[int]]:
    """Two requests on every task, together; `between` runs between the steps."""
    for number, info in enumerate(engine.tasks.page()):
        lease = engine.tasks.acquire(info.task)
        prompt = tuple(range(5 + number, 25 + number))
        request = Request(
            info.task,
            prompt,
            SamplingParams(max_tokens=12, temperature=0.0),
            info.task,
            lease.revision,
            lease.kind,
        )
        engine.add_request(request, lease)
    found: dict[str, list[int]] = {}
    while engine.has_work:
        between()
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output.token_id or -1)
    return found


@pytest.mark.parametrize(
    ("rows", "group_rows"), [(8, 4), (4, 2), (3, 2)], ids=["free", "all used", "too few"]
)
def test_what_runs_does_not_notice(tiny_base: Path, rows: int, group_rows: int) -> None:
    config = EngineConfig(num_blocks=32, task_rows=rows, group_rows=group_rows, prefix_cache=False)
    with Engine(tiny_base, config=config, device="cpu") as engine:
        for seed, kind in enumerate(KINDS):
            engine.tasks.upload(kind.replace("+", "-"), random_set(engine, kind, seed).to_bytes())
        undisturbed = answers(engine, lambda: None)
        assert len({tuple(ids) for ids in undisturbed.values()}) == 3
        sets = itertools.cycle([random_set(engine, kind, 10 + seed) for seed, kind in enumerate(KINDS)])
        counts = engine.tasks.registry.counts()
        used: list[int] = []

        def try_one() -> None:
            used.append(engine.scheduler.blocks.num_used)
            engine.canary.try_out(next(sets))
            assert engine.scheduler.blocks.num_used == used[-1]

        assert answers(engine, try_one) == undisturbed
        assert len(used) >= 12
        assert engine.tasks.registry.counts() == counts


@pytest.mark.parametrize(
    ("rows", "group_rows"), [(8, 4), (4, 2), (3, 2)], ids=["free", "all used", "too few"]
)
def test_what_runs_does_not_notice_a_set_in_its_own_steps(
    tiny_base: Path, rows: int, group_rows: int
) -> None:
    config = EngineConfig(num_blocks=32, task_rows=rows, group_rows=group_rows, prefix_cache=False)
    with Engine(tiny_base, config=config, device="cpu") as engine:
        for seed, kind in enumerate(KINDS):
            engine.tasks.upload(kind.replace("+", "-"), random_set(engine, kind, seed).to_bytes())
        undisturbed = answers(engine, lambda: None)
        counts = engine.tasks.registry.counts()
        trials: list[Trial] = []
        in_steps = 0

        def try_one() -> None:
            nonlocal in_steps
            if trials and not trials[-1].verdict.done():
                assert engine.canary.next is trials[-1]
                engine.canary.judge()
            else:
                in_steps += bool(trials)
            number = len(trials)
            trials.append(Trial(random_set(engine, KINDS[number % 3], 10 + number)))
            engine.canary.add(trials[-1])

        before = engine.stats()["step_tokens_total"]
        assert answers(engine, try_one) == undisturbed
        engine.canary.judge() if engine.canary.next else None
        assert all(trial.verdict.result() is None for trial in trials)
        assert len(trials) >= 12
        assert in_steps >= (len(trials) - 1 if rows == 8 else 0), "with free rows every one"
        assert engine.tasks.registry.counts() == counts
        assert engine.stats()["step_tokens_total"] - before == 3 * 20 + 3 * 11


def test_a_set_that_overflows_in_a_step_is_refused_and_the_step_goes_on(tiny_base: Path) -> None:
    with Engine(tiny_base, config=EngineConfig(num_blocks=16), device="cpu") as engine:
        engine.tasks.upload("t", random_set(engine, "channel", 0).to_bytes())
        undisturbed = answers(engine, lambda: None)
        make_overflow(engine)
        shapes = expected_shapes("channel", engine.model.manifest)
        tensors = {name: torch.full(shape, 16.0) for name, shape in shapes.items()}
        trial = Trial(ScaleSet.build("channel", tensors, engine.model.manifest))
        engine.canary.add(trial)
        assert answers(engine, lambda: None) == undisturbed
        with pytest.raises(InvalidScaleSet, match="NaN or infinity"):
            trial.verdict.result(0)
        assert not engine.canary.knows(trial.scale_set.revision)


def test_a_step_that_raises_with_a_set_is_computed_without_it(fake_engine: Any, make_fake_set: Any) -> None:
    engine = fake_engine(tasks={"a": 1.5})
    model: Any = engine.model
    trial = Trial(engine.tasks._parsed(make_fake_set(2.0)))
    expected = model.expected(list(range(5, 25)), 12, 1.5)
    model.explode = next(
        i for i in engine.canary._ids if i > 25 and i not in expected
    )  # a token of the trial's
    engine.canary.add(trial)
    assert answers(engine, lambda: None) == {"a": expected}
    assert engine.stats()["step_failures_total"] == 0
    assert engine.canary.next is trial
    assert model.forwards.count(20 + PROMPT_TOKENS) + model.forwards.count(1 + PROMPT_TOKENS) == 1, "one try"
    engine.canary.judge()
    with pytest.raises(InvalidScaleSet, match="cannot be computed"):
        trial.verdict.result(0)


def test_places_that_are_all_taken_keep_no_set_out(fake_engine: Any, make_fake_set: Any) -> None:
    engine = fake_engine(tasks={"a": 1.5}, max_sequences=1)
    trial = Trial(engine.tasks._parsed(make_fake_set(2.0)))
    engine.canary.add(trial)
    answers(engine, lambda: None)
    assert trial.verdict.result(0) is None


class NoGraphs:
    def prepare(self, batch: Batch) -> None:
        return None


@pytest.mark.parametrize("limit", [{"max_sequences": 4}, {"max_batch_tokens": 4}])
def test_a_full_step_has_no_room_for_a_set(fake_engine: Any, make_fake_set: Any, limit: Any) -> None:
    engine = fake_engine(tasks={"a": 1.5}, **limit)
    engine.runner.graphs = NoGraphs()  # whose buckets end at max_sequences
    trial = Trial(engine.tasks._parsed(make_fake_set(2.0)))
    engine.canary.add(trial)
    answers(engine, lambda: None)
    assert engine.canary.next is trial
    assert max(engine.model.forwards) <= limit.get("max_batch_tokens", 20)
    engine.canary.judge()
    assert trial.verdict.result(0) is None


def test_an_idle_row_is_written_again_before_it_is_used(tiny_base: Path) -> None:
    config = EngineConfig(num_blocks=32, task_rows=2, host_cache_bytes=1)
    with Engine(tiny_base, config=config, device="cpu") as engine:
        engine.tasks.upload("only", random_set(engine, "channel", 0).to_bytes())
        before = answers(engine, lambda: None)
        engine.canary.try_out(random_set(engine, "channel", 1))  # the only row there is
        assert answers(engine, lambda: None) == before


def no_memory_from(engine: Engine, write: int) -> None:
    """From the bank's n-th write of those to come, one raises."""
    bank: Any = engine.bank
    original, count = bank.write, itertools.count(1)

    def refuse(*args: Any) -> None:
        if next(count) == write:
            raise torch.OutOfMemoryError("no memory for a set")
        original(*args)

    bank.write = refuse


def ask(engine: Engine, name: str, prompt: list[int], task: str = BASE_TASK) -> None:
    lease = engine.tasks.acquire(task)
    params = SamplingParams(max_tokens=6, temperature=0.0)
    engine.add_request(Request(name, tuple(prompt), params, task, lease.revision, lease.kind), lease)


@pytest.mark.parametrize("explodes", [True, False], ids=["the step raises too", "only the row is lost"])
def test_a_row_that_cannot_be_put_back_after_a_step_is_written_before_it_is_used(
    fake_engine: Any, make_fake_set: Any, explodes: bool
) -> None:
    engine = fake_engine(tasks={"a": 1.5}, task_rows=2, max_sequences=1)
    model: Any = engine.model
    answers(engine, lambda: None)  # the only row is the task's
    trial = Trial(engine.tasks._parsed(make_fake_set(2.0)))
    if explodes:
        model.explode = engine.canary._ids[-1]
    engine.canary.add(trial)
    no_memory_from(engine, 2)
    ask(engine, "base", [1, 2])
    ask(engine, "a", [3, 4], "a")
    got: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            got.setdefault(output.request_id, []).append(output.token_id)
    assert got == {"base": model.expected([1, 2], 6), "a": model.expected([3, 4], 6, 1.5)}
    assert engine.stats()["restarts_total"] == 1
    assert engine.canary.next is trial, "to be tried by itself"
    engine.judge()
    assert isinstance(trial.verdict.exception(0), InvalidScaleSet if explodes else type(None))


def test_a_row_that_cannot_be_put_back_between_steps_costs_nobody_a_token(
    fake_engine: Any, make_fake_set: Any
) -> None:
    engine = fake_engine(tasks={"a": 1.5}, task_rows=2)
    model: Any = engine.model
    for name in ("x", "y"):
        ask(engine, name, [3, 4], "a")
    got: dict[str, list[int]] = {"x": [], "y": []}
    trial = Trial(engine.tasks._parsed(make_fake_set(2.0)))
    for step in itertools.count():
        for output in engine.step():
            got[output.request_id].append(output.token_id)
        if not engine.has_work:
            break
        if step == 2:
            engine.canary.add(trial)
            no_memory_from(engine, 2)
            engine.judge()
            engine.scheduler.check_integrity()
    assert got == dict.fromkeys("xy", model.expected([3, 4], 6, 1.5))
    with pytest.raises(EngineDead, match="send it again"):
        trial.verdict.result(0)
    assert engine.stats()["restarts_total"] == 1
    assert engine.tasks.registry.counts().leases == 0


def test_rows_that_are_lost_again_and_again_end_the_engine(fake_engine: Any, make_fake_set: Any) -> None:
    engine = fake_engine(tasks={"a": 1.5}, task_rows=2, max_crashes=1)
    answers(engine, lambda: None)
    ask(engine, "a", [3, 4], "a")
    engine.canary.add(Trial(engine.tasks._parsed(make_fake_set(2.0))))
    no_memory_from(engine, 2)
    with pytest.raises(EngineDead, match=r"1 crashes .* OutOfMemoryError: no memory"):
        engine.judge()
    assert not engine.has_work
    assert engine.tasks.registry.counts().leases == 0


def test_a_borrowed_row_is_the_one_that_is_missed_least() -> None:
    registry = TaskRegistry(rows=3, group_rows=2)
    assert registry.borrow("group").owner is None
    for task, kind in (("a", "group"), ("b", "channel")):
        registry.set_current(task, task, kind)  # type: ignore[arg-type]
        lease = registry.acquire(task)
        assert registry.place(task, lease.kind) is not None
    rows = registry.resident()
    assert registry.borrow("channel").owner == "a", "all are leased: the least recently used"
    of_group = registry.borrow("group")
    assert (of_group.owner, of_group.row, of_group.group_row) == ("a", rows["a"].row, rows["a"].group_row)
    registry.release(lease)
    idle = registry.borrow("channel")
    assert (idle.owner, idle.row, idle.group_row) == ("b", rows["b"].row, 0)
    assert registry.borrow("group").owner == "a", "there is only one row for groups"


def make_overflow(engine: Engine) -> None:
    """From here on scales beyond 8 give infinity, as they would in a model with large activations."""
    model: Any = engine.model
    forward = model.forward

    def overflowing(*args: Any) -> torch.Tensor:
        logits: torch.Tensor = forward(*args)
        row = model.step_rows.row
        if row is not None and float(engine.bank.banks[-1].out_scale[row.long()].max()) > 8:
            logits[-1, 3] = float("inf")
        return logits

    model.forward = overflowing


def test_a_set_that_overflows_is_refused_and_nothing_changes(tiny_base: Path, tmp_path: Path) -> None:
    engine = Engine(tiny_base, tmp_path / "store", EngineConfig(num_blocks=16, task_rows=2), device="cpu")
    make_overflow(engine)
    runner = AsyncEngine(engine)
    shapes = expected_shapes("channel", engine.model.manifest)

    def set_of(value: float) -> bytes:
        tensors = {name: torch.full(shape, value) for name, shape in shapes.items()}
        return ScaleSet.build("channel", tensors, engine.model.manifest).to_bytes()

    try:
        good = engine.tasks.upload("t", set_of(1.5))
        with pytest.raises(InvalidScaleSet, match="NaN or infinity"):
            engine.tasks.upload("t", set_of(16.0))
        with pytest.raises(InvalidScaleSet, match="NaN or infinity"):
            engine.tasks.upload("other", set_of(16.0))
        assert [info.task for info in engine.tasks.page()] == ["t"]
        assert engine.tasks.info("t") == good
        assert engine.tasks.registry.counts().leases == 0
    finally:
        runner.stop()
    with pytest.raises(EngineDead):
        engine.tasks.upload("t", set_of(1.25))


def test_a_forward_that_raises_refuses_the_set_alone(fake_engine: Any, make_fake_set: Any) -> None:
    engine = AsyncEngine(fake_engine())
    model: Any = engine.engine.model
    try:
        model.broken = True
        with pytest.raises(InvalidScaleSet, match="cannot be computed"):
            engine.engine.tasks.upload("t", make_fake_set(2.0))
        model.broken = False
        assert engine.alive
        engine.engine.tasks.upload("t", make_fake_set(2.0))
    finally:
        engine.stop()


def test_uploads_beside_running_streams(fake_engine: Any, make_fake_set: Any) -> None:
    """At most one trial between two steps, in the engine's thread, while requests run."""
    engine = AsyncEngine(fake_engine(tasks={"a": 1.5}))
    model: Any = engine.engine.model

    async def work() -> None:
        lease = engine.engine.tasks.acquire("a")
        params = SamplingParams(max_tokens=120, temperature=0.0)
        stream = engine.submit(Request("r", (5, 6, 7), params, "a", lease.revision, lease.kind), lease)
        uploads = [
            asyncio.to_thread(engine.engine.tasks.upload, f"t{i}", make_fake_set(2.0 + i / 10))
            for i in range(8)
        ]
        reading = asyncio.ensure_future(_tokens(stream))
        await asyncio.gather(*uploads)
        assert await reading == model.expected([5, 6, 7], 120, 1.5)

    try:
        asyncio.run(asyncio.wait_for(work(), 30))
        before = list(model.forwards)
        with_trial = [size for size in before if size >= PROMPT_TOKENS]
        assert len(with_trial) == 8
        assert max(with_trial) <= 3 + PROMPT_TOKENS, "one a step"
        engine.engine.tasks.upload("again", make_fake_set(2.0))
        assert model.forwards == before, "what passed once is not tried again"
    finally:
        engine.stop()


async def _tokens(stream: Any) -> list[int]:
    return [output.token_id async for output in stream]
