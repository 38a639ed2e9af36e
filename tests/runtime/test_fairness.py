"""Tasks of one priority share tokens: the stated bound holds, a crowd starves nobody, and absence earns nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from peqa_runtime.core import Blend, Request, payer_of
from peqa_runtime.engine import fair_queue
from peqa_runtime.engine.batch import StepResult
from peqa_runtime.engine.block_manager import BlockManager
from peqa_runtime.engine.fair_queue import FairQueue
from peqa_runtime.engine.prefix_cache import PrefixCache
from peqa_runtime.engine.scheduler import Scheduler
from peqa_runtime.engine.sequence import Sequence
from peqa_runtime.sampling_params import SamplingParams

PLACES = 4


def sequence(name: str, task: str, prompt: int = 4, output: int = 4, priority: int = 0) -> Sequence:
    tokens = tuple(range(1, prompt + 1))
    params = SamplingParams(max_tokens=output)
    return Sequence(Request(name, tokens, params, task, priority=priority), list(tokens))


def scheduler(blocks: int = 400, budget: int = 32) -> Scheduler:
    return Scheduler(BlockManager(blocks, 2), None, max_batch_tokens=budget, max_sequences=PLACES)  # type: ignore[arg-type]


def step(s: Scheduler) -> Counter[str]:
    """Run a step; the tokens computed per task."""
    batch = s.schedule()
    tokens: Counter[str] = Counter()
    for item in batch.scheduled:
        tokens[item.sequence.request.task] += item.num_tokens
    s.update(batch, [StepResult(7 if item.samples else None) for item in batch.scheduled])
    s.check_integrity()
    return tokens


def waiting(s: Scheduler) -> set[str]:
    return {w.request.task for w in s.waiting if not w.num_preemptions}


def requests(task: str, sizes: Iterator[tuple[int, int]]) -> Iterator[Sequence]:
    for number, (prompt, output) in enumerate(sizes):
        yield sequence(f"{task}{number}", task, prompt, output)


SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(a=SIZES, b=SIZES, budget=st.integers(2, 64), blocks=st.integers(40, 200), b_from=st.integers(0, 30))
def test_two_backlogged_tasks_differ_by_no_more_than_the_bound(
    a: list[tuple[int, int]], b: list[tuple[int, int]], budget: int, blocks: int, b_from: int
) -> None:
    """Over every stretch of steps: as the difference is checked against its smallest and its largest value so far."""
    s = scheduler(blocks, budget)
    bound = 2 * PLACES * max(prompt + output for prompt, output in (*a, *b))
    sources = {"a": requests("a", itertools.cycle(a)), "b": requests("b", itertools.cycle(b))}
    difference, least, most = 0, 0, 0
    computed: dict[str, int] = {}  # of each request, recomputation not counted
    for at in range(250):
        for task, source in sources.items():
            new = sum(w.request.task == task and not w.num_preemptions for w in s.waiting)
            for _ in range(2 * PLACES - new if task == "a" or at >= b_from else 0):
                s.add(next(source))
        before = dict(computed)
        batch = s.schedule()
        for item in batch.scheduled:
            name = item.sequence.request_id
            computed[name] = max(computed.get(name, 0), item.start + item.num_tokens)
        s.update(batch, [StepResult(7 if item.samples else None) for item in batch.scheduled])
        if at < b_from:
            continue
        for name, tokens in computed.items():
            difference += (tokens - before.get(name, 0)) * (1 if name.startswith("a") else -1)
        least, most = min(least, difference), max(most, difference)
        assert most - least <= bound


def test_long_prompts_get_no_more_than_short_ones() -> None:
    s = scheduler()
    for i in range(300):
        s.add(sequence(f"long{i}", "long", prompt=60, output=4))
    for i in range(600):
        s.add(sequence(f"short{i}", "short", prompt=4, output=4))
    total: Counter[str] = Counter()
    while {"long", "short"} <= waiting(s):
        total += step(s)
    assert abs(total["long"] - total["short"]) <= 2 * PLACES * 64
    assert sum(total.values()) > 6000, "or the bound says little"


def test_a_thousand_requests_of_one_task_do_not_starve_one_of_another() -> None:
    s = scheduler()
    for i in range(1000):
        s.add(sequence(f"crowd{i}", "crowd", prompt=8, output=8))
    for _ in range(50):
        step(s)
    s.add(sequence("single", "single"))
    before = len(s.waiting)
    while "single" in waiting(s):
        step(s)
    started = before - len(s.waiting)
    assert started <= 2 + PLACES, "it was its turn as soon as a place was free"


def test_many_blends_of_two_tasks_get_no_more_than_two_tasks() -> None:
    """One client asks for 200 different mixes of a and b, another for c: a third each, not 200 to 1."""
    s = scheduler()
    for i in range(200):
        weight = 0.25 + i / 400
        blend = Blend.of({"a": weight, "b": 1 - weight}).name
        s.add(sequence(f"blend{i}", blend, prompt=8, output=8))
        s.add(sequence(f"c{i}", "c", prompt=8, output=8))
    total: Counter[str] = Counter()
    while {"a", "b", "c"} <= {w.request.payer for w in s.waiting}:
        for task, tokens in step(s).items():
            total[payer_of(task)] += tokens
    assert sum(total.values()) > 1500, "or the bound says little"
    assert max(total.values()) - min(total.values()) <= 2 * PLACES * 16


def test_who_pays() -> None:
    assert payer_of("sql") == payer_of("sql:1") == "sql"
    assert payer_of(Blend.of({"b": 0.5, "a": 0.5}).name) == "a"
    assert payer_of(Blend.of({"z": 0.999999, "a": 0.000001}).name) == "z"
    assert payer_of(Blend.of({"base": 0.2, "sql@1a2b": 0.5, "x": 0.3}).name) == "sql"
    path = "/sets/a+b:0.5/set.safetensors"
    assert [payer_of(name) for name in (path, "a:1.2.3", "a:")] == [path, "a:1.2.3", "a:"], "no blends"


def crowded(cache: bool, crowd: list[str]) -> Scheduler:
    """Every place is taken, for long; prompts are all different."""
    s = Scheduler(
        BlockManager(400, 2, PrefixCache("ab" * 32, 2) if cache else None),
        None,  # type: ignore[arg-type]
        max_batch_tokens=64,
        max_sequences=PLACES,
    )
    for i, task in enumerate(crowd):
        s.add(different(f"{task}{i}", task, 10 + i, output=100))
    for _ in range(20):
        step(s)
    assert len(s.running) == PLACES
    return s


def different(name: str, task: str, first: int, output: int) -> Sequence:
    tokens = tuple(range(first * 100, first * 100 + 9))
    return Sequence(Request(name, tokens, SamplingParams(max_tokens=output), task), list(tokens))


def test_a_task_without_a_place_gets_one_of_a_task_with_several() -> None:
    s = crowded(True, ["a", "a", "a", "a", "a"])
    s.add(different("b", "b", 50, output=2))
    assert step(s) == {"a": 3, "b": 9}
    assert s.num_preemptions == 1
    s.add(different("b2", "b", 51, output=2))
    assert step(s) == {"a": 3, "b": 1}, "it has its place"
    assert s.num_preemptions == 1
    assert step(s) == {"a": 4}, "the preempted one comes back, and finds all that it had computed"
    steps = 0
    while "b" not in step(s):
        steps += 1
    assert steps <= 9, "at the latest when as many tokens were computed for a as for b"
    while s.has_work:
        step(s)


def test_nobody_is_preempted_where_that_would_be_wrong_or_dear() -> None:
    for cache, crowd in ((True, ["a", "b", "c", "d"]), (False, ["a", "a", "a", "a"])):
        s = crowded(cache, crowd)
        s.add(different("new", "new", 50, output=2))
        assert "new" not in step(s), "each has one place, or would compute everything again"
        assert s.num_preemptions == 0
    s = crowded(True, ["a", "a", "a", "b"])
    s.add(different("b2", "b", 50, output=2))
    assert step(s) == {"a": 3, "b": 1}, "b has a place"
    s = crowded(True, ["greedy", "a", "a", "a"])
    s.add(different("crowd", "a", 50, output=2))
    (level,) = s.waiting._levels.values()
    level.shares["greedy"].served += 1000
    s.abort("greedy0")
    step(s)
    s.add(different("greedy again", "greedy", 51, output=2))
    assert step(s) == {"a": 4}, "who was served more does not push others out"
    assert s.num_preemptions == 0


def test_nobody_waits_while_there_is_room() -> None:
    """Fairness holds nothing back: a task alone gets everything."""
    s = scheduler()
    for i in range(40):
        s.add(sequence(f"r{i}", "only", prompt=4, output=4))
    for _ in range(10):
        assert step(s)["only"] >= PLACES


def test_having_been_away_earns_nothing() -> None:
    s = scheduler()
    s.add(sequence("early", "b"))
    for i in range(200):
        s.add(sequence(f"a{i}", "a", prompt=8, output=8))
    for _ in range(60):
        step(s)
    assert "b" not in waiting(s)
    for i in range(200):
        s.add(sequence(f"b{i}", "b", prompt=8, output=8))
    total: Counter[str] = Counter()
    for _ in range(60):
        total += step(s)
    assert total["b"] <= total["a"] + 2 * PLACES * 16


def test_counters_are_each_prioritys_own() -> None:
    s = scheduler()
    for i in range(40):
        s.add(sequence(f"urgent{i}", "a", priority=-1))
    for _ in range(30):
        step(s)
    for i in range(40):
        s.add(sequence(f"a{i}", "a", prompt=8, output=8))
        s.add(sequence(f"b{i}", "b", prompt=8, output=8))
    total: Counter[str] = Counter()
    while {"a", "b"} <= waiting(s):
        total += step(s)
    assert abs(total["a"] - total["b"]) <= 2 * PLACES * 16, "what a got before was of another priority"


def test_names_that_are_gone_are_forgotten() -> None:
    queue = FairQueue()
    arrivals = itertools.count()

    def add(task: str) -> Sequence:
        s = sequence(task, task)
        s.arrival = next(arrivals)
        queue.add(s)
        return s

    add("stays")
    for i in range(5000):
        s = add(f"t{i}")
        queue.start(s)
        queue.charge(s, 1)
        queue.drop(s, running=True)
    (level,) = queue._levels.values()
    assert len(level.shares) == 5001, "those ahead of the one that waits are remembered"
    stays = next(iter(queue))
    queue.start(stays)
    queue.charge(stays, 10)
    for i in range(5000, 16_000):
        queue.drop(add(f"t{i}"), running=False)
    assert len(level.shares) < 200
    queue.drop(stays, running=True)
    assert not queue._levels


def test_a_start_looks_at_few_of_thousands_of_tasks() -> None:
    queue = FairQueue()
    for i in range(10_000):
        s = sequence(f"r{i}", f"t{i}")
        s.arrival = i
        queue.add(s)
    looked = 0
    place = fair_queue._Share.place.fget  # type: ignore[attr-defined]

    def counting(share: object) -> object:
        nonlocal looked
        looked += 1
        return place(share)

    fair_queue._Share.place = property(counting)  # type: ignore[assignment, method-assign]
    try:
        candidates = queue.candidates()
        for s in itertools.islice(candidates, 64):
            queue.start(s)
            queue.charge(s, 100)
        candidates.close()
    finally:
        fair_queue._Share.place = property(place)  # type: ignore[method-assign]
    assert looked < 1000
