"""Writing a base folder: all of it or nothing, tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock
from torch import Tensor

from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model.base_checkpoint import QuantizationSpec
from peqa_runtime.model.base_digest import BaseDigest, digest_float, digest_linear
from peqa_runtime.model.shard_writer import ShardWriter


@contextmanager
def staged_folder(destination: Path) -> Iterator[Path]:
    """A temporary sibling folder that becomes `destination` when the block ends without an error.

    Whatever an interrupted run left behind is removed first; a lock keeps two runs for one destination apart.
    Raises `InvalidCheckpoint` when `destination` exists and is not empty.
    """
    destination = Path(destination).absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{destination.name}.tmp-"
    with FileLock(destination.parent / f".{destination.name}.lock") as lock:
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise InvalidCheckpoint(f"{destination} exists already; remove it or choose another name")
        for stale in destination.parent.iterdir():
            if stale.name.startswith(prefix):
                shutil.rmtree(stale, ignore_errors=True)
        staging = destination.parent / f"{prefix}{uuid.uuid4().hex[:12]}"
        staging.mkdir()
        try:
            yield staging
            for path in (*sorted(p for p in staging.rglob("*") if p.is_file()), staging):
                _fsync(path)
            os.replace(staging, destination)
            _fsync(destination.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it finds the destination there


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class BaseWriter:
    """Writes the tensors and config.json of a base into `folder` (see `staged_folder`), tensor by tensor.

    Use as a context manager; leaving it without an error writes what is left and the config with its digest.
    `config` is the model's own config.json.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], spec: QuantizationSpec) -> None:
        self.folder = folder
        self._config = dict(config)
        self._spec = spec
        self._digest = BaseDigest()
        self._files = ShardWriter(folder)

    def add_codes(self, module: str, weight: QuantizedWeight) -> None:
        """Add a quantized module; its precision must be the one that the spec gives."""
        precision = self._spec.of(module)
        expected = (precision.bits, precision.groups(weight.in_features))
        assert (weight.bits, weight.groups) == expected, (module, expected)
        if module not in self._spec.embeddings:
            self._digest.add(digest_linear(module, weight))
        self._files.add(f"{module}.qweight", weight.qweight)
        self._files.add(f"{module}.scales", weight.scales)
        self._files.add(f"{module}.zeros", weight.zeros)

    def add_float(self, name: str, tensor: Tensor) -> None:
        """Add a tensor that stays as it is (norm, bias, 16-bit embedding ...)."""
        if name.rpartition(".")[0] not in self._spec.embeddings:
            self._digest.add(digest_float(name, tensor))
        self._files.add(name, tensor)

    def __enter__(self) -> BaseWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()

    def _finish(self) -> None:
        self._files.finish()
        spec = replace(self._spec, base_digest=self._digest.hexdigest())
        config = {**self._config, "quantization_config": spec.to_json()}
        (self.folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
