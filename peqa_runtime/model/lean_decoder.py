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
        self._linears = linears
        self._layers = layers
        self._head = head
        self._seen_banks: tuple[Tensor | None, ...] = ()
        self._seen_caches: tuple[Tensor | None, ...] = ()

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

    # Caches and banks are bound, and grow, for all layers together, so the last one tells whether they are others. To
    # look at every one of a hundred takes 0.2 ms of a step: the weights have pushed them out of the processor's caches.

    def _follow_caches(self) -> None:
        last = self._layers[-1]
        now = (last.key_cache, last.value_cache)
        if _same(now, self._seen_caches):
            return
        for i, layer in enumerate(self._layers):
            assert layer.key_cache is not None, "the engine binds the caches before the first step"
            assert layer.value_cache is not None
            self.native.bind_caches(i, layer.key_cache, layer.value_cache)
        self._seen_caches = now

    def _follow_banks(self) -> None:
        """The tensors of a bank come late: input and group scales with the first set that needs them."""
        bank = self._linears[-1][-1].bank
        now = () if bank is None else (bank.out_scale, bank.in_scale, bank.group_scale)
        if _same(now, self._seen_banks):
            return
        for i, linears in enumerate(self._linears):
            for j, module in enumerate(linears):
                if module.bank is not None:
                    self.native.bind_bank(i, j, module.bank)
        self._seen_banks = now


def _same(now: tuple[Tensor | None, ...], seen: tuple[Tensor | None, ...]) -> bool:
    return len(now) == len(seen) and all(a is b for a, b in zip(now, seen, strict=True))


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
