"""Decode steps as graphs, on a stand-in for CUDA's: the right bucket, nothing stale, and the bits of eager steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graph_recorder import StandIn

from peqa_runtime.core import SCALE_KINDS
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.decode_graphs import DecodeGraphs
from peqa_runtime.engine.engine import Engine
from peqa_runtime.engine.graph_plan import GraphPlan
from peqa_runtime.model import loader
from peqa_runtime.model.fused_decoder import fused_decoder
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.set_layout import expected_shapes

SENTENCE = "the cat and the dog sat on the mat; then they ran into another house, over there, without them"
CONFIG = EngineConfig(num_blocks=96, max_batch_tokens=128, max_sequences=6, task_rows=6)


def random_set(engine: Engine, kind: str, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    manifest = engine.model.manifest
    tensors = {
        name: 1 + 0.2 * (2 * torch.rand(shape, generator=generator) - 1)
        for name, shape in expected_shapes(kind, manifest).items()
    }
    return ScaleSet.build(kind, tensors, manifest).to_bytes()  # type: ignore[arg-type]


def eager_engine(
    base: Path, config: EngineConfig = CONFIG, kinds: tuple[str, ...] = SCALE_KINDS, *, fused: bool = False
) -> Engine:
    """As on a GPU: through transformers' modules, or the fused decoder."""
    engine = Engine(base, device="cpu", config=config)
    engine.model.lean = None
    if fused:
        loaded = engine.model
        loaded.fused = fused_decoder(loaded.model, loaded.layers, loaded.max_model_len)
        assert loaded.fused is not None
    for i, kind in enumerate(kinds):
        engine.tasks.upload(f"task{i}", random_set(engine, kind, i))
    return engine


def with_graphs(engine: Engine, recorder: object, plan: GraphPlan | None = None) -> DecodeGraphs:
    graphs = DecodeGraphs(
        plan or GraphPlan.of(engine.config.max_sequences, engine.max_model_len),
        recorder,  # type: ignore[arg-type]
        engine.runner.forward,
        engine.bank,
        block_size=engine.config.block_size,
        scratch_block=engine.kv_cache.spare[0],
        vocab_size=engine.model.vocab_size,
        device=engine.model.device,
        row_invariant=False,
    )
    if graphs.capture():
        engine.runner.graphs = graphs
    return graphs


def mixed(count: int, max_tokens: int) -> tuple[list[str], list[SamplingParams], list[str]]:
    rng = random.Random(1)
    words = SENTENCE.split()
    prompts = [" ".join(rng.choices(words, k=rng.randint(1, 24))) for _ in range(count)]
    params = [
        SamplingParams(
            max_tokens=rng.randint(2, max_tokens),
            temperature=0.0 if i % 3 else 0.8,
            seed=i,
            logprobs=2 if i % 2 else None,
            prompt_logprobs=1 if i % 8 == 0 else None,
            presence_penalty=0.5 if i % 5 == 0 else 0.0,  # changes the logits in place
            ignore_eos=True,
        )
        for i in range(count)
    ]
    return prompts, params, [("base", "task0", "task1", "task2")[i % 4] for i in range(count)]


@pytest.mark.parametrize("fused", [False, True])
def test_graphs_give_the_bits_of_eager_steps(fused: bool, tiny_base: Path) -> None:
    """Random mixes of all kinds of tasks, preempted; the cache, the padding's block too, is full of NaN."""
    config = EngineConfig(num_blocks=24, block_size=4, max_batch_tokens=37, max_sequences=6, task_rows=6)
    eager, captured = eager_engine(tiny_base, config), eager_engine(tiny_base, config, fused=fused)
    graphs = with_graphs(captured, StandIn())
    for engine in (eager, captured):
        for caches in engine.kv_cache.layers:
            for cache in caches:
                cache.fill_(float("nan"))
    work = mixed(20, 24)
    want = eager.generate(*work)
    assert captured.generate(*work) == want
    assert captured.stats()["preemptions_total"] > 0
    assert graphs.replays > 20
    assert len({c.token_ids for c in want}) > 15, "answers differ, or this test shows nothing"


GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def answers(engine: Engine, tasks: list[str]) -> list[tuple[int, ...]]:
    return [c.token_ids for c in engine.generate([SENTENCE[i:] for i in range(len(tasks))], GREEDY, tasks)]


def test_no_task_makes_a_graph_stale_or_has_one_captured(tiny_base: Path) -> None:
    """Uploaded, replaced and evicted sets are rows; a new kind is captured once per bucket, and then never again."""
    eager, captured = eager_engine(tiny_base, kinds=()), eager_engine(tiny_base, kinds=())
    recorder = StandIn()
    graphs = with_graphs(captured, recorder)
    assert recorder.captures == len(graphs.plan.buckets) == 4

    def upload_and_compare(kind: str, seed: int) -> None:
        for engine in (eager, captured):
            engine.tasks.upload("mine", random_set(engine, kind, seed))
        tasks = ["base", "mine", "base", "mine"]
        assert answers(captured, tasks) == answers(eager, tasks)

    seen = []
    for kind, seed in [("channel", i) for i in range(8)] + [("group", 1), ("group", 2)]:
        upload_and_compare(kind, seed)
        seen.append(recorder.captures)
    assert set(seen[:8]) == {4}, "channel sets need nothing but a row"
    assert seen[8:] == [seen[8]] * 2
    assert seen[8] > 4, "group scales have graphs of their own"
    upload_and_compare("channel+input", 3)
    upload_and_compare("channel+input", 4)
    after = recorder.captures
    assert after > seen[-1], "every row reads input scales from now on"
    upload_and_compare("channel+input", 5)
    upload_and_compare("channel", 9)
    assert recorder.captures == after
    assert captured.bank.allocated == ("channel", "channel+input", "group")


def test_the_banks_tensors_stay_where_they_are(tiny_base: Path) -> None:
    engine = eager_engine(tiny_base)
    names = ("out_scale", "in_scale", "group_scale")
    answers(engine, ["task0", "task1", "task2"])
    before = [getattr(bank, name).data_ptr() for bank in engine.bank.banks for name in names]
    for seed in range(12):
        engine.tasks.upload("more", random_set(engine, SCALE_KINDS[seed % 3], seed))
        answers(engine, ["more"])
    assert before == [getattr(bank, name).data_ptr() for bank in engine.bank.banks for name in names]


@pytest.mark.parametrize("what", ["bank", "cache", "inputs", "logits"])
def test_the_stand_in_notices_a_tensor_that_is_not_the_captured_one(tiny_base: Path, what: str) -> None:
    """Else the tests above would show nothing."""
    engine = eager_engine(tiny_base, kinds=("channel",))
    graphs = with_graphs(engine, StandIn())
    if what == "bank":
        engine.bank.banks[1].out_scale = engine.bank.banks[1].out_scale.clone()
    elif what == "cache":
        layer = engine.model.layers[1]
        layer.bind(layer.key_cache, layer.value_cache.clone())
    elif what == "inputs":
        forward = engine.runner._model.forward
        engine.model.forward = lambda context, *rest: forward(  # type: ignore[method-assign]
            replace(context, seq_lens=context.seq_lens.clone()), *rest
        )
    else:
        forward = engine.runner._model.forward
        engine.model.forward = lambda *given: forward(*given)[:0]  # type: ignore[method-assign]
    (answer,) = engine.generate([SENTENCE], GREEDY, ["task0"])
    assert answer.finish_reason == "error"
    assert graphs.replays == 0


def test_prompts_and_long_contexts_run_eagerly(tiny_base: Path) -> None:
    engine = eager_engine(tiny_base, kinds=())
    graphs = with_graphs(engine, StandIn(), GraphPlan((1, 2), (32,)))
    engine.generate(["ab"], replace(GREEDY, max_tokens=1))
    assert graphs.replays == 0, "the prompt gives the first token"
    engine.generate(["ab"], GREEDY)
    assert graphs.replays == 5
    engine.generate(["ab", "bc", "cd"], GREEDY)
    assert graphs.replays == 5, "three sequences are more than a graph has"
    count = len(engine.generate([SENTENCE], replace(GREEDY, max_tokens=1))[0].prompt_token_ids)
    assert 20 < count < 30, count
    engine.generate([SENTENCE], replace(GREEDY, max_tokens=20))
    assert graphs.replays == 5 + (32 - count), "one for each token up to the 32nd"


def test_a_prompt_that_comes_a_token_at_a_time_is_replayed_from_its_first(tiny_base: Path) -> None:
    engine = eager_engine(
        tiny_base, EngineConfig(num_blocks=32, max_batch_tokens=1, max_sequences=1), kinds=()
    )
    want = answers(engine, ["base"])
    graphs = with_graphs(engine, StandIn())
    engine.scheduler = engine._new_scheduler()  # with nothing in its prefix cache
    assert answers(engine, ["base"]) == want
    assert graphs.replays == len(engine.model.tokenizer(SENTENCE).input_ids) + len(want[0]) - 1


class Failing(StandIn):
    """Captures `good` times."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.good = good

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.captures == self.good:
            raise RuntimeError("called a synchronizing CUDA operation")
        return super().capture(run)


class Wrong(StandIn):
    """A replay that leaves the logits as they are."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        super().capture(run)
        return lambda: None


@pytest.mark.parametrize(
    ("recorder", "says"), [(Failing(0), "synchronizing"), (Failing(3), "eagerly"), (Wrong(), "other")]
)
def test_what_cannot_be_captured_runs_eagerly_and_says_so(
    tiny_base: Path, recorder: StandIn, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = eager_engine(tiny_base)
    with_graphs(engine, recorder)
    assert engine.runner.graphs is None
    assert says in caplog.text


def test_a_kind_that_cannot_be_captured_later_runs_eagerly(tiny_base: Path) -> None:
    eager, captured = eager_engine(tiny_base), eager_engine(tiny_base)
    graphs = with_graphs(captured, Failing(4))
    assert graphs.replays == 0
    tasks = ["task0", "task2"]  # the second one has group scales
    assert answers(captured, tasks) == answers(eager, tasks)
    assert graphs.replays == 0
    assert answers(captured, ["task0", "base"]) == answers(eager, ["task0", "base"])
    assert graphs.replays == 5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3", {"head_dim": 16}),
        ("gemma2", {"head_dim": 16, "sliding_window": 32}),
        ("gpt_neox", {}),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
def test_other_architectures_ask_the_device_for_nothing(
    architecture_base: Callable[..., Path],
    name: str,
    changes: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "steady_own_products", lambda model: None)  # for CPUs alone
    engine = eager_engine(architecture_base(name, **changes), kinds=("channel",))
    graphs = with_graphs(engine, StandIn())
    assert engine.runner.graphs is graphs


def test_a_model_that_waits_for_the_device_runs_eagerly(
    architecture_base: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Dynamic rotary scaling asks how long the longest sequence is."""
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    engine = eager_engine(architecture_base("llama", **dynamic), kinds=("channel",))
    with_graphs(engine, StandIn())
    assert engine.runner.graphs is None
    assert "waits for the device" in caplog.text
    (answer,) = engine.generate(["the cat"], GREEDY, ["task0"])
    assert len(answer.token_ids) == 6
