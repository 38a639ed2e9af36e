"""Paged attention inside transformers' models, through its attention registry, and the check that a model uses it.

Importing this registers the attention "peqa_paged". All sequences of a step come packed into one row of tokens; where
each token belongs stands in the step's `ForwardContext`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from peqa_kernels.paged_attention import paged_attention, write_kv
from peqa_runtime.errors import UnsupportedModel
from peqa_runtime.model.forward_context import ForwardContext

ATTENTION = "peqa_paged"
_HANDLE = "peqa_layer"
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class KVSpec:
    """What one layer keeps per token: key [kv_heads, d_k] and value [kv_heads, d_v]."""

    kv_heads: int
    d_k: int
    d_v: int
    sliding_window: int | None = None


@dataclass(frozen=True)
class AttentionUse:
    """How one layer calls the op, beside what it caches."""

    heads: int
    scaling: float
    softcap: float | None
    has_sinks: bool


@dataclass
class StepContext:
    """The context of the forward in progress; one per loaded model, shared by its layers."""

    current: ForwardContext | None = None


class PagedLayer:
    """One attention layer's place in the KV cache. The engine binds the tensors once, before the first forward."""

    def __init__(self, step: StepContext) -> None:
        self.step = step
        self.calls = 0
        self.spec: KVSpec | None = None
        self.use: AttentionUse | None = None
        self.key_cache: Tensor | None = None  # [blocks, block_size, kv_heads, d_k]
        self.value_cache: Tensor | None = None  # [blocks, block_size, kv_heads, d_v]

    def bind(self, key_cache: Tensor | None, value_cache: Tensor | None) -> None:
        """Use these caches from now on; None frees them."""
        self.key_cache, self.value_cache = key_cache, value_cache


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,  # [1, heads, tokens, d_k]
    key: Tensor,  # [1, kv_heads, tokens, d_k]
    value: Tensor,  # [1, kv_heads, tokens, d_v]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write the new tokens' K and V, attend over each sequence's whole past; ([1, tokens, heads, d_v], None)."""
    layer: PagedLayer = getattr(module, _HANDLE)
    layer.calls += 1
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if layer.key_cache is None or layer.value_cache is None:  # the probe of `place_layers`: shapes only
        layer.spec = KVSpec(key.shape[1], key.shape[3], value.shape[3], sliding_window)
        layer.use = AttentionUse(query.shape[1], scaling, softcap, s_aux is not None)
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    context = layer.step.current
    assert context is not None, "LoadedModel.forward sets the step's context"
    write_kv(
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layer.key_cache,
        layer.value_cache,
        context.slot_mapping,
    )
    out = paged_attention(
        query[0].transpose(0, 1),
        layer.key_cache,
        layer.value_cache,
        context.block_tables,
        context.query_starts,
        context.seq_lens,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        plan=context.plan,
    )
    return out[None], None


AttentionInterface.register(ATTENTION, paged_attention_forward)


def layer_of(attention: nn.Module) -> PagedLayer | None:
    """The paged layer that `place_layers` gave to an attention module."""
    layer: PagedLayer | None = getattr(attention, _HANDLE, None)
    return layer


def place_layers(model: PreTrainedModel, step: StepContext) -> list[PagedLayer]:
    """Switch a model to paged attention and find its layers, in order, with the shapes of what they cache.

    The shapes come from a forward of two tokens, not from the config: head counts and widths have many spellings there.
    Raises `UnsupportedModel` for a model that keeps state elsewhere or does not go through the attention registry.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        raise UnsupportedModel(
            f"{name} has layers of type {', '.join(sorted(others))}; only attention is paged"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(f"{name} does not take its attention from transformers' attention registry")
    layers: list[PagedLayer] = []
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            layers.append(PagedLayer(step))
            setattr(module, _HANDLE, layers[-1])
    model.set_attn_implementation(ATTENTION)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        model(input_ids=ids, position_ids=torch.arange(2, device=model.device)[None], use_cache=False)
    called = [layer for layer in layers if layer.calls]
    if not called or any(layer.calls != 1 for layer in called):
        raise UnsupportedModel(
            f"{name} calls the registered attention of its layers {[layer.calls for layer in called]} times instead of "
            "once each"
        )
    return called


def warm_up_attention(layers: Sequence[PagedLayer], dtype: torch.dtype, *, row_invariant: bool) -> None:
    """On a GPU: compile the attention kernels of bound layers, once for each kind of layer; `dtype` of activations."""
    from peqa_kernels.paged_attention.gpu import warm_up

    kinds = {(layer.spec, layer.use): layer for layer in layers}
    for (spec, use), layer in kinds.items():
        assert spec is not None, "place_layers saw every layer"
        assert use is not None
        assert layer.key_cache is not None, "bound before"
        assert layer.value_cache is not None
        warm_up(
            layer.key_cache,
            layer.value_cache,
            heads=use.heads,
            dtype=dtype,
            scaling=use.scaling,
            sliding_window=spec.sliding_window,
            softcap=use.softcap,
            sinks=torch.zeros(use.heads, dtype=dtype, device=layer.key_cache.device)
            if use.has_sinks
            else None,
            invariant=row_invariant,
        )
