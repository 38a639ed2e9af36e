"""Where an engine's model and tasks come from: what is loaded already, or folders."""

from __future__ import annotations

from contextlib import ExitStack
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
) -> tuple[TaskLibrary, ExitStack]:
    """The tasks of a store folder (None: of a new temporary one), and what to close in the end: nothing of a library
    that was given. Raises `StoreError`."""
    own = ExitStack()
    if isinstance(tasks, TaskLibrary):
        return tasks, own
    if tasks is None:
        tasks = own.enter_context(TemporaryDirectory(prefix="peqa-store-"))
    registry = TaskRegistry(rows=config.task_rows, group_rows=config.group_rows)
    store = ScaleStore(Path(tasks), manifest)
    library = TaskLibrary(store, registry, host_bytes=config.host_cache_bytes)
    own.callback(library.close)
    return library, own
