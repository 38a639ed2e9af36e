"""Ten thousand tasks in one store: what each costs at the start, in memory, at an upload, and at its first request.

`make test ALL=1 ARGS="-s -k ten_thousand"` prints the figures.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

from peqa_runtime.core import Lease, Request
from peqa_runtime.engine.async_engine import AsyncEngine
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.model import read_manifest
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.synthetic import fill_store, synthetic_sets
from peqa_runtime.scales.task_folder import TaskFolders
from peqa_runtime.scales.task_library import TaskLibrary
from peqa_runtime.scales.task_registry import TaskRegistry

pytestmark = [pytest.mark.slow, pytest.mark.alone]

COUNT = 10_000
COLD = 240
MEMORY = """
import gc, tracemalloc
from pathlib import Path
from peqa_runtime.model import read_manifest
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.task_library import TaskLibrary
from peqa_runtime.scales.task_registry import TaskRegistry

manifest = read_manifest(Path({base!r}))
tracemalloc.start()
library = TaskLibrary(ScaleStore(Path({store!r}), manifest), TaskRegistry(rows=4))
gc.collect()
print(tracemalloc.get_traced_memory()[0])
"""  # in a process of its own: tracemalloc counts whatever else goes on in this one
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def puts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A store with `COUNT` tasks, and the seconds that each put took."""
    folder = tmp_path_factory.mktemp("many") / "store"
    store = ScaleStore(folder, read_manifest(tiny_base), durable=False)
    seconds, before = [], time.perf_counter()
    for _ in fill_store(store, COUNT):
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    store.close()
    return folder, seconds


def test_the_last_upload_costs_what_the_first_did(puts: tuple[Path, list[float]]) -> None:
    _, seconds = puts
    first, last = median(seconds[:1000]), median(seconds[-1000:])
    print(f"\nput without syncs: {first * 1e3:.2f} ms among 1 000 tasks, {last * 1e3:.2f} ms among {COUNT}")
    assert last < 3 * first


def test_an_upload_touches_its_own_task_only(
    puts: tuple[Path, list[float]], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ScaleStore(puts[0], read_manifest(tiny_base), durable=False)
    looked: list[str] = []
    stamp, history = TaskFolders.stamp, TaskFolders.history
    monkeypatch.setattr(TaskFolders, "tasks", None)
    monkeypatch.setattr(TaskFolders, "stamp", lambda self, task: (looked.append(task), stamp(self, task))[1])
    monkeypatch.setattr(
        TaskFolders, "history", lambda self, task: (looked.append(task), history(self, task))[1]
    )
    for _, scale_set, _ in synthetic_sets(read_manifest(tiny_base), 18, seed=1):
        store.put("synthetic-00007", scale_set)
    store.rollback("synthetic-00007")
    assert set(looked) == {"synthetic-00007"}
    assert len(store.revisions("synthetic-00007")) == 16


def test_a_start_is_short_and_a_task_is_a_small_record(
    puts: tuple[Path, list[float]], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TaskFolders, "load", None)  # no set is read
    manifest = read_manifest(tiny_base)
    started = time.perf_counter()
    TaskLibrary(ScaleStore(puts[0], manifest), TaskRegistry(rows=4))
    seconds = time.perf_counter() - started
    library = TaskLibrary(ScaleStore(puts[0], manifest), TaskRegistry(rows=4))
    assert library.registry.counts().tasks == COUNT
    program = MEMORY.format(store=str(puts[0]), base=str(tiny_base))
    size = int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)
    (puts[0] / "index.json").unlink()
    started = time.perf_counter()
    again = ScaleStore(puts[0], manifest)
    anew = time.perf_counter() - started
    assert again.tasks() == library.store.tasks()
    print(
        f"\n{COUNT} tasks: opened in {seconds:.2f} s, without the index in {anew:.2f} s, {size / 1e6:.1f} MB of memory"
    )
    assert size < 2000 * COUNT
    assert seconds < 5


def test_first_tokens_of_cold_tasks_beside_resident_traffic(
    puts: tuple[Path, list[float]], tiny_base: Path
) -> None:
    """Four device rows, a host cache of 32 sets, and always more tasks in flight than rows."""
    manifest = read_manifest(tiny_base)
    size = next(synthetic_sets(manifest, 1))[1].num_bytes
    config = EngineConfig(num_blocks=256, max_sequences=16, task_rows=5, host_cache_bytes=32 * size)
    engine = Engine(tiny_base, puts[0], device="cpu", config=config)
    served, rng = AsyncEngine(engine), random.Random(0)
    cold_tasks = [f"synthetic-{n:05d}" for n in rng.sample(range(100, COUNT), COLD)]
    warm_tasks = [f"synthetic-{n:05d}" for n in range(2)]
    answers: dict[tuple[str, tuple[int, ...]], tuple[int | None, ...]] = {}

    async def ask(number: str, task: str) -> float:
        prompt = tuple(rng.randrange(5, 290) for _ in range(12))
        started = time.perf_counter()
        lease: Lease = await asyncio.wrap_future(engine.tasks.acquire_soon(task))
        first, tokens = 0.0, []
        request = Request(number, prompt, GREEDY, lease.task, lease.revision, lease.kind)
        async for output in served.submit(request, lease):
            first = first or time.perf_counter() - started
            assert output.error is None
            tokens.append(output.token_id)
        answers[task, prompt] = tuple(tokens)
        return first

    async def run() -> tuple[list[float], list[float]]:
        for i, task in enumerate(warm_tasks):
            await ask(f"first-{i}", task)
        warm = [await ask(f"warm-{i}", warm_tasks[i % 2]) for i in range(COLD)]
        cold = [await ask(f"cold-{i}", task) for i, task in enumerate(cold_tasks)]
        for at in range(0, COLD, 40):  # forty tasks at once on four rows: all of them end
            some = enumerate(cold_tasks[at : at + 40])
            await asyncio.wait_for(asyncio.gather(*(ask(f"many-{at + i}", task) for i, task in some)), 120)
        return sorted(warm), sorted(cold)

    try:
        warm, cold = asyncio.run(run())
    finally:
        served.stop()
    at = int(0.99 * COLD)
    print(
        f"\nfirst token: warm p50 {warm[COLD // 2] * 1e3:.1f} p99 {warm[at] * 1e3:.1f} ms, "
        f"cold p50 {cold[COLD // 2] * 1e3:.1f} p99 {cold[at] * 1e3:.1f} ms"
    )
    assert cold[at] - warm[at] < 0.1
    assert engine.tasks.host_counts()[0] == 32
    assert engine.tasks.registry.counts().leases == 0
    for (task, prompt), tokens in rng.sample(list(answers.items()), 40):
        assert engine.generate([prompt], GREEDY, task)[0].token_ids == tokens
