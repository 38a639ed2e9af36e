"""The scheduler's rules, one by one. No torch, no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import pytest

from peqa_runtime.core import (
    BASE_REVISION,
    BASE_TASK,
    Placement,
    Request,
    ScaleKind,
    TokenLogprobs,
    TokenOutput,
)
from peqa_runtime.engine.batch import Batch, StepResult
from peqa_runtime.engine.block_manager import BlockManager
from peqa_runtime.engine.prefix_cache import PrefixCache
from peqa_runtime.engine.scheduler import Scheduler
from peqa_runtime.engine.sequence import Sequence
from peqa_runtime.sampling_params import SamplingParams

EOS = 0


@dataclass
class Rows:
    """As many rows as `limit`; revisions in use keep theirs, the others' are taken."""

    limit: int
    placed: dict[str, int] = field(default_factory=dict)

    def place(
        self, revision: str, kind: ScaleKind, *, in_use: Collection[str] | None = None
    ) -> Placement | None:
        write = revision not in self.placed
        if write:
            idle = [r for r in self.placed if r not in (in_use or ())]
            if len(self.placed) < self.limit:
                row = len(self.placed) + 1
            elif idle:
                row = self.placed.pop(idle[0])
            else:
                return None
            self.placed[revision] = row
        return Placement(self.placed[revision], 0, write)


def sequence(name: str, prompt: int, revision: str = BASE_REVISION, **options: object) -> Sequence:
    return ids(name, list(range(1, prompt + 1)), revision, **options)


def ids(
    name: str, prompt: list[int], revision: str = BASE_REVISION, priority: int = 0, **params: object
) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 4, **params})  # type: ignore[arg-type]
    request = Request(name, tuple(prompt), sampling, revision or BASE_TASK, revision, priority=priority)
    return Sequence(request, prompt)


def scheduler(blocks: int = 64, block_size: int = 4, rows: Rows | None = None, **limits: int) -> Scheduler:
    return Scheduler(BlockManager(blocks, block_size), rows or Rows(4), eos_token_ids=(EOS,), **limits)


def results(batch: Batch, token: int = 7) -> list[StepResult]:
    """What a model would give: the same token to everyone who samples, prompt log-probabilities to who asks."""
    out = []
    for item in batch.scheduled:
        samples = item.samples and item.sequence.request.params.max_tokens > 0
        prompt = tuple(TokenLogprobs(p, -1.0) for p in item.prompt_logprob_positions)
        out.append(StepResult(token if samples else None, prompt_logprobs=prompt))
    return out


def step(s: Scheduler, token: int = 7) -> tuple[dict[str, int], list[TokenOutput]]:
    batch = s.schedule()
    outputs = s.update(batch, results(batch, token))
    s.check_integrity()
    return {item.sequence.request_id: item.num_tokens for item in batch.scheduled}, outputs


def test_a_prompt_is_cut_into_chunks_and_its_rest_shares_the_step_with_decodes() -> None:
    s = scheduler(max_batch_tokens=8)
    s.add(sequence("a", 3))
    assert step(s)[0] == {"a": 3}
    s.add(sequence("long", 20))
    assert step(s)[0] == {"a": 1, "long": 7}
    assert step(s)[0] == {"a": 1, "long": 7}
    assert step(s)[0] == {"a": 1, "long": 6}


def test_decodes_go_before_the_recomputation_of_an_older_one() -> None:
    s = scheduler(max_batch_tokens=4)
    s.add(sequence("old", 12))
    young = sequence("young", 1)
    s.add(young)
    assert step(s)[0] == {"old": 4}
    s.waiting.start(young)  # as after a preemption of "old" that left "young" running
    s.running.append(young)
    s.blocks.begin(young, [])
    young.status = "running"
    assert step(s)[0] == {"young": 1, "old": 3}


@pytest.mark.parametrize(
    ("params", "token", "reason", "stop_reason", "length"),
    [
        ({"max_tokens": 3}, 7, "length", None, 3),
        ({"max_tokens": 9}, EOS, "stop", None, 1),
        ({"max_tokens": 3, "ignore_eos": True}, EOS, "length", None, 3),
        ({"max_tokens": 9, "stop_token_ids": (7,)}, 7, "stop", 7, 1),
        ({"max_tokens": 9, "stop_token_ids": (7,), "min_tokens": 4}, 7, "stop", 7, 5),
        ({"max_tokens": 0}, 7, "length", None, 0),
    ],
)
def test_ends(
    params: dict[str, object], token: int, reason: str, stop_reason: int | None, length: int
) -> None:
    s = scheduler()
    s.add(sequence("a", 5, **params))
    outputs: list[TokenOutput] = []
    for _ in range(max(1, length)):
        outputs += step(s, token)[1]
    assert outputs[-1].finish_reason == reason
    assert outputs[-1].stop_reason == stop_reason
    assert sum(o.token_id is not None for o in outputs) == length
    assert not s.has_work
    assert s.blocks.num_used == 0


def test_a_long_list_of_stop_tokens_is_not_gone_through_for_each_token() -> None:
    class Listed(tuple[int, ...]):
        def __contains__(self, token: object) -> bool:
            raise AssertionError("looked for one by one")

    s = scheduler()
    s.add(sequence("a", 5, max_tokens=9, stop_token_ids=Listed((8, 7))))
    assert step(s, 6)[1][-1].finish_reason is None
    assert step(s, 7)[1][-1].stop_reason == 7


def test_too_few_blocks_stop_admission_in_order() -> None:
    s = scheduler(blocks=6, block_size=4)
    s.add(sequence("a", 12, max_tokens=1))
    s.add(sequence("big", 16, max_tokens=1))
    s.add(sequence("small", 1, max_tokens=1))  # would fit, but must not overtake for ever
    assert step(s)[0] == {"a": 12}
    assert step(s)[0] == {"big": 16, "small": 1}


def test_without_a_row_only_that_sequence_waits() -> None:
    rows = Rows(1)
    s = scheduler(rows=rows)
    for name, revision in (("a", "x"), ("b", "y"), ("c", "x"), ("d", BASE_REVISION), ("e", "y")):
        s.add(sequence(name, 2, revision, max_tokens=2))
    assert set(step(s)[0]) == {"a", "c", "d"}
    assert set(step(s)[0]) == {"a", "c", "d"}
    assert set(step(s)[0]) == {"b", "e"}


def test_who_lacks_a_row_is_not_overtaken_for_ever() -> None:
    """One row, and requests for its task without end: the other task's request gets its turn."""
    s = scheduler(rows=Rows(1), max_sequences=4)
    s.add(sequence("x0", 2, "x", max_tokens=2))
    step(s)
    s.add(sequence("y", 2, "y", max_tokens=2))
    overtaken = 0
    for number in range(1, 1000):
        s.add(sequence(f"x{number}", 2, "x", max_tokens=2))
        if "y" in step(s)[0]:
            break
        overtaken += 1
    else:
        pytest.fail("y starved")
    assert overtaken >= 20, "nor does it stop the others at once"
    while s.has_work:
        step(s)


def test_a_bank_write_is_asked_once_and_again_after_a_failure() -> None:
    s = scheduler()
    s.add(sequence("a", 2, "x"))
    batch = s.schedule()
    assert [(w.revision, w.row) for w in batch.bank_writes] == [("x", 1)]
    failed = s.fail([item.sequence for item in batch.scheduled], "boom", "request_failed")
    assert [(o.request_id, o.finish_reason, o.error) for o in failed] == [("a", "error", "boom")]
    s.check_integrity()
    s.add(sequence("base", 2))
    batch = s.schedule()
    assert batch.bank_writes == ()  # nobody in this step leases x: its set may have left host memory
    s.update(batch, results(batch))
    s.add(sequence("b", 2, "x"))
    batch = s.schedule()
    assert [(w.revision, w.row) for w in batch.bank_writes] == [("x", 1)]
    s.update(batch, results(batch))
    assert s.schedule().bank_writes == ()


def test_a_pending_write_is_replaced_with_its_row() -> None:
    rows = Rows(1)
    s = scheduler(rows=rows)
    s.add(sequence("a", 2, "x"))
    s.fail([item.sequence for item in s.schedule().scheduled], "boom", "request_failed")
    s.add(sequence("b", 2, "y"))
    assert [(w.revision, w.row) for w in s.schedule().bank_writes] == [("y", 1)]


def test_the_youngest_is_preempted_and_comes_back_with_its_tokens() -> None:
    s = scheduler(blocks=4, block_size=2)
    old, young = sequence("old", 2, max_tokens=6), sequence("young", 2, max_tokens=5)
    s.add(old)
    step(s)
    s.add(young)
    order = []
    while s.has_work:
        order.append(step(s)[0])
    assert s.num_preemptions > 0
    assert old.num_preemptions == 0
    assert young.num_generated_tokens == 5
    assert any(n > 2 for share in order for name, n in share.items() if name == "young"), "recomputed"


def test_abort_frees_at_once_wherever_the_sequence_is() -> None:
    s = scheduler(max_sequences=1)
    s.add(sequence("running", 8))
    s.add(sequence("waiting", 8))
    step(s)
    assert s.abort("waiting") is not None
    assert s.abort("running") is not None
    assert s.abort("running") is None
    assert not s.has_work
    assert s.blocks.num_used == 0


def test_a_sequence_aborted_during_the_step_gets_no_output() -> None:
    s = scheduler()
    s.add(sequence("a", 3))
    batch = s.schedule()
    s.abort("a")
    assert s.update(batch, results(batch)) == []
    s.check_integrity()


def test_a_row_that_is_not_finite_ends_only_its_request() -> None:
    s = scheduler()
    s.add(sequence("bad", 3))
    s.add(sequence("good", 3))
    batch = s.schedule()
    bad, good = s.update(batch, [StepResult(finite=False), StepResult(7)])
    assert (bad.request_id, bad.finish_reason, bad.token_id) == ("bad", "error", None)
    assert "NaN" in (bad.error or "")
    assert (good.request_id, good.finish_reason, good.token_id) == ("good", None, 7)
    s.check_integrity()


@pytest.mark.parametrize("prompt_rows", [1, 3, 100])
def test_prompt_logprobs_come_whole_with_the_first_output(prompt_rows: int) -> None:
    s = scheduler(max_batch_tokens=5, max_prompt_logprob_rows=prompt_rows)
    s.add(sequence("a", 9, prompt_logprobs=0, max_tokens=2))
    s.add(sequence("b", 9, prompt_logprobs=0, max_tokens=0))
    outputs: list[TokenOutput] = []
    while s.has_work:
        batch = s.schedule()
        assert sum(len(i.prompt_logprob_positions) for i in batch.scheduled) <= prompt_rows
        outputs += s.update(batch, results(batch))
    a1, a2 = (o for o in outputs if o.request_id == "a")
    (b,) = (o for o in outputs if o.request_id == "b")
    for output in (a1, b):
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert [p.token_id for p in output.prompt_logprobs[1:] if p] == list(range(8))
    assert a2.prompt_logprobs is None


def test_prompt_logprobs_of_a_single_token_prompt() -> None:
    s = scheduler()
    s.add(sequence("a", 1, prompt_logprobs=2, max_tokens=1))
    assert step(s)[1][0].prompt_logprobs == (None,)


def caching(blocks: int = 64, **limits: int) -> Scheduler:
    return Scheduler(BlockManager(blocks, 4, PrefixCache("ab" * 32, 4)), Rows(4), **limits)


def test_a_lower_priority_runs_earlier_and_equal_ones_by_age() -> None:
    s = scheduler(max_sequences=1)
    for name, priority in (("later", 1), ("a", 0), ("urgent", -5), ("b", 0)):
        s.add(sequence(name, 2, priority=priority, max_tokens=1))
    assert [set(step(s)[0]) for _ in range(4)] == [{"urgent"}, {"a"}, {"b"}, {"later"}]


def test_a_better_priority_takes_a_place_from_the_worst_and_latest_that_runs() -> None:
    s = scheduler(max_sequences=3)
    for name, priority in (("bulk1", 7), ("bulk2", 7), ("normal", 0)):
        s.add(sequence(name, 2, priority=priority, max_tokens=20))
    step(s)
    s.add(sequence("urgent", 2, priority=-1, max_tokens=2))
    assert set(step(s)[0]) == {"urgent", "normal", "bulk1"}
    assert s.num_preemptions == 1
    s.add(sequence("equal", 2, priority=7))
    assert set(step(s)[0]) == {"urgent", "normal", "bulk1"}, "an equal priority takes nothing"
    assert set(step(s)[0]) == {"normal", "bulk1", "bulk2"}, (
        "and who was preempted comes before who has not begun"
    )


def test_a_better_priority_takes_blocks_but_not_in_vain() -> None:
    s = scheduler(blocks=8, block_size=4)
    s.add(sequence("first", 12, priority=0, max_tokens=4))
    s.add(sequence("bulk", 8, priority=7, max_tokens=4))
    step(s)
    s.add(sequence("too big now", 24, priority=-1, max_tokens=4))
    s.add(sequence("too big even so", 20, priority=0, max_tokens=4))
    batch = s.schedule()
    assert {i.sequence.request_id for i in batch.scheduled} == {"too big now"}
    assert s.num_preemptions == 2
    s.update(batch, results(batch))
    s = scheduler(blocks=8, block_size=4)
    s.add(sequence("first", 16, priority=0, max_tokens=4))
    s.add(sequence("bulk", 4, priority=7, max_tokens=3))
    step(s)
    s.add(sequence("too big even so", 24, priority=0, max_tokens=4))
    assert set(step(s)[0]) == {"first", "bulk"}
    assert s.num_preemptions == 0


def test_memory_is_taken_from_the_worst_priority_first_then_from_the_latest() -> None:
    s = scheduler(blocks=6, block_size=2, max_sequences=8)
    for name, priority in (("bulk", 3), ("old", 0), ("new", 0)):
        s.add(sequence(name, 2, priority=priority, max_tokens=6))
    preempted = []
    while s.has_work:
        before = {x.request_id for x in s.running}
        batch = s.schedule()
        preempted += sorted(before - {x.request_id for x in s.running})
        s.update(batch, results(batch))
        s.check_integrity()
    assert preempted[0] == "bulk"
    assert "old" not in preempted


def test_a_short_prompt_of_a_task_that_is_behind_passes_a_long_one() -> None:
    s = scheduler(blocks=400, max_batch_tokens=8)
    s.add(sequence("long", 100, "x"))
    for _ in range(3):
        assert step(s)[0] == {"long": 8}
    s.add(sequence("short", 4, "y"))
    assert step(s)[0] == {"long": 8}, "who comes is not behind yet"
    assert step(s)[0] == {"short": 4, "long": 4}
    s.add(sequence("as long", 100, "y"))
    assert step(s)[0] == {"short": 1, "long": 7}, "one that is no shorter waits for what is begun"


def test_a_better_priority_goes_before_a_prompt_that_is_begun() -> None:
    s = scheduler(blocks=400, max_batch_tokens=8)
    s.add(sequence("long", 60))
    step(s)
    s.add(sequence("urgent", 80, priority=-1))
    assert step(s)[0] == {"urgent": 8}


@pytest.mark.parametrize("own", [2, 300])
def test_a_beginning_shared_by_many_is_computed_once(own: int) -> None:
    """All come at once: those who share wait for the one that computes the beginning, however much is their own."""
    s = caching(blocks=800, max_batch_tokens=64)
    for i in range(6):
        s.add(ids(f"r{i}", [*range(1, 193), *range(1000 + 500 * i, 1000 + 500 * i + own)]))
    total: Counter[str] = Counter()
    while s.has_work:
        total.update(step(s)[0])
    assert [total[f"r{i}"] - 3 for i in range(6)] == [192 + own] + 5 * [own]  # 3 to decode


def test_a_better_priority_does_not_wait_for_a_beginning_of_a_worse_one() -> None:
    """The worse one gets nothing as long as better ones fill the steps."""
    s = caching(blocks=400, max_batch_tokens=64)
    s.add(ids("worse", [*range(1, 193), 900], priority=5))
    assert step(s)[0] == {"worse": 64}
    for i in range(3):
        s.add(ids(f"other{i}", [*range(2000 + 100 * i, 2064 + 100 * i)], "x", priority=0))
    s.add(ids("better", [*range(1, 193), 901], priority=0))
    waited = 0
    while "better" not in step(s)[0]:
        waited += 1
    assert waited <= 4, "it had its turn among its equals"


def test_who_shares_nothing_does_not_wait_for_a_beginning() -> None:
    s = caching(blocks=400, max_batch_tokens=256)
    for i in range(2):
        s.add(ids(f"r{i}", [*range(1, 193), 900 + i]))
    s.add(ids("other", [7] * 20, "x"))
    assert step(s)[0] == {"r0": 193, "other": 20}


def test_a_short_beginning_is_not_waited_for() -> None:
    s = caching(max_batch_tokens=64)
    s.add(ids("a", [*range(1, 17), 90]))
    s.add(ids("b", [*range(1, 17), 91]))
    assert step(s)[0] == {"a": 17, "b": 17}


def test_who_waits_for_a_beginning_goes_on_when_its_owner_is_gone() -> None:
    s = caching(blocks=400, max_batch_tokens=32)
    s.add(ids("owner", [*range(1, 130), 900]))
    s.add(ids("sharer", [*range(1, 130), 901]))
    assert step(s)[0] == {"owner": 32}
    s.abort("owner")
    assert step(s)[0] == {"sharer": 32}
    assert s.running[0].num_cached_tokens == 32, "and finds what was computed"


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    s = caching(blocks=60, max_sequences=1)
    s.add(ids("bulk", [*range(1, 41)], priority=5, max_tokens=20))
    for _ in range(6):
        step(s)
    s.add(ids("urgent", [99], priority=0, max_tokens=1))
    assert step(s)[0] == {"urgent": 1}
    assert step(s)[0] == {"bulk": 46 - 44}, "45 are computed: eleven full blocks, and the rest again"


def test_prompt_logprobs_use_nothing_cached_but_may_be_used() -> None:
    s = caching()
    s.add(ids("scored", [*range(1, 21)], max_tokens=1, prompt_logprobs=0))
    assert step(s)[0] == {"scored": 20}
    s.add(ids("scored again", [*range(1, 21)], max_tokens=1, prompt_logprobs=0))
    s.add(ids("plain", [*range(1, 21)], max_tokens=1))
    shares, outputs = step(s)
    assert shares == {"scored again": 20, "plain": 4}
    assert {o.request_id: o.num_cached_tokens for o in outputs} == {"scored again": 0, "plain": 16}


def test_a_sequence_that_was_preempted_elsewhere_can_be_added_and_aborted() -> None:
    """As after a restart of the engine, which hands those that survive to a new scheduler."""
    for name in ("aborted", "runs"):
        old = scheduler(max_sequences=1)
        survivor = sequence(name, 4, priority=3)
        old.add(survivor)
        step(old)
        old.add(sequence("urgent", 1))
        step(old)
        assert survivor.num_preemptions == 1
        survivor.forget_place()
        new = scheduler()
        new.add(survivor)
        if name == "aborted":
            assert new.abort(name) is survivor
        while new.has_work:
            step(new)
        assert survivor.num_generated_tokens == (1 if name == "aborted" else 4)
