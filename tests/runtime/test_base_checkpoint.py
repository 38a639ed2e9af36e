"""The base folder: its digest, its manifest, and folders that are damaged or contradict themselves."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from peqa_kernels.packing import unpack_codes
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model import load, quantize_folder, read_manifest, shard_writer, verify_digest
from peqa_runtime.model.base_checkpoint import compute_digest, read_spec

Tensors = dict[str, Tensor]
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def edit(base: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors")


def edit_config(base: Path, **values: object) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"].update(values)
    (base / "config.json").write_text(json.dumps(config))


def canonical_digest(base: Path) -> str:
    """The canonical form once more, from its description and nothing of ours but the packing."""
    tensors = load_file(base / "model.safetensors")
    lines = []
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in ("model.embed_tokens", "lm_head") or leaf in ("scales", "zeros"):
            continue
        if leaf == "qweight":
            zeros, scales = tensors[f"{module}.zeros"], tensors[f"{module}.scales"]
            columns = tensor.shape[1] * 2
            data = unpack_codes(tensor, 4, columns).numpy().tobytes()
            data += zeros.numpy().astype("<f4").tobytes() + scales.numpy().astype("<f4").tobytes()
            entry = ["linear", module, tensor.shape[0], columns, 4, scales.shape[1]]
        else:
            data = tensor.float().numpy().astype("<f4").tobytes()
            entry = ["float", name, list(tensor.shape)]
        lines.append(json.dumps([*entry, hashlib.sha256(data).hexdigest()]) + "\n")
    return hashlib.sha256(("peqa-base 1\n" + "".join(sorted(lines))).encode()).hexdigest()


def test_digest_is_the_documented_one(tiny_base: Path) -> None:
    assert read_spec(tiny_base).base_digest == compute_digest(tiny_base) == canonical_digest(tiny_base)


def test_digest_does_not_depend_on_file_dtype_head_or_name(base: Path) -> None:
    before = compute_digest(base)

    def rewrite(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float16)  # ones: exact
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.bfloat16)
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * 2

    edit(base, rewrite)
    edit_config(base, model_id="another")
    assert compute_digest(base) == before


def test_digest_does_not_depend_on_sharding(
    tiny_hf_folder: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "_SHARD_BYTES", 30_000)
    quantize_folder(tiny_hf_folder, tmp_path / "base", 4, 32, progress=False)
    assert len(list((tmp_path / "base").glob("model-0000*-of-0000*.safetensors"))) > 2
    assert read_manifest(tmp_path / "base").base_digest == read_manifest(tiny_base).base_digest
    verify_digest(tmp_path / "base")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        sharded, single = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits
            for folder in (tmp_path / "base", tiny_base)
        )
    assert torch.equal(sharded, single)


@pytest.mark.parametrize("leaf", ["qweight", "scales", "zeros"])
def test_digest_sees_every_value_of_a_linear(base: Path, leaf: str) -> None:
    def change(tensors: Tensors) -> None:
        flat = tensors[f"{Q_PROJ}.{leaf}"].view(-1)
        flat[-1] = flat[-1] ^ 16 if leaf == "qweight" else flat[-1] * 1.0001

    edit(base, change)
    with pytest.raises(InvalidCheckpoint, match="is damaged"):
        verify_digest(base)
    with pytest.raises(InvalidCheckpoint, match="is damaged"):
        load(base)
    assert load(base, verify=False).manifest == read_manifest(base)


def test_digest_sees_norms_and_names(base: Path) -> None:
    before = compute_digest(base)
    edit(base, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] + 1e-3}))
    assert compute_digest(base) != before
    edit(base, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] - 1e-3}))
    edit(base, lambda t: t.update({"model.norm.other": t.pop("model.norm.weight")}))
    assert compute_digest(base) != before


def test_save_pretrained_round_trip_is_exact(tiny_base: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(tmp_path / "copy")
    first, second = (load_file(folder / "model.safetensors") for folder in (tiny_base, tmp_path / "copy"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name
    assert read_spec(tmp_path / "copy") == read_spec(tiny_base)
    verify_digest(tmp_path / "copy")


def test_manifest(tiny_base: Path) -> None:
    manifest = read_manifest(tiny_base)
    assert manifest.model_id == "tiny-llama"
    assert len(manifest.base_digest) == 64
    assert len(manifest.linears) == 14
    shape = manifest.linears["model.layers.1.mlp.down_proj"]
    assert (shape.out_features, shape.in_features, shape.groups) == (64, 128, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.scales"), "q_proj.scales is missing"),
        (lambda t: t.update({f"{Q_PROJ}.zeros": torch.zeros(64, 3)}), "needs scales and zeros of shape"),
        (
            lambda t: t.update({f"{Q_PROJ}.qweight": torch.zeros(64, 8, dtype=torch.uint8)}),
            "does not divide 16",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.scales": t[f"{Q_PROJ}.scales"].half()}),
            "must be a F32 matrix, not F16",
        ),
        (lambda t: [t.pop(name) for name in list(t) if "qweight" in name], "no quantized linear"),
    ],
    ids=["missing", "shape", "width", "dtype", "none"],
)
def test_tensors_that_contradict_the_config(base: Path, change: Callable, message: str) -> None:
    edit(base, change)
    with pytest.raises(InvalidCheckpoint, match=message):
        read_manifest(base)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_method": "gptq"}, "this is no peqa base .*'gptq'.*`peqa quantize"),
        ({"format_version": 2}, "format_version 2 is not readable"),
        ({"bits": 5}, "bits must be one of"),
        ({"bits": True}, "bits must be one of"),
        ({"group_size": 0}, "group_size must be -1 or a positive integer"),
        ({"group_size": "32"}, "group_size must be -1 or a positive integer"),
        ({"overrides": {"lm_head": {"bits": 4}}}, "overrides.lm_head: group_size"),
        ({"overrides": ["lm_head"]}, "overrides must be an object"),
        ({"group_size": 64}, "needs scales and zeros of shape"),
    ],
)
def test_configs_that_are_wrong(base: Path, values: dict, message: str) -> None:
    edit_config(base, **values)
    with pytest.raises(InvalidCheckpoint, match=message):
        read_manifest(base)


def test_folders_that_are_incomplete(base: Path, tiny_hf_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"no peqa base.*`peqa quantize SRC -o BASE`"):
        load(tiny_hf_folder)
    with pytest.raises(InvalidCheckpoint, match="is no model folder"):
        load(tmp_path / "nothing")
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-7])
    with pytest.raises(InvalidCheckpoint, match="is damaged"):
        read_manifest(base)
    (base / "model.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"model.safetensors is missing"):
        read_manifest(base)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(InvalidCheckpoint, match="outside of the folder"):
        read_manifest(base)
    (base / "config.json").write_text("{")
    with pytest.raises(InvalidCheckpoint, match="not valid JSON"):
        read_manifest(base)


def test_missing_embedding_is_named(base: Path) -> None:
    """It stands outside of the digest, and transformers would fill it with random numbers."""
    edit(base, lambda t: t.pop("model.embed_tokens.weight"))
    with pytest.raises(InvalidCheckpoint, match=r"model.embed_tokens.weight"):
        load(base)


def test_folder_of_another_shape_is_named(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(InvalidCheckpoint, match=r"does not fit its own config.json.*model.layers.1"):
        load(base)


def test_values_in_the_file_are_fp32_little_endian(tiny_base: Path) -> None:
    """The format that others will read: header, then raw values."""
    raw = (tiny_base / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + size])[f"{Q_PROJ}.scales"]
    begin, end = entry["data_offsets"]
    values = np.frombuffer(raw[8 + size + begin : 8 + size + end], "<f4").reshape(entry["shape"])
    np.testing.assert_array_equal(
        values, load_file(tiny_base / "model.safetensors")[f"{Q_PROJ}.scales"].numpy()
    )
