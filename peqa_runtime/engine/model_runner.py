"""Turns a Batch into tensors, runs the model once, and samples. Lists first, tensors once per step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peqa_kernels.paged_attention import AttentionPlan
from peqa_runtime.engine.batch import Batch, StepResult
from peqa_runtime.engine.decode_graphs import DecodeGraphs
from peqa_runtime.engine.logit_rows import logit_positions
from peqa_runtime.engine.sampler import Sampler
from peqa_runtime.engine.step_inputs import Model, StepInputs
from peqa_runtime.model.forward_context import ForwardContext
from peqa_runtime.scales.scale_set import ScaleSet


class Bank(Protocol):
    """Where scale sets are written (the ScaleBank)."""

    def write(self, row: int, group_row: int | None, scale_set: ScaleSet) -> None:
        """Copy a set into its row."""


class ModelRunner:
    """Runs one step at a time. `scale_set(revision)` gives a leased set from host memory, never from disk.

    `graphs`: what computes decode steps where the device has graphs; None: every step runs eagerly.
    """

    def __init__(
        self,
        model: Model,
        bank: Bank,
        scale_set: Callable[[str], ScaleSet],
        sampler: Sampler,
        block_size: int,
        *,
        row_invariant: bool = False,
    ) -> None:
        self._model = model
        self._row_invariant = row_invariant
        self._bank = bank
        self._scale_set = scale_set
        self.sampler = sampler
        self.graphs: DecodeGraphs | None = None
        self._block_size = block_size

    def run(self, batch: Batch) -> list[StepResult]:
        """Write new rows, compute the batch's tokens, choose the next ones: one result per scheduled sequence."""
        self.write_rows(batch)
        with torch.inference_mode():
            return self.sampler.sample(batch, self.prepare(batch)())

    def prepare(self, batch: Batch) -> Callable[[], Tensor]:
        """Build the batch's inputs, and return what computes it, once, before another is prepared.

        That gives float32 [rows, vocab], rows as `logit_positions` lists them, valid until the next call.
        """
        compute = None if self.graphs is None else self.graphs.prepare(batch)
        return partial(self.forward, self.inputs(batch)) if compute is None else compute

    def write_rows(self, batch: Batch) -> None:
        """Copy the scale sets that the step is the first to use into their rows."""
        for write in batch.bank_writes:
            self._bank.write(write.row, write.group_row, self._scale_set(write.revision))

    def inputs(self, batch: Batch) -> StepInputs:
        """The step's tensors, on the model's device."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_starts = [0]
        lengths: list[int] = []
        logits_at: list[int] = []
        rows: list[int] = []
        group_rows: list[int] = []
        block_size = self._block_size
        for item in batch.scheduled:
            sequence, start, count = item.sequence, item.start, item.num_tokens
            stop, table = start + count, sequence.block_table
            if wanted := logit_positions(item):
                offset = len(ids) - start
                logits_at += range(offset + wanted.start, offset + wanted.stop)
            if count == 1:
                ids.append(sequence.token_ids[start])
                positions.append(start)
                slots.append(table[start // block_size] * block_size + start % block_size)
                rows.append(sequence.row)
                group_rows.append(sequence.group_row)
            else:
                ids += sequence.token_ids[start:stop]
                positions += range(start, stop)
                slots += _slots(table, start, stop, block_size)
                rows += [sequence.row] * count
                group_rows += [sequence.group_row] * count
            query_starts.append(len(ids))
            lengths.append(stop)
        # All base: no row at all, which then reads no bank.
        has_group = any(group_rows)
        return StepInputs(
            context=ForwardContext(
                block_tables=self._ints(_padded([item.sequence.block_table for item in batch.scheduled])),
                query_starts=self._ints(query_starts),
                seq_lens=self._ints(lengths),
                slot_mapping=self._longs(slots),
                plan=AttentionPlan(
                    max(item.num_tokens for item in batch.scheduled), max(lengths), self._row_invariant
                ),
            ),
            ids=self._longs(ids),
            positions=self._longs(positions),
            logits_at=self._longs(logits_at),
            row=self._ints(rows) if has_group or any(rows) else None,
            group_row=self._ints(group_rows) if has_group else None,
        )

    def forward(self, inputs: StepInputs) -> Tensor:
        """One pass of the model: float32 logits [rows, vocab], rows as `logit_positions` lists them."""
        step_rows = self._model.step_rows
        step_rows.row, step_rows.group_row = inputs.row, inputs.group_row
        return self._model.forward(inputs.context, inputs.ids, inputs.positions, inputs.logits_at)

    def _ints(self, numbers: list[int] | list[list[int]]) -> Tensor:
        return self._tensor(np.array(numbers, dtype=np.int32))

    def _longs(self, numbers: list[int]) -> Tensor:
        return self._tensor(np.array(numbers, dtype=np.int64))

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        """Numpy reads lists of numbers in a quarter of torch's time."""
        tensor = torch.from_numpy(array)
        return tensor if self._model.device.type == "cpu" else tensor.to(self._model.device)


def _slots(table: list[int], start: int, stop: int, block_size: int) -> list[int]:
    """Slots of the positions start..stop, a block at a time."""
    slots: list[int] = []
    while start < stop:
        end = min(stop, start - start % block_size + block_size)
        first = table[start // block_size] * block_size + start % block_size
        slots += range(first, first + end - start)
        start = end
    return slots


def _padded(tables: list[list[int]]) -> list[list[int]]:
    """The tables in one length; what fills them up is never read."""
    width = max(map(len, tables))
    return [table if len(table) == width else table + [0] * (width - len(table)) for table in tables]
