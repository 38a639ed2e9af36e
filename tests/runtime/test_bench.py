"""The offline half of the engine's bench, on a tiny base: names, bars, and that a wrong answer shows."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from peqa_kernels.bench.machine import Machine
from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Call
from peqa_kernels.quant_matmul import bank_dtype
from peqa_runtime.bench import cli, run, throughput
from peqa_runtime.bench.equality import (
    Batches,
    answers_alone,
    little_memory,
    load_cases,
    random_batches,
    random_cases,
)
from peqa_runtime.bench.gpu import (
    answers_of_both,
    cost_of_equal_bits,
    cost_of_prompts,
    eager_steps,
    memory_rows,
    prompt_steps,
    steps_against_floor,
)
from peqa_runtime.bench.load_profile import load_profile, request_flops
from peqa_runtime.bench.profile import step_profile
from peqa_runtime.bench.random_base import LlamaShape, write_random_base
from peqa_runtime.bench.throughput import Pairs, in_pairs, mixed_against_base
from peqa_runtime.bench.workload import Load, Prompts, engine_with_tasks, mixed, random_set
from peqa_runtime.core import Blend
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.model.base_checkpoint import read_manifest
from peqa_runtime.scales.scale_set import ScaleSet

MODEL_PARTS = ["matmul", "attention", "elementwise", "head", "call"]
LOAD = Load(prompt_tokens=20, output_tokens=6, tasks=3)


def test_no_two_prompts_begin_alike() -> None:
    prompts = Prompts(vocab_size=40, seed=1)
    written = [prompts.write(8) for _ in range(100)]
    assert len({prompt[:2] for prompt in written}) == 100
    assert all(len(prompt) == 8 and min(prompt) >= 16 and max(prompt) < 40 for prompt in written)


def test_sets_differ_and_fit(tiny_base: Path) -> None:
    manifest = read_manifest(tiny_base)
    sets = [ScaleSet.parse(random_set(manifest, seed), manifest) for seed in (0, 1)]
    assert sets[0].revision != sets[1].revision
    assert {one.kind for one in sets} == {"channel"}


def test_tasks_take_turns() -> None:
    assert mixed(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    assert mixed([], 2) == ["base", "base"]


def test_mixed_tasks_are_held_against_the_base(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_with_tasks(tiny_base, LOAD.task_names, EngineConfig(num_blocks=64), "cpu") as engine:
        prompts = Prompts(engine.model.vocab_size, 0)
        served: list[tuple[int, int]] = []

        def pairs(one: list[Call], other: list[Call], seconds: float, show: object) -> Pairs:
            served.append((len(one), len(other)))
            for call in (*one, *other):
                call()
            return Pairs(0.96, 0.96, 1.0, 9)

        monkeypatch.setattr(throughput, "in_pairs", pairs)
        rows = mixed_against_base(engine, LOAD, prompts, 0.0, lambda _: None)
    assert served == [(1, 3), (1, 1), (1, 1)], "every task has its turn"
    assert [row.name for row in rows] == [f"engine/mixed-tasks/{n}-sequences/vs-base" for n in (1, 8, 32)]
    assert [(row.value, row.bar, row.ok) for row in rows] == [(0.96, 0.97, False)] * 3
    assert rows[1].facts["tokens_per_s"] == pytest.approx(8 * 6)


def test_two_ways_are_compared_round_by_round() -> None:
    slow = itertools.count(1)

    def first() -> None:
        time.sleep(0.002 * next(slow))  # the machine gets slower

    def second() -> None:
        time.sleep(0.001)

    found = in_pairs([first], [second], 0.0, lambda _: None)
    assert found.rounds == 15
    assert found.one > 2 * found.other
    assert found.ratio > 2


@pytest.mark.alone
def test_the_profile_adds_up(tiny_base: Path) -> None:
    load = Load(prompt_tokens=20, output_tokens=8, tasks=16)
    with engine_with_tasks(tiny_base, load.task_names, EngineConfig(num_blocks=96), "cpu") as engine:
        *parts, overhead, sampled = step_profile(engine, load)
    names = [row.name.removeprefix("engine/step-profile/") for row in parts]
    assert names == [*MODEL_PARTS, "scheduling", "inputs", "sampling", "rest"]
    assert all(row.bar is None for row in parts)
    assert sum(row.value for row in parts) == pytest.approx(1.0, abs=0.2)
    assert (overhead.name, overhead.bar) == ("engine/step-profile/overhead", 0.15)
    around = [
        row.value for row, name in zip(parts, names, strict=True) if name not in MODEL_PARTS or name == "call"
    ]
    assert overhead.value == pytest.approx(sum(around))
    assert (sampled.name, sampled.bar) == ("engine/step-profile/overhead-sampled", None)
    assert 0 < sampled.value < 1


def test_batches_equal_each_request_alone_and_a_difference_shows(tiny_base: Path) -> None:
    def shown(_: str) -> None: ...

    with engine_with_tasks(tiny_base, LOAD.task_names, EngineConfig(prefix_cache=False), "cpu") as engine:
        cases = random_cases(LOAD, engine.model.vocab_size, seed=3, count=12)
        alone = answers_alone(engine, cases)
        assert len({case.task for case in cases}) > 2
        assert any(isinstance(case.task, Blend) for case in cases)
        assert len(set(alone)) > 5
    wrong = [alone[1], alone[0], *alone[2:]]
    found, broken = Batches(), Batches()
    with engine_with_tasks(tiny_base, LOAD.task_names, EngineConfig(num_blocks=16), "cpu") as engine:
        random_batches(engine, cases, alone, 12, 0, shown, found)
        random_batches(engine, cases, wrong, 12, 0, shown, broken)
    with engine_with_tasks(tiny_base, LOAD.task_names, EngineConfig(num_blocks=128), "cpu") as engine:
        random_batches(engine, cases, alone, 3, 0, shown, found, wide=True)
    rows = found.rows()
    assert [row.name for row in rows] == [
        "engine/random-batches/equal-to-alone",
        "engine/random-batches/preemptions",
        "engine/random-batches/prefix-hit-tokens",
    ]
    assert all(row.ok for row in rows), [(row.name, row.value) for row in rows]
    assert (found.count, found.wide) == (15, 3)
    assert found.requests > 12 * 2 + 3 * 20
    assert broken.equal < broken.count
    assert not broken.rows()[0].ok


def test_little_memory_gives_the_same_answers(tiny_base: Path) -> None:
    load = Load(prompt_tokens=40, output_tokens=40, tasks=3)
    with engine_with_tasks(tiny_base, load.task_names, EngineConfig(), "cpu") as engine:
        cases = load_cases(load, engine.model.vocab_size, 0, 8)
        want = answers_alone(engine, cases)
    with engine_with_tasks(tiny_base, load.task_names, EngineConfig(num_blocks=11), "cpu") as engine:
        rows = little_memory(engine, want, cases)
    assert [row.name.rpartition("/")[2] for row in rows] == ["equal-to-alone", "errors", "preemptions"]
    assert all(row.ok for row in rows), [(row.name, row.value) for row in rows]


def test_a_random_base_serves(tiny_base: Path, tmp_path: Path) -> None:
    shape = LlamaShape(hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, vocab=300)
    write_random_base(tmp_path / "base", shape, tiny_base)
    machine = Machine(torch.device("cpu"), "test", 1e9, 1e9, 1e12)
    load = Load(prompt_tokens=6, output_tokens=5, tasks=2)
    config = EngineConfig(num_blocks=128, max_sequences=64)
    with engine_with_tasks(tmp_path / "base", load.task_names, config, "cpu") as engine:
        rows = steps_against_floor(engine, machine, load, Prompts(300, 0))
        on_device = memory_rows(engine, machine, 10**9)
        cache = sum(tensor.nbytes for caches in engine.kv_cache.layers for tensor in caches)
    assert [row.name for row in rows] == [
        *(f"engine/gpu/random-7b/{n}-sequences/of-floor" for n in (1, 8, 32, 64)),
        *(
            f"engine/gpu/random-7b/memory-{part}"
            for part in ("with-1000-tasks", "base-and-workspaces", "bank", "kv-cache")
        ),
    ]
    assert [row.bar for row in rows] == [0.6, None, 0.7, None, None, None, None, None]
    whole, base, bank, kv_cache = (row.value for row in on_device)
    assert whole == pytest.approx(base + bank)
    assert kv_cache == pytest.approx(cache / 1e9)
    assert whole + kv_cache == pytest.approx(1.0), "all that is in use, the cache apart"
    weights = sum(n * k for n, k in shape.linears.values()) * 2
    outputs = sum(n for n, _ in shape.linears.values()) * 2
    moved = weights // 2 + 4 * outputs + 300 * 32 * 4  # codes, scales, the head in fp32
    scale = bank_dtype(torch.device("cpu")).itemsize
    moved += scale * outputs + 2 * 2 * 8 * 2 * 4 * (6 + 5 // 2)  # one task, keys and values of 8 tokens
    assert rows[0].facts["bytes_floor_us"] == pytest.approx(moved / 1e9 * 1e6)
    assert rows[0].facts["flops_floor_us"] == pytest.approx(2 * (weights + 300 * 32) / 1e12 * 1e6)


def test_a_tokenizer_is_all_that_the_steps_on_a_gpu_need(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base may be too large to be brought to a machine without network."""
    for file in tiny_base.glob("tokenizer*"):
        shutil.copy(file, tmp_path)

    def steps(base: Path, *rest: object) -> list[Row]:
        write_random_base(tmp_path / "random", LlamaShape(32, 64, 1, 4, 2, 300), base)
        return [Row("steps", 1.0, "x", ">=")]

    answers = Row("answers", 1.0, "share", ">=")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "GraphReplay", lambda **_: None)
    monkeypatch.setattr(run, "measure_machine", lambda *_: None)
    monkeypatch.setattr(run, "random_base_steps", steps)
    monkeypatch.setattr(run, "answers_of_both", lambda *_: answers)
    monkeypatch.setattr(run, "rows_on", lambda *_: [[Row("engine/of-a-base", 1.0, "x", ">=")]])
    assert cli.main([str(tmp_path), "--only", "gpu"]) == 0
    said = capsys.readouterr()
    assert "1 rows" in said.out
    assert "has a tokenizer only" in said.err
    shutil.rmtree(tmp_path / "random")
    assert cli.main([str(tiny_base), "--only", "gpu"]) == 0
    said = capsys.readouterr()
    assert "3 rows" in said.out
    assert "engine/gpu/of-a-base" in said.out


class NoGraph:
    """Graphs that fit no step."""

    asked = 0

    def prepare(self, batch: object) -> None:
        self.asked += 1


def test_graphs_and_equal_bits_are_compared(tiny_base: Path) -> None:
    load = Load(prompt_tokens=6, output_tokens=5, tasks=2)
    machine = Machine(torch.device("cpu"), "test", 1e9, 1e9, 1e12)
    with engine_with_tasks(tiny_base, load.task_names, EngineConfig(max_sequences=64), "cpu") as engine:
        prompts = Prompts(300, 0)
        engine.runner.graphs = graphs = NoGraph()  # type: ignore[assignment]
        assert len(eager_steps(engine, load, prompts, 2)) == 3
        assert graphs.asked == 0
        compared = [
            row
            for row in steps_against_floor(engine, machine, load, prompts)
            if row.name.endswith("/graph-against-eager")
        ]
        assert engine.runner.graphs is graphs
        assert graphs.asked > 0
        (cost,) = cost_of_equal_bits(engine, {8: 2.0}, load, prompts)
        assert len(prompt_steps(engine, load, prompts)) == 8
        assert not engine.has_work
    assert len(compared) == 4
    for row in compared:
        assert row.value == pytest.approx(row.facts["eager_us"] / row.facts["graph_us"])
    assert (cost.name, cost.bar) == ("engine/gpu/random-7b/8-sequences/cost-of-equal-bits", 1.03)
    assert cost.value == pytest.approx(cost.facts["time_us"] / 2e6)
    assert not cost_of_prompts(2.1, 2.0, 512).ok


def test_a_load_is_taken_apart(tiny_base: Path) -> None:
    load = Load(prompt_tokens=20, output_tokens=6, tasks=3)
    with engine_with_tasks(tiny_base, load.task_names, EngineConfig(num_blocks=256), "cpu") as engine:
        rows = {
            row.name: row
            for row in load_profile(engine, load, Prompts(engine.model.vocab_size, 0), flops_per_second=1e12)
        }
        assert not engine.has_work
        weights = sum(linear.out_features * linear.in_features for linear in engine.model.linears)
        head = engine.model.vocab_size * 64
        assert request_flops(engine, load) == 2 * (25 * weights + 6 * head)
        assert engine.tasks.registry.counts().leases == 0
        assert "schedule" not in vars(engine.scheduler), "its watches are gone"
    for streams in (1, 8, 32):
        name = f"engine/load-profile/{streams}-streams"
        parts = [*MODEL_PARTS, "scheduling", "inputs", "sampling", "rest"]
        assert sum(rows[f"{name}/{part}"].value for part in parts) == pytest.approx(1.0)
        assert all(rows[f"{name}/{part}"].value >= 0 for part in parts)
        whole, share = rows[f"{name}/linear-bf16-ceiling"], rows[f"{name}/of-ceiling"]
        assert whole.value == pytest.approx(1e12 / (2 * (25 * weights + 6 * head)) * 6)
        assert share.value == pytest.approx(share.facts["tokens_per_s"] / whole.value)


def test_a_device_is_measured_whole(tiny_base: Path) -> None:
    options = run.Options(tiny_base, (), "cpu", 0.0, 5, 0, LOAD)
    names = [row.name for rows in run.rows_on(options, lambda _: None) for row in rows]
    assert "engine/step-profile/overhead" in names
    assert "engine/load-profile/32-streams/of-ceiling" in names
    assert "engine/random-batches/equal-to-alone" in names


def test_answers_of_two_devices_are_compared(tiny_base: Path) -> None:
    row = answers_of_both(tiny_base, "cpu", LOAD, 0)
    assert (row.name, row.value, row.ok) == ("engine/gpu/answers-of-the-cpu", 1.0, True)


def test_the_command_writes_rows_and_sets(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    sizes = ["--prompt-tokens", "20", "--output-tokens", "4", "--seconds", "0", "--device", "cpu", "--quiet"]
    assert cli.main([str(tiny_base), "--only", "streams", "--out", str(out), *sizes]) == 0
    (row,) = json.loads(out.read_text())
    assert (row["name"], row["unit"], row["bar"]) == ("engine/offline/64-streams", "tokens/s", None)
    assert row["value"] > 0
    assert cli.main([str(tiny_base), "--sets", str(tmp_path / "sets"), "--count", "2"]) == 0
    assert [file.name for file in sorted((tmp_path / "sets").iterdir())] == [
        "00000.safetensors",
        "00001.safetensors",
    ]


def test_the_command_refuses_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(tmp_path), "--only", "nothing"]) == 2
    assert "not nothing" in capsys.readouterr().err
    assert cli.main([str(tmp_path), "--only", "streams"]) == 1
    assert "error: " in capsys.readouterr().err
