"""docs/tuning.md: its commands, run one after the other as they stand there, all work."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from peqa_runtime.cli import app

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "tuning.md").read_text()
COMMANDS = [
    command
    for block in re.findall(r"```sh\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    for line in block.splitlines()
    for command in line.split(" && ")
]
SMALLER = {  # variables for what commands that hold a word leave open
    " train ": {"PEQA_STEPS": "2", "PEQA_BATCH": "4"},
    " eval ": {"PEQA_LIMIT": "2"},
    "--calibration": {"PEQA_CALIBRATION_WINDOWS": "4", "PEQA_CALIBRATION_TOKENS": "64"},
    "blockwise": {"PEQA_BLOCKWISE_EPOCHS": "1"},
}


@pytest.fixture
def desk(tiny_hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the commands name."""
    rng = random.Random(0)
    words = ("the", "cat", "and", "dog", "sat", "on", "mat", "then", "they", "ran", "into", "house")
    pairs = [(" ".join(rng.choices(words, k=4)), rng.choice(words)) for _ in range(24)]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    talks = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}
        for prompt, completion in pairs
    ]
    for name, found in (("rows", rows), ("held_out", rows), ("sql", rows), ("slots", rows), ("chats", talks)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
    alpaca = [{"instruction": prompt, "input": "", "output": completion} for prompt, completion in pairs]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    (tmp_path / "text.txt").write_text(" ".join(rng.choices(words, k=3000)))
    (rules,) = re.findall(r"```json\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    (tmp_path / "rules.json").write_text(rules)
    (tmp_path / "model").symlink_to(tiny_hf_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peqa_runtime.training.auto.RATES", (1e-2,))
    torch.set_num_threads(1)
    return tmp_path


def test_every_command_works_as_written(desk: Path) -> None:
    assert len(COMMANDS) >= 20
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "peqa", command
        smaller = {name: v for word, found in SMALLER.items() if word in command for name, v in found.items()}
        done = CliRunner(env=smaller).invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, (command, done.output)
    assert (desk / "back.safetensors").read_bytes() != b""
    assert {path.name for path in (desk / "sets").iterdir()} == {"sql.safetensors", "slots.safetensors"}
    assert (desk / "merged-gptq" / "quantize_config.json").is_file()
