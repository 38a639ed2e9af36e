"""The prefix cache in the engine: what is found changes no answer, and never belongs to other weights or tenants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from peqa_runtime.core import BASE_TASK, Request, TokenOutput
from peqa_runtime.engine.engine import Engine
from peqa_runtime.sampling_params import SamplingParams

MakeEngine = Callable[..., Engine]
PROMPT = [5, 6, 7, 8, 9] * 5
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def ask(
    engine: Engine, task: str = BASE_TASK, prompt: list[int] = PROMPT, salt: str = "", **params: Any
) -> tuple[list[int], int]:
    """Run one request; its tokens, and how many tokens of its prompt were found."""
    lease = engine.tasks.acquire(task)
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params})
    request = Request("r", tuple(prompt), sampling, task, lease.revision, lease.kind, cache_salt=salt)
    engine.add_request(request, lease)
    outputs: list[TokenOutput] = []
    while engine.has_work:
        outputs += engine.step()
    assert outputs[-1].finish_reason == "length"
    return [o.token_id for o in outputs if o.token_id is not None], outputs[0].num_cached_tokens


def expected(engine: Engine, scale: float = 1.0, prompt: list[int] = PROMPT) -> list[int]:
    model: Any = engine.model
    tokens: list[int] = model.expected(prompt, 8, scale)
    return tokens


def test_a_prompt_asked_again_is_found_and_answered_the_same(fake_engine: MakeEngine) -> None:
    engine = fake_engine()
    want = expected(engine)
    assert ask(engine) == (want, 0)
    assert ask(engine) == (want, 24)
    forwards = engine.model.forwards  # type: ignore[attr-defined]
    assert (forwards[0], forwards[8]) == (25, 1)
    stats = engine.stats()
    assert stats["prefix_cache_queries_total"] == 50
    assert stats["prefix_cache_hits_total"] == 24
    assert stats["prefix_cache_blocks"] == 8, "25 + 7 tokens were computed"
    assert stats["kv_blocks_used"] == 0


def test_switched_off_nothing_is_found_or_reported(fake_engine: MakeEngine) -> None:
    engine = fake_engine(prefix_cache=False)
    assert ask(engine) == ask(engine) == (expected(engine), 0)
    assert not any("prefix" in name for name in engine.stats())


def test_an_upload_never_serves_what_the_old_revision_computed(
    fake_engine: MakeEngine, make_fake_set: Callable[[float], bytes]
) -> None:
    engine = fake_engine(tasks={"t": 1.5, "other": 0.75})
    old = engine.tasks.info("t").revision
    assert ask(engine, "t") == (expected(engine, 1.5), 0)
    assert ask(engine, "t") == (expected(engine, 1.5), 24)
    engine.tasks.upload("t", make_fake_set(1.25))
    assert ask(engine, "t") == (expected(engine, 1.25), 0), "the same name and prompt, other weights"
    engine.tasks.rollback("t")
    assert engine.tasks.info("t").revision == old
    assert ask(engine, "t") == (expected(engine, 1.5), 24), "the old revision's blocks are found again"
    engine.tasks.delete("t")
    engine.tasks.upload("t", make_fake_set(0.5))
    assert ask(engine, "t") == (expected(engine, 0.5), 0), "nor does a name that is used again"
    engine.tasks.upload("copy", make_fake_set(0.5))
    assert ask(engine, "copy") == (expected(engine, 0.5), 24), "one content, two names: the same blocks"
    assert ask(engine, "other") == (expected(engine, 0.75), 0)
    assert ask(engine) == (expected(engine), 0)


def test_an_upload_while_the_old_revision_runs(
    fake_engine: MakeEngine, make_fake_set: Callable[[float], bytes]
) -> None:
    engine = fake_engine(tasks={"t": 1.5})
    lease = engine.tasks.acquire("t")
    engine.add_request(Request("old", tuple(PROMPT), GREEDY, "t", lease.revision, lease.kind), lease)
    outputs = engine.step()
    engine.tasks.upload("t", make_fake_set(1.25))
    lease = engine.tasks.acquire("t")
    engine.add_request(Request("new", tuple(PROMPT), GREEDY, "t", lease.revision, lease.kind), lease)
    while engine.has_work:
        outputs += engine.step()
    for name, scale in (("old", 1.5), ("new", 1.25)):
        got = [o for o in outputs if o.request_id == name]
        assert [o.token_id for o in got] == expected(engine, scale)
        assert got[0].num_cached_tokens == 0


def test_tenants_with_another_salt_find_nothing_of_each_other(fake_engine: MakeEngine) -> None:
    engine = fake_engine()
    want = expected(engine)
    assert ask(engine, salt="a") == (want, 0)
    assert ask(engine, salt="b") == (want, 0)
    assert ask(engine) == (want, 0)
    assert ask(engine, salt="a") == (want, 24)


def test_the_next_turn_finds_the_answer_of_the_last(fake_engine: MakeEngine) -> None:
    engine = fake_engine()
    first, _ = ask(engine)
    turn = [*PROMPT, *first, 1, 2, 3]
    assert ask(engine, prompt=turn) == (expected(engine, prompt=turn), 32)


def test_prompts_to_be_scored_are_computed_whole(fake_engine: MakeEngine) -> None:
    engine = fake_engine()
    plain = engine.generate([PROMPT], SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=2))
    again = engine.generate([PROMPT], SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=2))
    assert plain == again
    assert again[0].num_cached_tokens == 0
    assert len(again[0].prompt_logprobs or ()) == len(PROMPT)
    (found,) = engine.generate([PROMPT], GREEDY)
    assert found.num_cached_tokens == 24
    assert list(found.token_ids) == expected(engine)


def test_an_abort_within_the_prompt_leaves_what_was_computed(fake_engine: MakeEngine) -> None:
    engine = fake_engine(max_batch_tokens=10)
    engine.add_request(Request("gone", tuple(PROMPT), GREEDY))
    engine.step()
    engine.abort("gone")
    assert engine.stats()["kv_blocks_used"] == 0
    assert ask(engine) == (expected(engine), 8)


@pytest.mark.parametrize("what", ["poison", "explode"])
def test_what_failed_is_not_found(fake_engine: MakeEngine, what: str) -> None:
    engine = fake_engine(model={what: 96})
    for _ in range(2):
        engine.add_request(Request("bad", (*PROMPT, 96), GREEDY))
        outputs: list[TokenOutput] = []
        while engine.has_work:
            outputs += engine.step()
        assert outputs[-1].finish_reason == "error"
        assert engine.stats()["prefix_cache_blocks"] == 0
        assert engine.stats()["kv_blocks_used"] == 0
    assert ask(engine) == (expected(engine), 0)


def test_a_full_cache_gives_up_its_oldest(fake_engine: MakeEngine) -> None:
    engine = fake_engine(num_blocks=20)
    for first in range(1, 30):
        prompt = [first, *PROMPT]
        assert ask(engine, prompt=prompt) == (expected(engine, prompt=prompt), 0)
        engine.scheduler.check_integrity()
    assert ask(engine, prompt=[29, *PROMPT])[1] == 24
    assert ask(engine, prompt=[1, *PROMPT])[1] == 0
