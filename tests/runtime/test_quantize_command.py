"""`peqa quantize` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from peqa_runtime.cli import app
from peqa_runtime.model import read_manifest
from peqa_runtime.model.base_checkpoint import read_spec


def peqa(*args: object, status: int = 0) -> Any:
    """Run the command in this process; returns its result after checking the exit status."""
    result = CliRunner().invoke(app, [str(a) for a in ("quantize", *args)], catch_exceptions=False)
    assert result.exit_code == status, result.output + result.stderr
    return result


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"the cat {i} and the dog {i * i} sat" for i in range(200)))
    return file


CALIBRATION = ("--calibration-windows", 4, "--calibration-tokens", 32, "--device", "cpu", "-q")


def test_blockwise_with_rules_and_its_report(tiny_hf_folder: Path, text: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"rules": [{"match": "*.down_proj", "bits": 4}]}))
    base = tmp_path / "base"
    shown = peqa(
        tiny_hf_folder, "-o", base, "--bits", 2, "--group-size", 32, "--method", "blockwise", "--epochs", 1,
        "--rules", rules, "--calibration", text, *CALIBRATION, "--json",
    )  # fmt: skip
    report = json.loads(shown.stdout)
    assert report["linears"] == {"2 bit blockwise": 12, "4 bit blockwise": 2}
    assert report["base_digest"] == read_manifest(base).base_digest
    assert [block["block"] for block in report["blocks"]] == ["model.layers.0", "model.layers.1"]
    for block in report["blocks"]:
        assert 0 < block["gain"]["after"] <= block["gain"]["before"]
        assert len(block["errors"]) == 7
    assert read_spec(base).of("model.layers.0.mlp.down_proj").bits == 4
    note = read_spec(base).quantizer
    assert note["training"]["epochs"] == 1
    assert note["calibration"]["seed"] == 0


def test_a_person_sees_what_was_done(tiny_hf_folder: Path, text: Path, tmp_path: Path) -> None:
    shown = peqa(
        tiny_hf_folder, "-o", tmp_path / "base", "--group-size", 32, "--method", "gptq", "--calibration", text,
        "--zeros", "integer", *CALIBRATION,
    )  # fmt: skip
    assert shown.stdout == ""
    assert "14 linears 4 bit gptq" in shown.stderr
    assert "mean squared error of the linears' outputs" in shown.stderr
    assert read_spec(tmp_path / "base").quantizer["integer_zeros"] is True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--method", "gptq"], "method gptq needs calibration text"),
        (["--calibration", "TEXT"], "rounding to nearest reads no calibration text"),
        (["--calibration-windows", "9"], "--calibration-windows means nothing without --calibration"),
        (["--act-order"], "--act-order is for --method gptq"),
        (["--damping", "0.1"], "--damping is for --method gptq"),
        (
            ["--epochs", "2", "--method", "gptq", "--calibration", "TEXT"],
            "--epochs is for --method blockwise",
        ),
        (["--method", "gptq", "--calibration", "TEXT", "--damping", "7"], "damping must be above 0"),
        (["--method", "gptq", "--calibration", "TEXT", "--calibration-windows", "1"], "at least 2 windows"),
        (["--method", "gptq", "--calibration", "TEXT", "--calibration-windows", "100000"], "is too short"),
        (["--method", "gptq", "--calibration", "TEXT", "--calibration-tokens", "1000"], "context of 512"),
        (
            ["--method", "gptq", "--calibration", "TEXT", "--act-order", "--no-static-groups"],
            "act-order without static groups",
        ),
        (["--method", "gptq", "--calibration", "nothing.txt"], "nothing.txt: no such file"),
        (["--rules", "nothing.json"], "nothing.json: the rules cannot be read"),
        (["--bits", "5"], "bits must be one of"),
        (
            ["--method", "blockwise", "--calibration", "TEXT", "--epochs", "1e9"],
            "epochs must be at most 1000, not 1000000000.0",
        ),
        (["--scale-lr", "0.1"], "--scale-lr is for --method blockwise"),
        (["--group-size", "48"], "group_size must be one of"),
        (["--device", "tpu"], "device must be auto, cpu"),
    ],
)
def test_what_is_wrong_is_one_line(
    tiny_hf_folder: Path, text: Path, tmp_path: Path, given: list[str], message: str
) -> None:
    given = [str(text) if value == "TEXT" else value for value in given]
    shown = peqa(tiny_hf_folder, "-o", tmp_path / "base", "--group-size", 32, *given, "-q", status=1)
    (line,) = shown.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.slow
def test_a_gguf_file_is_decoded_first(smollm2_gguf: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    peqa(smollm2_gguf, "-o", base, "--bits", 8, "--group-size", -1, "-q")
    spec = read_spec(base)
    assert (spec.bits, spec.group_size) == (8, -1)
    assert spec.of("model.embed_tokens").group_size == 32
    assert sorted(p.name for p in tmp_path.iterdir() if "unfinished" in p.name) == []
