"""GPTQ exports: the numbers of the merged weights, what loaders make of them, import of our own files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import (
    DOWN,
    PROMPTS,
    TOKENS,
    edit_base,
    greedy_gap,
    integer_base,
    merged_weights,
    middle_zeros,
    published,
    random_set,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typer.testing import CliRunner, Result

from peqa_kernels.quant_matmul import dequantize
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.cli import app
from peqa_runtime.core import TokenLogprobs
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.engine.offline import Completion
from peqa_runtime.errors import InvalidCheckpoint, InvalidRequest
from peqa_runtime.export.folder import export_folder
from peqa_runtime.model import import_checkpoint, read_manifest
from peqa_runtime.model.base_checkpoint import open_tensors, read_spec
from peqa_runtime.model.quantizers.plan import Rule
from peqa_runtime.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=2)
CONFIG = EngineConfig(num_blocks=64, kv_cache_dtype="float32")
ROUNDING = 0.02
"""What fp16 scales change in a log-probability here, with room to spare: 0.01 was measured."""


CASES = pytest.mark.parametrize(
    ("bits", "group_size", "kind", "version", "written"),
    [
        (4, 32, None, None, 1),
        (4, 32, "channel", None, 1),
        (4, 32, "channel", 2, 2),
        (3, 32, "group", None, 1),
        (3, -1, "channel", 2, 2),
        (2, 16, "channel", None, 2),
        (8, -1, "channel", None, 1),
    ],
)
"""`version`: asked for. `written`: the 2-bit base has zeros of 0, which version 1 cannot hold."""


@CASES
def test_gptq_files_hold_the_merged_weights_and_come_back(
    tiny_hf_folder: Path, tmp_path: Path, bits: int, group_size: int, kind: Any, version: Any, written: int
) -> None:
    base = integer_base(tiny_hf_folder, tmp_path / "base", bits, group_size)
    chosen = random_set(base, kind, tmp_path / "s.safetensors") if kind else None
    export_folder(base, tmp_path / "out", "gptq", scale_set=chosen, gptq_version=version, progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
    said = {key: config[key] for key in ("quant_method", "checkpoint_format", "bits", "group_size", "sym")}
    assert said == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if written == 1 else "gptq_v2",
        "bits": bits,
        "group_size": group_size,
        "sym": False,
    }
    assert "dynamic" not in config
    for name, weight in merged_weights(base, chosen).items():
        assert tensors[f"{name}.scales"].dtype == torch.float16
        torch.testing.assert_close(
            published(tensors, name, bits, 2 - written).double(), weight, rtol=2**-11 + 1e-6, atol=1e-7
        )
    import_checkpoint(tmp_path / "out", tmp_path / "again", progress=False)
    with open_tensors(base) as before, open_tensors(tmp_path / "again") as after:
        for name in read_manifest(base).linears:
            parts = [
                [h[f"{name}.{n}"].get_tensor(f"{name}.{n}") for n in ("qweight", "zeros", "scales")]
                for h in (before, after)
            ]
            assert torch.equal(parts[0][0], parts[1][0])
            assert torch.equal(parts[0][1], parts[1][1])
            weight = QuantizedWeight(
                parts[1][0], parts[1][2], parts[1][1], bits, parts[1][0].shape[1] * 8 // bits
            )
            assert torch.equal(dequantize(weight), published(tensors, name, bits, 2 - written))


def as_loaders_read(folder: Path) -> PreTrainedModel:
    """transformers' float model with what config.json and the published layout say of each linear."""
    config = json.loads((folder / "config.json").read_text())
    said = config.pop("quantization_config")
    add = {"gptq": 1, "gptq_v2": 0}[said["checkpoint_format"]]
    tensors = load_file(folder / "model.safetensors")
    state = {name: tensor.float() for name, tensor in tensors.items() if name.endswith(".weight")}
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            state[f"{module}.weight"] = published(tensors, module, said["bits"], add)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.load_state_dict(state)
    return model


@CASES
def test_what_loaders_read_answers_as_the_server_does(
    tiny_hf_folder: Path, tmp_path: Path, bits: int, group_size: int, kind: Any, version: Any, written: int
) -> None:
    base = integer_base(tiny_hf_folder, tmp_path / "base", bits, group_size)
    chosen = random_set(base, kind, tmp_path / "s.safetensors") if kind else None
    export_folder(base, tmp_path / "out", "gptq", scale_set=chosen, gptq_version=version, progress=False)
    greedy_gap(as_loaders_read(tmp_path / "out"), base, chosen or "base")


def logprobs(answer: Completion) -> tuple[TokenLogprobs, ...]:
    assert answer.logprobs is not None
    return answer.logprobs


@CASES
def test_a_base_made_of_an_export_answers_as_base_and_set_did(
    tiny_hf_folder: Path, tmp_path: Path, bits: int, group_size: int, kind: Any, version: Any, written: int
) -> None:
    """Token by token, until two all but tie; log-probabilities differ by what fp16 takes from the scales."""
    base = integer_base(tiny_hf_folder, tmp_path / "base", bits, group_size)
    chosen = random_set(base, kind, tmp_path / "s.safetensors") if kind else None
    export_folder(
        base,
        tmp_path / "out",
        "gptq",
        scale_set=chosen,
        dtype="float32",
        gptq_version=version,
        progress=False,
    )
    import_checkpoint(tmp_path / "out", tmp_path / "again", progress=False)
    with Engine(base, config=CONFIG) as before, Engine(tmp_path / "again", config=CONFIG) as after:
        expected = before.generate(PROMPTS, GREEDY, task=chosen or "base")
        found = after.generate(PROMPTS, GREEDY, task="base")
        untuned = before.generate(PROMPTS, GREEDY, task="base")
    equal = 0
    for answer, again in zip(expected, found, strict=True):
        for theirs, ours in zip(logprobs(answer), logprobs(again), strict=False):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=ROUNDING)
            if ours.token_id != theirs.token_id:
                assert ours.token_id == theirs.top[1][0], "the second likeliest"
                break
            equal += 1
    assert equal >= 0.8 * sum(len(answer.token_ids) for answer in expected)
    assert chosen is None or [a.token_ids for a in untuned] != [a.token_ids for a in expected]


def test_zeros_of_0_are_left_to_version_2(tiny_hf_folder: Path, tmp_path: Path) -> None:
    base = integer_base(tiny_hf_folder, tmp_path / "base")
    edit_base(base, lambda tensors: tensors[f"{DOWN}.zeros"][3, 1].fill_(0))
    with pytest.raises(
        InvalidCheckpoint, match=r"1 linears .*down_proj, .*zero points of 0.*leave --gptq-ver"
    ):
        export_folder(base, tmp_path / "out", "gptq", gptq_version=1, progress=False)
    with pytest.raises(InvalidRequest, match="versions 1 and 2, not 3"):
        export_folder(base, tmp_path / "out", "gptq", gptq_version=3, progress=False)
    told: list[str] = []
    export_folder(base, tmp_path / "out", "gptq", progress=False, say=told.append)
    assert told[0].startswith(f"1 linears ({DOWN}, …) have zero points of 0, so zeros are stored as they are")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(
        published(tensors, DOWN, 4, 0).double(),
        merged_weights(base, None)[DOWN],
        rtol=2**-11 + 1e-6,
        atol=1e-7,
    )


def test_what_loaders_take_and_what_is_rounded_is_said(tiny_hf_folder: Path, tmp_path: Path) -> None:
    """By the command, on stderr; nothing of it where every loader takes the file and no scale is rounded."""
    base = integer_base(tiny_hf_folder, tmp_path / "base")

    def export(*options: str) -> Result:
        command = ["export", str(base), "--format", "gptq", "-q", "--json", *options]
        return CliRunner().invoke(app, command, catch_exceptions=False)

    plain, second = (
        export("-o", str(tmp_path / name), *more)
        for name, more in (("one", ()), ("two", ("--gptq-version", "2")))
    )
    assert (
        "(checkpoint_format gptq): vLLM, AutoGPTQ and transformers read that; GPTQModel.load" in plain.stderr
    )
    assert "(checkpoint_format gptq_v2): GPTQModel reads that" in second.stderr
    for done in (plain, second):
        assert re.search(r"rounded to fp16, by up to 0\.0[1-5]%: tokens may differ", done.stderr)
        assert json.loads(done.stdout)["format"] == "gptq"

    def exact(tensors: dict[str, Tensor]) -> None:
        middle_zeros(tensors)
        for name in tensors:
            if name.endswith(".scales"):
                tensors[name] = tensors[name].half().float()

    edit_base(base, exact)
    quiet = export("-o", str(tmp_path / "three"))
    assert quiet.stderr == ""
    wrong = CliRunner().invoke(
        app, ["export", str(base), "--format", "hf", "-o", str(tmp_path / "hf"), "--gptq-version", "1"]
    )
    assert wrong.exit_code == 1
    assert "--gptq-version belongs to --format gptq" in wrong.stderr


def test_symmetric_bases_are_written_as_version_1(tiny_hf_folder: Path, tmp_path: Path) -> None:
    base = integer_base(tiny_hf_folder, tmp_path / "base")
    edit_base(base, middle_zeros)
    export_folder(base, tmp_path / "out", "gptq", progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["checkpoint_format"], config["sym"]) == ("gptq", True)
    assert (tensors[f"{DOWN}.qzeros"] == 0x77777777).all()
    expected = merged_weights(base, None)[DOWN]
    torch.testing.assert_close(
        published(tensors, DOWN, 4, 1).double(), expected, rtol=2**-11 + 1e-6, atol=1e-7
    )
    import_checkpoint(tmp_path / "out", tmp_path / "again", progress=False)
    with open_tensors(tmp_path / "again") as handles:
        assert (handles[f"{DOWN}.zeros"].get_tensor(f"{DOWN}.zeros") == 8).all()


def test_mixed_precision_is_said_in_dynamic(tiny_hf_folder: Path, tmp_path: Path) -> None:
    rules = (Rule("*.0.mlp.down_proj", {"bits": 8}), Rule("*.o_proj", {"skip": True}))
    base = integer_base(tiny_hf_folder, tmp_path / "base", 4, 32, *rules)
    told: list[str] = []
    export_folder(base, tmp_path / "out", "gptq", progress=False, say=told.append)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["dynamic"] == {
        "-:^model\\.layers\\.0\\.self_attn\\.o_proj$": {},
        "-:^model\\.layers\\.1\\.self_attn\\.o_proj$": {},
        "+:^model\\.layers\\.0\\.mlp\\.down_proj$": {"bits": 8, "group_size": 32},
    }
    assert any(line.startswith("linears differ in bits") for line in told)
    import_checkpoint(tmp_path / "out", tmp_path / "again", progress=False)
    before, after = read_spec(base), read_spec(tmp_path / "again")
    assert after.overrides == before.overrides
    assert after.modules_to_not_convert == before.modules_to_not_convert


def test_what_a_gptq_file_cannot_hold(tiny_hf_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = integer_base(tiny_hf_folder, tmp_path / "base")
    inputs = random_set(base, "channel+input", tmp_path / "in.safetensors")
    eights = integer_base(tiny_hf_folder, tmp_path / "eights", 4, 32)
    edit_base(eights, lambda tensors: tensors[f"{DOWN}.scales"][0].fill_(1e-7))
    for folder, scale_set, sentence in (
        (tiny_base, None, "zero points that are no codes.*--format hf, or quantize with --zeros integer"),
        (base, inputs, "scales the inputs of 14 linears .*use --format hf"),
        (eights, None, "down_proj has scales from 1e-07 .*fp16.*--format hf"),
    ):
        with pytest.raises(InvalidCheckpoint, match=sentence):
            export_folder(folder, tmp_path / "out", "gptq", scale_set=scale_set, progress=False)
    assert not (tmp_path / "out").exists()
