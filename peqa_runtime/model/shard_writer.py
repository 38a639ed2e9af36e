"""The safetensors files of a model folder, tensor by tensor: one file, or several of 2 GiB with an index."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from peqa_runtime.model.base_checkpoint import INDEX_FILE, SINGLE_FILE

_SHARD_BYTES = 2 << 30  # a shard is held in memory while it grows


class ShardWriter:
    """Collects tensors; `finish` gives the files their names, as Hugging Face folders have them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: dict[str, Tensor] = {}
        self._shards: list[dict[str, int]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor."""
        tensor = tensor.contiguous()
        size = sum(t.nbytes for t in self._pending.values())
        if self._pending and size + tensor.nbytes > _SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor

    def finish(self) -> None:
        """Write what is left, and the index where there are several files."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(self._shards):
            name = SINGLE_FILE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self.folder / f"shard-{i}", self.folder / name)
            weight_map.update(dict.fromkeys(shard, name))
        if count > 1:
            total = sum(sum(shard.values()) for shard in self._shards)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=1, sort_keys=True))

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self._shards)}"
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes 0600, the other files of the folder are readable
        self._shards.append({name: tensor.nbytes for name, tensor in self._pending.items()})
        self._pending = {}
