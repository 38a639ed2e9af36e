"""What a run leaves on disk while it goes: checkpoints to go on from, and each task's best scales."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from peqa_runtime.disk_space import disk_full_named
from peqa_runtime.errors import InvalidData
from peqa_runtime.scales.atomic_file import write_atomic

MASTERS = "scales.safetensors"
RUN_FILE = "run.json"
_EARLIER = {"beta2": 0.999}  # settings that a run has which was begun before they could be chosen
_UNNOTED = frozenset({"teacher_digest"})  # what such a run did not note, so that nothing can be compared


def last_checkpoint(folder: Path) -> Path | None:
    """Newest complete checkpoint (the state file is written last, so one that was cut short is passed over)."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            found.append((int(json.loads((path / "trainer_state.json").read_text())["global_step"]), path))
        except (OSError, ValueError, KeyError):
            continue
    return max(found)[1] if found else None


def load_masters(checkpoint: Path, task: int) -> dict[str, Tensor]:
    """The scales of one of a run's tasks, fp32, by their name in a scale set file."""
    found = load_file(checkpoint / MASTERS)
    return {name.partition(".")[2]: s for name, s in found.items() if name.startswith(f"{task}.")}


def prepare_folder(folder: Path, fingerprint: Mapping[str, Any], *, resume: bool | None) -> Path | None:
    """Checkpoint to go on from, or None for a new run. `resume`: True must, False must not, None if there is one.

    A folder of a run with other settings or data raises `InvalidData` rather than mixing two runs; `DiskFull`.
    """
    wanted = json.loads(json.dumps(fingerprint))
    if resume is False and folder.exists():
        shutil.rmtree(folder)
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        try:
            before = json.loads((folder / RUN_FILE).read_text())
        except (OSError, ValueError):
            before = {}
        changed = sorted(
            key
            for key in wanted.keys() | before.keys()
            if (key in before or key not in _UNNOTED)
            and wanted.get(key) != before.get(key, _EARLIER.get(key))
        )
        if changed:
            raise InvalidData(
                f"{folder} holds a run with other settings ({', '.join(changed)}); "
                "use the same ones to go on, or --no-resume to start anew"
            )
        return checkpoint
    if resume:
        raise InvalidData(f"nothing to resume: {folder} holds no complete checkpoint")
    if folder.exists():
        shutil.rmtree(folder)  # what a run left that never came to a checkpoint
    with disk_full_named(folder):
        folder.mkdir(parents=True)
        write_atomic(folder / RUN_FILE, json.dumps(wanted, indent=1).encode())
    return None


class BestScales:
    """The scales of each task that had the lowest held-out loss so far, one file a task."""

    def __init__(self, folder: Path, tasks: int) -> None:
        """Read what an interrupted run has found already."""
        self.files = [folder / f"best-{task}.safetensors" for task in range(tasks)]
        self.losses: list[float] = [float("inf")] * tasks
        self.steps = [0] * tasks
        for task, file in enumerate(self.files):
            try:
                with safe_open(file, "pt") as opened:
                    noted = opened.metadata()
                self.losses[task], self.steps[task] = float(noted["loss"]), int(noted["step"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError):
                continue

    def offer(self, task: int, loss: float, step: int, scales: Mapping[str, Tensor], *, write: bool) -> None:
        """Keep these scales if their loss is the lowest; `write` is for one process of several. Raises `DiskFull`."""
        if not loss < self.losses[task]:
            return
        self.losses[task], self.steps[task] = loss, step
        if write:
            noted = {"loss": repr(loss), "step": str(step)}
            with disk_full_named(self.files[task]):
                write_atomic(self.files[task], save(dict(scales), noted), durable=False)

    def load(self, task: int) -> dict[str, Tensor]:
        """The kept scales of a task."""
        return load_file(self.files[task])
