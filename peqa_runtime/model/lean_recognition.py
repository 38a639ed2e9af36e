"""Is a loaded model one that the lean decoder computes? Told by exact classes, parts and settings.

Whatever differs in anything is not recognised, and the model runs as transformers wrote it: a wrong guess would be a
wrong answer, a missed one only a slower step.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peqa_kernels.native.decoder import DecoderLayer, DecoderLinear, DecoderSpec
from peqa_kernels.quant_matmul.cpu import NativeCpu
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.model.attention import KVSpec, PagedLayer, layer_of
from peqa_runtime.model.float_linear import SteadyLinear
from peqa_runtime.model.fusion import SiblingPart
from peqa_runtime.model.quantized_linear import QuantizedEmbedding, QuantizedLinear, TiedHead

_FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""model_type -> first part of the class names. Their decoders differ in biases, q/k norms and windows only."""

_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose angles depend on the position alone."""

_ANGLE_BYTES = (
    2**28
)  # most memory that the tables of angles may take: half a million positions of heads of 128


@dataclass(frozen=True)
class Recognised:
    """`linears`: of each layer qkv, out, gate_up and down. `head`: a float head, applied to what `spec` computes."""

    spec: DecoderSpec
    linears: list[list[QuantizedLinear]]
    head: nn.Module | None


class _Unknown(Exception):
    """The model has something that the lean decoder does not compute."""


def recognise(model: PreTrainedModel, layers: list[PagedLayer], max_positions: int) -> Recognised | None:
    """What a fused, paged and prepared float32 model on the CPU computes, or None when the lean decoder does not.

    `layers`: the model's paged layers; `max_positions`: tokens that one sequence may have.
    """
    try:
        return _Reader(model).read(layers, max_positions)
    except _Unknown:
        return None


def _require(fact: bool) -> None:
    if not fact:
        raise _Unknown


class _Reader:
    """Reads the parts of a model of one family."""

    def __init__(self, model: Any) -> None:
        family = model.config.model_type
        self._source = f"transformers.models.{family}.modeling_{family}"
        self._prefix = _FAMILIES.get(family, "")
        _require(
            type(model).__module__ == self._source and type(model).__name__ == f"{self._prefix}ForCausalLM"
        )
        self._model = model
        self._eps = model.config.rms_norm_eps

    def read(self, layers: list[PagedLayer], max_positions: int) -> Recognised:
        """The whole model."""
        model = self._expect(self._model, "ForCausalLM", "model", "lm_head")
        inner = self._expect(model.model, "Model", "embed_tokens", "layers", "norm", "rotary_emb")
        _require(len(inner.layers) == model.config.num_hidden_layers == len(layers) > 0)
        linears = [self._linears(module) for module in inner.layers]
        attention = inner.layers[0].self_attn
        d, kv_heads = attention.head_dim, attention.k_proj.out_features // attention.head_dim
        heads = attention.o_proj.in_features // d
        found = []
        for module, paged, parts in zip(inner.layers, layers, linears, strict=True):
            own = module.self_attn
            _require(layer_of(own) is paged and (own.head_dim, own.scaling) == (d, attention.scaling))
            _require(paged.spec == KVSpec(kv_heads, d, d, paged.spec.sliding_window if paged.spec else None))
            qkv, out, gate_up, down = parts
            _require(qkv.sizes == (heads * d, kv_heads * d, kv_heads * d) and out.in_features == heads * d)
            _require(gate_up.sizes == (down.in_features,) * 2 == (linears[0][3].in_features,) * 2)
            found.append(self._layer(module, parts, paged.spec.sliding_window if paged.spec else None))
        cosines, sines = self._angles(inner.rotary_emb, d, max_positions)
        head = _head(model.lm_head)
        spec = DecoderSpec(
            layers=tuple(found),
            embedding=_embedding(inner.embed_tokens),
            norm=self._norm(inner.norm),
            head=head,
            cosines=cosines,
            sines=sines,
            heads=heads,
            kv_heads=kv_heads,
            d=d,
            eps=self._eps,
            scaling=attention.scaling,
        )
        return Recognised(spec, linears, model.lm_head if head is None else None)

    def _expect(self, module: Any, part: str, *children: str) -> Any:
        """The module is plainly of the family's class, with these children and no others."""
        _require(type(module) is getattr(sys.modules[self._source], f"{self._prefix}{part}", None))
        _require(_plain(module) and {name for name, _ in module.named_children()} == set(children))
        return module

    def _linears(self, layer: Any) -> list[QuantizedLinear]:
        """The four matmuls of a layer."""
        self._expect(layer, "DecoderLayer", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        norms = ("q_norm", "k_norm") if self._has_head_norms else ()
        own = self._expect(layer.self_attn, "Attention", "q_proj", "k_proj", "v_proj", "o_proj", *norms)
        mlp = self._expect(layer.mlp, "MLP", "gate_proj", "up_proj", "down_proj", "act_fn")
        _require(type(mlp.act_fn).__name__ in ("SiLUActivation", "SiLU") and _plain(mlp.act_fn))
        return [
            _fused(own.q_proj, own.k_proj, own.v_proj),
            _alone(own.o_proj),
            _fused(mlp.gate_proj, mlp.up_proj),
            _alone(mlp.down_proj),
        ]

    @property
    def _has_head_norms(self) -> bool:
        return self._prefix == "Qwen3"

    def _layer(self, layer: Any, parts: list[QuantizedLinear], window: int | None) -> DecoderLayer:
        qkv, out, gate_up, down = (_codes(part) for part in parts)
        own = layer.self_attn
        return DecoderLayer(
            qkv=qkv,
            out=out,
            gate_up=gate_up,
            down=down,
            attention_norm=self._norm(layer.input_layernorm),
            mlp_norm=self._norm(layer.post_attention_layernorm),
            q_norm=self._norm(own.q_norm) if self._has_head_norms else None,
            k_norm=self._norm(own.k_norm) if self._has_head_norms else None,
            window=window,
        )

    def _norm(self, module: Any) -> Tensor:
        _require(self._expect(module, "RMSNorm").variance_epsilon == self._eps)
        return _floats(module.weight)

    def _angles(self, module: Any, d: int, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [positions, d / 2], as the model's own module gives them."""
        rotary = self._expect(module, "RotaryEmbedding")
        _require(rotary.rope_type in _ROPE_TYPES and d % 2 == 0 and positions * d * 4 <= _ANGLE_BYTES)
        with torch.inference_mode():
            both = rotary(torch.zeros(1), torch.arange(positions)[None])
        tables = []
        for angles in both:
            _require(angles.shape == (1, positions, d))
            first, second = angles[0].split(d // 2, dim=-1)
            _require(torch.equal(first, second))
            tables.append(first.contiguous())
        return tables[0], tables[1]


def _plain(module: Any) -> bool:
    """Nobody changed what calling the module does."""
    return not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _fused(*siblings: Any) -> QuantizedLinear:
    """The one matmul of siblings that stand in their group's order."""
    _require(all(type(sibling) is SiblingPart and _plain(sibling) for sibling in siblings))
    group = siblings[0].group
    _require(all(sibling.group is group and sibling.index == i for i, sibling in enumerate(siblings)))
    _require(len(group.sizes) == len(siblings))
    return _alone(group.linear)


def _alone(linear: Any) -> QuantizedLinear:
    if type(linear) is not QuantizedLinear or not _plain(linear) or linear.tuned is not None:
        raise _Unknown
    return linear


def _codes(module: QuantizedLinear | QuantizedEmbedding) -> DecoderLinear:
    backend = module.prepare().impl
    if not isinstance(backend, NativeCpu):
        raise _Unknown
    bias = module.bias if isinstance(module, QuantizedLinear) else None
    return DecoderLinear(backend.packed, None if bias is None else _floats(bias))


def _head(module: Any) -> DecoderLinear | None:
    """The head where it is codes; None where it is floats, which torch multiplies."""
    _require(_plain(module))
    if type(module) is TiedHead:
        return _codes(module.embedding)
    if type(module) is QuantizedLinear:
        return _codes(_alone(module))
    _require(type(module) is SteadyLinear)
    return None


def _embedding(module: Any) -> Tensor | QuantizedWeight:
    _require(_plain(module))
    if type(module) is QuantizedEmbedding:
        codes = module.weight_codes()
        _require(codes.qweight.is_contiguous() and module.dtype == torch.float32)
        return QuantizedWeight(
            codes.qweight, _floats(codes.scales), _floats(codes.zeros), codes.bits, codes.in_features
        )
    _require(type(module) is nn.Embedding and module.max_norm is None)
    return _floats(module.weight)


def _floats(tensor: Tensor) -> Tensor:
    _require(tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu")
    return tensor.detach()
