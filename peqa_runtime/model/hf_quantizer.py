"""quant_method "peqa" for transformers: importing this makes `AutoModelForCausalLM.from_pretrained(base)` work."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from peqa_runtime.errors import InvalidCheckpoint, UnsupportedModel
from peqa_runtime.model.base_checkpoint import QuantizationSpec
from peqa_runtime.model.quantized_linear import QuantizedEmbedding, QuantizedLinear, TiedHead

METHOD = "peqa"


class PeqaConfig(QuantizationConfigMixin):
    """`quantization_config` as transformers carries it; attributes are the JSON keys of `QuantizationSpec`."""

    def __init__(self, **values: Any) -> None:
        spec = QuantizationSpec.from_json({"quant_method": METHOD, **values})
        for key, value in spec.to_json().items():
            setattr(self, key, value)

    @property
    def spec(self) -> QuantizationSpec:
        """The checked form."""
        return QuantizationSpec.from_json(vars(self))


class PeqaQuantizer(HfQuantizer):
    """Swaps quantized modules in while the model is on the meta device; transformers then loads their tensors."""

    requires_calibration = False
    serialized_names = {"weight": ["qweight", "zeros", "scales"]}  # noqa: RUF012, the name of the base class

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        convert(model, self.quantization_config.spec)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Codes are saved as they were loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Scales can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """transformers' Trainer refuses "purely quantized" models; ours has trainable scales."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile is allowed."""
        return True


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(PeqaConfig)
    register_quantizer(METHOD)(PeqaQuantizer)


def convert(model: PreTrainedModel, spec: QuantizationSpec) -> None:
    """Replace linears and embeddings of a meta model by modules for their codes, in place.

    Raises `UnsupportedModel` for an embedding that does more than look up, `InvalidCheckpoint` when a group size does
    not divide a linear's inputs.
    """
    head = model.get_output_embeddings()
    for name, old in list(model.named_modules()):
        new: nn.Module | None = None
        with torch.device("meta"):
            if isinstance(old, nn.Embedding) and name in spec.overrides:
                new = _embedding(name, old, spec)
            elif isinstance(old, nn.Linear) and _is_quantized(name, old is head, spec):
                new = _linear(name, old, spec)
        if new is not None:
            _replace(model, name, new)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, QuantizedEmbedding) and model.config.get_text_config().tie_word_embeddings:
        _replace(model, _name_of(model, head), TiedHead(embedding))
        # transformers would tie `lm_head.weight` to an embedding weight that does not exist
        model._tied_weights_keys = None
        model.all_tied_weights_keys = {}


def _is_quantized(name: str, is_head: bool, spec: QuantizationSpec) -> bool:
    return name in spec.overrides if is_head else name not in spec.modules_to_not_convert


def _linear(name: str, old: nn.Linear, spec: QuantizationSpec) -> QuantizedLinear:
    precision = spec.of(name)
    try:
        precision.groups(old.in_features)
    except ValueError as error:
        raise InvalidCheckpoint(f"{name}: {error}") from error
    return QuantizedLinear(
        old.in_features, old.out_features, precision.bits, precision.group_size, old.bias is not None
    )


def _embedding(name: str, old: nn.Embedding, spec: QuantizationSpec) -> QuantizedEmbedding:
    if type(old) is not nn.Embedding:
        raise UnsupportedModel(
            f"{name} is a {type(old).__name__}, which does more than look rows up; store it as 16-bit floats"
        )
    precision = spec.of(name)
    return QuantizedEmbedding(
        old.num_embeddings, old.embedding_dim, precision.bits, precision.group_size, old.weight.dtype
    )


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
