"""A recognised model described for the lean decoder: float32 on the CPU, codes as the compiled kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peqa_kernels.native.decoder import DecoderLayer, DecoderLinear, DecoderSpec
from peqa_kernels.quant_matmul.cpu import NativeCpu
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.model.attention import PagedLayer
from peqa_runtime.model.decoder_parts import (
    DecoderParts,
    LayerParts,
    UnknownPart,
    angle_tables,
    read_parts,
    require,
)
from peqa_runtime.model.float_linear import SteadyLinear
from peqa_runtime.model.quantized_linear import QuantizedEmbedding, QuantizedLinear, TiedHead


@dataclass(frozen=True)
class Recognised:
    """`linears`: of each layer qkv, out, gate_up and down. `head`: a float head, applied to what `spec` computes."""

    spec: DecoderSpec
    linears: list[list[QuantizedLinear]]
    head: nn.Module | None


def recognise(model: PreTrainedModel, layers: list[PagedLayer], max_positions: int) -> Recognised | None:
    """What a fused, paged and prepared float32 model on the CPU computes, or None when the lean decoder does not.

    `layers`: the model's paged layers; `max_positions`: tokens that one sequence may have.
    """
    try:
        parts = read_parts(model, layers)
        spec = _spec(parts, max_positions)
    except UnknownPart:
        return None
    head = parts.head if spec.head is None else None
    return Recognised(spec, [layer.linears for layer in parts.layers], head)


def _spec(parts: DecoderParts, max_positions: int) -> DecoderSpec:
    cosines, sines = angle_tables(parts, max_positions, torch.device("cpu"), torch.float32)
    return DecoderSpec(
        layers=tuple(_layer(layer) for layer in parts.layers),
        embedding=_embedding(parts.embedding),
        norm=_floats(parts.norm),
        head=_head(parts.head),
        cosines=cosines,
        sines=sines,
        heads=parts.heads,
        kv_heads=parts.kv_heads,
        d=parts.d,
        eps=parts.eps,
        scaling=parts.scaling,
    )


def _layer(layer: LayerParts) -> DecoderLayer:
    return DecoderLayer(
        qkv=_codes(layer.qkv),
        out=_codes(layer.out),
        gate_up=_codes(layer.gate_up),
        down=_codes(layer.down),
        attention_norm=_floats(layer.attention_norm),
        mlp_norm=_floats(layer.mlp_norm),
        q_norm=None if layer.q_norm is None else _floats(layer.q_norm),
        k_norm=None if layer.k_norm is None else _floats(layer.k_norm),
        window=layer.window,
    )


def _codes(module: QuantizedLinear | QuantizedEmbedding) -> DecoderLinear:
    backend = module.prepare().impl
    if not isinstance(backend, NativeCpu):
        raise UnknownPart
    bias = module.bias if isinstance(module, QuantizedLinear) else None
    return DecoderLinear(backend.packed, None if bias is None else _floats(bias))


def _head(module: TiedHead | QuantizedLinear | SteadyLinear) -> DecoderLinear | None:
    """The head where it is codes; None where it is floats, which torch multiplies."""
    if isinstance(module, SteadyLinear):
        return None
    return _codes(module.embedding if isinstance(module, TiedHead) else module)


def _embedding(module: QuantizedEmbedding | nn.Embedding) -> Tensor | QuantizedWeight:
    if isinstance(module, nn.Embedding):
        return _floats(module.weight)
    codes = module.weight_codes()
    require(codes.qweight.is_contiguous() and module.dtype == torch.float32)
    return QuantizedWeight(
        codes.qweight, _floats(codes.scales), _floats(codes.zeros), codes.bits, codes.in_features
    )


def _floats(tensor: Tensor) -> Tensor:
    require(tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu")
    return tensor.detach()
