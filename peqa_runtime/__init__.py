"""One frozen integer model, many tasks: load a base, keep scale sets, generate. No HTTP here.

The public names. Those that need torch or transformers are imported when they are first asked for, so that a command
line that only wants an error class starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peqa_runtime.core import (
        BASE_TASK,
        BaseManifest,
        Lease,
        Request,
        RevisionInfo,
        SamplingParams,
        TaskInfo,
        TokenOutput,
    )
    from peqa_runtime.engine.async_engine import AsyncEngine
    from peqa_runtime.engine.config import EngineConfig
    from peqa_runtime.engine.engine import Engine
    from peqa_runtime.errors import PeqaError
    from peqa_runtime.model import LoadedModel, import_gguf, load, quantize_folder, read_manifest
    from peqa_runtime.scales.scale_set import ScaleSet
    from peqa_runtime.scales.scale_store import ScaleStore
    from peqa_runtime.scales.task_library import TaskLibrary
    from peqa_runtime.scales.task_registry import TaskRegistry

_HOMES = {
    "BASE_TASK": "peqa_runtime.core",
    "AsyncEngine": "peqa_runtime.engine.async_engine",
    "BaseManifest": "peqa_runtime.core",
    "Engine": "peqa_runtime.engine.engine",
    "EngineConfig": "peqa_runtime.engine.config",
    "Lease": "peqa_runtime.core",
    "LoadedModel": "peqa_runtime.model",
    "PeqaError": "peqa_runtime.errors",
    "Request": "peqa_runtime.core",
    "RevisionInfo": "peqa_runtime.core",
    "SamplingParams": "peqa_runtime.core",
    "ScaleSet": "peqa_runtime.scales.scale_set",
    "ScaleStore": "peqa_runtime.scales.scale_store",
    "TaskInfo": "peqa_runtime.core",
    "TaskLibrary": "peqa_runtime.scales.task_library",
    "TaskRegistry": "peqa_runtime.scales.task_registry",
    "TokenOutput": "peqa_runtime.core",
    "import_gguf": "peqa_runtime.model",
    "load": "peqa_runtime.model",
    "quantize_folder": "peqa_runtime.model",
    "read_manifest": "peqa_runtime.model",
}

__all__ = [
    "BASE_TASK",
    "AsyncEngine",
    "BaseManifest",
    "Engine",
    "EngineConfig",
    "Lease",
    "LoadedModel",
    "PeqaError",
    "Request",
    "RevisionInfo",
    "SamplingParams",
    "ScaleSet",
    "ScaleStore",
    "TaskInfo",
    "TaskLibrary",
    "TaskRegistry",
    "TokenOutput",
    "import_gguf",
    "load",
    "quantize_folder",
    "read_manifest",
]


def __getattr__(name: str) -> object:
    """Import the module that a public name lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
