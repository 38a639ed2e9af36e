"""Before an uploaded set becomes a task's: does the model compute finite numbers with it?

A short prompt goes through the model in the engine's thread: as a few rows more of the next step, where that has room
left, else by itself between two steps; one set per step. So what runs is held up by the rows' own cost, also where a
forward of four rows takes as long as one of thirty-two, because both read all weights.

Each token of the prompt enters as a decode row would (all of a step's keys and values are written before any are read),
so a step of decodes stays one. Nothing of it can be seen: its K/V lie in blocks that are nobody's, and its bank row is
borrowed. It is a free one, or one that no running request uses, or else one whose content is put back before the next
step; never one that the step itself reads. What it gives is cut off before tokens are chosen. A step that raises with
it is computed again without it. No request, prefix or metric hears of it. Where the row cannot be put back, nothing
goes on before every row is written anew: `RowLost`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peqa_runtime.core import Request
from peqa_runtime.engine.batch import Batch, ScheduledSequence, StepResult
from peqa_runtime.engine.model_runner import ModelRunner
from peqa_runtime.engine.rescue import RowLost
from peqa_runtime.engine.sequence import Sequence as Running
from peqa_runtime.errors import EngineDead, InvalidScaleSet, NoSuchRevision
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.scales.scale_bank import ScaleBank
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.task_registry import BorrowedRow, TaskRegistry

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 4
"""Enough for attention to weigh keys against each other; more would find little more, and cost rows of a step."""

_REMEMBERED = 4096
"""Revisions that passed. A revision is its content, so what it gives on one base is always the same."""

_PARAMS = SamplingParams(max_tokens=1, temperature=0.0)


def blocks_needed(block_size: int) -> int:
    """Blocks of the KV cache that the prompt takes."""
    return -(-PROMPT_TOKENS // block_size)


@dataclass(eq=False)
class Trial:
    """A set to try out. `verdict` fails with `InvalidScaleSet` when it is refused, `EngineDead` when nobody can tell.

    `alone`: a step with it raised, so it is not tried in another.
    """

    scale_set: ScaleSet
    verdict: Future[None] = field(default_factory=Future)
    alone: bool = False


class Canary:
    """Tries sets out. `blocks`: ids of `blocks_needed` blocks that nobody else uses.

    Belongs to the engine's thread, but for `knows`. `max_batch_tokens`: what a step may hold, its own rows included;
    `max_sequences`: what there are graphs for, on a device that has any.
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
        max_sequences: int,
        max_batch_tokens: int,
    ) -> None:
        self._runner = runner
        self._bank = bank
        self._registry = registry
        self._held = held
        self._passed: dict[str, None] = {}  # oldest first
        self._waiting: deque[Trial] = deque()
        self._table = list(blocks)
        self._max_sequences = max_sequences
        self._max_batch_tokens = max_batch_tokens
        # Ids from all over the vocabulary, so from all over the embedding.
        self._ids = tuple((2 * i + 1) * vocab_size // (2 * PROMPT_TOKENS) for i in range(PROMPT_TOKENS))

    def knows(self, revision: str) -> bool:
        """True when this content has passed before."""
        return revision in self._passed

    def add(self, trial: Trial) -> None:
        """Have it judged: by `run` if it finds room in a step, else by `judge`."""
        self._waiting.append(trial)

    @property
    def next(self) -> Trial | None:
        """The trial that is judged next."""
        return self._waiting[0] if self._waiting else None

    def run(self, batch: Batch) -> list[StepResult]:
        """Run a step, as `ModelRunner.run` does; with the next trial in it, which is then judged, if there is room.

        Raises `RowLost` too.
        """
        trial = self.next
        if trial is None or trial.alone or not self._has_room(batch):
            return self._runner.run(batch)
        at = self._registry.borrow(trial.scale_set.kind)
        if at.owner is not None and any(
            item.sequence.request.revision == at.owner for item in batch.scheduled
        ):
            return self._runner.run(batch)
        try:
            with self._lent(at, trial.scale_set):
                self._runner.write_rows(batch)
                joined = Batch(batch.scheduled + self._rows(at), batch.bank_writes)
                with torch.inference_mode():
                    logits = self._runner.prepare(joined)()
                    sound = _is_finite(logits[-PROMPT_TOKENS:])
                    results = self._runner.sampler.sample(batch, logits[:-PROMPT_TOKENS])
        except torch.AcceleratorError:
            raise
        except RowLost:
            trial.alone = True
            raise
        except Exception:  # noqa: BLE001  whoever is to blame: the step goes on without the trial, and finds out
            trial.alone = True
            return self._runner.run(batch)
        self._waiting.popleft()
        self._conclude(trial, sound)
        return results

    def judge(self) -> None:
        """Judge the next trial by a forward of its own. Raises `RowLost`."""
        trial = self._waiting.popleft()
        try:
            self.try_out(trial.scale_set)
        except InvalidScaleSet as error:
            trial.verdict.set_exception(error)
        except RowLost:
            trial.verdict.set_exception(
                EngineDead("the engine restarted while it tried this set; send it again")
            )
            raise
        except BaseException as error:
            trial.verdict.set_exception(EngineDead(f"the engine died of {type(error).__name__}: {error}"))
            raise
        else:
            trial.verdict.set_result(None)

    def give_up(self, error: EngineDead) -> None:
        """Nothing is judged any more."""
        while self._waiting:
            self._waiting.popleft().verdict.set_exception(error)

    def try_out(self, scale_set: ScaleSet) -> None:
        """Raise `InvalidScaleSet` when the model's answer to the prompt is not finite, or cannot be computed.

        Raises `RowLost` too.
        """
        try:
            at = self._registry.borrow(scale_set.kind)
            with self._lent(at, scale_set), torch.inference_mode():
                sound = _is_finite(self._runner.prepare(Batch(self._rows(at)))())
        except (torch.AcceleratorError, RowLost):
            raise
        except Exception as error:
            logger.exception("a trial forward with an uploaded set failed")
            raise InvalidScaleSet(
                "the model cannot be computed with this set; the server's log says why"
            ) from error
        if not sound:
            raise InvalidScaleSet(_NOT_FINITE)
        self._remember(scale_set.revision)

    def _conclude(self, trial: Trial, sound: bool) -> None:
        if sound:
            self._remember(trial.scale_set.revision)
            trial.verdict.set_result(None)
        else:
            trial.verdict.set_exception(InvalidScaleSet(_NOT_FINITE))

    def _remember(self, revision: str) -> None:
        self._passed[revision] = None
        if len(self._passed) > _REMEMBERED:
            del self._passed[next(iter(self._passed))]

    def _has_room(self, batch: Batch) -> bool:
        if self._runner.graphs is not None and len(batch.scheduled) + PROMPT_TOKENS > self._max_sequences:
            return False  # no graph is for so many rows, and without one a step waits for Python
        return batch.num_tokens + PROMPT_TOKENS <= self._max_batch_tokens

    def _rows(self, at: BorrowedRow) -> tuple[ScheduledSequence, ...]:
        """One token each, all on one block table: token i sees those before it, as in a prompt."""
        request = Request("canary", self._ids, _PARAMS)
        return tuple(
            ScheduledSequence(
                Running(
                    request,
                    list(self._ids[: i + 1]),
                    block_table=self._table,
                    row=at.row,
                    group_row=at.group_row,
                ),
                i,
                1,
            )
            for i in range(PROMPT_TOKENS)
        )

    @contextmanager
    def _lent(self, at: BorrowedRow, scale_set: ScaleSet) -> Iterator[None]:
        """The set is in the row; afterwards what its owner needs is there again. Raises `RowLost`."""
        try:
            self._bank.write(at.row, at.group_row, scale_set)
            yield
        finally:
            if at.owner is not None:
                self._put_back(at, at.owner)

    def _put_back(self, at: BorrowedRow, owner: str) -> None:
        """Write the owner's set again. A leased revision, so any that runs, is in memory; another is written when it is
        wanted."""
        written = False
        try:
            self._bank.write(at.row, at.owner_group_row, self._held(owner))
            written = True
        except NoSuchRevision:
            pass
        except torch.AcceleratorError:
            raise
        except Exception as error:
            raise RowLost(f"the row of revision {owner[:12]} could not be put back after a trial") from error
        finally:
            if not written:
                self._registry.mark_unwritten(owner)


_NOT_FINITE = (
    "with this set the model computes NaN or infinity where the base computes numbers: its scales are too far from 1.0 "
    "together, though each is within bounds"
)


def _is_finite(logits: Tensor) -> bool:
    return bool(torch.isfinite(logits).all())
