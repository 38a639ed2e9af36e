"""The floats to quantize, tensor by tensor from disk: a Hugging Face folder, or a base whose codes are decoded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from peqa_kernels.quant_matmul import dequantize
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model.base_checkpoint import (
    QuantizationSpec,
    open_files,
    read_config,
    read_spec,
    tensor_files,
)
from peqa_runtime.model.importers.recognition import checkpoint_files

_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
)


class FloatSource:
    """A model folder read as floats. Nothing is read until asked for, and nothing is kept.

    `config`: its config.json without the quantization. `spec`: of a base, else None.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], spec: QuantizationSpec | None, handles: Any
    ) -> None:
        self.folder = folder
        self.config = config
        self.spec = spec
        self._handles = handles
        leaves = ("qweight", "scales", "zeros")
        self._coded = {name.rpartition(".")[0] for name in handles if spec and name.endswith(".qweight")}
        self.names = sorted(
            {name for name in handles if not self._is_coded(name, leaves)}
            | {f"{module}.weight" for module in self._coded}
        )
        """Parameters, by their name in the model."""

    def _is_coded(self, name: str, leaves: tuple[str, ...]) -> bool:
        module, _, leaf = name.rpartition(".")
        return leaf in leaves and module in self._coded

    def __contains__(self, name: str) -> bool:
        """Whether there is a parameter of this name."""
        return name in self._handles or name.removesuffix(".weight") in self._coded

    def codes(self, module: str) -> QuantizedWeight | None:
        """The codes of a module, where the folder holds codes for it."""
        if module not in self._coded or self.spec is None:
            return None
        qweight, scales, zeros = (self._read(f"{module}.{leaf}") for leaf in ("qweight", "scales", "zeros"))
        bits = self.spec.of(module).bits
        return QuantizedWeight(qweight, scales, zeros, bits, qweight.shape[1] * 8 // bits)

    def tensor(self, name: str) -> Tensor:
        """A parameter in its own dtype; decoded codes are fp32."""
        codes = self.codes(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return self._read(name) if codes is None else dequantize(codes)

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor

    def stamp(self) -> list[Any]:
        """A base's digest, or names, sizes and times of the files: another model in the same place has another."""
        if self.spec:
            return [self.spec.base_digest]
        files = [self.folder / "config.json", *tensor_files(self.folder)]
        return [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]

    def copy_companions(self, target: Path) -> None:
        """Copy tokenizer, generation config and licence."""
        for pattern in _COPIED:
            for file in self.folder.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, target / file.name)


@contextmanager
def open_source(folder: Path) -> Iterator[FloatSource]:
    """Open a folder of floats or a base.

    Raises `InvalidCheckpoint` when it is neither, or holds codes of another kind.
    """
    config = read_config(folder)
    quantization = config.pop("quantization_config", None)
    spec = None
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method != "peqa":
            raise InvalidCheckpoint(
                f"{folder} is quantized already ({method!r}); quantize the 16-bit original, or `peqa import` it"
            )
        spec = read_spec(folder)
    with open_files(checkpoint_files(folder)) as handles:
        yield FloatSource(folder, config, spec, handles)
