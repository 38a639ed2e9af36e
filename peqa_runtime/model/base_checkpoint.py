"""The base folder: a Hugging Face model folder whose linears are integer codes. Format, reader, digest.

    config.json          the model's own, plus `quantization_config` (see `QuantizationSpec`)
    model.safetensors    `<linear>.qweight` uint8 [N, K * bits / 8] (order: peqa_kernels.packing),
                         `<linear>.scales` and `<linear>.zeros` float32 [N, G]; every other tensor as it was
    tokenizer files      as transformers writes them

Large models have `model-0000i-of-0000n.safetensors` and `model.safetensors.index.json` instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.core import BaseManifest, LinearShape
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model.base_digest import BaseDigest, digest_float, digest_linear

FORMAT_VERSION = 1
PER_CHANNEL = -1
"""The group size that stands for "one group per row"."""

_BITS = (2, 3, 4, 8)
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class Precision:
    """How one module's codes are stored. `group_size` inputs share a scale and a zero; -1 = the whole row."""

    bits: int
    group_size: int

    def groups(self, in_features: int) -> int:
        """G of a linear with K = `in_features`; raises ValueError when the group size does not divide K."""
        size = in_features if self.group_size == PER_CHANNEL else self.group_size
        if size < 1 or in_features % size:
            raise ValueError(f"group size {self.group_size} does not divide {in_features}")
        return in_features // size


@dataclass(frozen=True)
class QuantizationSpec:
    """`quantization_config` of a base folder.

    `overrides`: modules that differ from `bits`/`group_size` (an 8-bit embedding, say). `modules_to_not_convert`:
    linears that stay floats. `embeddings`: the embedding table and the output head, quantized or not: they carry no
    task scales and stand outside of `base_digest`. `quantizer`: how the integers were made, for the record.
    """

    bits: int
    group_size: int
    model_id: str
    base_digest: str = ""
    overrides: Mapping[str, Precision] = field(default_factory=dict)
    modules_to_not_convert: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    quantizer: Mapping[str, Any] = field(default_factory=dict)

    def of(self, module: str) -> Precision:
        """Precision of the module with this name."""
        return self.overrides.get(module, Precision(self.bits, self.group_size))

    def to_json(self) -> dict[str, Any]:
        """The value of `quantization_config` in config.json."""
        return {
            "quant_method": "peqa",
            "format_version": FORMAT_VERSION,
            "bits": self.bits,
            "group_size": self.group_size,
            "overrides": {
                name: {"bits": p.bits, "group_size": p.group_size}
                for name, p in sorted(self.overrides.items())
            },
            "modules_to_not_convert": sorted(self.modules_to_not_convert),
            "embeddings": sorted(self.embeddings),
            "base_digest": self.base_digest,
            "model_id": self.model_id,
            **({"quantizer": dict(self.quantizer)} if self.quantizer else {}),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> QuantizationSpec:
        """Parse `quantization_config`; raises `InvalidCheckpoint` naming the key that is wrong."""
        if value.get("quant_method") != "peqa":
            raise InvalidCheckpoint(
                f"this is no peqa base (quant_method is {value.get('quant_method')!r}); make one with "
                "`peqa quantize SRC -o BASE` or `peqa import SRC -o BASE`"
            )
        version = value.get("format_version")
        if version != FORMAT_VERSION:
            raise InvalidCheckpoint(
                f"base format_version {version!r} is not readable here; this version reads {FORMAT_VERSION}"
            )
        overrides = value.get("overrides") or {}
        if not isinstance(overrides, dict):
            raise InvalidCheckpoint("quantization_config.overrides must be an object of module names")
        quantizer = value.get("quantizer") or {}
        if not isinstance(quantizer, dict):
            raise InvalidCheckpoint("quantization_config.quantizer must be an object")
        default = _precision("quantization_config", value)
        return QuantizationSpec(
            bits=default.bits,
            group_size=default.group_size,
            model_id=str(value.get("model_id") or ""),
            base_digest=str(value.get("base_digest") or ""),
            overrides={name: _precision(f"overrides.{name}", p) for name, p in overrides.items()},
            modules_to_not_convert=tuple(value.get("modules_to_not_convert") or ()),
            embeddings=tuple(value.get("embeddings") or ()),
            quantizer=quantizer,
        )


def _precision(where: str, value: Any) -> Precision:
    bits = value.get("bits") if isinstance(value, Mapping) else None
    group_size = value.get("group_size") if isinstance(value, Mapping) else None
    if bits not in _BITS or isinstance(bits, bool):
        raise InvalidCheckpoint(f"{where}: bits must be one of {_BITS}, got {bits!r}")
    if type(group_size) is not int or (group_size != PER_CHANNEL and group_size < 1):
        raise InvalidCheckpoint(f"{where}: group_size must be -1 or a positive integer, got {group_size!r}")
    return Precision(bits, group_size)


def read_config(folder: Path | str) -> dict[str, Any]:
    """config.json of a model folder; raises `InvalidCheckpoint` when there is none or it is no JSON object."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidCheckpoint(
            f"{folder} is no model folder: {path.name} cannot be read ({error})"
        ) from error
    except ValueError as error:
        raise InvalidCheckpoint(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidCheckpoint(f"{path} must hold a JSON object")
    return config


def read_spec(folder: Path | str) -> QuantizationSpec:
    """`quantization_config` of a base folder; raises `InvalidCheckpoint` when the folder is no peqa base."""
    value = read_config(folder).get("quantization_config")
    return QuantizationSpec.from_json(value if isinstance(value, dict) else {})


def tensor_files(folder: Path | str) -> list[Path]:
    """The safetensors files of a model folder; raises `InvalidCheckpoint` when one is missing."""
    folder = Path(folder)
    index = folder / INDEX_FILE
    names = {SINGLE_FILE}
    if index.exists():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidCheckpoint(f"{index} is damaged: {error!r}") from error
    files = [folder / name for name in sorted(names)]
    for file in files:
        if file.resolve().parent != folder.resolve():
            raise InvalidCheckpoint(f"{index} names a file outside of the folder: {file}")
        if not file.is_file():
            raise InvalidCheckpoint(f"{folder} is incomplete: {file.name} is missing")
    return files


@contextmanager
def open_tensors(folder: Path | str) -> Iterator[dict[str, Any]]:
    """Open handles of a model folder by tensor name: `handles[name].get_tensor(name)`, `.get_slice(name)`.

    Nothing is read until asked for. Raises `InvalidCheckpoint` for a damaged file.
    """
    with open_files(tensor_files(folder)) as handles:
        yield handles


@contextmanager
def open_files(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """`open_tensors` for safetensors files that lie anywhere; raises `InvalidCheckpoint` for a damaged one."""
    handles: dict[str, Any] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InvalidCheckpoint(f"{file} is damaged: {error}") from error
        handles.update(dict.fromkeys(handle.keys(), handle))
    yield handles


def read_manifest(folder: Path | str) -> BaseManifest:
    """Identity and shapes of a base folder, from its config and its tensors' headers; checks that they agree.

    Raises `InvalidCheckpoint` when the folder is no base, or incomplete, or contradicts itself.
    """
    spec = read_spec(folder)
    linears: dict[str, LinearShape] = {}
    with open_tensors(folder) as handles:
        for name in handles:
            module, _, leaf = name.rpartition(".")
            if leaf == "qweight":
                shape = _linear_shape(folder, module, handles, spec)
                if module not in spec.embeddings:
                    linears[module] = shape
    if not linears:
        raise InvalidCheckpoint(f"{folder} holds no quantized linear")
    return BaseManifest(spec.model_id or Path(folder).resolve().name, spec.base_digest, linears)


def _linear_shape(
    folder: Path | str, module: str, handles: Mapping[str, Any], spec: QuantizationSpec
) -> LinearShape:
    """Shape of one quantized module; K is a multiple of 8, so the packed width tells it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf, dtype in (("qweight", "U8"), ("scales", "F32"), ("zeros", "F32")):
        key = f"{module}.{leaf}"
        if key not in handles:
            raise InvalidCheckpoint(f"{folder}: {key} is missing")
        view = handles[key].get_slice(key)
        if view.get_dtype() != dtype or len(view.get_shape()) != 2:
            raise InvalidCheckpoint(
                f"{folder}: {key} must be a {dtype} matrix, not {view.get_dtype()} {view.get_shape()}"
            )
        shapes[leaf] = tuple(view.get_shape())
    precision = spec.of(module)
    rows, width = shapes["qweight"]
    in_features = width * 8 // precision.bits
    try:
        groups = precision.groups(in_features)
    except ValueError as error:
        raise InvalidCheckpoint(f"{folder}: {module}: {error}") from error
    if shapes["scales"] != (rows, groups) or shapes["zeros"] != (rows, groups):
        raise InvalidCheckpoint(
            f"{folder}: {module} needs scales and zeros of shape {(rows, groups)}, "
            f"has {shapes['scales']} and {shapes['zeros']}"
        )
    return LinearShape(rows, in_features, groups)


def compute_digest(folder: Path | str, threads: int = 2) -> str:
    """`base_digest` of the tensors in a base folder, whatever its config says (see `base_digest`)."""
    spec = read_spec(folder)

    def record(name: str, handles: Mapping[str, Any]) -> str | None:
        module, _, leaf = name.rpartition(".")
        if module in spec.embeddings or (leaf in ("scales", "zeros") and f"{module}.qweight" in handles):
            return None
        tensor = handles[name].get_tensor(name)
        if leaf != "qweight":
            return digest_float(name, tensor)
        scales, zeros = (handles[f"{module}.{n}"].get_tensor(f"{module}.{n}") for n in ("scales", "zeros"))
        bits = spec.of(module).bits
        return digest_linear(
            module, QuantizedWeight(tensor, scales, zeros, bits, tensor.shape[1] * 8 // bits)
        )

    digest = BaseDigest()
    with torch.inference_mode(), open_tensors(folder) as handles, ThreadPoolExecutor(threads) as pool:
        for line in pool.map(lambda name: record(name, handles), handles):
            if line is not None:
                digest.add(line)
    return digest.hexdigest()


def verify_digest(folder: Path | str) -> None:
    """Raise `InvalidCheckpoint` when the tensors of a base folder are not those that its digest names."""
    stored, found = read_spec(folder).base_digest, compute_digest(folder)
    if stored != found:
        raise InvalidCheckpoint(
            f"{folder} is damaged: its contents have digest {found[:16]}, its config says {stored[:16]}; "
            "import or quantize the model again"
        )
