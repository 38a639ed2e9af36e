"""`Engine(base).generate(...)`: what a program without a server does with a base, a store and scale set files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from peqa_runtime import BASE_TASK, Engine, EngineConfig, SamplingParams, ScaleSet, ScaleStore, read_manifest
from peqa_runtime.errors import InvalidRequest, InvalidScaleSet, TaskQuarantined, UnknownTask
from peqa_runtime.scales.task_registry import STRIKES

CONFIG = EngineConfig(num_blocks=96, task_rows=4)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPT = "the cat and the dog"


def set_file(base: Path, folder: Path, seed: int) -> Path:
    """A scale set that changes the tiny model's answers."""
    manifest = read_manifest(base)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.out_scale": 1 + 0.3 * torch.rand(shape.out_features, generator=generator)
        for name, shape in manifest.linears.items()
    }
    path = folder / f"set{seed}.safetensors"
    path.write_bytes(ScaleSet.build("channel", tensors, manifest).to_bytes())
    return path


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sets")
    return [set_file(tiny_base, folder, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def engine(tiny_base: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    store = tmp_path_factory.mktemp("offline") / "store"
    with Engine(tiny_base, store, CONFIG, device="cpu") as engine:
        engine.tasks.upload("one", files[0])
        engine.tasks.upload("two", files[1])
        yield engine


def test_each_prompt_has_its_task_by_name_file_or_blend(engine: Engine, files: list[Path]) -> None:
    tasks = ["one", BASE_TASK, files[1], files[2], {"one": 0.5, "two": 0.5}, {"two": 1.0}]
    got = engine.generate([PROMPT] * 6, GREEDY, tasks)
    by_name = engine.generate([PROMPT] * 2, GREEDY, ["one", "two"])
    assert got[0].token_ids == by_name[0].token_ids
    assert got[2].token_ids == by_name[1].token_ids == got[5].token_ids
    assert got[2].revision == by_name[1].revision
    assert len({got[i].token_ids for i in range(5)}) == 5, "the sets differ in what they say"
    assert got[2].task == str(files[1])
    assert all(c.finish_reason == "length" and len(c.token_ids) == 6 for c in got)
    assert engine.tasks.registry.counts().leases == 0
    assert {info.task for info in engine.tasks.page()} == {"one", "two"}, "a file does not become a task"


def test_a_set_may_be_given_as_it_is(engine: Engine, files: list[Path]) -> None:
    scale_set = ScaleSet.parse(files[2], engine.model.manifest)
    ours, from_file = engine.generate([PROMPT] * 2, GREEDY, [scale_set, files[2]])
    assert ours.token_ids == from_file.token_ids
    assert ours.revision == ours.task == scale_set.revision, "it has no name of its own"
    assert engine.tasks.registry.counts().leases == 0


def test_more_files_than_rows_take_turns(tiny_base: Path, tmp_path: Path) -> None:
    paths = [set_file(tiny_base, tmp_path, seed) for seed in range(10, 16)]
    with Engine(tiny_base, config=EngineConfig(num_blocks=96, task_rows=3), device="cpu") as engine:
        together = engine.generate([PROMPT] * 6, GREEDY, paths)
        alone = [engine.generate([PROMPT], GREEDY, path)[0] for path in paths]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_params_and_logprobs_per_prompt(engine: Engine) -> None:
    params = [GREEDY, SamplingParams(max_tokens=3, seed=5, logprobs=2, prompt_logprobs=1, ignore_eos=True)]
    plain, reported = engine.generate([PROMPT, PROMPT], params, ["one", "two"])
    assert plain.logprobs is None
    assert reported.logprobs is not None
    assert [entry.token_id for entry in reported.logprobs] == list(reported.token_ids)
    assert all(len(entry.top) == 2 for entry in reported.logprobs)
    assert reported.prompt_logprobs is not None
    assert len(reported.prompt_logprobs) == len(reported.prompt_token_ids)


def test_a_progress_bar_counts_the_prompts(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.generate([PROMPT] * 3, GREEDY)
    assert capsys.readouterr().err == ""
    engine.generate([PROMPT] * 3, GREEDY, progress=True)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "error"),
    [
        ("nobody", UnknownTask),
        (Path("nowhere.safetensors"), InvalidScaleSet),
        ({"one": 0.5, "two": 0.2}, InvalidRequest),
        ({"one": 0.5, "nobody": 0.5}, UnknownTask),
        (["one", "two"], InvalidRequest),
    ],
)
def test_refusals_leave_nothing_behind(engine: Engine, task: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        engine.generate([PROMPT] * 3, GREEDY, task)  # type: ignore[arg-type]
    assert not engine.has_work
    assert engine.tasks.registry.counts().leases == 0


def test_a_set_that_makes_nan_ends_its_prompts_and_no_other(tiny_base: Path, files: list[Path]) -> None:
    with Engine(tiny_base, config=CONFIG, device="cpu") as engine:
        engine.tasks.upload("sick", files[0])
        want = engine.generate([PROMPT], GREEDY)[0]
        engine.generate([PROMPT], GREEDY, "sick")
        for bank in engine.bank.banks:
            bank.out_scale[1] = float("nan")
        *sick, well = engine.generate([PROMPT] * 4, GREEDY, ["sick"] * 3 + [BASE_TASK])
        assert [c.finish_reason for c in sick] == ["error"] * 3
        assert all("NaN" in (c.error or "") for c in sick)
        assert well.token_ids == want.token_ids
        with pytest.raises(TaskQuarantined):
            engine.generate([PROMPT], GREEDY, "sick")


def test_a_store_outlives_its_engine_and_a_temporary_one_does_not(
    tiny_base: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    with Engine(tiny_base, store, CONFIG, device="cpu") as first:
        first.tasks.upload("kept", files[0])
        want = first.generate([PROMPT], GREEDY, "kept")
    engine = Engine(str(tiny_base), str(store), CONFIG, device="cpu")
    assert engine.generate([PROMPT], GREEDY, "kept") == want
    engine.close()
    engine.close()
    assert ScaleStore(store, read_manifest(tiny_base)).tasks() == ["kept"]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Engine(tiny_base, config=CONFIG, device="cpu") as temporary:
        temporary.tasks.upload("gone", files[0])
        (folder,) = tmp_path.glob("peqa-store-*")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("prompts", "task", "words"),
    [
        ([PROMPT], None, "task is the name of a task, .* got NoneType"),
        ([PROMPT], 5, "got int"),
        ([PROMPT, PROMPT], ["one", b"two"], "got bytes"),
        ([PROMPT, 5], "one", "a prompt is a text or a list of token ids, not '5'"),
        ([[1, 2.5]], "one", "not '.1, 2.5.'"),
        ([PROMPT], {"one": "all"}, "must be a finite number"),
    ],
)
def test_what_is_no_prompt_or_task_is_refused_by_name(
    engine: Engine, prompts: list[object], task: object, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        engine.generate(prompts, GREEDY, task)  # type: ignore[arg-type]
    assert not engine.has_work
    assert engine.tasks.registry.counts().leases == 0


def test_token_ids_may_be_numpys(engine: Engine) -> None:
    ids = [5, 6, 7]
    assert engine.generate([np.array(ids)], GREEDY) == engine.generate([ids], GREEDY)  # type: ignore[list-item]


def test_closing_the_engine_closes_the_store_that_it_opened(
    tiny_base: Path, files: list[Path], tmp_path: Path
) -> None:
    with Engine(tiny_base, tmp_path / "store", CONFIG, device="cpu") as engine:
        engine.tasks.upload("one", files[0])
        lease = engine.tasks.acquire("one")
        for _ in range(STRIKES):
            engine.tasks.strike(lease.revision)
        assert not (tmp_path / "store" / "index.json").exists()
    assert (tmp_path / "store" / "index.json").exists()
    store = ScaleStore(tmp_path / "store", read_manifest(tiny_base))
    record = store.record("one")
    assert record is not None
    assert record.quarantined
