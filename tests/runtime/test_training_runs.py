"""Whole runs: tasks together as apart, ways to save memory, early stopping, and what happens when things go wrong."""

from __future__ import annotations

import errno
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import CONFIG, Rows, run

from peqa_runtime.errors import InvalidData, StoreError, TrainingDiverged
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.training import scale_trainer as trainer_module
from peqa_runtime.training.checkpoints import last_checkpoint
from peqa_runtime.training.guards import count_clamped, count_zero_codes
from peqa_runtime.training.logprobs import token_logprobs
from peqa_runtime.training.run import TrainingFiles, checkpoints_of
from peqa_runtime.training.scale_trainer import ScaleTrainer
from peqa_runtime.training.settings import Wanted
from peqa_runtime.training.token_losses import has_plain_head
from peqa_runtime.training.tuning import (
    TunableModel,
    drop_scales,
    load_tunable,
    quantized_linears,
    refuse_groups,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tunable(tiny_base: Path) -> TunableModel:
    return load_tunable(tiny_base, device="cpu")


def worst(a: ScaleSet, b: ScaleSet) -> float:
    return max((a.tensors[n].float() - b.tensors[n].float()).abs().max().item() for n in a.tensors)


@pytest.mark.parametrize("pack", [False, True])
def test_tasks_tuned_together_become_what_they_become_apart(
    tunable: TunableModel, rows: Rows, tmp_path: Path, pack: bool
) -> None:
    files = [
        TrainingFiles(
            task, rows(task, count), tmp_path / f"{task}.safetensors", held_out_fraction=0.2, dtype="float32"
        )
        for task, count in (("odd", 20), ("many", 33))
    ]
    config = replace(CONFIG, pack=pack)
    together = run(tunable, *files, config=config)
    for given, mixed in zip(files, together, strict=True):
        (apart,) = run(tunable, given, config=config)
        assert worst(apart.scale_set, mixed.scale_set) < 2e-4 < worst_change(mixed.scale_set)
        assert mixed.result.held_out_loss == pytest.approx(apart.result.held_out_loss, rel=1e-3)
        assert mixed.scale_set.task == given.task
        assert mixed.rows == apart.rows
    assert worst(together[0].scale_set, together[1].scale_set) > 1e-2


def test_a_run_in_bfloat16_leaves_a_model_of_fp32(tunable: TunableModel, rows: Rows, tmp_path: Path) -> None:
    ids = [tunable.encode("some words")]
    before = token_logprobs(tunable, ids)
    files = TrainingFiles("t", rows("t", 8), tmp_path / "t.safetensors")
    run(tunable, files, config=replace(CONFIG, steps=1, compute="bfloat16"))
    drop_scales(tunable)
    assert token_logprobs(tunable, ids) == before


def test_a_second_run_on_a_model_computes_as_the_first_did(
    tunable: TunableModel, rows: Rows, tmp_path: Path
) -> None:
    files = TrainingFiles("t", rows("t", 8), tmp_path / "t.safetensors", held_out=rows("h", 4))
    config = replace(CONFIG, steps=2, compute="bfloat16")
    first, second = (run(tunable, files, config=config)[0] for _ in range(2))
    whole = run(tunable, files, config=replace(config, compute="float32"))[0]
    assert first.result.base_loss == second.result.base_loss != whole.result.base_loss
    assert first.scale_set.revision == second.scale_set.revision


def worst_change(scale_set: ScaleSet) -> float:
    return max((t.float() - 1).abs().max().item() for t in scale_set.tensors.values())


@pytest.mark.parametrize("change", [{"accumulate": 2}, {"checkpoint_activations": True}, {"pack": True}])
def test_ways_to_save_memory_do_not_change_the_result(
    tunable: TunableModel, rows: Rows, tmp_path: Path, change: dict[str, Any]
) -> None:
    files = TrainingFiles("t", rows("t", 20), tmp_path / "t.safetensors", dtype="float32")
    (plain,) = run(tunable, files)
    (other,) = run(tunable, files, config=replace(CONFIG, **change))
    assert worst(plain.scale_set, other.scale_set) < 2e-4 < worst_change(plain.scale_set)


def test_checkpointed_activations_are_computed_again(
    tunable: TunableModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = TrainingFiles("t", rows("t", 8), tmp_path / "t.safetensors")
    assert has_plain_head(tunable)  # the trainer asks the model this once
    layer = tunable.model.model.layers[1].mlp
    forward, calls = layer.forward, []
    monkeypatch.setattr(layer, "forward", lambda *args: (calls.append(1), forward(*args))[1])
    counts: list[int] = []
    for on in (False, True):
        calls.clear()
        run(tunable, files, config=replace(CONFIG, steps=2, checkpoint_activations=on))
        counts.append(len(calls))
    assert counts == [2, 4]


def test_a_run_stops_early_and_keeps_its_best(tunable: TunableModel, rows: Rows, tmp_path: Path) -> None:
    """Held-out rows that contradict the training rows: the base stays the best, and the run ends after `patience`."""
    contrary = tmp_path / "contrary.jsonl"
    contrary.write_text(
        rows("t", 20).read_text().replace("t 0", "~~").replace("t 1", "||").replace("t 2", "^^")
    )
    files = TrainingFiles("t", rows("t", 20), tmp_path / "t.safetensors", held_out=contrary)
    config = replace(CONFIG, steps=200, check_every=4, patience=2, learning_rate=5e-2)
    said: list[str] = []
    (done,) = run(tunable, files, config=config, say=said.append)
    assert done.result.last_step < 200
    assert done.result.last_step == done.result.best_step + 8
    assert done.result.held_out_loss is not None
    assert done.result.base_loss is not None
    assert done.result.held_out_loss <= done.result.base_loss
    assert f"stopped early after step {done.result.last_step} of 200" in said[2]
    assert ("nothing did better than the base" in said[-1]) == (done.result.best_step == 0)
    assert done.result.tokens < 200 * 4 * 20
    assert math.isfinite(done.result.train_loss)
    with pytest.raises(InvalidData, match="needs held-out rows"):
        run(tunable, replace(files, held_out=None), config=config)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_checkpoint(
    tunable: TunableModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = TrainingFiles("t", rows("t", 20), tmp_path / "t.safetensors")
    losses = ScaleTrainer._losses
    steps = iter(range(1, 100))

    def poisoned(self: ScaleTrainer, *args: Any) -> torch.Tensor:
        found = losses(self, *args)
        return found * float("nan") if next(steps) == 5 else found

    monkeypatch.setattr(ScaleTrainer, "_losses", poisoned)
    with pytest.raises(TrainingDiverged, match=r"NaN or infinite at step 5; .*checkpoint-3 is kept"):
        run(tunable, files)
    checkpoint = last_checkpoint(checkpoints_of([files]))
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-3"
    assert all(torch.isfinite(p).all() for p in tunable.model.parameters())
    assert not files.output.exists()


def test_a_full_disk_says_what_is_safe_and_the_same_command_goes_on(
    tunable: TunableModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TrainingFiles("t", rows("t", 20), tmp_path / "whole.safetensors")
    (expected,) = run(tunable, whole)
    files = replace(whole, output=tmp_path / "t.safetensors")
    save, full = trainer_module.save_file, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_room(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "checkpoint-6" in str(path):
            raise full
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "save_file", no_room)
        with pytest.raises(
            StoreError, match=r"step 6 could not be written .the disk is full at .*checkpoint-3 is kept"
        ):
            run(tunable, files)

    def unwritten(self: ScaleSet, path: Path) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(ScaleSet, "save", unwritten)
        with pytest.raises(StoreError, match=r"t\.safetensors could not be written .*same command"):
            run(tunable, files)
    (done,) = run(tunable, files)  # from the checkpoint of the last step: nothing is left to compute
    assert done.scale_set.revision == expected.scale_set.revision


@pytest.mark.parametrize(
    ("outputs", "fractions", "message"),
    [
        (("a", "a"), (0.1, 0.1), "a name and an output of its own"),
        (("a", "b"), (0.1, 0.0), "either all tasks"),
    ],
)
def test_tasks_that_cannot_be_tuned_together(
    tunable: TunableModel,
    rows: Rows,
    tmp_path: Path,
    outputs: tuple[str, str],
    fractions: tuple[float, float],
    message: str,
) -> None:
    files = [
        TrainingFiles(f"t{i}", rows("t", 20), tmp_path / f"{name}.safetensors", held_out_fraction=fraction)
        for i, (name, fraction) in enumerate(zip(outputs, fractions, strict=True))
    ]
    with pytest.raises(InvalidData, match=message):
        run(tunable, *files)


def test_zero_codes_and_rows_that_no_scale_moves_are_found(tunable: TunableModel) -> None:
    before = count_zero_codes(tunable)
    name, linear = next(iter(quantized_linears(tunable.model, tunable.manifest).items()))
    linear.qweight.data[3] = 0
    linear.zeros.data[3] = 0
    found = count_zero_codes(tunable)
    assert found.dead_rows == (*before.dead_rows, f"{name}[3]")
    dense = linear.in_features
    assert before.zeros < found.zeros <= before.zeros + dense
    assert 0 < found.share < 1
    assert count_clamped({"a": torch.tensor([1 / 16, 1.0, 16.0, 2.0])}) == 2


def test_the_papers_recipe_wants_one_scale_a_row(tunable: TunableModel) -> None:
    config = Wanted("peqa-paper").config(1000)
    assert (config.kind, config.schedule, config.batch_rows, config.steps) == ("channel", "linear", 128, 24)
    assert (config.beta2, Wanted("peqa-paper", beta2=0.9).config(1000).beta2) == (0.999, 0.9)
    assert [Wanted(kind=kind).config(1000).beta2 for kind in ("channel", "group")] == [0.95, 0.999]
    assert Wanted("peqa-paper", batch_rows=8).config(16, text=True).steps == 30
    with pytest.raises(InvalidData, match="--group-size -1"):
        refuse_groups(tunable)
