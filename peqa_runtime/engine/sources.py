"""Where an engine's model and tasks come from: what is loaded already, or folders."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from peqa_runtime.core import BaseManifest
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.task_library import TaskLibrary
from peqa_runtime.scales.task_registry import TaskRegistry

if TYPE_CHECKING:
    from peqa_runtime.model.loader import LoadedModel


def open_model(base: LoadedModel | Path | str, *, device: str, dtype: str) -> LoadedModel:
    """The model of a base folder. Raises `InvalidCheckpoint`, `UnsupportedModel`."""
    if not isinstance(base, Path | str):
        return base
    from peqa_runtime.model.loader import load  # imports transformers, which takes seconds

    return load(base, device=device, dtype=dtype)


def open_tasks(
    tasks: TaskLibrary | Path | str | None, manifest: BaseManifest, config: EngineConfig
) -> tuple[TaskLibrary, TemporaryDirectory[str] | None]:
    """The tasks of a store folder; None: of a new temporary one, which the caller cleans up. Raises `StoreError`."""
    if isinstance(tasks, TaskLibrary):
        return tasks, None
    temporary = None
    if tasks is None:
        temporary = TemporaryDirectory(prefix="peqa-store-")
        tasks = temporary.name
    registry = TaskRegistry(rows=config.task_rows, group_rows=config.group_rows)
    store = ScaleStore(Path(tasks), manifest)
    return TaskLibrary(store, registry, host_bytes=config.host_cache_bytes), temporary
