"""The model layer: base folders, importers, quantized modules and how transformers loads them.

Importing this registers quant_method "peqa" with transformers.
"""

from __future__ import annotations

from peqa_runtime.model.base_checkpoint import read_manifest, verify_digest
from peqa_runtime.model.hf_quantizer import PeqaConfig, PeqaQuantizer
from peqa_runtime.model.importers.gguf import import_gguf
from peqa_runtime.model.quantized_linear import QuantizedEmbedding, QuantizedLinear, StepRows, TiedHead

__all__ = [
    "PeqaConfig",
    "PeqaQuantizer",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "StepRows",
    "TiedHead",
    "import_gguf",
    "read_manifest",
    "verify_digest",
]
