"""The engine's thread: streams that always end, a loop that never blocks the engine, and clean ends of every kind."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from peqa_runtime.core import BASE_TASK, Request, TokenOutput
from peqa_runtime.engine import engine as engine_module
from peqa_runtime.engine.async_engine import AsyncEngine, TokenStream
from peqa_runtime.engine.engine import REQUEST_FAILED, Engine
from peqa_runtime.engine.scheduler import Scheduler
from peqa_runtime.errors import EngineDead, InvalidRequest, Overloaded, PromptTooLong
from peqa_runtime.sampling_params import SamplingParams

MakeEngine = Callable[..., Engine]
Start = Callable[..., AsyncEngine]


@pytest.fixture
def start(fake_engine: MakeEngine) -> Iterator[Start]:
    engines: list[AsyncEngine] = []

    def make(**options: Any) -> AsyncEngine:
        engines.append(AsyncEngine(fake_engine(**options)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()
        assert not engine.alive
        assert engine.engine.scheduler.blocks.num_used == 0
        assert engine.engine.tasks.registry.counts().leases == 0, "every lease was released exactly once"


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def submit(
    engine: AsyncEngine, name: str, prompt: tuple[int, ...] = (5, 6, 7), task: str = BASE_TASK, **params: Any
) -> TokenStream:
    lease = engine.engine.tasks.acquire(task)
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params})
    return engine.submit(Request(name, prompt, sampling, task, lease.revision, lease.kind), lease)


async def read(stream: TokenStream) -> list[TokenOutput]:
    return [output async for output in stream]


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [o.token_id for o in outputs if o.token_id is not None]


@asynccontextmanager
async def held(engine: AsyncEngine) -> AsyncIterator[None]:
    """Hold the engine within a step meanwhile."""
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go_on.wait(10)

    model: Any = engine.engine.model
    model.before_forward = wait
    stream = submit(engine, "holder", max_tokens=1)
    await asyncio.to_thread(inside.wait, 10)
    try:
        yield
    finally:
        model.before_forward = lambda: None
        go_on.set()
    await read(stream)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it did not happen")


def test_streams_give_every_token_in_order(start: Start) -> None:
    engine = start(tasks={"a": 1.5})

    async def work() -> None:
        streams = [submit(engine, str(i), (i + 1, 2), "a" if i % 2 else BASE_TASK) for i in range(12)]
        for i, outputs in enumerate(await asyncio.gather(*map(read, streams))):
            want = engine.engine.model.expected([i + 1, 2], 8, 1.5 if i % 2 else 1.0)  # type: ignore[attr-defined]
            assert tokens(outputs) == want
            assert [o.finished for o in outputs] == [False] * 7 + [True]

    run(work())


def test_without_a_lease_of_its_own_a_request_pins_the_callers_revision(start: Start) -> None:
    engine = start(tasks={"a": 1.5})

    async def work() -> None:
        tasks = engine.engine.tasks
        lease = tasks.acquire("a")
        params = SamplingParams(temperature=0.0, max_tokens=8)
        streams = [
            engine.submit(Request(f"{i}", (1, 2), params, "a", lease.revision, lease.kind)) for i in range(3)
        ]
        tasks.release(lease)
        tasks.delete("a")
        for outputs in await asyncio.gather(*map(read, streams)):
            assert tokens(outputs) == engine.engine.model.expected([1, 2], 8, 1.5)  # type: ignore[attr-defined]
        assert tasks.registry.resident() == {}

    run(work())


def test_a_reader_that_stalls_holds_up_nobody(start: Start) -> None:
    engine = start()

    async def work() -> None:
        stalled, brisk = submit(engine, "stalled", max_tokens=50), submit(engine, "brisk", max_tokens=50)
        assert len(await read(brisk)) == 50
        await until(lambda: not engine.engine.has_work)
        assert len(await read(stalled)) == 50

    run(work())


def test_a_step_makes_one_call_per_loop_whatever_the_number_of_requests(start: Start) -> None:
    engine = start()

    async def work() -> None:
        loop = asyncio.get_running_loop()
        calls: list[int] = []
        original = loop.call_soon_threadsafe
        async with held(engine):
            streams = [submit(engine, str(i), max_tokens=5) for i in range(8)]

            def counted(callback: Any, *args: Any, **kwargs: Any) -> Any:
                if getattr(callback, "__name__", "") == "deliver_all":
                    calls.append(len(args[0]))
                return original(callback, *args, **kwargs)

            loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        await asyncio.gather(*map(read, streams))
        assert sum(calls) == 8 * 5 + 1
        assert len(calls) == 5 + 1

    run(work())


def test_the_last_token_does_not_wait_for_a_step_that_never_comes(start: Start) -> None:
    engine = start()
    model: Any = engine.engine.model
    inside, both_wait = threading.Event(), threading.Event()
    steps = itertools.count()

    def cancel_in_the_second() -> None:
        if next(steps) == 0:
            inside.set()
            assert both_wait.wait(10)
        else:
            engine.abort("cancelled")

    async def work() -> None:
        model.before_forward = cancel_in_the_second
        submit(engine, "first", max_tokens=1)
        await asyncio.to_thread(inside.wait, 10)
        last = submit(engine, "last", max_tokens=1)
        submit(engine, "cancelled", max_tokens=50)
        both_wait.set()
        assert len(tokens(await asyncio.wait_for(read(last), 5))) == 1

    run(work())
    assert next(steps) == 2


def test_cancel_wakes_a_waiting_reader_and_frees_the_blocks(start: Start) -> None:
    engine = start(tasks={"a": 1.5})

    async def work() -> None:
        stream = submit(engine, "x", task="a", max_tokens=200)
        first = await anext(stream)
        assert first.token_id is not None
        async with held(engine):
            parked = asyncio.create_task(read(stream))
            await asyncio.sleep(0.01)
            stream.cancel()
            stream.cancel()
            assert (await parked)[-1].finish_reason == "abort"
        await until(lambda: engine.engine.scheduler.blocks.num_used == 0)
        assert await read(stream) == []
        assert engine.engine.tasks.registry.counts().leases == 0
        assert engine.stats()["aborted_total"] == 1

    run(work())


def test_cancel_before_the_engine_has_seen_the_request(start: Start) -> None:
    engine = start()

    async def work() -> None:
        async with held(engine):
            stream = submit(engine, "x")
            stream.cancel()
        assert [o.finish_reason for o in await read(stream)] == ["abort"]
        again = submit(engine, "x")
        assert len(await read(again)) == 8

    run(work())


@pytest.mark.parametrize(
    ("limit", "message"),
    [({"max_waiting": 3}, "3 requests wait"), ({"max_waiting_tokens": 7}, "9 tokens of prompts wait")],
)
def test_too_many_waiting_are_refused_and_the_rest_is_served(
    start: Start, limit: dict[str, int], message: str
) -> None:
    engine = start(**limit, max_sequences=1)

    async def work() -> None:
        async with held(engine):
            streams = [submit(engine, str(i)) for i in range(3)]
            with pytest.raises(Overloaded, match=message) as caught:
                submit(engine, "one too many")
            assert 1 <= caught.value.retry_after <= 60
            assert engine.stats()["requests_waiting"] == 3
            streams[0].cancel()
            streams.append(submit(engine, "in its place"))
        assert [len(o) for o in await asyncio.gather(*map(read, streams))] == [1, 8, 8, 8]
        assert engine.stats()["rejected_total"] == 1

    run(work())


def test_a_request_of_many_choices_is_refused_whole_while_others_of_its_task_are_in_work(
    start: Start,
) -> None:
    engine = start(max_sequences=2, max_wait=1, tasks={"a": 1.5})

    async def work() -> None:
        await read(submit(engine, "measured"))
        engine.reserve("a", 1000).release()
        engine._queue.step(0, 1000.0)  # it takes long
        async with held(engine):
            with pytest.raises(Overloaded, match="last of 1000 choices"):
                engine.reserve(BASE_TASK, 1000)
            assert not engine._queue._reserved
            engine.reserve(BASE_TASK).release()
            many = engine.reserve("a", 1000)
            assert engine.stats()["expected_wait_seconds"] > 1
            many.release()
        assert not engine._queue._reserved
        assert engine.stats()["rejected_total"] == 1
        assert len(await read(submit(engine, "x"))) == 8

    run(work())


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [((), {}, InvalidRequest), ((97,), {}, InvalidRequest), ((1,) * 300, {}, PromptTooLong)],
)
def test_refusals_are_raised_by_submit(
    start: Start, prompt: tuple[int, ...], params: dict[str, Any], error: type[Exception]
) -> None:
    engine = start(tasks={"a": 1.5})

    async def work() -> None:
        with pytest.raises(error):
            submit(engine, "x", prompt, "a", **params)
        assert len(await read(submit(engine, "y"))) == 8

    run(work())


def test_a_failed_step_reaches_its_readers_and_the_engine_serves_on(start: Start) -> None:
    engine = start(model={"explode": 96})

    async def work() -> None:
        (last,) = await read(submit(engine, "bad", (96,)))
        assert last.finish_reason == "error"
        assert len(await read(submit(engine, "good"))) == 8

    run(work())


def test_death_reaches_every_reader_and_every_later_submit(start: Start) -> None:
    engine = start(max_crashes=1, max_sequences=1, tasks={"a": 1.5})

    async def work() -> None:
        async def expect_death(stream: TokenStream) -> None:
            with pytest.raises(EngineDead):
                await read(stream)
            with pytest.raises(EngineDead):
                await anext(stream)

        streams = []
        async with held(engine):
            for i in range(4):
                streams.append(submit(engine, str(i), (96,), "a"))

            def boom(_: Any) -> Any:
                raise RuntimeError("boom")

            engine.engine.runner.run = boom  # type: ignore[method-assign]
        await asyncio.gather(*map(expect_death, streams))
        await until(lambda: not engine.alive)
        with pytest.raises(EngineDead, match="boom"):
            submit(engine, "late", task="a")

    run(work())


def test_even_an_error_outside_the_step_reaches_the_readers(start: Start) -> None:
    engine = start()

    async def work() -> None:
        async with held(engine):
            stream = submit(engine, "x")

            engine.engine.step = a_bug  # type: ignore[method-assign]
        with pytest.raises(EngineDead, match="KeyError"):
            await read(stream)

    run(work())


def a_bug(*_: Any, **__: Any) -> Any:
    raise KeyError("a bug")


@pytest.mark.parametrize("where", ["before it is queued", "halfway", "when it is queued"])
def test_an_error_in_one_request_ends_that_request(
    start: Start, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    engine = start(tasks={"a": 1.5, "b": 0.5}, max_sequences=2)
    scheduler, registry = engine.engine.scheduler, engine.engine.tasks.registry
    owner, name = {
        "before it is queued": (engine_module, "Sequence"),
        "halfway": (scheduler.waiting, "add"),
        "when it is queued": (scheduler, "add"),
    }[where]
    original: Any = getattr(owner, name)

    def fail_for_b(item: Any, *rest: Any, **more: Any) -> Any:
        is_b = getattr(item, "request", item).task == "b"
        if is_b and where != "when it is queued":
            a_bug()
        found = original(item, *rest, **more)
        return a_bug() if is_b else found

    async def work() -> None:
        async with held(engine):
            others = [submit(engine, f"{i}", (i + 1, 2), "a") for i in range(3)]
            bad = submit(engine, "bad", task="b")
            others += [submit(engine, f"{i}", (i + 1, 2), "a") for i in range(3, 6)]
            monkeypatch.setattr(owner, name, fail_for_b)
        (last,) = await read(bad)
        assert (last.finish_reason, last.error, last.error_code) == (
            "error",
            REQUEST_FAILED,
            "request_failed",
        )
        assert registry.holders(registry.current("b") or "") == 0
        for i, outputs in enumerate(await asyncio.gather(*map(read, others))):
            assert tokens(outputs) == engine.engine.model.expected([i + 1, 2], 8, 1.5)  # type: ignore[attr-defined]
        monkeypatch.undo()
        assert engine.alive
        assert engine.tasks_in_work() == ({}, {})
        engine.engine.scheduler.check_integrity()
        assert not engine.engine.has_work
        assert len(await read(submit(engine, "bad", task="b"))) == 8, "its id is free again"
        stats = engine.stats()
        assert (stats["errors_total"], stats["requests_total"]) == (1, 9)
        assert stats["restarts_total"] == (where != "before it is queued")

    run(work())


def test_a_queue_that_takes_nobody_in_ends_the_engine(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(tasks={"a": 1.5})
    monkeypatch.setattr(Scheduler, "add", a_bug)

    async def work() -> None:
        for name in ("0", "1"):
            assert (await read(submit(engine, name, task="a")))[-1].error_code == "request_failed"
        with pytest.raises(EngineDead, match="3 crashes"):
            await read(submit(engine, "2", task="a"))

    run(work())


def test_stop_drains_then_aborts(start: Start) -> None:
    engine = start(max_sequences=2)

    async def work() -> None:
        async with held(engine):
            short, long = submit(engine, "short", max_tokens=4), submit(engine, "long", max_tokens=200)
            stopping = asyncio.create_task(asyncio.to_thread(engine.stop, 0.3))
            await asyncio.sleep(0.05)
            with pytest.raises(EngineDead, match="shutting down"):
                submit(engine, "late")
            model: Any = engine.engine.model
        model.before_forward = lambda: time.sleep(0.01)
        assert (await read(short))[-1].finish_reason == "length"
        assert (await read(long))[-1].finish_reason == "abort"
        await stopping
        assert not engine.alive

    run(work())


def test_stop_ends_as_soon_as_all_are_done(start: Start) -> None:
    engine = start()

    async def work() -> None:
        stream = submit(engine, "x")
        started = time.monotonic()
        await asyncio.to_thread(engine.stop, 15.0)
        assert time.monotonic() - started < 5
        assert len(await read(stream)) == 8

    run(work())


def test_stop_of_an_idle_engine_returns(start: Start) -> None:
    engine = start()
    engine.stop(10.0)
    engine.stop()
    assert not engine.alive


def test_a_loop_that_is_gone_does_not_stop_the_others(start: Start) -> None:
    engine = start()

    async def leave() -> None:
        submit(engine, "orphan", max_tokens=200)

    async def work() -> None:
        assert len(await read(submit(engine, "x"))) == 8
        await until(lambda: engine.engine.scheduler.blocks.num_used == 0)

    model: Any = engine.engine.model
    model.before_forward = lambda: time.sleep(0.005)
    run(leave())
    run(work())


def test_an_idle_engine_sleeps(start: Start) -> None:
    engine = start()
    run(_read_one(engine))
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


async def _read_one(engine: AsyncEngine) -> None:
    await read(submit(engine, "x"))


def test_many_tasks_take_turns_on_few_rows(start: Start) -> None:
    scales = {f"t{i}": 0.5 + i / 10 for i in range(12)}
    engine = start(tasks=scales, task_rows=3)

    async def work() -> None:
        names = [t for t in scales for _ in range(3)]
        streams = [submit(engine, f"{t}-{i}", task=t) for i, t in enumerate(names)]
        for name, outputs in zip(names, await asyncio.gather(*map(read, streams)), strict=True):
            want = engine.engine.model.expected([5, 6, 7], 8, round(scales[name], 3))  # type: ignore[attr-defined]
            assert tokens(outputs) == want, name

    run(work())
