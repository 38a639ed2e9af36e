"""The shape of PEQA's results where floats were trained and never quantized: a tiny Llama that learned a text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peqa_runtime.evaluation import Question, Reference, evaluate, metric_named
from peqa_runtime.model import quantize_folder
from peqa_runtime.model.quantize import QuantizeOptions
from peqa_runtime.model.quantizers.blockwise import TrainingOptions
from peqa_runtime.model.quantizers.calibration import CalibrationText
from peqa_runtime.training import TrainingFiles, load_tunable, train_files
from peqa_runtime.training.settings import TuneConfig

SENTENCE = "the cat and dog sat on mat then they ran into another house over"
WORDS = SENTENCE.split()
WINDOW = 64
TUNING = TuneConfig(steps=30, learning_rate=2e-2, batch_rows=8, warmup_steps=4, compute="float32")


def write_text(path: Path, seed: int, words: int) -> Path:
    """Each word is followed by one of three; which three is the same for all seeds."""
    successors = {word: random.Random(word).sample(WORDS, 3) for word in WORDS}
    rng = random.Random(seed)
    found = ["the"]
    for _ in range(words):
        found.append(rng.choice(successors[found[-1]]))
    path.write_text(" ".join(found))
    return path


@pytest.fixture(scope="module")
def learned(tiny_hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the float model after 100 steps on the text."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("learned")
    model = AutoModelForCausalLM.from_pretrained(tiny_hf_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_hf_folder)
    ids = torch.tensor(tokenizer(write_text(folder / "train.txt", 0, 20_000).read_text())["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        starts = torch.randint(len(ids) - WINDOW, (8,))
        batch = torch.stack([ids[start : start + WINDOW] for start in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    write_text(folder / "test.txt", 1, 1500)
    return folder


def perplexity(base: Path, test: Path, scale_set: Path | None = None) -> float:
    question = Question(test, metric_named("perplexity"), context=WINDOW)
    return float(evaluate(Reference(load_tunable(base, device="cpu")), question, scale_set)["perplexity"])


def test_better_integers_then_tuned_scales_bring_a_trained_model_back(learned: Path, tmp_path: Path) -> None:
    text = CalibrationText(learned / "train.txt", windows=48, tokens=WINDOW)
    options = QuantizeOptions(calibration=text, training=TrainingOptions(epochs=8), device="cpu")
    found: dict[str, float] = {}
    for name, bits, method in (
        ("8", 8, "rtn"),
        ("rtn", 2, "rtn"),
        ("gptq", 2, "gptq"),
        ("blockwise", 2, "blockwise"),
    ):
        given = QuantizeOptions(device="cpu") if method == "rtn" else options
        quantize_folder(learned / "hf", tmp_path / name, bits, 32, method, options=given, progress=False)  # type: ignore[arg-type]
        found[name] = perplexity(tmp_path / name, learned / "test.txt")
    for name in ("rtn", "gptq"):
        files = TrainingFiles(
            "text", learned / "train.txt", tmp_path / f"{name}.safetensors", max_tokens=WINDOW
        )
        tunable = load_tunable(tmp_path / name, device="cpu")
        train_files(tunable, [files], lambda rows: TUNING, progress=False)
        found[f"{name}, tuned"] = perplexity(tmp_path / name, learned / "test.txt", files.output)
    assert found["8"] < found["blockwise"] < found["gptq"] < found["rtn"]
    assert found["gptq, tuned"] < found["gptq"]
    assert found["gptq, tuned"] < found["rtn, tuned"] < found["rtn"]
    assert found["rtn, tuned"] - found["8"] < 0.3 * (found["rtn"] - found["8"])
