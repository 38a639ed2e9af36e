"""Random workloads against a memory that remembers what was written where: nothing leaks, nothing is shared wrongly.

The memory stands for the KV cache. Computing a token writes "these weights, this tenant, these tokens up to here" into
its slot, and every token computed reads all slots before it through the block table and checks what is in them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peqa_runtime.core import BASE_TASK, Blend, Placement, Request, ScaleKind, TokenLogprobs, TokenOutput
from peqa_runtime.engine.batch import Batch, ScheduledSequence, StepResult
from peqa_runtime.engine.block_manager import BlockManager
from peqa_runtime.engine.prefix_cache import PrefixCache
from peqa_runtime.engine.scheduler import Scheduler
from peqa_runtime.engine.sequence import Sequence
from peqa_runtime.sampling_params import SamplingParams


@dataclass
class Rows:
    """As many rows as `limit`; a running revision keeps its own."""

    limit: int
    placed: dict[str, int] = field(default_factory=dict)

    def place(
        self, revision: str, kind: ScaleKind, *, in_use: Collection[str] | None = None
    ) -> Placement | None:
        write = revision not in self.placed
        if write:
            idle = [r for r in self.placed if r not in (in_use or ())]
            if len(self.placed) == self.limit and not idle:
                return None
            row = self.placed.pop(idle[0]) if len(self.placed) == self.limit else len(self.placed) + 1
            self.placed[revision] = row
        return Placement(self.placed[revision], 0, write)


class Memory:
    """What every slot of the cache and every row of the bank holds."""

    def __init__(self, block_size: int) -> None:
        self.size = block_size
        self.slots: dict[int, object] = {}
        self.rows: dict[int, str] = {}
        self.found = 0

    def run(self, batch: Batch) -> list[StepResult]:
        for write in batch.bank_writes:
            self.rows[write.row] = write.revision
        written: Counter[int] = Counter()
        for item in batch.scheduled:  # all write before any reads, as the kernels of one step do
            for position in range(item.start, item.start + item.num_tokens):
                slot = self.slot(item.sequence, position)
                written[slot] += 1
                self.slots[slot] = self.content(item.sequence, position)
        assert not written or max(written.values()) == 1, "two write into one slot"
        return [self.read(item) for item in batch.scheduled]

    def slot(self, sequence: Sequence, position: int) -> int:
        return sequence.block_table[position // self.size] * self.size + position % self.size

    @staticmethod
    def content(sequence: Sequence, position: int) -> object:
        request = sequence.request
        return request.revision, request.cache_salt, tuple(sequence.token_ids[: position + 1])

    def read(self, item: ScheduledSequence) -> StepResult:
        sequence = item.sequence
        revision = sequence.request.revision
        assert revision == "" or self.rows[sequence.row] == revision, "another set is in the row"
        assert (revision == "") == (sequence.row == 0)
        for position in range(item.start + item.num_tokens):
            assert self.slots[self.slot(sequence, position)] == self.content(sequence, position), position
        samples = item.samples and sequence.request.params.max_tokens > 0
        prompt = tuple(TokenLogprobs(p, -1.0) for p in item.prompt_logprob_positions)
        return StepResult(next_token(sequence) if samples else None, prompt_logprobs=prompt)


def next_token(sequence: Sequence) -> int:
    """What the "model" says: a few values only, so that generated texts meet again."""
    return (sum(sequence.token_ids) * 7 + len(sequence.request.revision)) % 3 + 1


def answer(request: Request) -> list[int]:
    """The tokens that a request gets when it is alone."""
    s = Sequence(request, list(request.prompt_token_ids))
    for _ in range(request.params.max_tokens):
        s.token_ids.append(next_token(s))
    return s.token_ids[s.num_prompt_tokens :]


@dataclass(frozen=True)
class Event:
    """What happens at a step: a request comes, one is aborted (before or during the step), or the step fails."""

    step: int
    kind: str
    request: Request | None = None
    name: str = ""


@dataclass(frozen=True)
class World:
    blocks: int
    block_size: int
    budget: int
    places: int
    rows: int
    cache: bool
    events: tuple[Event, ...]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    size, blocks = draw(st.sampled_from([1, 2, 4])), draw(st.integers(8, 40))
    room = blocks * size
    names = [f"r{i}" for i in range(draw(st.integers(1, 24)))]
    beginnings = draw(st.lists(st.lists(st.integers(1, 3), max_size=16), min_size=1, max_size=3))
    events = []
    for name in names:
        beginning = draw(st.sampled_from(beginnings))
        prompt = [*beginning, *draw(st.lists(st.integers(1, 3), min_size=1, max_size=12))][: room - 1]
        params = SamplingParams(
            max_tokens=draw(st.integers(0, min(10, room - len(prompt)))),
            prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
        )
        revision = draw(st.sampled_from(["", "x", "x", "yy", "zzz", "0.75", "0.5"]))
        task = draw(st.sampled_from(["a", "b"])) + revision if revision else BASE_TASK
        if revision.startswith("0"):  # a blend, which has a row of its own and counts for one of two tasks
            task = Blend.of({"ax": float(revision), "byy": 1 - float(revision)}).name
        request = Request(
            name,
            tuple(prompt),
            params,
            task,
            revision,
            priority=draw(st.sampled_from([0, 0, 0, 1, -1])),
            cache_salt=draw(st.sampled_from(["", "", "", "s"])),
        )
        events.append(Event(draw(st.integers(0, 30)), "add", request))
    for kind in draw(st.lists(st.sampled_from(["abort", "abort in step", "fail", "nan"]), max_size=6)):
        events.append(Event(draw(st.integers(0, 40)), kind, name=draw(st.sampled_from(names))))
    return World(
        blocks=blocks,
        block_size=size,
        budget=draw(st.integers(1, 32)),
        places=draw(st.integers(1, 8)),
        rows=draw(st.integers(1, 3)),
        cache=draw(st.sampled_from([True, True, True, False])),
        events=tuple(sorted(events, key=lambda e: e.step)),
    )


def live(world: World) -> Scheduler:
    """Run a world to its end, checking every step."""
    cache = PrefixCache("ab" * 32, world.block_size) if world.cache else None
    s = Scheduler(
        BlockManager(world.blocks, world.block_size, cache),
        Rows(world.rows),
        max_batch_tokens=world.budget,
        max_sequences=world.places,
        max_prompt_logprob_rows=5,
    )
    memory = Memory(world.block_size)
    requests: dict[str, Request] = {}
    outputs: dict[str, list[TokenOutput]] = defaultdict(list)
    gone: set[str] = set()
    events, at = list(world.events), 0
    while events or s.has_work:
        now = [e for e in events if e.step <= at]
        events = events[len(now) :]
        for event in now:
            if event.request is not None:
                requests[event.request.request_id] = event.request
                s.add(Sequence(event.request, list(event.request.prompt_token_ids)))
            elif event.kind == "abort" and s.abort(event.name):
                gone.add(event.name)
        batch = s.schedule()
        check_batch(batch, world, s)
        results = memory.run(batch)
        for event in now:
            if event.kind == "abort in step" and s.abort(event.name):
                gone.add(event.name)
        news = []
        if any(event.kind == "fail" for event in now):
            for item in batch.scheduled:  # nobody knows how far it came
                for position in range(item.start, item.start + item.num_tokens):
                    if item.sequence.status == "running":
                        memory.slots[memory.slot(item.sequence, position)] = "spoiled"
            news = s.fail([item.sequence for item in batch.scheduled], "boom", "request_failed")
        else:
            bad = {event.name for event in now if event.kind == "nan"}
            for i, item in enumerate(batch.scheduled):
                if item.sequence.request_id in bad and item.sequence.status == "running":
                    results[i] = StepResult(finite=False)
                    for position in range(item.sequence.num_computed_tokens + item.num_tokens):
                        memory.slots[memory.slot(item.sequence, position)] = "not a number"
            harmed = {i.sequence for i in batch.scheduled if i.sequence.request_id in bad}
            news = s.update(batch, results)
            for sequence in list(s.running):  # who shares its blocks reads the same numbers
                if harmed and any(
                    memory.slots.get(b * memory.size) == "not a number" for b in sequence.block_table
                ):
                    news += s.fail([sequence], "NaN", "numerical_error")
        for output in news:
            outputs[output.request_id].append(output)
        s.check_integrity()
        at += 1
        assert at < 5000, "everything ends"
    assert s.blocks.num_used == 0
    assert not len(s.waiting)
    for name, request in requests.items():
        check_answer(request, outputs[name], name in gone)
    return s


def check_batch(batch: Batch, world: World, s: Scheduler) -> None:
    assert batch.num_tokens <= world.budget
    assert len(s.running) <= world.places
    assert sum(len(i.prompt_logprob_positions) for i in batch.scheduled) <= 5
    assert len({i.sequence for i in batch.scheduled}) == len(batch.scheduled), (
        "nobody computes twice in a step"
    )
    assert batch.scheduled or not s.running, "a step in which somebody runs computes something"
    for item in batch.scheduled:
        assert item.num_tokens > 0
        assert item.start == item.sequence.num_computed_tokens < item.sequence.num_tokens
        assert item.sequence.status == "running"


def check_answer(request: Request, outputs: list[TokenOutput], gone: bool) -> None:
    tokens = [o.token_id for o in outputs if o.token_id is not None]
    want = answer(request)
    assert tokens == want[: len(tokens)]
    assert [o.finished for o in outputs[:-1]] == [False] * (len(outputs) - 1)
    if gone:
        assert not outputs or not outputs[-1].finished
        return
    assert outputs[-1].finish_reason in ("length", "error")
    if outputs[-1].finish_reason == "length":
        assert tokens == want
        if request.params.prompt_logprobs is not None:
            given_logprobs = outputs[0].prompt_logprobs
            assert given_logprobs is not None
            assert [p and p.token_id for p in given_logprobs] == [
                None,
                *range(len(request.prompt_token_ids) - 1),
            ]


@settings(max_examples=250, deadline=None)
@given(worlds())
def test_any_world(world: World) -> None:
    live(world)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=500, deadline=None)
@given(worlds())
def test_many_worlds(world: World) -> None:
    live(world)


def busy_world(**change: object) -> World:
    """Forty requests of three revisions, each with a beginning of its own, on few blocks."""
    events = []
    for i in range(40):
        beginning = ([1, 2, 3] * 6, [3, 2, 1] * 6, [2] * 18)[i % 3]
        revision = ("", "x", "yy")[i % 3]
        params = SamplingParams(max_tokens=12)
        prompt = tuple([*beginning, *([i % 3 + 1] * (i % 7 + 1))])
        events.append(Event(i // 3, "add", Request(f"r{i}", prompt, params, revision or BASE_TASK, revision)))
    world = {"blocks": 44, "block_size": 2, "budget": 24, "places": 6, "rows": 2, "cache": True}
    return World(**{**world, "events": tuple(events), **change})  # type: ignore[arg-type]


def test_the_worlds_force_what_they_are_about() -> None:
    s = live(busy_world())
    assert s.num_preemptions > 0
    assert s.blocks.cache is not None
    assert s.blocks.cache.num_hit_tokens > 100
    assert live(busy_world(cache=False)).num_preemptions > 0
