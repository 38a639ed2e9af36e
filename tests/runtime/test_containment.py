"""Faults and how far they reach: one request, one task, one step, and never further."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from peqa_runtime.core import BASE_TASK, Blend, Lease, Request, TokenOutput
from peqa_runtime.engine.batch import Batch, StepResult
from peqa_runtime.engine.engine import ENGINE_RESTARTED, REQUEST_FAILED, Engine
from peqa_runtime.errors import EngineDead, TaskQuarantined
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.strike_book import REMEMBERED
from peqa_runtime.scales.task_library import TaskLibrary
from peqa_runtime.scales.task_registry import STRIKES, TaskRegistry

MakeEngine = Callable[..., Engine]
BAD = 96
FULL = tuple(range(1, 9))  # two blocks of the fake engines


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, BAD) for _ in range(rng.randint(1, 30))] for _ in range(count)]


def add(engine: Engine, name: str, prompt: list[int], task: str | Blend = BASE_TASK, **params: Any) -> None:
    lease = engine.tasks.acquire(task)
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 6, **params})
    engine.add_request(Request(name, tuple(prompt), sampling, lease.task, lease.revision, lease.kind), lease)


def drain(engine: Engine) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.scheduler.check_integrity()
    assert engine.scheduler.blocks.num_used == 0
    return outputs


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [o.token_id for o in outputs if o.token_id is not None]


def assert_right(engine: Engine, got: list[TokenOutput], prompt: list[int], scale: float = 1.0) -> None:
    """Every token up to the end or to the first one that the fake model is told to choke on."""
    want: list[int] = engine.model.expected(prompt, 6, scale)  # type: ignore[attr-defined]
    if BAD in want[:-1]:
        want = want[: want.index(BAD) + 1]
        assert got[-1].finish_reason == "error"
    else:
        assert got[-1].finish_reason == "length"
    assert tokens(got) == want


@contextmanager
def breaking(engine: Engine, call: Callable[[Batch], None]) -> Iterator[None]:
    """Meanwhile `call` sees each batch before it runs, and may raise."""
    runner: Any = engine.runner
    original = runner.run

    def run(batch: Batch) -> list[StepResult]:
        call(batch)
        results: list[StepResult] = original(batch)
        return results

    runner.run = run
    try:
        yield
    finally:
        runner.run = original


@pytest.mark.parametrize("fault", ["poison", "explode"])
@pytest.mark.parametrize("config", [{}, {"max_batch_tokens": 7}, {"num_blocks": 24, "max_sequences": 6}])
def test_requests_that_fail_end_alone(fake_engine: MakeEngine, fault: str, config: dict[str, int]) -> None:
    engine = fake_engine(model={fault: BAD}, tasks={"a": 1.5}, **config)
    some = prompts(20)
    for i, prompt in enumerate(some):
        if i % 5 == 2:
            add(engine, f"bad{i}", [*prompt, BAD])
        add(engine, str(i), prompt, "a" if i % 3 == 0 else BASE_TASK)
    got = drain(engine)
    for i, prompt in enumerate(some):
        assert_right(engine, got[str(i)], prompt, 1.5 if i % 3 == 0 else 1.0)
    code = {"poison": "numerical_error", "explode": "request_failed"}[fault]
    for i in range(2, 20, 5):
        (last,) = got[f"bad{i}"]
        assert (last.finish_reason, last.error_code) == ("error", code)
        assert last.error
    assert engine.stats()["restarts_total"] == 0
    assert engine.tasks.registry.counts().leases == 0


def test_blocks_of_a_request_that_ended_with_nan_are_not_found_again(fake_engine: MakeEngine) -> None:
    """The fault goes away, the blocks that it spoiled must not come back."""
    engine = fake_engine(model={"poison": BAD})
    model: Any = engine.model
    prompt = [*FULL, BAD]
    add(engine, "spoiled", prompt)
    assert drain(engine)["spoiled"][0].error_code == "numerical_error"
    for key, value in engine.kv_cache.layers:
        key.fill_(float("nan"))
        value.fill_(float("nan"))
    model.poison = None
    add(engine, "again", prompt)
    got = drain(engine)["again"]
    assert got[0].num_cached_tokens == 0
    assert tokens(got) == model.expected(prompt, 6)
    add(engine, "third", prompt)
    assert drain(engine)["third"][0].num_cached_tokens == 8, "what a good request computed is found"


@pytest.mark.parametrize("scored", [False, True])
def test_nan_in_a_part_of_a_prompt_is_seen_before_its_blocks_can_be_found(
    fake_engine: MakeEngine, scored: bool
) -> None:
    """Nothing is sampled of the part, nor where a prompt is only read in."""
    engine = fake_engine(model={"poison": BAD}, max_batch_tokens=8)
    some = prompts(1)[0]
    shared = [1, 2, 3, 4, 5, 6, 7, BAD]
    add(engine, "spoiled", shared if scored else shared * 3, max_tokens=0 if scored else 6)
    (only,) = engine.step()
    assert (only.request_id, only.error_code) == ("spoiled", "numerical_error")
    model: Any = engine.model
    model.poison = None
    add(engine, "after", [*shared, *some])
    got = drain(engine)["after"]
    assert got[0].num_cached_tokens == 0
    assert_right(engine, got, [*shared, *some], 1.0)


def test_a_set_that_cannot_be_written_ends_the_requests_of_its_task(fake_engine: MakeEngine) -> None:
    engine = fake_engine(tasks={"good": 1.5, "corrupt": 0.5})
    corrupt = engine.tasks.registry.current("corrupt")
    bank: Any = engine.bank
    write, sets = bank.write, []

    def refuse(row: int, group_row: int | None, scale_set: Any) -> None:
        write(row, group_row, scale_set)
        sets.append(scale_set.revision)
        if scale_set.revision == corrupt:
            raise ValueError("a corrupt set")

    bank.write = refuse
    for i in range(9):
        add(engine, str(i), [i + 1, 2, 3], ("good", "corrupt", BASE_TASK)[i % 3])
    got = drain(engine)
    for i in range(9):
        if i % 3 == 1:
            assert [(o.error, o.error_code) for o in got[str(i)]] == [(REQUEST_FAILED, "request_failed")]
        else:
            assert tokens(got[str(i)]) == engine.model.expected([i + 1, 2, 3], 6, (1.5, 0, 1.0)[i % 3])  # type: ignore[attr-defined]
    bank.write = write
    add(engine, "healed", [5, 6], "corrupt")
    assert tokens(drain(engine)["healed"]) == engine.model.expected([5, 6], 6, 0.5)  # type: ignore[attr-defined]
    assert corrupt in sets


def test_a_request_that_cannot_be_sampled_ends_alone(fake_engine: MakeEngine) -> None:
    engine = fake_engine()

    def choke(batch: Batch) -> None:
        for item in batch.scheduled:
            if item.sequence.request.request_id == "bad" and item.sequence.num_generated_tokens == 2:
                raise IndexError("a bad sampling state")

    add(engine, "bad", [9, 9], seed=1, temperature=1.0)
    for i in range(5):
        add(engine, str(i), [i + 1])
    with breaking(engine, choke):
        got = drain(engine)
    assert len(tokens(got["bad"])) == 2
    assert got["bad"][-1].error_code == "request_failed"
    for i in range(5):
        assert_right(engine, got[str(i)], [i + 1])


def test_a_broken_request_alone_does_not_count_as_a_crash(fake_engine: MakeEngine) -> None:
    engine = fake_engine(model={"explode": BAD}, max_crashes=1)
    for i in range(6):
        add(engine, str(i), [BAD])
        assert drain(engine)[str(i)][-1].error_code == "request_failed"
    assert engine.stats()["restarts_total"] == 0


def test_a_crash_ends_the_steps_requests_and_the_waiting_survive(fake_engine: MakeEngine) -> None:
    engine = fake_engine(tasks={"a": 1.5}, max_sequences=2)
    model: Any = engine.model
    for i in range(5):
        add(engine, str(i), [i + 1, 7], "a")
    first = {o.request_id: [o] for o in engine.step()}
    assert set(first) == {"0", "1"}
    model.broken = True
    lost = engine.step()
    assert {o.request_id: (o.error, o.error_code) for o in lost} == dict.fromkeys(
        ("0", "1"), (ENGINE_RESTARTED, "engine_restarted")
    )
    assert engine.scheduler.blocks.num_used == 0
    model.broken = False
    engine.bank.banks[0].out_scale[1:] = 77.0  # the row is written anew
    got = drain(engine)
    for i in (2, 3, 4):
        assert tokens(got[str(i)]) == model.expected([i + 1, 7], 6, 1.5)
    assert engine.stats()["restarts_total"] == 1
    assert engine.tasks.registry.counts().leases == 0


@pytest.mark.parametrize("method", ["schedule", "update"])
def test_a_crash_of_the_bookkeeping_ends_what_ran_and_nothing_is_forgotten(
    fake_engine: MakeEngine, method: str
) -> None:
    engine = fake_engine(max_sequences=2, tasks={"a": 1.5})
    for i in range(5):
        add(engine, str(i), [i + 1, 7], "a")
    engine.step()
    scheduler: Any = engine.scheduler
    original = getattr(scheduler, method)

    def crash(*args: Any) -> Any:
        original(*args)  # half of the work is done, and its outputs are lost
        raise KeyError("a bug")

    setattr(scheduler, method, crash)
    assert {o.request_id for o in engine.step()} == {"0", "1"}
    got = drain(engine)
    assert {name: outputs[-1].finish_reason for name, outputs in got.items()} == dict.fromkeys(
        "234", "length"
    )
    assert engine.tasks.registry.counts().leases == 0


def test_a_waiting_request_that_cannot_be_planned_takes_nobody_down_for_ever(fake_engine: MakeEngine) -> None:
    engine = fake_engine(max_sequences=2)
    for i in range(4):
        add(engine, str(i), [i + 1])

    def poisoned(*_: Any) -> Any:
        raise KeyError("a bug")

    ended: list[str | None] = []
    for _ in range(2):
        engine.scheduler.schedule = poisoned  # type: ignore[method-assign]
        ended += [o.error_code for o in engine.step()]
    assert ended == ["engine_restarted"] * 4
    assert not engine.has_work
    add(engine, "x", [1])
    assert_right(engine, drain(engine)["x"], [1])


def test_crashes_within_the_window_end_the_engine(fake_engine: MakeEngine) -> None:
    engine = fake_engine(model={"broken": True}, max_sequences=1, tasks={"a": 1.5})
    for i in range(5):
        add(engine, str(i), [1], "a")
    engine.step()
    engine.step()
    with pytest.raises(EngineDead, match=r"3 crashes within .* RuntimeError: boom"):
        engine.step()
    assert not engine.has_work
    assert engine.scheduler.blocks.num_used == 0
    assert engine.tasks.registry.counts().leases == 0


def test_a_device_that_is_lost_while_the_request_is_looked_for_ends_the_engine_at_once(
    fake_engine: MakeEngine,
) -> None:
    engine = fake_engine()
    for i in range(4):
        add(engine, str(i), [1])
    errors = itertools.chain(
        [RuntimeError("a launch failed")], itertools.repeat(torch.AcceleratorError("gone"))
    )

    def fail(_: Batch) -> None:
        raise next(errors)

    with breaking(engine, fail), pytest.raises(EngineDead, match="the device fails: gone"):
        engine.step()
    assert not engine.has_work


def test_crashes_far_apart_do_not_end_the_engine(
    fake_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peqa_runtime.engine import rescue

    now = [0.0]
    monkeypatch.setattr(rescue.time, "monotonic", lambda: now[0])
    engine = fake_engine(model={"broken": True}, max_sequences=1)
    for i in range(6):
        add(engine, str(i), [1])
        now[0] += 31
        assert engine.step()[0].error_code == "engine_restarted"
    now[0] -= 31 - 25
    add(engine, "too soon", [1])
    with pytest.raises(EngineDead):
        engine.step()


def strike(engine: Engine, task: str | Blend, times: int = STRIKES) -> None:
    for i in range(times):
        add(engine, f"strike{i}", [1, BAD], task)
        assert drain(engine)[f"strike{i}"][-1].error_code == "numerical_error"


def test_a_task_that_makes_nan_three_times_is_set_aside_until_it_is_uploaded(
    fake_engine: MakeEngine, make_fake_set: Callable[[float], bytes]
) -> None:
    engine = fake_engine(model={"poison": BAD}, tasks={"a": 1.5, "b": 0.5, "twin": 1.5})
    registry = engine.tasks.registry
    strike(engine, "a", STRIKES - 1)
    engine.tasks.release(engine.tasks.acquire("a"))
    strike(engine, "a", 1)
    with pytest.raises(
        TaskQuarantined, match=r"'a' is in quarantine: 3 requests .* Roll the task back or upload"
    ):
        engine.tasks.acquire("a")
    assert set(registry.quarantined()) == {"a", "twin"}
    assert engine.stats()["tasks_quarantined"] == 2
    add(engine, "b", [1], "b")
    assert_right(engine, drain(engine)["b"], [1], 0.5)
    engine.tasks.upload("a", make_fake_set(1.25))
    add(engine, "new", [1], "a")
    assert_right(engine, drain(engine)["new"], [1], 1.25)
    with pytest.raises(TaskQuarantined):
        engine.tasks.acquire("twin")
    engine.tasks.upload("twin", make_fake_set(1.5))
    engine.tasks.release(engine.tasks.acquire("twin"))
    assert registry.quarantined() == {}


def test_a_rollback_ends_the_quarantine(
    fake_engine: MakeEngine, make_fake_set: Callable[[float], bytes]
) -> None:
    engine = fake_engine(model={"poison": BAD}, tasks={"a": 1.5})
    engine.tasks.upload("a", make_fake_set(1.25))
    strike(engine, "a")
    assert engine.tasks.registry.quarantined()
    engine.tasks.rollback("a")
    add(engine, "old", [1], "a")
    assert_right(engine, drain(engine)["old"], [1], 1.5)
    engine.tasks.delete("a")
    assert engine.tasks.registry.quarantined() == {}


def test_a_quarantine_outlives_the_process_until_an_upload_or_a_rollback(
    fake_engine: MakeEngine, make_fake_set: Callable[[float], bytes]
) -> None:
    engine = fake_engine(model={"poison": BAD}, tasks={"a": 1.5, "b": 0.5, "twin": 1.5})
    engine.tasks.upload("b", make_fake_set(0.25))
    for task in ("a", "b"):
        strike(engine, task)
    engine.tasks.close()
    store, registry = engine.tasks.store, engine.tasks.registry

    def restarted() -> TaskLibrary:
        rows = registry.counts().rows + 1
        return TaskLibrary(ScaleStore(store.directory, store.manifest), TaskRegistry(rows=rows))

    again = restarted()
    assert again.quarantined() == registry.quarantined()
    assert set(again.quarantined()) == {"a", "b", "twin"}
    with pytest.raises(TaskQuarantined):
        again.acquire("a")
    assert again.info("a").num_revisions == 1
    assert [info.task for info in again.page()] == ["a", "b", "twin"]
    again.upload("a", make_fake_set(1.5))  # what it is already
    again.rollback("b")
    again.release(again.acquire("a"))
    assert set(again.quarantined()) == {"twin"}
    again.close()
    last = restarted()
    assert set(last.quarantined()) == {"twin"}
    last.delete("twin")
    last.upload("twin", make_fake_set(1.5))
    assert last.quarantined() == {}
    last.close()


def test_a_blend_that_makes_nan_three_times_is_set_aside_until_one_of_its_tasks_changes(
    fake_engine: MakeEngine, make_fake_set: Callable[[float], bytes]
) -> None:
    engine = fake_engine(model={"poison": BAD}, tasks={"a": 1.5, "b": 0.5, "c": 1.25}, task_rows=2)
    half, other = Blend.of({"a": 0.5, "b": 0.5}), Blend.of({"a": 0.75, "b": 0.25})
    strike(engine, half, STRIKES - 1)
    strike(engine, other, 1)
    add(engine, "between", [1], "c")  # takes the only row
    drain(engine)
    strike(engine, half, 1)
    with pytest.raises(
        TaskQuarantined, match=r"the blend a:0\.5\+b:0\.5 is in quarantine: 3 requests .* one of its"
    ):
        engine.tasks.acquire(half)
    assert engine.tasks.registry.quarantined() == {}
    for choice, scale in (("a", 1.5), ("b", 0.5), (other, 1.25)):
        add(engine, "x", [1], choice)
        assert_right(engine, drain(engine)["x"], [1], scale)
    engine.tasks.upload("c", make_fake_set(0.75))
    with pytest.raises(TaskQuarantined):
        engine.tasks.acquire(half)
    engine.tasks.upload("b", make_fake_set(0.5))  # what it is already
    strike(engine, half, STRIKES - 1)
    add(engine, "x", [1], half)
    assert_right(engine, drain(engine)["x"], [1], 1.0)
    assert engine.tasks.registry.counts().leases == 0


def test_a_kept_revision_that_makes_nan_three_times_is_set_aside_by_itself(
    fake_engine: MakeEngine, make_fake_set: Callable[[float], bytes]
) -> None:
    engine = fake_engine(model={"poison": BAD}, tasks={"a": 1.5})
    old = f"a@{engine.tasks.info('a').revision[:8]}"
    engine.tasks.upload("a", make_fake_set(1.25))
    strike(engine, old)
    with pytest.raises(
        TaskQuarantined, match=r"revision .* of task 'a' is in quarantine: 3 requests .* another"
    ):
        engine.tasks.acquire(old)
    add(engine, "now", [1], "a")
    assert_right(engine, drain(engine)["now"], [1], 1.25)
    engine.tasks.rollback("a")
    add(engine, "then", [1], old)
    assert_right(engine, drain(engine)["then"], [1], 1.5)
    assert engine.tasks.registry.counts().leases == 0


def test_only_so_many_failing_blends_are_remembered() -> None:
    registry = TaskRegistry(rows=2)
    registry.set_current("a", "a-1", "channel")
    blend = Blend.of({"a": 0.5, "base": 0.5})
    for revision in ("first", *map(str, range(REMEMBERED))):
        for _ in range(STRIKES):
            lease = registry.hold(Lease(blend.name, revision, blend=blend))
            registry.strike(revision)
            registry.release(lease)
    registry.release(registry.hold(Lease(blend.name, "first", blend=blend)))
    with pytest.raises(TaskQuarantined):
        registry.hold(Lease(blend.name, "0", blend=blend))
    registry.delete("a")
    registry.release(registry.hold(Lease(blend.name, "0", blend=blend)))


def test_a_set_that_is_no_task_is_never_set_aside() -> None:
    registry = TaskRegistry(rows=2)
    for _ in range(STRIKES + 1):
        lease = registry.hold(Lease("mine.safetensors", "r"))
        assert registry.strike("r") == []
        registry.release(lease)


def test_the_base_is_never_set_aside(fake_engine: MakeEngine) -> None:
    engine = fake_engine(model={"poison": BAD})
    strike(engine, BASE_TASK, STRIKES + 1)
    add(engine, "x", [1])
    assert_right(engine, drain(engine)["x"], [1])
    assert engine.stats()["numerical_errors_total"] == STRIKES + 1


def test_a_client_cannot_make_a_healthy_task_look_broken(fake_engine: MakeEngine) -> None:
    """Banning every token leaves nothing finite to choose: a refusal, not a strike."""
    from peqa_runtime.errors import InvalidRequest

    engine = fake_engine(model={"eos_token_ids": (0,)}, tasks={"a": 1.5})
    with pytest.raises(InvalidRequest, match="whole vocabulary") as caught:
        add(engine, "x", [1], "a", min_tokens=1, stop_token_ids=tuple(range(97)))
    assert caught.value.param == "stop_token_ids"
    extreme = {"repetition_penalty": 100.0, "presence_penalty": 2.0, "temperature": 1e-4, "min_tokens": 5}
    add(engine, "y", [1] * 20, "a", stop_token_ids=tuple(range(95)), **extreme)
    assert drain(engine)["y"][-1].finish_reason != "error"


def test_random_faults_leave_nothing_behind(fake_engine: MakeEngine) -> None:
    """Chosen steps raise, chosen requests raise or give NaN, others are aborted: whoever is left is right."""
    rng = random.Random(4)
    engine = fake_engine(
        model={"poison": BAD, "explode": 95},
        tasks={"a": 1.5},
        num_blocks=40,
        max_batch_tokens=20,
        max_crashes=1000,
    )
    model: Any = engine.model
    some = [[t % 94 + 1 for t in p] for p in prompts(120, seed=9)]
    got: dict[str, list[TokenOutput]] = {}
    crashed = 0
    waiting = list(enumerate(some))
    while waiting or engine.has_work:
        for _ in range(min(rng.randrange(4), len(waiting))):
            i, prompt = waiting.pop(0)
            add(engine, str(i), prompt + [[], [], [], [BAD], [95]][i % 5], "a" if i % 2 else BASE_TASK)
        model.broken = rng.random() < 0.03
        crashed += model.broken
        if rng.random() < 0.05:
            engine.abort(str(rng.randrange(120)))
        for output in engine.step():
            got.setdefault(output.request_id, []).append(output)
        engine.scheduler.check_integrity()
        for task in engine.tasks.registry.quarantined():
            engine.tasks.upload(task, engine.tasks.content(task))
    assert crashed > 3
    assert engine.scheduler.blocks.num_used == 0
    assert engine.tasks.registry.counts().leases == 0
    right = 0
    for i, prompt in enumerate(some):
        outputs = got.get(str(i), [])
        if i % 5 < 3 and outputs and outputs[-1].finish_reason == "length":
            assert tokens(outputs) == model.expected(prompt, 6, 1.5 if i % 2 else 1.0)
            right += 1
    assert right > 25
