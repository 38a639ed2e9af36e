"""Before an uploaded set becomes a task's: does the model compute finite numbers with it?

A short prompt goes through the model in a batch of its own, in the engine's thread between two steps, so what runs
waits for one small step at most. Nothing of it can be seen: its K/V lie in a block that is nobody's, and its bank
row is borrowed. It is a free one, or one that no running request uses, or else one whose content is put back before
the next step. No request, prefix or metric hears of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from peqa_runtime.core import Request, SamplingParams
from peqa_runtime.engine.batch import Batch, ScheduledSequence
from peqa_runtime.engine.model_runner import ModelRunner
from peqa_runtime.engine.sequence import Sequence as Running
from peqa_runtime.errors import InvalidScaleSet, NoSuchRevision
from peqa_runtime.scales.scale_bank import ScaleBank
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.task_registry import BorrowedRow, TaskRegistry

logger = logging.getLogger(__name__)

PROMPTS = 1
PROMPT_TOKENS = 4
"""A step of four rows is a small one; more prompts would find little more, and hold up what runs for longer."""

_REMEMBERED = 4096
"""Revisions that passed. A revision is its content, so what it gives on one base is always the same."""

_PARAMS = SamplingParams(max_tokens=1, temperature=0.0)


def blocks_needed(block_size: int) -> int:
    """Blocks of the KV cache that the prompts take."""
    return PROMPTS * -(-PROMPT_TOKENS // block_size)


class Canary:
    """Tries sets out. `blocks`: ids of `blocks_needed` blocks that nobody else uses.

    Belongs to the engine's thread, but for `knows`.
    """

    def __init__(
        self,
        runner: ModelRunner,
        bank: ScaleBank,
        registry: TaskRegistry,
        held: Callable[[str], ScaleSet],
        *,
        vocab_size: int,
        blocks: Sequence[int],
    ) -> None:
        self._runner = runner
        self._bank = bank
        self._registry = registry
        self._held = held
        self._passed: dict[str, None] = {}  # oldest first
        count = len(blocks) // PROMPTS
        self._tables = [list(blocks[i * count : (i + 1) * count]) for i in range(PROMPTS)]
        # Ids from all over the vocabulary, so from all over the embedding.
        ids = [
            (2 * i + 1) * vocab_size // (2 * PROMPTS * PROMPT_TOKENS) for i in range(PROMPTS * PROMPT_TOKENS)
        ]
        self._prompts = [tuple(ids[i::PROMPTS]) for i in range(PROMPTS)]

    def knows(self, revision: str) -> bool:
        """True when this content has passed before."""
        return revision in self._passed

    def try_out(self, scale_set: ScaleSet) -> None:
        """Raise `InvalidScaleSet` when the model's answer to the prompt is not finite, or cannot be computed."""
        borrowed = self._registry.borrow(scale_set.kind)
        try:
            self._bank.write(borrowed.row, borrowed.group_row, scale_set)
            sound = self._answers_are_finite(borrowed)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            logger.exception("a trial forward with an uploaded set failed")
            raise InvalidScaleSet(
                "the model cannot be computed with this set; the server's log says why"
            ) from error
        finally:
            self._put_back(borrowed)
        if not sound:
            raise InvalidScaleSet(
                "with this set the model computes NaN or infinity where the base computes numbers: its scales are "
                "too far from 1.0 together, though each is within bounds"
            )
        self._passed[scale_set.revision] = None
        if len(self._passed) > _REMEMBERED:
            del self._passed[next(iter(self._passed))]

    def _answers_are_finite(self, at: BorrowedRow) -> bool:
        items = [
            ScheduledSequence(
                Running(
                    Request(f"canary-{i}", ids, _PARAMS),
                    list(ids),
                    block_table=table,
                    row=at.row,
                    group_row=at.group_row,
                ),
                0,
                len(ids),
            )
            for i, (ids, table) in enumerate(zip(self._prompts, self._tables, strict=True))
        ]
        inputs = self._runner.inputs(Batch(tuple(items)))
        with torch.inference_mode():
            return bool(torch.isfinite(self._runner.forward(inputs)).all())

    def _put_back(self, borrowed: BorrowedRow) -> None:
        """Leave the row as its owner needs it. A leased revision, so any that runs, is in memory."""
        if borrowed.owner is None:
            return
        try:
            self._bank.write(borrowed.row, borrowed.owner_group_row, self._held(borrowed.owner))
        except NoSuchRevision:
            self._registry.mark_unwritten(borrowed.owner)
