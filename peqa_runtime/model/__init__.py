"""The model layer: base folders, importers, quantized modules and how transformers loads them.

Importing this registers quant_method "peqa" with transformers.
"""

from __future__ import annotations

from peqa_runtime.model.attention import ATTENTION, KVSpec, PagedLayer
from peqa_runtime.model.base_checkpoint import read_manifest, verify_digest
from peqa_runtime.model.forward_context import ForwardContext
from peqa_runtime.model.fusion import LinearSpec, fuse_siblings
from peqa_runtime.model.hf_quantizer import PeqaConfig, PeqaQuantizer
from peqa_runtime.model.importers.checkpoint import import_checkpoint
from peqa_runtime.model.importers.gguf import import_gguf
from peqa_runtime.model.importers.recognition import is_quantized
from peqa_runtime.model.loader import LoadedModel, load
from peqa_runtime.model.quantize import quantize_folder, quantize_rtn
from peqa_runtime.model.quantized_linear import QuantizedEmbedding, QuantizedLinear, StepRows, TiedHead

__all__ = [
    "ATTENTION",
    "ForwardContext",
    "KVSpec",
    "LinearSpec",
    "LoadedModel",
    "PagedLayer",
    "PeqaConfig",
    "PeqaQuantizer",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "StepRows",
    "TiedHead",
    "fuse_siblings",
    "import_checkpoint",
    "import_gguf",
    "is_quantized",
    "load",
    "quantize_folder",
    "quantize_rtn",
    "read_manifest",
    "verify_digest",
]
