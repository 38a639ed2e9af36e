"""Tuning scales: the loss falls, nothing but scales moves, an interrupted run ends where an uninterrupted one does."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from peqa_runtime.core import ScaleKind
from peqa_runtime.errors import InvalidCheckpoint, InvalidData, UnsupportedModel
from peqa_runtime.model import read_manifest
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.set_layout import expected_shapes
from peqa_runtime.text import encode
from peqa_runtime.training.batches import held_out_batches
from peqa_runtime.training.callbacks import KeepPositive
from peqa_runtime.training.checkpoints import last_checkpoint, prepare_folder
from peqa_runtime.training.data import encode_rows
from peqa_runtime.training.logprobs import completion_logprobs
from peqa_runtime.training.rows import read_rows
from peqa_runtime.training.run import (
    FinishedRun,
    TrainingFiles,
    checkpoints_of,
    read_training_data,
    train_files,
)
from peqa_runtime.training.settings import TuneConfig, steps_for
from peqa_runtime.training.trainer import TrainingInterrupted
from peqa_runtime.training.tuning import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    apply_scale_set,
    fast_compute_dtype,
    load_tunable,
    logits_at,
    start_tuning,
)

CONFIG = TuneConfig(steps=12, learning_rate=2e-2, warmup_steps=2, batch_rows=4, check_every=4, seed=5)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = (
        json.dumps({"prompt": f"{i} is" + "?" * (i % 5), "completion": "odd" if i % 2 else "even"})
        for i in range(40)
    )
    file.write_text("\n".join(lines))
    return file


def run(
    base: Path, files: TrainingFiles, config: TuneConfig = CONFIG, resume: bool | None = None
) -> FinishedRun:
    tunable = load_tunable(base, device="cpu")
    return train_files(tunable, [files], lambda rows: config, resume=resume, progress=False)[0]


@pytest.mark.parametrize("kind", ["channel", "channel+input", "group"])
def test_the_loss_falls_and_only_scales_change(
    tiny_base: Path, rows: Path, tmp_path: Path, kind: ScaleKind
) -> None:
    output = tmp_path / "set.safetensors"
    tunable = load_tunable(tiny_base, device="cpu")
    before = {name: p.clone() for name, p in tunable.model.named_parameters()}
    losses: list[float] = []
    files = TrainingFiles("answers", rows, output, held_out_fraction=0.2)
    (done,) = train_files(tunable, [files], lambda n: replace(CONFIG, kind=kind), progress=False)
    data = encode_rows(read_rows(rows), tunable)
    batch = held_out_batches(data.examples, rows=40, pad_token_id=0)[0]
    for scaled in (False, True):
        fresh = load_tunable(tiny_base, device="cpu")
        if scaled:
            apply_scale_set(fresh, output)
        logits = logits_at(fresh.model, batch.input_ids, batch.positions)
        losses.append(torch.nn.functional.cross_entropy(logits, batch.targets).item())
    assert losses[1] < losses[0] - 1
    assert done.result.held_out_loss is not None
    for name, parameter in before.items():
        assert torch.equal(parameter, tunable.model.get_parameter(name)), name
    manifest = read_manifest(tiny_base)
    saved = ScaleSet.parse(output, manifest)
    assert saved.revision == done.scale_set.revision
    assert {name: tuple(t.shape) for name, t in saved.tensors.items()} == expected_shapes(kind, manifest)
    assert all(t.dtype == torch.float16 for t in saved.tensors.values())
    assert all((t != 1).any() for t in saved.tensors.values()), "every linear was tuned"
    assert not checkpoints_of([files]).exists()


def test_the_note_says_how_the_set_was_made(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    files = TrainingFiles(
        "answers", rows, tmp_path / "s.safetensors", held_out_fraction=0.1, prompt_format="Q: {prompt}\nA: "
    )
    note = run(tiny_base, files).scale_set.note
    assert (note["rows"], note["held_out_rows"], note["steps"], note["seed"]) == (36, 4, 12, 5)
    assert note["data"] == "rows.jsonl"
    assert len(note["data_digest"]) == 64
    assert note["learning_rate"] == CONFIG.learning_rate
    assert 0 < note["train_loss"] < 10
    assert note["versions"]["torch"] == torch.__version__
    parsed = ScaleSet.parse(tmp_path / "s.safetensors", read_manifest(tiny_base))
    assert parsed.prompt_format == "Q: {prompt}\nA: "
    assert parsed.task == "answers"


@pytest.mark.parametrize("held_out_fraction", [0.0, 0.2])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out_fraction: float
) -> None:
    whole = TrainingFiles(
        "answers", rows, tmp_path / "whole.safetensors", held_out_fraction=held_out_fraction
    )
    cut = replace(whole, output=tmp_path / "cut.safetensors")
    expected = run(tiny_base, whole).scale_set

    clamp = KeepPositive.on_optimizer_step
    steps = iter(range(1, 100))

    def interrupt(self: KeepPositive, *args: object, **kwargs: object) -> None:
        clamp(self, *args, **kwargs)
        if next(steps) == 6:  # in the middle between two regular checkpoints
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(KeepPositive, "on_optimizer_step", interrupt)
    with pytest.raises(TrainingInterrupted, match="after step 6 of 12"):
        run(tiny_base, cut)
    assert not cut.output.exists()
    checkpoint = last_checkpoint(checkpoints_of([cut]))
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-6"
    masters = load_file(checkpoint / "scales.safetensors")
    assert {t.dtype for t in masters.values()} == {torch.float32}
    resumed = run(tiny_base, cut).scale_set
    for name, tensor in expected.tensors.items():
        assert torch.equal(tensor, resumed.tensors[name]), name
    assert resumed.revision == expected.revision
    assert resumed.note["tokens"] == expected.note["tokens"] > 0
    assert resumed.note["held_out_loss"] == expected.note["held_out_loss"]


def test_the_optimizers_memory_is_the_configs(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    """The same run twice ends alike, one with another memory of gradients elsewhere."""
    sets = [
        run(
            tiny_base,
            TrainingFiles("answers", rows, tmp_path / f"{i}.safetensors"),
            replace(CONFIG, beta2=beta2),
        )
        for i, beta2 in enumerate((0.9, 0.9, 0.999))
    ]
    revisions = [done.scale_set.revision for done in sets]
    assert revisions[0] == revisions[1] != revisions[2]
    assert [done.scale_set.note["beta2"] for done in sets] == [0.9, 0.9, 0.999]
    with pytest.raises(InvalidData, match="beta2 must be at least 0 and below 1, got 1"):
        replace(CONFIG, beta2=1.0)


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    assert prepare_folder(folder, {"steps": 3, "lr": 0.1}, resume=None) is None
    assert prepare_folder(folder, {"steps": 4, "lr": 0.1}, resume=None) is None, "nothing to lose yet"
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    (folder / "checkpoint-9").mkdir()  # cut short: its state was never written
    assert prepare_folder(folder, {"steps": 4, "lr": 0.1}, resume=None) == folder / "checkpoint-2"
    with pytest.raises(InvalidData, match=r"other settings \(steps\)"):
        prepare_folder(folder, {"steps": 5, "lr": 0.1}, resume=None)
    assert prepare_folder(folder, {"steps": 5, "lr": 0.1}, resume=False) is None
    with pytest.raises(InvalidData, match="nothing to resume"):
        prepare_folder(folder, {"steps": 5, "lr": 0.1}, resume=True)


def test_a_run_from_before_a_setting_was_there_is_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    assert prepare_folder(folder, {"steps": 3}, resume=None) is None
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')
    with pytest.raises(InvalidData, match=r"other settings \(beta2\)"):
        prepare_folder(folder, {"steps": 3, "beta2": 0.95}, resume=None)
    same = {"steps": 3, "beta2": 0.999, "teacher_digest": "not noted then"}
    assert prepare_folder(folder, same, resume=None) == folder / "checkpoint-2"


def test_scales_stay_in_the_range_that_servers_accept() -> None:
    scales = [torch.nn.Parameter(torch.tensor([-1.0, 0.0, 1.5, 1e6]))]
    KeepPositive(scales).on_optimizer_step()
    assert scales[0].tolist() == [SMALLEST_SCALE, SMALLEST_SCALE, 1.5, LARGEST_SCALE]


def test_bf16_training_multiplies_in_bf16_both_ways(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tunable = load_tunable(tiny_base, device="cpu")
    scales = start_tuning(tunable, "channel")
    seen: set[torch.dtype] = set()
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (seen.add(a.dtype), matmul(a, b))[1])
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_at(tunable.model, torch.tensor([[5, 6, 7]]), torch.tensor([2]))
    logits.logsumexp(-1).sum().backward()
    assert logits.dtype == torch.float32
    assert seen & {torch.bfloat16}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in scales.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 1_000_001}, "steps must be at least 1 and at most 1000000, got 1000001"),
        *(({"clip": value}, "clip must be above 0 and no infinity") for value in (0.0, math.inf, math.nan)),
        *(({"beta2": value}, "beta2 must be at least 0 and below 1") for value in (math.inf, math.nan)),
        *(({"distill": value}, "distill must be between 0 and 1") for value in (math.inf, math.nan)),
        *(({"temperature": value}, "temperature must be above 0 and") for value in (math.inf, math.nan)),
        ({"learning_rate": math.inf}, r"learning_rate \(--lr\) must be above 0 and at most 1"),
        ({"learning_rate": 0.0}, r"learning_rate \(--lr\) must be above 0"),
        ({"learning_rate": float("nan")}, r"learning_rate \(--lr\) must be above 0"),
        ({"kind": "rows"}, "kind must be one of channel"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"batch_rows": 0}, r"batch_rows \(--batch\) must be"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        replace(CONFIG, **change)


def test_contradicting_files_are_refused(tmp_path: Path) -> None:
    data, output = tmp_path / "d.jsonl", tmp_path / "s.safetensors"
    with pytest.raises(InvalidData, match="not both"):
        TrainingFiles("t", data, output, held_out=data, held_out_fraction=0.1)
    with pytest.raises(InvalidData, match=r"\.safetensors file"):
        TrainingFiles("t", data, tmp_path / "s.bin")


def test_epochs_become_steps() -> None:
    assert steps_for(100, 16, 1.0) == 7
    assert steps_for(100, 16, 0.1) == 1
    for epochs in (0.0, -1.0, math.inf, -math.inf, math.nan, 1e9):
        with pytest.raises(InvalidData, match="epochs must be above 0 and at most 10000"):
            steps_for(0, 16, epochs)
    assert steps_for(1600, 16, 10_000) == 1_000_000
    with pytest.raises(
        InvalidData, match="10000 epochs over 1601 rows are 1010000 steps of 16 rows, and a run may"
    ):
        steps_for(1601, 16, 10_000)


def test_compute_dtype_can_be_forced() -> None:
    assert fast_compute_dtype(torch.device("cpu"), "float32") == torch.float32
    assert fast_compute_dtype(torch.device("cpu"), "bfloat16") == torch.bfloat16


def test_a_base_without_a_tokenizer_is_named(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(InvalidCheckpoint, match=r"base has no tokenizer that can be read .*copy") as caught:
        load_tunable(tmp_path / "base", device="cpu")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_loaded_is_named(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="device must be"):
        load_tunable(tiny_base, device="gpu")
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_base, damaged)
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match=r"model\.norm\.weight"):
        load_tunable(damaged, device="cpu")


def test_a_prompt_begins_as_it_does_in_a_server(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    """A model with a begin-of-text token: training and evaluation put it before the prompt, where a server has it."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", 3)]
    )
    tokenizer.save_pretrained(folder)
    tunable = load_tunable(folder, device="cpu")
    data, _ = read_training_data(tunable, TrainingFiles("answers", rows, tmp_path / "s.safetensors"), 0)
    first, row = data.examples[0], read_rows(rows)[0]
    served = encode(tunable.tokenizer, row.prompt)
    assert served[0] == 3
    assert first.token_ids[: first.loss_from] == tuple(served)
    assert 3 not in first.token_ids[1:]
    (scored,) = completion_logprobs(folder, None, [{"prompt": row.prompt, "completion": row.completion}])
    assert scored.token_ids == first.token_ids
