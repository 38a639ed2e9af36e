"""The scheduler against a second one that is slow and plainly right: the same shares in every step of any workload.

The oracle keeps flat lists, sorts and searches them whole for every decision, and counts blocks as one number. It
knows the rules and nothing of heaps, levels or block tables. Rows of the bank and the prefix cache are left out: they
have tests of their own.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peqa_runtime.core import Blend, Request
from peqa_runtime.engine.batch import StepResult
from peqa_runtime.engine.block_manager import BlockManager
from peqa_runtime.engine.scheduler import Scheduler
from peqa_runtime.engine.sequence import Sequence
from peqa_runtime.sampling_params import SamplingParams


@dataclass(eq=False)
class Job:
    name: str
    asked: str | dict[str, float]  # a task, or the weights of a blend
    priority: int
    prompt: int
    output: int
    arrival: int = 0
    tokens: int = 0
    computed: int = 0
    ever_computed: int = 0
    blocks: int = 0

    @property
    def task(self) -> str:
        """The one that pays: of a blend the task with the largest weight."""
        if isinstance(self.asked, str):
            return self.asked
        return max(sorted(self.asked), key=lambda task: self.asked[task])

    @property
    def left(self) -> int:
        return self.tokens - self.computed

    @property
    def rank(self) -> tuple[int, int]:
        return self.priority, self.arrival


class Oracle:
    def __init__(self, blocks: int, size: int, budget: int, places: int) -> None:
        self.free, self.size, self.budget, self.places = blocks, size, budget, places
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.served: dict[tuple[int, str], int] = defaultdict(int)
        self.last_to_leave: dict[int, tuple[int, str]] = {}
        self.preemptions = 0
        self.plan: dict[str, int] = {}

    def of_task(self, priority: int, task: str | None = None) -> list[Job]:
        return [j for j in self.waiting if j.priority == priority and task in (None, j.task)]

    def add(self, job: Job) -> None:
        job.tokens = job.prompt
        self.begins_to_wait(job)

    def begins_to_wait(self, job: Job) -> None:
        key = (job.priority, job.task)
        if not self.of_task(*key):
            others = [self.served[j.priority, j.task] for j in self.of_task(job.priority)]
            last = self.last_to_leave.get(job.priority)
            floor = min(others) if others else self.served[last] if last else 0
            self.served[key] = max(self.served[key], floor)
        self.waiting.append(job)

    def blocks_of(self, job: Job) -> int:
        return -(-job.tokens // self.size)

    def next_one(self) -> Job | None:
        def turn(job: Job) -> tuple[int, int, int]:
            oldest = min(j.arrival for j in self.waiting if (j.priority, j.task) == (job.priority, job.task))
            return job.priority, self.served[job.priority, job.task], oldest

        return min(self.waiting, key=lambda job: (turn(job), job.arrival)) if self.waiting else None

    def give(self, job: Job) -> None:
        share = min(job.left, self.budget_left)
        if share:
            self.plan[job.name] = share
            self.budget_left -= share
            new = job.computed + share - max(job.computed, job.ever_computed)
            if new > 0:
                self.served[job.priority, job.task] += new
                job.ever_computed += new

    def preempt(self, job: Job) -> None:
        self.running.remove(job)
        self.begins_to_wait(job)
        self.free += job.blocks
        job.blocks = job.computed = 0
        self.preemptions += 1
        self.budget_left += self.plan.pop(job.name, 0)

    def step(self) -> dict[str, int]:
        self.plan, self.budget_left = {}, self.budget
        for job in sorted((j for j in self.running if j.left == 1), key=lambda j: j.rank):
            if self.budget_left == 0 or job not in self.running:
                continue
            while job in self.running and self.free < self.blocks_of(job) - job.blocks:
                self.preempt(max(self.running, key=lambda j: j.rank))
            if job in self.running:
                self.free -= self.blocks_of(job) - job.blocks
                job.blocks = self.blocks_of(job)
                self.give(job)
        begun = sorted((j for j in self.running if j.left > 1), key=lambda j: j.rank)
        while (head := self.next_one()) is not None:
            for job in list(begun):
                ahead = self.served[job.priority, job.task] - self.served[head.priority, head.task]
                same = job.priority == head.priority
                if job in self.running and (
                    job.priority < head.priority or (same and (ahead < self.budget or job.left <= head.left))
                ):
                    begun.remove(job)
                    self.give(job)
            if self.budget_left == 0 or not self.make_room(head):
                break
            self.waiting.remove(head)
            self.running.append(head)
            if not self.of_task(head.priority, head.task):
                self.last_to_leave[head.priority] = (head.priority, head.task)
            head.blocks = self.blocks_of(head)
            self.free -= head.blocks
            self.give(head)
        for job in begun:
            if job in self.running:
                self.give(job)
        return dict(self.plan)

    def make_room(self, head: Job) -> bool:
        stay = sorted(self.running, key=lambda j: j.rank)
        leave: list[Job] = []
        while len(stay) >= self.places or self.blocks_of(head) + len(stay) > self.free + sum(
            j.blocks for j in leave
        ):
            if not stay or stay[-1].priority <= head.priority:
                return False
            leave.append(stay.pop())
        for job in leave:
            self.preempt(job)
        return True

    def finish_step(self) -> None:
        for job in list(self.running):
            job.computed += self.plan.get(job.name, 0)
            if self.plan.get(job.name) and not job.left:
                job.tokens += 1
                if job.tokens == job.prompt + job.output:
                    self.end(job)

    def end(self, job: Job) -> None:
        (self.running if job in self.running else self.waiting).remove(job)
        self.free += job.blocks
        if all(j.priority != job.priority for j in (*self.waiting, *self.running)):
            self.served = defaultdict(int, {k: v for k, v in self.served.items() if k[0] != job.priority})
            self.last_to_leave.pop(job.priority, None)


def sequence(job: Job) -> Sequence:
    prompt = tuple(range(1, job.prompt + 1))
    params = SamplingParams(max_tokens=job.output)
    name = job.asked if isinstance(job.asked, str) else Blend.of(job.asked).name
    return Sequence(Request(job.name, prompt, params, name, priority=job.priority), list(prompt))


def compare(
    jobs: list[tuple[Job, int]], *, blocks: int, size: int, budget: int, places: int, aborts: dict[int, str]
) -> Oracle:
    """Run both over jobs that arrive at given steps; every step's shares must be equal. The oracle, at the end."""
    real = Scheduler(BlockManager(blocks, size), None, max_batch_tokens=budget, max_sequences=places)  # type: ignore[arg-type]
    oracle = Oracle(blocks, size, budget, places)
    known: dict[str, Job] = {}
    at = 0
    pending = sorted(jobs, key=lambda item: item[1])
    while pending or real.has_work:
        while pending and pending[0][1] <= at:
            job = pending.pop(0)[0]
            job.arrival = len(known)
            known[job.name] = job
            oracle.add(job)
            real.add(sequence(job))
        name = aborts.get(at)
        if name in known and real.abort(name) is not None:
            oracle.end(known[name])
        batch = real.schedule()
        got = {item.sequence.request_id: item.num_tokens for item in batch.scheduled}
        assert got == oracle.step(), f"step {at}"
        results = [StepResult(7 if item.samples else None) for item in batch.scheduled]
        real.update(batch, results)
        oracle.finish_step()
        real.check_integrity()
        assert real.num_preemptions == oracle.preemptions
        at += 1
        assert at < 10_000, "everything ends"
    assert not oracle.waiting
    assert not oracle.running
    assert oracle.free == blocks
    return oracle


@st.composite
def workloads(draw: st.DrawFn) -> dict[str, object]:
    size = draw(st.sampled_from([1, 2, 4]))
    blocks = draw(st.integers(10, 40))
    tasks = draw(st.integers(1, 5))
    jobs = []
    for number in range(draw(st.integers(1, 24))):
        prompt = draw(st.integers(1, min(30, blocks * size - 6)))
        output = draw(st.integers(1, min(8, blocks * size - prompt)))
        priority = draw(st.sampled_from([0, 0, 0, 0, -1, 5]))
        asked: str | dict[str, float] = f"t{draw(st.integers(0, tasks - 1))}"
        if tasks > 1 and draw(st.booleans()):
            first, second = draw(st.permutations([f"t{i}" for i in range(tasks)]))[:2]
            weight = draw(st.sampled_from([0.25, 0.5, 0.625]))
            asked = {first: weight, second: 1 - weight}
        job = Job(f"j{number}", asked, priority, prompt, output)
        jobs.append((job, draw(st.integers(0, 20))))
    aborts = draw(st.dictionaries(st.integers(0, 40), st.sampled_from([j.name for j, _ in jobs]), max_size=4))
    budget, places = draw(st.integers(1, 32)), draw(st.integers(1, 8))
    return {
        "jobs": jobs,
        "blocks": blocks,
        "size": size,
        "budget": budget,
        "places": places,
        "aborts": aborts,
    }


@settings(max_examples=150, deadline=None)
@given(workloads())
def test_every_step_is_the_oracles(workload: dict[str, object]) -> None:
    compare(**workload)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=500, deadline=None)
@given(workloads())
def test_every_step_is_the_oracles_at_length(workload: dict[str, object]) -> None:
    compare(**workload)  # type: ignore[arg-type]


def test_hundreds_of_task_names_that_come_and_go() -> None:
    """More names than the queue keeps without tidying up, twice; each of them comes again."""
    jobs = [(Job(f"j{i}", f"t{i * 9 % 140}", 0, 1 + i * 5 % 23, 1 + i * 3 % 9), i // 3) for i in range(280)]
    oracle = compare(jobs, blocks=24, size=2, budget=16, places=6, aborts={5: "j3", 60: "j171", 90: "j250"})
    assert oracle.preemptions > 0, "or this shows nothing of preemption"


def test_what_a_begun_prompt_gets_counts_for_the_next() -> None:
    """Two begun prompts and a short one that may pass the second until the first has its share."""
    long = [Job("j2", "t0", -1, 9, 3), Job("j8", "t0", -1, 1, 3), Job("j9", "t0", -1, 29, 2)]
    short = [Job(f"j{i}", "t0", 0, 1, 1) for i in (0, 4, 6)] + [Job("j7", "t1", 0, 1, 1)]
    late = [Job("j1", "t0", 0, 1, 1), Job("j3", "t0", 0, 1, 1)]
    rest = [Job("j10", "t0", 0, 6, 1), Job("j11", "t0", 0, 1, 1), Job("j12", "t1", 0, 19, 1)]
    more = [Job(f"j{i}", "t0", 0, 1, 1) for i in range(13, 19)]
    jobs = [(job, 0) for job in (short[0], *long[:1], *short[1:], *long[1:], *rest, *more)]
    jobs += [(job, 1) for job in late] + [(Job("j5", "t0", -1, 1, 1), 12)]
    compare(jobs, blocks=13, size=4, budget=6, places=4, aborts={})
