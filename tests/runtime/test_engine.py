"""The engine on a fake model: continuous batching changes nothing about any answer, and everything is given back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from peqa_runtime.core import BASE_TASK, Request, TokenOutput
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.errors import InvalidRequest, PromptTooLong
from peqa_runtime.sampling_params import SamplingParams

MakeEngine = Callable[..., Engine]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, 97) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def add(engine: Engine, name: str, prompt: list[int], task: str = BASE_TASK, **params: Any) -> None:
    lease = engine.tasks.acquire(task)
    params = {"temperature": 0.0, "max_tokens": 8, **params}
    request = Request(name, tuple(prompt), SamplingParams(**params), task, lease.revision, lease.kind)
    engine.add_request(request, lease)


def drain(engine: Engine) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.scheduler.check_integrity()
    assert_clean(engine)
    return outputs


def assert_clean(engine: Engine) -> None:
    assert engine.scheduler.blocks.num_used == 0
    assert engine.tasks.registry.counts().leases == 0


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [o.token_id for o in outputs if o.token_id is not None]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_batch_tokens": 5},
        {"max_batch_tokens": 1, "max_sequences": 3},
        {"num_blocks": 16, "max_sequences": 8},  # far too few blocks: preemption
        {"block_size": 1, "num_blocks": 60},
        {"task_rows": 2},  # one row for three tasks: they take turns
    ],
)
def test_answers_do_not_depend_on_how_the_engine_batches(
    fake_engine: MakeEngine, config: dict[str, int]
) -> None:
    scales = {"a": 1.25, "b": 0.75, "c": 1.5, BASE_TASK: 1.0}
    engine = fake_engine(tasks={t: s for t, s in scales.items() if t != BASE_TASK}, **config)
    some = prompts(24)
    tasks = [list(scales)[i % 4] for i in range(24)]
    for i, prompt in enumerate(some):
        add(engine, str(i), prompt, tasks[i])
    got = drain(engine)
    model: Any = engine.model
    for i, prompt in enumerate(some):
        assert tokens(got[str(i)]) == model.expected(prompt, 8, scales[tasks[i]]), (i, tasks[i])
        assert got[str(i)][-1].finish_reason == "length"
    if config.get("num_blocks") == 16:
        assert engine.stats()["preemptions_total"] > 0


def test_requests_join_while_others_run(fake_engine: MakeEngine) -> None:
    engine = fake_engine(max_batch_tokens=16)
    some = prompts(12, seed=3)
    got: dict[str, list[TokenOutput]] = {}
    waiting = list(enumerate(some))
    while waiting or engine.has_work:
        if waiting:
            i, prompt = waiting.pop(0)
            add(engine, str(i), prompt)
        for output in engine.step():
            got.setdefault(output.request_id, []).append(output)
    for i, prompt in enumerate(some):
        assert tokens(got[str(i)]) == engine.model.expected(prompt, 8)  # type: ignore[attr-defined]


def test_random_sampling_survives_batching_and_preemption(fake_engine: MakeEngine) -> None:
    some = prompts(10, seed=5)
    params = [SamplingParams(max_tokens=10, seed=i, top_p=0.9 if i % 2 else 1.0) for i in range(10)]
    roomy = fake_engine().generate(some, params)
    tight_engine = fake_engine(num_blocks=14, max_batch_tokens=7)
    tight = tight_engine.generate(some, params)
    assert [c.token_ids for c in roomy] == [c.token_ids for c in tight]
    assert tight_engine.stats()["preemptions_total"] > 0
    assert len({c.token_ids for c in roomy}) == 10


def test_a_missing_seed_is_drawn_anew_for_each_request(fake_engine: MakeEngine) -> None:
    engine = fake_engine()
    done = engine.generate([[1, 2, 3]] * 8, SamplingParams(max_tokens=8))
    assert len({c.token_ids for c in done}) > 1


def test_a_recycled_cache_full_of_nan_changes_nothing(fake_engine: MakeEngine) -> None:
    engine = fake_engine(prefix_cache=False)
    some = prompts(6)
    before = engine.generate(some, GREEDY)
    for key, value in engine.kv_cache.layers:
        key.fill_(float("nan"))
        value.fill_(float("nan"))
    assert engine.generate(some, GREEDY) == before


def test_an_upload_does_not_reach_a_running_request(
    fake_engine: MakeEngine, make_fake_set: Callable[[float], bytes]
) -> None:
    engine = fake_engine(tasks={"a": 1.25}, task_rows=3)
    model: Any = engine.model
    add(engine, "old", [5, 6, 7], "a")
    first = tokens([*engine.step(), *engine.step(), *engine.step()])
    engine.tasks.upload("a", make_fake_set(1.75))
    add(engine, "new", [5, 6, 7], "a")
    add(engine, "base", [5, 6, 7])
    engine.tasks.delete("a")
    got = drain(engine)
    assert first + tokens(got["old"]) == model.expected([5, 6, 7], 8, 1.25)
    assert tokens(got["new"]) == model.expected([5, 6, 7], 8, 1.75)
    assert tokens(got["base"]) == model.expected([5, 6, 7], 8)


def test_texts_go_in_and_come_out(fake_engine: MakeEngine) -> None:
    engine = fake_engine(tasks={"a": 1.5})
    base, task = engine.generate(["hello there", "hello there"], GREEDY, [BASE_TASK, "a"])
    assert list(base.prompt_token_ids) == [ord(c) - 32 for c in "hello there"]
    assert [ord(c) - 32 for c in base.text] == list(base.token_ids)
    assert base.text != task.text
    assert (base.revision, task.task) == ("", "a")
    assert task.revision


def test_logprobs_and_prompt_logprobs_come_through(fake_engine: MakeEngine) -> None:
    engine = fake_engine(max_batch_tokens=4, max_prompt_logprob_rows=3)
    prompt = prompts(1, longest=30)[0] * 3
    (done,) = engine.generate(
        [prompt], SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=1)
    )
    assert done.prompt_logprobs is not None
    assert done.logprobs is not None
    assert [p.token_id if p else None for p in done.prompt_logprobs] == [None, *prompt[1:]]
    assert [p.token_id for p in done.logprobs] == list(done.token_ids)
    assert all(p.top[0] == (p.token_id, p.logprob) for p in done.logprobs)
    (scored,) = engine.generate([prompt], SamplingParams(max_tokens=0, prompt_logprobs=1))
    assert scored.prompt_logprobs == done.prompt_logprobs
    assert (scored.token_ids, scored.finish_reason) == ((), "length")


def test_end_of_text_ends(fake_engine: MakeEngine) -> None:
    prompt = [5, 6, 7]
    plain = fake_engine().generate([prompt], GREEDY)[0]
    eos = plain.token_ids[3]
    assert eos not in plain.token_ids[:3]
    engine = fake_engine(model={"eos_token_ids": (eos,)})
    stopped, ignoring = engine.generate(
        [prompt, prompt], [GREEDY, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)]
    )
    assert (stopped.token_ids, stopped.finish_reason) == (plain.token_ids[:4], "stop")
    assert (ignoring.token_ids, ignoring.finish_reason) == (plain.token_ids, "length")


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"prompt": []}, InvalidRequest, "prompt"),
        ({"prompt": [1, 97]}, InvalidRequest, "prompt"),
        ({"prompt": [-1]}, InvalidRequest, "prompt"),
        ({"stop_token_ids": (97,)}, InvalidRequest, "stop_token_ids"),
        ({"prompt": [1] * 250, "max_tokens": 7}, PromptTooLong, "max_tokens"),
        ({"prompt": [1] * 257, "max_tokens": 0}, PromptTooLong, "prompt"),
    ],
)
def test_refusals_name_the_field_and_leave_nothing(
    fake_engine: MakeEngine, change: dict[str, Any], error: type[InvalidRequest], param: str
) -> None:
    engine = fake_engine(tasks={"a": 1.5})
    with pytest.raises(error) as caught:
        add(engine, "x", **{"prompt": [1], "task": "a", **change})
    assert caught.value.param == param
    assert not engine.has_work
    assert_clean(engine)


def test_what_cannot_fit_the_cache_is_refused_and_what_just_fits_runs(fake_engine: MakeEngine) -> None:
    engine = fake_engine(num_blocks=4, block_size=4)
    with pytest.raises(PromptTooLong, match="16 tokens that fit"):
        add(engine, "x", [1] * 10, max_tokens=7)
    add(engine, "y", [1] * 10, max_tokens=6)
    assert len(drain(engine)["y"]) == 6


def test_an_id_in_use_is_refused(fake_engine: MakeEngine) -> None:
    engine = fake_engine()
    add(engine, "x", [1])
    with pytest.raises(InvalidRequest, match="in use"):
        add(engine, "x", [1])
    drain(engine)
    add(engine, "x", [1])


def test_abort_gives_blocks_and_lease_back_at_once(fake_engine: MakeEngine) -> None:
    engine = fake_engine(tasks={"a": 1.5}, max_sequences=1)
    add(engine, "x", [1] * 20, "a")
    add(engine, "waiting", [1] * 20, "a")
    engine.step()
    assert engine.abort("x")
    assert engine.abort("waiting")
    assert not engine.abort("x")
    assert not engine.has_work
    assert_clean(engine)


def test_two_engines_live_in_one_process(fake_engine: MakeEngine) -> None:
    a, b = fake_engine(tasks={"t": 1.5}), fake_engine(tasks={"t": 0.5}, block_size=2)
    for i, prompt in enumerate(prompts(4)):
        add(a, str(i), prompt, "t")
        add(b, str(i), prompt, "t")
    got: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    while a.has_work or b.has_work:
        for engine, seen in zip((a, b), got, strict=True):
            for output in engine.step():
                seen.setdefault(output.request_id, []).append(output.token_id or 0)
    for i, prompt in enumerate(prompts(4)):
        assert got[0][str(i)] == a.model.expected(prompt, 8, 1.5)  # type: ignore[attr-defined]
        assert got[1][str(i)] == b.model.expected(prompt, 8, 0.5)  # type: ignore[attr-defined]


def test_steps_are_one_forward_over_the_whole_batch(fake_engine: MakeEngine) -> None:
    engine = fake_engine(max_batch_tokens=64)
    engine.generate([[1, 2, 3]] * 6, SamplingParams(temperature=0.0, max_tokens=4))
    assert engine.model.forwards == [18, 6, 6, 6]  # type: ignore[attr-defined]


def test_stats_count(fake_engine: MakeEngine) -> None:
    engine = fake_engine(tasks={"a": 1.5})
    add(engine, "x", [1, 2, 3], "a", max_tokens=4)
    add(engine, "y", [1, 2, 3], max_tokens=2)
    engine.step()
    during = engine.stats()
    assert (during["requests_running"], during["kv_blocks_used"], during["task_rows_used"]) == (2, 2, 1)
    drain(engine)
    after = engine.stats()
    assert (after["prompt_tokens_total"], after["generation_tokens_total"]) == (6, 6)
    assert (after["finished_total"], after["steps_total"], after["kv_blocks_used"]) == (2, 4, 0)


def test_registry_and_engine_must_agree_on_rows(fake_engine: MakeEngine) -> None:
    engine = fake_engine()
    with pytest.raises(ValueError, match="registry has 8 rows"):
        Engine(engine.model, engine.tasks, EngineConfig(task_rows=9, num_blocks=4))


@pytest.mark.parametrize("change", [{"block_size": 0}, {"num_blocks": 0}, {"max_sequences": -1}])
def test_config_is_checked(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        EngineConfig(**change)


def test_generate_checks_its_lists(fake_engine: MakeEngine) -> None:
    engine = fake_engine()
    with pytest.raises(InvalidRequest, match="2 entries for 3 prompts"):
        engine.generate([[1]] * 3, [GREEDY, GREEDY])
    with pytest.raises(InvalidRequest, match="list"):
        engine.generate("text")
    with pytest.raises(InvalidRequest):
        engine.generate([[1], [97]])
    assert not engine.has_work
    assert_clean(engine)


def test_the_cache_is_sized_from_what_is_available(fake_engine: MakeEngine) -> None:
    from peqa_runtime.engine.kv_cache import bytes_per_block, fitting_blocks

    shapes = [type("S", (), {"kv_heads": 2, "d_k": 8, "d_v": 4})()] * 3
    per_block = bytes_per_block(shapes, 16, torch.float32)
    assert per_block == 3 * 16 * 2 * (8 + 4) * 4

    def fit(available: int, device: str = "cpu", length: int = 160, sequences: int = 1000) -> int:
        return fitting_blocks(
            shapes,
            block_size=16,
            dtype=torch.float32,
            available_bytes=available,
            device=torch.device(device),
            max_model_len=length,
            max_sequences=sequences,
        )

    assert fit(1000 * per_block) == 250
    assert fit(1 << 60) == min((2 << 30) // per_block, 10_000)
    assert fit(20 * per_block) == 10  # one context, although it is more than a quarter
    assert fit(1000 * per_block, "cuda") == 850
    assert fit(1000 * per_block, sequences=3) == 30
    with pytest.raises(ValueError, match="smaller max_model_len"):
        fit(9 * per_block)
