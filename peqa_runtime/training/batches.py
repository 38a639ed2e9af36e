"""Batches: which examples a step takes, and their tokens padded or packed into rows.

Packed rows hold several examples one after the other. Each example's positions begin at 0 again, from which
transformers makes block-diagonal attention: no example sees another (`packing_is_exact` tries it on the model).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from peqa_runtime.training.data import Example


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded rows. Causal attention needs no mask: no real token looks at the padding behind it.

    `positions` index the flattened `[rows * tokens]` places whose next token is in the loss.
    """

    input_ids: Tensor  # int64 [rows, tokens]
    positions: Tensor  # int64 [loss tokens]
    targets: Tensor  # int64 [loss tokens]
    owners: Tensor  # int64 [loss tokens], which of the examples each belongs to
    position_ids: Tensor | None = None  # int64 [rows, tokens], of packed rows

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on `device`."""
        at = None if self.position_ids is None else self.position_ids.to(device)
        return TokenBatch(
            self.input_ids.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.owners.to(device),
            at,
        )


class BatchPlan(Sequence[tuple[int, ...]]):
    """Which examples each of `steps` batches holds: every epoch shuffled anew, like lengths together.

    Examples are shuffled, sorted by length within pools of 32 batches (so that little is padding), cut into batches of
    `rows`, and the batches shuffled. The plan depends on the arguments only, so a resumed run goes on with it.

    One epoch is in memory at a time, so a long run begins at once. Steps are taken in order: one of an earlier epoch
    makes all of them anew.
    """

    def __init__(self, lengths: Sequence[int], *, rows: int, steps: int, seed: int) -> None:
        assert rows > 0
        assert lengths
        self._lengths, self._rows, self._steps, self._seed = lengths, rows, steps, seed
        self._per_epoch = math.ceil(len(lengths) / rows)
        self._begin()

    def _begin(self) -> None:
        self._rng = random.Random(f"batches {self._seed}")
        self._epoch, self._batches = 0, _plan_epoch(self._lengths, self._rows, self._rng)

    def __len__(self) -> int:
        return self._steps

    @overload
    def __getitem__(self, step: int) -> tuple[int, ...]: ...

    @overload
    def __getitem__(self, step: slice) -> list[tuple[int, ...]]: ...

    def __getitem__(self, step: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(self._steps))]
        if not 0 <= step < self._steps:
            raise IndexError(step)
        epoch, place = divmod(step, self._per_epoch)
        if epoch < self._epoch:
            self._begin()
        while self._epoch < epoch:
            self._epoch, self._batches = self._epoch + 1, _plan_epoch(self._lengths, self._rows, self._rng)
        return self._batches[place]


def plan_batches(lengths: Sequence[int], *, rows: int, steps: int, seed: int) -> list[tuple[int, ...]]:
    """All of a `BatchPlan` at once."""
    return list(BatchPlan(lengths, rows=rows, steps=steps, seed=seed))


def _plan_epoch(lengths: Sequence[int], rows: int, rng: random.Random) -> list[tuple[int, ...]]:
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[tuple[int, ...]] = []
    pool = rows * 32
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lengths.__getitem__)
        batches += [tuple(part[i : i + rows]) for i in range(0, len(part), rows)]
    rng.shuffle(batches)
    return batches


def pack_rows(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which examples share a row of at most `width` tokens (a longer example has one of its own).

    The longest first, each into the first row that it fits in.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, room in enumerate(free) if room >= lengths[i]), None)
        if row is None:
            rows.append([])
            free.append(max(width, lengths[i]))
            row = len(rows) - 1
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows


def collate(
    examples: Sequence[Example], pad_token_id: int, *, pack: int = 0, width: int | None = None
) -> TokenBatch:
    """One batch of all examples; the last token of each is only ever a target.

    `pack`: tokens of a row that several examples share; 0 = a row each. `width`: pad rows to so many tokens.
    """
    lengths = [len(example.token_ids) - 1 for example in examples]
    rows = pack_rows(lengths, pack) if pack else [[i] for i in range(len(examples))]
    widest = max(sum(lengths[i] for i in row) for row in rows)
    width = widest if width is None else width
    assert width >= widest, (width, widest)
    input_ids = torch.full((len(rows), width), pad_token_id)
    position_ids = torch.zeros_like(input_ids)
    positions: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            ids, first, count = examples[i].token_ids, examples[i].loss_from, lengths[i]
            input_ids[r, at : at + count] = torch.tensor(ids[:-1])
            position_ids[r, at : at + count] = torch.arange(count)
            positions += range(r * width + at + first - 1, r * width + at + count)
            targets += ids[first:]
            owners += [i] * (len(ids) - first)
            at += count
    return TokenBatch(
        input_ids,
        torch.tensor(positions),
        torch.tensor(targets),
        torch.tensor(owners),
        position_ids if pack else None,
    )


class StepBatches(torch.utils.data.Dataset):
    """The batches of a run, in order: of each task `rows` rows a step, cut into `shares` (processes times parts).

    Item i is share `i % shares` of step `i // shares`, so resuming means going on at another index. Rows of one task
    are adjacent. A loss token weighs 1 / (its task's loss tokens in the whole step), so the sum over all shares is the
    sum of the tasks' mean losses: every task's gradient is the one that it has when it is tuned alone.
    """

    def __init__(
        self,
        tasks: Sequence[Sequence[Example]],
        plans: Sequence[Sequence[tuple[int, ...]]],
        pad_token_id: int,
        *,
        shares: int = 1,
        pack: int = 0,
    ) -> None:
        self.tasks, self.plans, self.pad_token_id = tasks, plans, pad_token_id
        self.shares, self.pack = shares, pack

    def __len__(self) -> int:
        return len(self.plans[0]) * self.shares

    def num_tokens(self, steps: int) -> int:
        """Tokens of the examples of the first `steps` steps, padding left out."""
        return sum(
            len(examples[i].token_ids) - 1
            for examples, plan in zip(self.tasks, self.plans, strict=True)
            for step in range(steps)
            for i in plan[step]
        )

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        """Tensors of one share: `input_ids`, `positions`, `targets`, `weights` [loss tokens], `parts` [tasks, 2]."""
        step, share = divmod(item, self.shares)
        batches: list[TokenBatch] = []
        weights: list[Tensor] = []
        for examples, plan in zip(self.tasks, self.plans, strict=True):
            wanted = [examples[i] for i in plan[step]]
            total = sum(len(e.token_ids) - e.loss_from for e in wanted)
            own = wanted[share :: self.shares]
            batches.append(collate(own or wanted[:1], self.pad_token_id, pack=self.pack))
            # A share that no row is left for computes one at weight 0: all processes take part in every step.
            weights.append(torch.full((len(batches[-1].targets),), 1 / total if own else 0.0))
        return _joined(batches, weights, self.pad_token_id)


def _joined(batches: Sequence[TokenBatch], weights: Sequence[Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """One batch of several tasks' rows, all as wide as the widest."""
    width = max(batch.input_ids.shape[1] for batch in batches)
    input_ids: list[Tensor] = []
    position_ids: list[Tensor] = []
    positions: list[Tensor] = []
    parts: list[tuple[int, int]] = []
    first = 0
    for task, batch in enumerate(batches):
        rows, tokens = batch.input_ids.shape
        pad = (0, width - tokens)
        input_ids.append(torch.nn.functional.pad(batch.input_ids, pad, value=pad_token_id))
        if batch.position_ids is not None:
            position_ids.append(torch.nn.functional.pad(batch.position_ids, pad))
        positions.append((first + batch.positions // tokens) * width + batch.positions % tokens)
        parts.append((task, rows * width))
        first += rows
    joined = {
        "input_ids": torch.cat(input_ids),
        "positions": torch.cat(positions),
        "targets": torch.cat([batch.targets for batch in batches]),
        "weights": torch.cat(list(weights)),
        "parts": torch.tensor(parts),
    }
    if position_ids:
        joined["position_ids"] = torch.cat(position_ids)
    return joined


def held_out_batches(
    examples: Sequence[Example], *, rows: int, pad_token_id: int, pack: int = 0
) -> list[TokenBatch]:
    """Batches of like lengths that cover `examples` once."""
    ordered = sorted(examples, key=lambda e: len(e.token_ids))
    return [collate(ordered[i : i + rows], pad_token_id, pack=pack) for i in range(0, len(ordered), rows)]
