"""What a run has done so far, on disk: finished blocks and the hidden states that the next one starts from.

    request.json              what was asked for; a folder belongs to one request
    block-00012.safetensors   codes, scales and zeros of a finished block's linears, its report in the header
    quantized-00013.f32       hidden states that enter block 13 behind quantized blocks, [windows, tokens, D] fp32
    float-00013.f32           the same behind float blocks; only where some block is trained
A file is there whole or not at all. A block's file is written last, and only then go the hidden states before it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.disk_space import disk_full_named
from peqa_runtime.scales.atomic_file import sync_folder, write_atomic

_LEAVES = ("qweight", "scales", "zeros")


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of every window, on disk: [windows, tokens, D] fp32."""

    path: Path
    windows: int
    tokens: int
    width: int

    def read(self, window: int) -> Tensor:
        """One window, [1, tokens, D]."""
        size = self.tokens * self.width
        values = np.fromfile(self.path, dtype="<f4", count=size, offset=4 * size * window)
        return torch.from_numpy(values).view(1, self.tokens, self.width)

    def write(self, windows: Iterable[Tensor]) -> None:
        """Write all windows, in order; the file is there when the last one is."""
        unfinished = self.path.with_suffix(".tmp")
        with disk_full_named(self.path), open(unfinished, "wb") as file:
            for window in windows:
                assert window.shape == (1, self.tokens, self.width), window.shape
                values = window.detach().to("cpu", torch.float32).contiguous().numpy()
                file.write(values.astype("<f4", copy=False).data)
            file.flush()
            os.fsync(file.fileno())
        assert unfinished.stat().st_size == 4 * self.windows * self.tokens * self.width, "windows are missing"
        os.replace(unfinished, self.path)
        sync_folder(self.path.parent)


class Workbench:
    """The folder of one run. Use under a lock: one run at a time."""

    def __init__(self, folder: Path, request: Mapping[str, Any]) -> None:
        """Open or make the folder; what is of another request, or damaged, is thrown away."""
        self.folder = folder
        note = folder / "request.json"
        text = json.dumps(request, indent=1, sort_keys=True)
        if note.exists() and note.read_text(encoding="utf-8") == text:
            return
        shutil.rmtree(folder, ignore_errors=True)
        with disk_full_named(folder):
            folder.mkdir(parents=True)
            write_atomic(note, text.encode())

    def hidden(self, kind: str, block: int, windows: int, tokens: int, width: int) -> HiddenStates:
        """The hidden states that enter a block; `kind` is "float" or "quantized"."""
        return HiddenStates(self.folder / f"{kind}-{block:05d}.f32", windows, tokens, width)

    def drop_hidden(self, kind: str, before: int) -> None:
        """Delete the hidden states of blocks before this one."""
        for file in self.folder.glob(f"{kind}-*.f32"):
            if int(file.stem.rpartition("-")[2]) < before:
                file.unlink()

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def finished(self) -> int:
        """How many blocks are done, from the first on."""
        count = 0
        while self._block(count).exists():
            count += 1
        return count

    def save_block(
        self, index: int, weights: Mapping[str, QuantizedWeight], report: Mapping[str, Any]
    ) -> None:
        """Note a block as done."""
        tensors = {
            f"{name}.{leaf}": getattr(w, leaf).cpu() for name, w in weights.items() for leaf in _LEAVES
        }
        bits = {name: weight.bits for name, weight in weights.items()}
        with disk_full_named(self.folder):
            data = save(tensors, metadata={"report": json.dumps(report), "bits": json.dumps(bits)})
            write_atomic(self._block(index), data)

    def report(self, index: int) -> dict[str, Any]:
        """What `save_block` was told of a block."""
        with safe_open(self._block(index), framework="pt") as file:
            report: dict[str, Any] = json.loads(file.metadata()["report"])
        return report

    def weights(self, index: int) -> dict[str, QuantizedWeight]:
        """The quantized linears of a block, by name."""
        with safe_open(self._block(index), framework="pt") as file:
            found: dict[str, QuantizedWeight] = {}
            for name, bits in json.loads(file.metadata()["bits"]).items():
                qweight, scales, zeros = (file.get_tensor(f"{name}.{leaf}") for leaf in _LEAVES)
                found[name] = QuantizedWeight(qweight, scales, zeros, bits, qweight.shape[1] * 8 // bits)
        return found

    def remove(self) -> None:
        """The run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)
