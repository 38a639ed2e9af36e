"""Uploads, rollbacks and deletes of sets of every kind while requests run on fewer rows than there are tasks."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import random
import threading
from pathlib import Path

import torch

from peqa_runtime.core import SCALE_KINDS, Request
from peqa_runtime.engine.async_engine import AsyncEngine
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.errors import NoSuchRevision, UnknownTask
from peqa_runtime.sampling_params import SamplingParams

_spec = importlib.util.spec_from_file_location(
    "cases", Path(__file__).with_name("test_batch_independence.py")
)
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

PROMPT = (5, 6, 7, 8, 9) * 4
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
REQUESTS = 400
MIN_CHANGES = 20


def test_every_answer_is_its_own_revisions(tiny_base: Path) -> None:
    torch.set_num_threads(1)
    config = EngineConfig(
        num_blocks=40, block_size=8, max_batch_tokens=40, task_rows=3, group_rows=2, max_sequences=12
    )
    engine = Engine(tiny_base, device="cpu", config=config)
    sets = [cases.random_set(engine, kind, i, 0.3) for i, kind in enumerate(SCALE_KINDS * 3)]
    expected: dict[str, tuple[int, ...]] = {}
    for data in sets:
        revision = engine.tasks.upload("t0", data).revision
        expected[revision] = engine.generate([PROMPT], GREEDY, "t0")[0].token_ids
    assert len(set(expected.values())) == len(sets)

    served = AsyncEngine(engine)
    done, changes, faults = itertools.count(), [], []
    stop = threading.Event()

    def change(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            task, what = f"t{rng.randrange(4)}", rng.random()
            try:
                if what < 0.7:
                    engine.tasks.upload(task, rng.choice(sets))
                elif what < 0.85:
                    engine.tasks.rollback(task)
                else:
                    engine.tasks.delete(task)
                changes.append(task)
            except (UnknownTask, NoSuchRevision):
                pass
            except BaseException as error:  # noqa: BLE001  a thread's failure must fail the test
                faults.append(repr(error))
            stop.wait(rng.random() * 0.01)

    async def ask(seed: int) -> None:
        rng = random.Random(seed)
        for number in done:
            if number >= REQUESTS and len(changes) > MIN_CHANGES:
                return
            try:
                lease = await asyncio.to_thread(engine.tasks.acquire, f"t{rng.randrange(4)}")
            except UnknownTask:
                continue
            request = Request(str(number), PROMPT, GREEDY, lease.task, lease.revision, lease.kind)
            stream, gone = served.submit(request, lease), rng.random() < 0.15
            tokens: list[int | None] = []
            async for output in stream:
                if output.token_id is not None:
                    tokens.append(output.token_id)
                if gone and len(tokens) == 3:
                    stream.cancel()
            if not gone and tuple(tokens) != expected[lease.revision]:
                faults.append(f"{lease.kind}: {tokens}, {output.finish_reason} {output.error}")

    async def clients() -> None:
        await asyncio.wait_for(asyncio.gather(*(ask(seed) for seed in range(16))), 120)

    changers = [threading.Thread(target=change, args=(seed,)) for seed in range(2)]
    for changer in changers:
        changer.start()
    try:
        asyncio.run(clients())
    finally:
        stop.set()
        for changer in changers:
            changer.join()
        served.stop()
    assert faults == []
    assert engine.tasks.registry.counts().leases == 0
    assert engine.scheduler.blocks.num_used == 0
    assert engine.stats()["step_failures_total"] == 0
