"""One frozen integer model, many tasks: load a base, keep scale sets, generate. No HTTP here.

The public names. Those that need torch or transformers are imported when they are first asked for, so that a command
line that only wants an error class starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peqa_runtime.constraint import Constraint
    from peqa_runtime.core import (
        BASE_REVISION,
        BASE_TASK,
        SCALE_KINDS,
        BaseManifest,
        FinishReason,
        Lease,
        LinearShape,
        Request,
        RevisionInfo,
        ScaleKind,
        TaskInfo,
        TokenLogprobs,
        TokenOutput,
        check_task_name,
    )
    from peqa_runtime.engine.async_engine import AsyncEngine
    from peqa_runtime.engine.config import EngineConfig
    from peqa_runtime.engine.engine import Engine
    from peqa_runtime.engine.offline import Completion
    from peqa_runtime.engine.token_stream import TokenStream
    from peqa_runtime.errors import (
        DiskFull,
        EngineDead,
        InvalidCheckpoint,
        InvalidData,
        InvalidRequest,
        InvalidScaleSet,
        InvalidTaskName,
        NoSuchRevision,
        Overloaded,
        PeqaError,
        PromptTooLong,
        RevisionConflict,
        StoreError,
        TaskQuarantined,
        TaskUnusable,
        TrainingDiverged,
        UnknownTask,
        UnsupportedModel,
        WrongBase,
    )
    from peqa_runtime.export.folder import export_folder
    from peqa_runtime.export.ia3 import export_ia3, import_ia3
    from peqa_runtime.model import (
        LoadedModel,
        import_checkpoint,
        import_gguf,
        load,
        quantize_folder,
        read_manifest,
    )
    from peqa_runtime.sampling_params import SamplingParams
    from peqa_runtime.scales.scale_set import ScaleSet
    from peqa_runtime.scales.scale_store import ScaleStore
    from peqa_runtime.scales.task_library import TaskLibrary
    from peqa_runtime.scales.task_registry import TaskRegistry
    from peqa_runtime.text import (
        IncrementalDecoder,
        StopStrings,
        apply_chat_template,
        decode,
        encode,
        token_text,
    )

_HOMES = {
    "peqa_runtime.constraint": ("Constraint",),
    "peqa_runtime.core": (
        "BASE_REVISION",
        "BASE_TASK",
        "SCALE_KINDS",
        "BaseManifest",
        "FinishReason",
        "Lease",
        "LinearShape",
        "Request",
        "RevisionInfo",
        "ScaleKind",
        "TaskInfo",
        "TokenLogprobs",
        "TokenOutput",
        "check_task_name",
    ),
    "peqa_runtime.engine.async_engine": ("AsyncEngine",),
    "peqa_runtime.engine.config": ("EngineConfig",),
    "peqa_runtime.engine.engine": ("Engine",),
    "peqa_runtime.engine.offline": ("Completion",),
    "peqa_runtime.engine.token_stream": ("TokenStream",),
    "peqa_runtime.errors": (
        "DiskFull",
        "EngineDead",
        "InvalidCheckpoint",
        "InvalidData",
        "InvalidRequest",
        "InvalidScaleSet",
        "InvalidTaskName",
        "NoSuchRevision",
        "Overloaded",
        "PeqaError",
        "PromptTooLong",
        "RevisionConflict",
        "StoreError",
        "TaskQuarantined",
        "TaskUnusable",
        "TrainingDiverged",
        "UnknownTask",
        "UnsupportedModel",
        "WrongBase",
    ),
    "peqa_runtime.export.folder": ("export_folder",),
    "peqa_runtime.export.ia3": (
        "export_ia3",
        "import_ia3",
    ),
    "peqa_runtime.model": (
        "LoadedModel",
        "import_checkpoint",
        "import_gguf",
        "load",
        "quantize_folder",
        "read_manifest",
    ),
    "peqa_runtime.sampling_params": ("SamplingParams",),
    "peqa_runtime.scales.scale_set": ("ScaleSet",),
    "peqa_runtime.scales.scale_store": ("ScaleStore",),
    "peqa_runtime.scales.task_library": ("TaskLibrary",),
    "peqa_runtime.scales.task_registry": ("TaskRegistry",),
    "peqa_runtime.text": (
        "IncrementalDecoder",
        "StopStrings",
        "apply_chat_template",
        "decode",
        "encode",
        "token_text",
    ),
}

__all__ = [
    "BASE_REVISION",
    "BASE_TASK",
    "SCALE_KINDS",
    "AsyncEngine",
    "BaseManifest",
    "Completion",
    "Constraint",
    "DiskFull",
    "Engine",
    "EngineConfig",
    "EngineDead",
    "FinishReason",
    "IncrementalDecoder",
    "InvalidCheckpoint",
    "InvalidData",
    "InvalidRequest",
    "InvalidScaleSet",
    "InvalidTaskName",
    "Lease",
    "LinearShape",
    "LoadedModel",
    "NoSuchRevision",
    "Overloaded",
    "PeqaError",
    "PromptTooLong",
    "Request",
    "RevisionConflict",
    "RevisionInfo",
    "SamplingParams",
    "ScaleKind",
    "ScaleSet",
    "ScaleStore",
    "StopStrings",
    "StoreError",
    "TaskInfo",
    "TaskLibrary",
    "TaskQuarantined",
    "TaskRegistry",
    "TaskUnusable",
    "TokenLogprobs",
    "TokenOutput",
    "TokenStream",
    "TrainingDiverged",
    "UnknownTask",
    "UnsupportedModel",
    "WrongBase",
    "apply_chat_template",
    "check_task_name",
    "decode",
    "encode",
    "export_folder",
    "export_ia3",
    "import_checkpoint",
    "import_gguf",
    "import_ia3",
    "load",
    "quantize_folder",
    "read_manifest",
    "token_text",
]


def __getattr__(name: str) -> object:
    """Import the module that a public name lives in."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
