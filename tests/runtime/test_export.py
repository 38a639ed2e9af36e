"""Exports: the numbers of the merged weights, the tokens of our own engine, import of our own files, refusals."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from peqa_kernels.packing import unpack_codes
from peqa_kernels.quant_matmul import dequantize
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.cli import app
from peqa_runtime.core import ScaleKind
from peqa_runtime.engine.engine import Engine
from peqa_runtime.errors import DiskFull, InvalidCheckpoint, InvalidRequest, WrongBase
from peqa_runtime.export.folder import export_folder
from peqa_runtime.model import import_checkpoint, quantize_folder, read_manifest, shard_writer
from peqa_runtime.model.base_checkpoint import compute_digest, open_tensors, read_spec
from peqa_runtime.model.quantize import QuantizeOptions
from peqa_runtime.model.quantizers.plan import Rule
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.set_layout import expected_shapes

DOWN = "model.layers.1.mlp.down_proj"
TOKENS = 12


def integer_base(source: Path, folder: Path, bits: int = 4, group_size: int = 32, *rules: Rule) -> Path:
    options = QuantizeOptions(integer_zeros=True, rules=rules)
    quantize_folder(source, folder, bits, group_size, options=options, progress=False)
    return folder


def random_set(base: Path, kind: ScaleKind, file: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    manifest = read_manifest(base)
    tensors = {
        name: 1 + 0.4 * torch.rand(shape, generator=generator)
        for name, shape in expected_shapes(kind, manifest).items()
    }
    ScaleSet.build(kind, tensors, manifest, task="sql").save(file)
    return file


def merged_weights(base: Path, scale_set: Path | None) -> dict[str, Tensor]:
    """By the definition: w = out * s0 * group * (q - z) * in, in double precision."""
    manifest, spec = read_manifest(base), read_spec(base)
    factors = {} if scale_set is None else ScaleSet.parse(scale_set, manifest).tensors
    weights: dict[str, Tensor] = {}
    with open_tensors(base) as handles:
        for name in manifest.linears:
            q, s, z = (
                handles[f"{name}.{n}"].get_tensor(f"{name}.{n}") for n in ("qweight", "scales", "zeros")
            )
            bits = spec.of(name).bits
            codes = unpack_codes(q, bits, q.shape[1] * 8 // bits).double().view(*s.shape, -1)
            scale = s.double()
            if f"{name}.group_scale" in factors:
                scale = scale * factors[f"{name}.group_scale"].double()
            weight = ((codes - z.double()[..., None]) * scale[..., None]).flatten(1)
            if f"{name}.out_scale" in factors:
                weight = weight * factors[f"{name}.out_scale"].double()[:, None]
            if f"{name}.in_scale" in factors:
                weight = weight * factors[f"{name}.in_scale"].double()
            weights[name] = weight
    return weights


def greedy_gap(folder: Path, base: Path, task: Path | str) -> None:
    """The engine's greedy tokens are the folder's in transformers; where they part, its logits all but tie."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = ["the cat and", "over there", "ran into another house, then", "dog"]
    equal = 0
    with Engine(base) as engine:
        answers = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=TOKENS), task=task)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt).input_ids
        for token in answer.token_ids:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            assert logits[token] >= logits.max() - 2e-3 * logits.abs().max(), (prompt, token)
            equal += int(logits.argmax()) == token
            ids.append(token)
    assert equal >= 0.95 * sum(len(answer.token_ids) for answer in answers)
    assert len({token for answer in answers for token in answer.token_ids}) > 5, "the check says something"


@pytest.mark.parametrize("kind", ["base", "channel", "channel+input", "group"])
def test_a_folder_of_floats_computes_what_the_engine_does(tiny_base: Path, tmp_path: Path, kind: Any) -> None:
    task = "base" if kind == "base" else random_set(tiny_base, kind, tmp_path / "s.safetensors")
    chosen = None if kind == "base" else tmp_path / "s.safetensors"
    export_folder(tiny_base, tmp_path / "out", "hf", scale_set=chosen, progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in merged_weights(tiny_base, chosen).items():
        torch.testing.assert_close(tensors[f"{name}.weight"].double(), weight, rtol=4e-7, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    greedy_gap(tmp_path / "out", tiny_base, task)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_a_folder_of_floats(tiny_base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    export_folder(tiny_base, tmp_path / "out", "hf", dtype=name, progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    expected = merged_weights(tiny_base, None)[DOWN].float().to(dtype)
    assert torch.equal(tensors[f"{DOWN}.weight"], expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name


def published(tensors: dict[str, Tensor], module: str, bits: int, add: int) -> Tensor:
    """The GPTQ formula word by word, in numpy: (code - zero - add) * scale of the input's group."""

    def fields(words: np.ndarray) -> np.ndarray:
        """uint32 [R, W] -> [R, W * 32 / bits], bit by bit."""
        raw = np.unpackbits(words.view(np.uint8).reshape(len(words), -1), axis=1, bitorder="little")
        return (raw.reshape(len(words), -1, bits) << np.arange(bits)).sum(-1)

    qweight = tensors[f"{module}.qweight"].numpy().view(np.uint32)
    codes = fields(np.ascontiguousarray(qweight.T)).T
    zeros = fields(tensors[f"{module}.qzeros"].numpy().view(np.uint32)) + add
    group = tensors[f"{module}.g_idx"].numpy()
    scales = tensors[f"{module}.scales"].float().numpy()
    return torch.from_numpy(((codes - zeros[group]) * scales[group]).T.astype(np.float32))


@pytest.mark.parametrize(
    ("bits", "group_size", "kind"),
    [(4, 32, None), (4, 32, "channel"), (3, 32, "group"), (2, 16, "channel"), (8, -1, "channel")],
)
def test_gptq_files_hold_the_merged_weights_and_come_back(
    tiny_hf_folder: Path, tmp_path: Path, bits: int, group_size: int, kind: Any
) -> None:
    base = integer_base(tiny_hf_folder, tmp_path / "base", bits, group_size)
    chosen = random_set(base, kind, tmp_path / "s.safetensors") if kind else None
    export_folder(base, tmp_path / "out", "gptq", scale_set=chosen, progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
    said = {key: config[key] for key in ("quant_method", "checkpoint_format", "bits", "group_size", "sym")}
    assert said == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": bits,
        "group_size": group_size,
        "sym": False,
    }
    assert "dynamic" not in config
    for name, weight in merged_weights(base, chosen).items():
        assert tensors[f"{name}.scales"].dtype == torch.float16
        torch.testing.assert_close(
            published(tensors, name, bits, 0).double(), weight, rtol=2**-11 + 1e-6, atol=1e-7
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
            assert torch.equal(dequantize(weight), published(tensors, name, bits, 0))


def edit_base(base: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change tensors of a base, and its digest with them."""
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["base_digest"] = compute_digest(base)
    (base / "config.json").write_text(json.dumps(config))


def middle_zeros(tensors: dict[str, Tensor]) -> None:
    """Make a base symmetric: every zero 8."""
    for name, tensor in tensors.items():
        if name.endswith(".zeros"):
            tensor.fill_(8)


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
    assert "linears differ" in told[0]
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


def test_sets_and_folders_that_do_not_fit(tiny_hf_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    other = integer_base(tiny_hf_folder, tmp_path / "other")
    foreign = random_set(other, "channel", tmp_path / "s.safetensors")
    with pytest.raises(WrongBase, match="tuned on base"):
        export_folder(tiny_base, tmp_path / "out", "hf", scale_set=foreign, progress=False)
    with pytest.raises(InvalidCheckpoint, match="no peqa base"):
        export_folder(tiny_hf_folder, tmp_path / "out", "hf", progress=False)
    with pytest.raises(InvalidRequest, match="dtype must be one of float32, bfloat16, float16, not 'int8'"):
        export_folder(tiny_base, tmp_path / "out", "hf", dtype="int8", progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InvalidCheckpoint, match="exists already"):
        export_folder(tiny_base, tmp_path / "full", "hf", progress=False)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match="is damaged: its contents have digest"):
        export_folder(other, tmp_path / "out", "hf", progress=False)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.mark.parametrize(
    ("fault", "error"),
    [(OSError(errno.ENOSPC, "No space left on device"), DiskFull), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["disk-full", "interrupted"],
)
def test_what_breaks_off_leaves_nothing(
    tiny_base: Path,
    tiny_hf_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    error: type[BaseException],
) -> None:
    base = integer_base(tiny_hf_folder, tmp_path / "base")
    export_folder(base, tmp_path / "gptq", "gptq", progress=False)
    before = sorted(tmp_path.iterdir())

    def save(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        path.write_bytes(b"half of it")
        raise fault

    monkeypatch.setattr(shard_writer, "save_file", save)
    for run in (
        lambda: export_folder(tiny_base, tmp_path / "out", "hf", progress=False),
        lambda: export_folder(base, tmp_path / "out", "gptq", progress=False),
        lambda: import_checkpoint(tmp_path / "gptq", tmp_path / "out", progress=False),
    ):
        with pytest.raises(error) as caught:
            run()
        assert "goes on" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before


def test_the_command(tiny_base: Path, tmp_path: Path) -> None:
    file = random_set(tiny_base, "channel", tmp_path / "s.safetensors")
    options = ["--scale-set", str(file), "--format", "hf", "-o", str(tmp_path / "out"), "-q", "--json"]
    result = CliRunner().invoke(app, ["export", str(tiny_base), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert report["bytes"] == sum((tmp_path / "out" / name).stat().st_size for name in files)
    card = (tmp_path / "out" / "README.md").read_text()
    manifest = read_manifest(tiny_base)
    assert manifest.base_digest in card
    assert ScaleSet.parse(file, manifest).revision in card
    again = CliRunner().invoke(app, ["export", str(tiny_base), *options], catch_exceptions=False)
    assert again.exit_code == 1
    assert "exists already" in again.stderr
