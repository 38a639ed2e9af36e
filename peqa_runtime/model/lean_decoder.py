"""The Llama family on the CPU without transformers' modules: a step is one call into the C library."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peqa_kernels import native
from peqa_kernels.native.decoder import NativeDecoder
from peqa_runtime.model.attention import PagedLayer
from peqa_runtime.model.forward_context import ForwardContext
from peqa_runtime.model.lean_recognition import recognise
from peqa_runtime.model.quantized_linear import QuantizedLinear, StepRows


class LeanDecoder:
    """A recognised model's step. Banks and caches are those that its modules hold at that moment."""

    def __init__(
        self,
        native_decoder: NativeDecoder,
        linears: list[list[QuantizedLinear]],
        layers: list[PagedLayer],
        head: nn.Module | None,
    ) -> None:
        """`linears`: of each layer, qkv, out, gate_up and down. `head`: applied to what the native decoder gives."""
        self.native = native_decoder
        self._linears = [(i, j, module) for i, row in enumerate(linears) for j, module in enumerate(row)]
        self._layers = layers
        self._head = head
        self._seen_banks: list[tuple[Tensor | None, ...]] = [() for _ in self._linears]
        self._seen_caches: list[tuple[Tensor | None, ...]] = [() for _ in layers]

    def forward(
        self, context: ForwardContext, input_ids: Tensor, positions: Tensor, logits_at: Tensor, rows: StepRows
    ) -> Tensor:
        """As `LoadedModel.forward`; `logits_at` may be empty."""
        self._follow_caches()
        if rows.row is not None or rows.group_row is not None:
            self._follow_banks()
        result = self.native.run(
            input_ids,
            positions,
            context.slot_mapping,
            logits_at,
            context.block_tables,
            context.query_starts,
            context.seq_lens,
            rows.row,
            rows.group_row,
        )
        if self._head is None:
            return result
        with torch.inference_mode():
            logits: Tensor = self._head(result)
            return logits

    def _follow_caches(self) -> None:
        for i, layer in enumerate(self._layers):
            caches = (layer.key_cache, layer.value_cache)
            seen = self._seen_caches[i]
            if not seen or seen[0] is not caches[0] or seen[1] is not caches[1]:
                assert caches[0] is not None, "the engine binds the caches before the first step"
                assert caches[1] is not None
                self.native.bind_caches(i, caches[0], caches[1])
                self._seen_caches[i] = caches

    def _follow_banks(self) -> None:
        """The tensors of a bank come late: input and group scales with the first set that needs them."""
        for i, (layer, number, module) in enumerate(self._linears):
            bank = module.bank
            if bank is None:
                continue
            seen = self._seen_banks[i]
            if (
                not seen
                or seen[0] is not bank.out_scale
                or seen[1] is not bank.in_scale
                or seen[2] is not bank.group_scale
            ):
                self.native.bind_bank(layer, number, bank)
                self._seen_banks[i] = (bank.out_scale, bank.in_scale, bank.group_scale)


def lean_decoder(model: PreTrainedModel, layers: list[PagedLayer], max_positions: int) -> LeanDecoder | None:
    """The lean decoder of a fused, paged and prepared model on the CPU, or None where it is not one that it knows.

    `layers`: the model's paged layers; `max_positions`: tokens that one sequence may have.
    """
    ops = native.load()
    if ops is None or model.device.type != "cpu" or model.dtype != torch.float32:
        return None
    found = recognise(model, layers, max_positions)
    if found is None:
        return None
    return LeanDecoder(NativeDecoder(ops, found.spec), found.linears, layers, found.head)
