"""The inputs of captured decode steps: tensors that never move, filled anew before each step by one transfer.

A graph reads its inputs where they lay when it was captured. So all that a decode step has to say is written into one
buffer in host memory, in sections, and goes to one buffer of the same shape on the device, of which the graphs' inputs
are views. Rows that no sequence fills are padding: some token under the base, at the first position of a block that
belongs to no request. It writes no key or value (slot -1), and rows do not see each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from peqa_kernels.paged_attention import AttentionPlan
from peqa_runtime.engine.batch import ScheduledSequence
from peqa_runtime.engine.step_inputs import StepInputs
from peqa_runtime.model.forward_context import ForwardContext

_ALIGNED = 4  # words: kernels are compiled for addresses that are multiples of 16 bytes
_LONG = 2  # words of an int64


class StaticInputs:
    """Inputs of decode steps of up to `sequences` sequences with up to `reach` tokens each."""

    def __init__(
        self,
        sequences: int,
        reach: int,
        *,
        block_size: int,
        scratch_block: int,
        vocab_size: int,
        device: torch.device,
        row_invariant: bool,
    ) -> None:
        """`scratch_block`: one that no request gets; what it holds does not matter."""
        self._block_size = block_size
        self._scratch_block = scratch_block
        self._plan = AttentionPlan(1, reach, row_invariant)
        self._width = -(-reach // block_size)
        sizes = [_LONG * sequences] * 3 + [sequences] * 3
        starts = [0, *itertools.accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]
        self._head = starts[-1]
        total = self._head + sequences * self._width
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        numbers = self._host.numpy()
        self._ids, self._positions, self._slots = (
            numbers[start : start + _LONG * sequences].view(np.int64) for start in starts[:3]
        )
        self._lengths, self._rows, self._group_rows = (
            numbers[start : start + sequences] for start in starts[3:6]
        )
        self._tables = numbers[self._head :].reshape(sequences, self._width)
        self._known_tables: list[list[int]] = [[] for _ in range(sequences)]  # what `_tables` holds
        # From all over the vocabulary: a graph is tried on them, and token 0 not seldom has zeros for embedding.
        self._padding_ids = (2 * np.arange(sequences) + 1) * vocab_size // (2 * sequences)
        self._starts = starts
        self._query_starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        self._logits_at = torch.arange(sequences, dtype=torch.int64, device=device)

    def of(self, size: int, *, grouped: bool) -> StepInputs:
        """The tensors of a step of `size` sequences, at the same addresses in every call."""

        def longs(section: int) -> Tensor:
            start = self._starts[section]
            return self._device[start : start + _LONG * size].view(torch.int64)

        def ints(section: int) -> Tensor:
            return self._device[self._starts[section] : self._starts[section] + size]

        tables = self._device[self._head : self._head + size * self._width]
        return StepInputs(
            context=ForwardContext(
                block_tables=tables.view(size, self._width),
                query_starts=self._query_starts[: size + 1],
                seq_lens=ints(3),
                slot_mapping=longs(2),
                plan=self._plan,
            ),
            ids=longs(0),
            positions=longs(1),
            logits_at=self._logits_at[:size],
            row=ints(4),
            group_row=ints(5) if grouped else None,
        )

    def fill(self, items: Items[ScheduledSequence], size: int) -> None:
        """Write a decode step into the first `size` rows: one new token of each sequence, and padding."""
        count, block_size = len(items), self._block_size
        at = [item.start for item in items]
        tables = [item.sequence.block_table for item in items]
        self._ids[:count] = [item.sequence.token_ids[start] for item, start in zip(items, at, strict=True)]
        self._positions[:count] = at
        self._slots[:count] = [
            table[start // block_size] * block_size + start % block_size
            for table, start in zip(tables, at, strict=True)
        ]
        self._lengths[:count] = self._positions[:count] + 1
        self._rows[:count] = [item.sequence.row for item in items]
        self._group_rows[:count] = [item.sequence.group_row for item in items]
        rest = slice(count, size)
        self._ids[rest] = self._padding_ids[rest]
        self._positions[rest] = self._rows[rest] = self._group_rows[rest] = 0
        self._slots[rest], self._lengths[rest] = -1, 1
        padding = [self._scratch_block]
        for row, table in enumerate(itertools.chain(tables, itertools.repeat(padding, size - count))):
            if self._known_tables[row] != table:  # comparing costs a hundredth of converting
                self._tables[row, : len(table)] = table
                self._known_tables[row] = table.copy()
        used = self._head + size * self._width
        # Waits for the transfer: the next step may begin to write while a copy from pinned memory is still under way.
        self._device[:used].copy_(self._host[:used])
