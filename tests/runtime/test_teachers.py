"""Teachers: what they draw a model to, which may be taken, and a run that goes on with the one that it began with."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_cases import CONFIG, Rows, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from peqa_runtime.errors import InvalidCheckpoint, InvalidData, TrainingDiverged
from peqa_runtime.model import quantize_folder
from peqa_runtime.model.quantized_linear import QuantizedLinear
from peqa_runtime.training.batches import collate
from peqa_runtime.training.data import encode_file
from peqa_runtime.training.distill import divergence, load_teacher, teacher_digest
from peqa_runtime.training.run import TrainingFiles, checkpoints_of
from peqa_runtime.training.scale_trainer import ScaleTrainer
from peqa_runtime.training.tuning import TunableModel, load_tunable, logits_at, start_tuning


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tunable(tiny_base: Path) -> TunableModel:
    return load_tunable(tiny_base, device="cpu")


def test_a_teacher_draws_the_model_to_itself(
    tunable: TunableModel, tiny_base: Path, rows: Rows, tmp_path: Path
) -> None:
    """Trained on nothing but its probabilities, the model comes nearer to a teacher with other scales."""
    other = tmp_path / "teacher"
    shutil.copytree(tiny_base, other)
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(".scales")]:
        factors = 0.7 + 0.6 * torch.rand(tensors[name].shape[0], 1, generator=generator)
        tensors[name] = tensors[name] * factors
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    data = encode_file(rows("t", 20), tunable)
    batch = collate(data.examples, 0)
    inputs = {"input_ids": batch.input_ids, "positions": batch.positions}
    teacher = load_teacher(other, tunable)

    def distance() -> float:
        with torch.no_grad():
            logits = logits_at(tunable.model, batch.input_ids, batch.positions)
        return divergence(logits, teacher.logits(inputs), 1.0).mean().item()

    before = distance()
    files = TrainingFiles("t", rows("t", 20), tmp_path / "t.safetensors")
    config = replace(CONFIG, steps=20, distill=1.0, temperature=2.0)
    run(tunable, files, config=config, teacher=str(other))
    assert distance() < before / 2
    own = divergence(
        logits_at(tunable.model, batch.input_ids, batch.positions),
        load_teacher(None, tunable).logits(inputs),
        1.0,
    )
    start_tuning(tunable, "channel")
    base = logits_at(tunable.model, batch.input_ids, batch.positions).log_softmax(-1)
    assert own.mean() > 0, "the base as its own teacher is unscaled while the model is tuned"
    torch.testing.assert_close(load_teacher(None, tunable).logits(inputs).log_softmax(-1), base)
    with pytest.raises(InvalidData, match="belong together"):
        run(tunable, files, teacher="base")


def write_teacher(kind: str, source: Path, folder: Path) -> Path:
    """The floats that the base was made of, or those floats in 8 bits."""
    if kind == "float":
        return Path(shutil.copytree(source, folder))
    quantize_folder(source, folder, bits=8, group_size=32, progress=False)
    return folder


TEACHERS = pytest.mark.parametrize("kind", ["8-bit", "float"])


@TEACHERS
def test_a_finer_model_teaches_the_base_made_of_it(
    tunable: TunableModel, tiny_hf_folder: Path, rows: Rows, tmp_path: Path, kind: str
) -> None:
    """An 8-bit base stays one, a float model stays floats; either's probabilities are those of the floats."""
    folder = write_teacher(kind, tiny_hf_folder, tmp_path / "teacher")
    teacher = load_teacher(folder, tunable)
    found = Counter(
        f"{module.bits} bits" if isinstance(module, QuantizedLinear) else type(module).__name__
        for name, module in teacher._model.named_modules()
        if name.endswith("_proj")
    )
    assert found == {"8 bits" if kind == "8-bit" else "Linear": 14}
    batch = collate(encode_file(rows("t", 20), tunable).examples, 0)
    inputs = {"input_ids": batch.input_ids, "positions": batch.positions}
    floats = AutoModelForCausalLM.from_pretrained(tiny_hf_folder, dtype=torch.float32)
    with torch.no_grad():
        expected = floats(batch.input_ids).logits.flatten(0, 1)[batch.positions]
    taught = teacher.logits(inputs)
    assert divergence(taught, expected, 1.0).mean() < 0.003

    def distance() -> float:
        with torch.no_grad():
            logits = logits_at(tunable.model, batch.input_ids, batch.positions)
        return divergence(logits, taught, 1.0).mean().item()

    before = distance()
    files = TrainingFiles("t", rows("t", 20), tmp_path / "t.safetensors")
    run(tunable, files, config=replace(CONFIG, steps=20, distill=1.0), teacher=str(folder))
    assert distance() < before / 2


@TEACHERS
def test_a_run_does_not_go_on_with_a_teacher_that_took_the_place_of_its_own(
    tunable: TunableModel,
    tiny_hf_folder: Path,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """It has the same config and the same shapes, as a model has that was trained on."""
    teacher = write_teacher(kind, tiny_hf_folder, tmp_path / "teacher")
    floats = tmp_path / "other-floats"
    shutil.copytree(tiny_hf_folder, floats)
    tensors = load_file(floats / "model.safetensors")
    for name in tensors:
        if "_proj" in name:
            tensors[name] = tensors[name] * 1.05
    save_file(tensors, floats / "model.safetensors", {"format": "pt"})
    other = write_teacher(kind, floats, tmp_path / "other")
    whole = TrainingFiles("t", rows("t", 20), tmp_path / "whole.safetensors")
    config = replace(CONFIG, distill=0.5)
    (expected,) = run(tunable, whole, config=config, teacher=str(teacher))
    files = replace(whole, output=tmp_path / "t.safetensors")
    losses, steps = ScaleTrainer._losses, itertools.count(1)

    def stopped(self: ScaleTrainer, *args: Any) -> torch.Tensor:
        return losses(self, *args) * (float("nan") if next(steps) == 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(ScaleTrainer, "_losses", stopped)
        with pytest.raises(TrainingDiverged, match="checkpoint-3 is kept"):
            run(tunable, files, config=config, teacher=str(teacher))
    teacher.rename(tmp_path / "kept")
    other.rename(teacher)
    with pytest.raises(InvalidData, match=r"a run with other settings \(teacher_digest\)"):
        run(tunable, files, config=config, teacher=str(teacher))
    teacher.rename(other)
    (tmp_path / "kept").rename(teacher)
    (done,) = run(tunable, files, config=config, teacher=str(teacher), resume=True)
    assert done.scale_set.revision == expected.scale_set.revision


def test_a_teacher_that_is_no_folder_of_a_model(tunable: TunableModel, rows: Rows, tmp_path: Path) -> None:
    files = TrainingFiles("t", rows("t", 8), tmp_path / "t.safetensors")
    with pytest.raises(InvalidCheckpoint, match=r"nowhere is no model folder: it has no config\.json"):
        run(tunable, files, config=replace(CONFIG, distill=0.5), teacher=str(tmp_path / "nowhere"))
    assert not checkpoints_of([files]).exists()


def test_the_digest_of_a_teacher_sees_its_weights_without_reading_them_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = torch.zeros(1 << 23, dtype=torch.uint8)
    save_file({"a": weights}, tmp_path / "model.safetensors")
    before = teacher_digest(tmp_path)
    assert teacher_digest(tmp_path) == before
    digests = {before}
    for change in (
        lambda: save_file({"b": weights}, tmp_path / "model.safetensors"),
        lambda: save_file({"a": weights + 1}, tmp_path / "model.safetensors"),
        lambda: save_file({"a": weights[:-8]}, tmp_path / "model.safetensors"),
        lambda: (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors"),
        lambda: (tmp_path / "config.json").write_text("{ }"),
    ):
        change()
        digests.add(teacher_digest(tmp_path))
    assert len(digests) == 6


def test_the_divergence_is_that_of_the_formula() -> None:
    """T^2 sum_i p_i log(p_i / q_i) at temperature T; vocabularies of unlike padding are cut to the smaller."""
    ours, theirs = torch.randn(3, 7), torch.randn(3, 5)
    p, q = (theirs / 2).softmax(-1), (ours[:, :5] / 2).softmax(-1)
    torch.testing.assert_close(divergence(ours, theirs, 2.0), 4 * (p * (p / q).log()).sum(-1))


def test_a_teacher_of_other_tokens_is_refused(
    tunable: TunableModel, tiny_base: Path, rows: Rows, tmp_path: Path
) -> None:
    files = TrainingFiles("t", rows("t", 20), tmp_path / "t.safetensors")
    config = replace(CONFIG, distill=0.5, steps=1)
    run(tunable, files, config=config, teacher=str(tiny_base))
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    with pytest.raises(InvalidData, match="other tokens"):
        run(tunable, files, config=config, teacher=str(other))
