"""Floats to codes, tuned, uploaded, served: the engine's log-probabilities are the trainer's, for every kind of set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peqa_runtime.core import SCALE_KINDS
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.model import quantize_folder
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.training.logprobs import RowLogprobs, completion_logprobs
from peqa_runtime.training.run import TrainingFiles, train_files
from peqa_runtime.training.settings import TuneConfig
from peqa_runtime.training.tuning import load_tunable

ROWS = [{"prompt": f"{i} is", "completion": "odd" if i % 2 else "even"} for i in range(24)]


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, -1)])
def test_trained_sets_of_every_kind_in_one_batch(
    tiny_hf_folder: Path, tmp_path: Path, bits: int, group_size: int
) -> None:
    torch.set_num_threads(1)
    base, data = tmp_path / "base", tmp_path / "rows.jsonl"
    quantize_folder(tiny_hf_folder, base, bits, group_size, progress=False)
    data.write_text("\n".join(map(json.dumps, ROWS)))
    engine = Engine(
        base, device="cpu", config=EngineConfig(num_blocks=64, max_batch_tokens=50, kv_cache_dtype="float32")
    )
    expected: list[tuple[str, RowLogprobs]] = [
        ("base", row) for row in completion_logprobs(base, None, ROWS[:4])
    ]
    for i, kind in enumerate(SCALE_KINDS):
        files = TrainingFiles(f"task{i}", data, tmp_path / f"task{i}.safetensors")
        config = TuneConfig(kind=kind, steps=6, warmup_steps=1, learning_rate=3e-2, batch_rows=8)
        train_files(load_tunable(base, device="cpu"), [files], lambda rows, c=config: c, progress=False)
        engine.tasks.upload(f"task{i}", files.output)
        expected += [(f"task{i}", row) for row in completion_logprobs(base, files.output, ROWS[:4])]
    moved = {name: [row.logprobs for task, row in expected if task == name] for name, _ in expected}
    assert len(set(map(str, moved.values()))) == 4, "every set changes the model in its own way"
    served = engine.generate(
        [row.token_ids for _, row in expected],
        SamplingParams(max_tokens=0, prompt_logprobs=0),
        [task for task, _ in expected],
    )
    for (task, row), got in zip(expected, served, strict=True):
        assert got.prompt_logprobs is not None
        tail = [entry.logprob for entry in got.prompt_logprobs[-len(row.logprobs) :] if entry]
        assert tail == pytest.approx(row.logprobs, abs=2e-3), task
