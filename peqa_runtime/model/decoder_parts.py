"""Is a loaded model a decoder whose every step is known here? Told by exact classes, parts and settings.

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


class UnknownPart(Exception):
    """The model has something that is not known here."""


@dataclass(frozen=True)
class LayerParts:
    """One layer: norm, q/k/v fused, attention, out, norm, gate/up fused, silu(gate) * up, down; both halves added."""

    qkv: QuantizedLinear  # [(heads + 2 kv_heads) * d, hidden]
    out: QuantizedLinear
    gate_up: QuantizedLinear  # [2 intermediate, hidden]
    down: QuantizedLinear
    attention_norm: Tensor  # [hidden]
    mlp_norm: Tensor  # [hidden]
    q_norm: Tensor | None  # [d], of each query head before it is turned
    k_norm: Tensor | None
    paged: PagedLayer
    window: int | None  # positions that a query sees, its own included; None = all

    @property
    def linears(self) -> list[QuantizedLinear]:
        """Its matmuls, in order."""
        return [self.qkv, self.out, self.gate_up, self.down]


@dataclass(frozen=True)
class DecoderParts:
    """A recognised model: its own modules, and the weights of its norms."""

    layers: tuple[LayerParts, ...]
    embedding: QuantizedEmbedding | nn.Embedding
    norm: Tensor  # [hidden]
    head: TiedHead | QuantizedLinear | SteadyLinear
    rotary: nn.Module
    heads: int
    kv_heads: int
    d: int
    eps: float
    scaling: float


def read_parts(model: PreTrainedModel, layers: list[PagedLayer]) -> DecoderParts:
    """The parts of a fused, paged and prepared model; `layers`: its paged layers. UnknownPart for any other."""
    return _Reader(model).read(layers)


def require(fact: bool) -> None:
    """Raise UnknownPart where it does not hold."""
    if not fact:
        raise UnknownPart


def angle_tables(
    parts: DecoderParts, positions: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [positions, d / 2] in `dtype`, as the model's own module gives them to its layers."""
    d = parts.d
    require(d % 2 == 0 and positions * d * 4 <= _ANGLE_BYTES)
    with torch.inference_mode():
        both = parts.rotary(
            torch.zeros(1, dtype=dtype, device=device), torch.arange(positions, device=device)[None]
        )
    tables = []
    for angles in both:
        require(angles.shape == (1, positions, d))
        first, second = angles[0].split(d // 2, dim=-1)
        require(torch.equal(first, second))
        tables.append(first.contiguous())
    return tables[0], tables[1]


class _Reader:
    """Reads the parts of a model of one family."""

    def __init__(self, model: Any) -> None:
        family = model.config.model_type
        self._source = f"transformers.models.{family}.modeling_{family}"
        self._prefix = _FAMILIES.get(family, "")
        require(
            type(model).__module__ == self._source and type(model).__name__ == f"{self._prefix}ForCausalLM"
        )
        self._model = model
        self._eps = model.config.rms_norm_eps

    def read(self, layers: list[PagedLayer]) -> DecoderParts:
        """The whole model."""
        model = self._expect(self._model, "ForCausalLM", "model", "lm_head")
        inner = self._expect(model.model, "Model", "embed_tokens", "layers", "norm", "rotary_emb")
        require(len(inner.layers) == model.config.num_hidden_layers == len(layers) > 0)
        found = [self._layer(module, paged) for module, paged in zip(inner.layers, layers, strict=True)]
        attention, first = inner.layers[0].self_attn, found[0]
        d, kv_heads = attention.head_dim, attention.k_proj.out_features // attention.head_dim
        heads = first.out.in_features // d
        for module, layer in zip(inner.layers, found, strict=True):
            own = module.self_attn
            require((own.head_dim, own.scaling) == (d, attention.scaling))
            require(layer.paged.spec == KVSpec(kv_heads, d, d, layer.window))
            require(layer.qkv.sizes == (heads * d, kv_heads * d, kv_heads * d))
            require(layer.out.in_features == heads * d)
            require(layer.gate_up.sizes == (layer.down.in_features,) * 2 == (first.down.in_features,) * 2)
        rotary = self._expect(inner.rotary_emb, "RotaryEmbedding")
        require(rotary.rope_type in _ROPE_TYPES)
        return DecoderParts(
            layers=tuple(found),
            embedding=_embedding(inner.embed_tokens),
            norm=self._norm(inner.norm),
            head=_head(model.lm_head),
            rotary=rotary,
            heads=heads,
            kv_heads=kv_heads,
            d=d,
            eps=self._eps,
            scaling=attention.scaling,
        )

    def _expect(self, module: Any, part: str, *children: str) -> Any:
        """The module is plainly of the family's class, with these children and no others."""
        require(type(module) is getattr(sys.modules[self._source], f"{self._prefix}{part}", None))
        require(_plain(module) and {name for name, _ in module.named_children()} == set(children))
        return module

    def _layer(self, layer: Any, paged: PagedLayer) -> LayerParts:
        self._expect(layer, "DecoderLayer", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        has_head_norms = self._prefix == "Qwen3"
        norms = ("q_norm", "k_norm") if has_head_norms else ()
        own = self._expect(layer.self_attn, "Attention", "q_proj", "k_proj", "v_proj", "o_proj", *norms)
        require(layer_of(own) is paged)
        mlp = self._expect(layer.mlp, "MLP", "gate_proj", "up_proj", "down_proj", "act_fn")
        require(type(mlp.act_fn).__name__ in ("SiLUActivation", "SiLU") and _plain(mlp.act_fn))
        return LayerParts(
            qkv=_fused(own.q_proj, own.k_proj, own.v_proj),
            out=_alone(own.o_proj),
            gate_up=_fused(mlp.gate_proj, mlp.up_proj),
            down=_alone(mlp.down_proj),
            attention_norm=self._norm(layer.input_layernorm),
            mlp_norm=self._norm(layer.post_attention_layernorm),
            q_norm=self._norm(own.q_norm) if has_head_norms else None,
            k_norm=self._norm(own.k_norm) if has_head_norms else None,
            paged=paged,
            window=paged.spec.sliding_window if paged.spec else None,
        )

    def _norm(self, module: Any) -> Tensor:
        require(self._expect(module, "RMSNorm").variance_epsilon == self._eps)
        weight: Tensor = module.weight.detach()
        return weight


def _plain(module: Any) -> bool:
    """Nobody changed what calling the module does."""
    return not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _fused(*siblings: Any) -> QuantizedLinear:
    """The one matmul of siblings that stand in their group's order."""
    require(all(type(sibling) is SiblingPart and _plain(sibling) for sibling in siblings))
    group = siblings[0].group
    require(all(sibling.group is group and sibling.index == i for i, sibling in enumerate(siblings)))
    require(len(group.sizes) == len(siblings))
    return _alone(group.linear)


def _alone(linear: Any) -> QuantizedLinear:
    if type(linear) is not QuantizedLinear or not _plain(linear) or linear.tuned is not None:
        raise UnknownPart
    return linear


def _head(module: Any) -> TiedHead | QuantizedLinear | SteadyLinear:
    require(_plain(module))
    if type(module) is QuantizedLinear:
        return _alone(module)
    if type(module) is TiedHead or type(module) is SteadyLinear:
        return module
    raise UnknownPart


def _embedding(module: Any) -> QuantizedEmbedding | nn.Embedding:
    require(_plain(module))
    if type(module) is QuantizedEmbedding or (type(module) is nn.Embedding and module.max_norm is None):
        return module
    raise UnknownPart
