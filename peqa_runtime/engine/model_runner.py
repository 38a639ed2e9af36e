"""Turns a Batch into tensors, runs the model once, and samples. Lists first, tensors once per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from peqa_runtime.core import Batch, StepResult
from peqa_runtime.engine.sampler import Sampler, logit_positions
from peqa_runtime.model.forward_context import ForwardContext
from peqa_runtime.scales.scale_set import ScaleSet


class Rows(Protocol):
    """Which bank row each token of the step uses (the model's `StepRows`)."""

    row: Tensor | None
    group_row: Tensor | None


class Model(Protocol):
    """What the runner needs of a loaded model."""

    @property
    def device(self) -> torch.device:
        """Where inputs go."""

    @property
    def step_rows(self) -> Rows:
        """Read by every quantized linear during the forward."""

    def forward(
        self, context: ForwardContext, input_ids: Tensor, positions: Tensor, logits_at: Tensor
    ) -> Tensor:
        """float32 logits [len(logits_at), vocab] of packed tokens."""


class Bank(Protocol):
    """Where scale sets are written (the ScaleBank)."""

    def write(self, row: int, group_row: int | None, scale_set: ScaleSet) -> None:
        """Copy a set into its row."""


class ModelRunner:
    """Runs one step at a time. `scale_set(revision)` gives a leased set from host memory, never from disk."""

    def __init__(
        self,
        model: Model,
        bank: Bank,
        scale_set: Callable[[str], ScaleSet],
        sampler: Sampler,
        block_size: int,
    ) -> None:
        self._model = model
        self._bank = bank
        self._scale_set = scale_set
        self._sampler = sampler
        self._block_size = block_size

    def run(self, batch: Batch) -> list[StepResult]:
        """Write new rows, compute the batch's tokens, choose the next ones: one result per scheduled sequence."""
        for write in batch.bank_writes:
            self._bank.write(write.row, write.group_row, self._scale_set(write.revision))
        with torch.inference_mode():
            return self._sampler.sample(batch, self._forward(batch))

    def _forward(self, batch: Batch) -> Tensor:
        """One pass of the model: float32 logits [rows, vocab], rows as `logit_positions` lists them."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_starts = [0]
        logits_at: list[int] = []
        block_size = self._block_size
        for item in batch.scheduled:
            sequence, start, stop = item.sequence, item.start, item.start + item.num_tokens
            offset = len(ids) - start
            logits_at += [offset + position for position in logit_positions(item)]
            ids += sequence.token_ids[start:stop]
            positions += range(start, stop)
            table = sequence.block_table
            slots += [table[p // block_size] * block_size + p % block_size for p in range(start, stop)]
            query_starts.append(len(ids))
        width = max(len(item.sequence.block_table) for item in batch.scheduled)
        tables = [(item.sequence.block_table + [0] * width)[:width] for item in batch.scheduled]
        lengths = [item.start + item.num_tokens for item in batch.scheduled]
        self._set_rows(batch)
        context = ForwardContext(
            block_tables=self._ints(tables),
            query_starts=self._ints(query_starts),
            seq_lens=self._ints(lengths),
            slot_mapping=self._longs(slots),
        )
        return self._model.forward(context, self._longs(ids), self._longs(positions), self._longs(logits_at))

    def _set_rows(self, batch: Batch) -> None:
        """Tell the linears each token's row; None where everything is the base, which then reads no bank."""
        rows: list[int] = []
        group_rows: list[int] = []
        for item in batch.scheduled:
            rows += [item.sequence.row] * item.num_tokens
            group_rows += [item.sequence.group_row] * item.num_tokens
        step_rows = self._model.step_rows
        step_rows.row = self._ints(rows) if any(rows) or any(group_rows) else None
        step_rows.group_row = self._ints(group_rows) if any(group_rows) else None

    def _ints(self, numbers: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self._model.device)

    def _longs(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._model.device)
