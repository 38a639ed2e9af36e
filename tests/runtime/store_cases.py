"""A small base, scale sets of one value each, and what a store of them holds on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from peqa_runtime.core import BaseManifest, LinearShape
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.set_layout import expected_shapes

MANIFEST = BaseManifest("tiny", "d1" * 32, {f"l{i}": LinearShape(6, 8, 2) for i in range(3)})
OTHER_BASE = BaseManifest("tiny2", "e2" * 32, MANIFEST.linears)


def set_of(value: float, manifest: BaseManifest = MANIFEST, **options: object) -> ScaleSet:
    tensors = {n: torch.full(s, value) for n, s in expected_shapes("channel", manifest).items()}
    return ScaleSet.build("channel", tensors, manifest, **options)


A, B, C, D = (set_of(value) for value in (0.8, 0.9, 1.1, 1.2))


def new_store(folder: Path, manifest: BaseManifest = MANIFEST, **options: int) -> ScaleStore:
    return ScaleStore(folder, manifest, **options)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of tasks and quarantine, with its bytes; the two hex digits of a task's place left out."""
    return {
        str(p.relative_to(folder)).replace(f"tasks/{p.parent.parent.name}/", ""): p.read_bytes()
        for room in ("tasks", "quarantine")
        for p in (folder / room).rglob("*")
        if p.is_file()
    }


def place(folder: Path, task: str) -> Path:
    """The task's folder."""
    return folder / "tasks" / hashlib.sha256(task.encode()).hexdigest()[:2] / task


def blob(folder: Path, task: str, scale_set: ScaleSet) -> Path:
    return place(folder, task) / f"{scale_set.revision}.safetensors"


def history(store: ScaleStore, task: str) -> list[str]:
    """Revisions, oldest first; the current one in brackets."""
    return [f"[{r.revision}]" if r.current else r.revision for r in reversed(store.revisions(task))]
