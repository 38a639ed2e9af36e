"""The Llama family on a GPU without transformers' modules: between two products of a layer stands one launch.

transformers' modules launch some 37 kernels for a layer, most of them for one operation on a row of numbers; here they
are ten. Norms, rotations and gates round where those modules round, so that answers are the same but for the order in
which a norm adds up its row.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peqa_kernels.elementwise import LARGEST_ROW, add_rms_norm, rms_norm, rotate_and_write, silu_mul
from peqa_kernels.elementwise.gpu_check import DecoderSizes, agrees
from peqa_kernels.paged_attention import paged_attention
from peqa_runtime.model.attention import PagedLayer
from peqa_runtime.model.decoder_parts import (
    DecoderParts,
    LayerParts,
    UnknownPart,
    angle_tables,
    read_parts,
    require,
)
from peqa_runtime.model.forward_context import ForwardContext

logger = logging.getLogger(__name__)


class FusedDecoder:
    """A recognised model's step, launched kernel by kernel. Banks and caches are those that its modules hold then."""

    def __init__(self, parts: DecoderParts, cosines: Tensor, sines: Tensor) -> None:
        """`cosines` and `sines`: [positions, d / 2], of every position that a sequence may have."""
        self._parts = parts
        self._cosines = cosines
        self._sines = sines
        self._head_norms = [_head_norms(layer) for layer in parts.layers]

    def forward(
        self, context: ForwardContext, input_ids: Tensor, positions: Tensor, logits_at: Tensor
    ) -> Tensor:
        """As `LoadedModel.forward`."""
        if len(logits_at) == 0:
            return self.forward(context, input_ids, positions, logits_at.new_zeros(1))[:0]
        parts, eps = self._parts, self._parts.eps
        with torch.inference_mode():
            hidden: Tensor = parts.embedding(input_ids)  # [tokens, hidden]
            branch: Tensor | None = None  # what is to be added to it
            for layer, norms in zip(parts.layers, self._head_norms, strict=True):
                if branch is None:
                    normed = rms_norm(hidden, layer.attention_norm, eps)
                else:
                    hidden, normed = add_rms_norm(hidden, branch, layer.attention_norm, eps)
                branch = layer.out(self._attend(layer, norms, layer.qkv(normed), positions, context))
                hidden, normed = add_rms_norm(hidden, branch, layer.mlp_norm, eps)
                branch = layer.down(silu_mul(layer.gate_up(normed)))
            assert branch is not None, "a model has layers"
            normed = add_rms_norm(hidden, branch, parts.norm, eps)[1]
            logits: Tensor = parts.head(normed[logits_at])
            return logits.float()

    def _attend(
        self,
        layer: LayerParts,
        norms: Tensor | None,
        qkv: Tensor,  # [tokens, (heads + 2 kv_heads) * d]
        positions: Tensor,
        context: ForwardContext,
    ) -> Tensor:
        """[tokens, heads * d]."""
        caches = layer.paged.key_cache, layer.paged.value_cache
        assert caches[0] is not None, "the engine binds the caches before the first step"
        assert caches[1] is not None
        q = rotate_and_write(
            qkv,
            self._cosines,
            self._sines,
            positions,
            caches[0],
            caches[1],
            context.slot_mapping,
            norms,
            self._parts.eps,
        )
        out = paged_attention(
            q,
            caches[0],
            caches[1],
            context.block_tables,
            context.query_starts,
            context.seq_lens,
            scaling=self._parts.scaling,
            sliding_window=layer.window,
            plan=context.plan,
        )
        return out.view(len(out), -1)


def fused_decoder(
    model: PreTrainedModel, layers: list[PagedLayer], max_positions: int
) -> FusedDecoder | None:
    """The fused decoder of a fused, paged and prepared model, or None where it is not one that it knows.

    `layers`: the model's paged layers; `max_positions`: tokens that one sequence may have. None, and a warning, where
    the device computes something else than torch does.
    """
    try:
        parts = read_parts(model, layers)
        dtype, device = parts.norm.dtype, parts.norm.device
        _require_fitting(parts, dtype)
        tables = angle_tables(parts, max_positions, device, dtype)
    except UnknownPart:
        return None
    first = parts.layers[0]
    sizes = DecoderSizes(
        hidden=len(parts.norm),
        intermediate=first.down.in_features,
        heads=parts.heads,
        kv_heads=parts.kv_heads,
        d=parts.d,
        head_norms=first.q_norm is not None,
    )
    if not agrees(sizes, dtype, device):
        logger.warning(
            "the fused kernels compute wrongly on this GPU with this version of Triton: norms, rotations and gates run "
            "as transformers' modules, in more launches"
        )
        return None
    return FusedDecoder(parts, *tables)


def _require_fitting(parts: DecoderParts, dtype: torch.dtype) -> None:
    """Norms in the dtype of activations, rows that one program can hold."""
    for layer in parts.layers:
        for weight in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm, parts.norm):
            require(weight is None or (weight.dtype == dtype and weight.is_contiguous()))
    require(len(parts.norm) <= LARGEST_ROW)


def _head_norms(layer: LayerParts) -> Tensor | None:
    """[2, d], for queries and keys."""
    if layer.q_norm is None or layer.k_norm is None:
        return None
    return torch.stack([layer.q_norm, layer.k_norm])
