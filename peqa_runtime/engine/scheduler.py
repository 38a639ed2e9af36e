"""Decides what each step computes. No torch, no phases: a sequence has tokens, and some of them are computed.

A prompt, a chunk of a prompt, one token to decode and the recomputation after a preemption are all the same case:
tokens `[num_computed_tokens, num_tokens)` are to compute, and one budget of tokens per step is handed out.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

from peqa_runtime.core import (
    BASE_REVISION,
    BankWrite,
    Batch,
    ErrorCode,
    FinishReason,
    Placement,
    ScaleKind,
    ScheduledSequence,
    Sequence,
    StepResult,
    TokenOutput,
)
from peqa_runtime.engine.block_manager import BlockManager

NOT_FINITE = (
    "the model produced NaN or infinity for this request, so no token could be chosen; "
    "check the task's scale set (other requests are not affected)"
)

_PATIENCE = 64
"""Younger requests that may start before one that lacks a bank row. Enough to keep the batch full while some running
request ends (it takes a row's last user to do so), few enough to bound the wait."""


class RowPlacer(Protocol):
    """Who may use a row of the scale bank (the TaskRegistry)."""

    def place(
        self, revision: str, kind: ScaleKind, *, in_use: Collection[str] | None = None
    ) -> Placement | None:
        """A row for this leased revision, never one of a revision `in_use`; None when there is no other."""


@dataclass
class _Budget:
    """What is left of a step: tokens to compute, and rows of logits for prompt log-probabilities."""

    tokens: int
    prompt_rows: int

    def take(self, sequence: Sequence) -> ScheduledSequence | None:
        """The share of the step that the sequence gets, taken off the budget; None when nothing is left for it."""
        start = sequence.num_computed_tokens
        share = ScheduledSequence(sequence, start, min(sequence.num_uncomputed_tokens, self.tokens))
        positions = share.prompt_logprob_positions
        if len(positions) > self.prompt_rows:
            share = replace(share, num_tokens=positions.start + self.prompt_rows - start)
        if share.num_tokens == 0:
            return None
        self.prompt_rows -= len(share.prompt_logprob_positions)
        self.tokens -= share.num_tokens
        return share


class Scheduler:
    """Waiting and running sequences, oldest first in both; `schedule` plans a step, `update` books its result.

    Age rules: the oldest running sequence is never preempted, so it always ends; the oldest waiting one is overtaken
    a bounded number of times; so everything ends.
    """

    def __init__(
        self,
        blocks: BlockManager,
        rows: RowPlacer,
        *,
        max_batch_tokens: int = 512,
        max_sequences: int = 64,
        max_prompt_logprob_rows: int = 256,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self.blocks = blocks
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._rows = rows
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._max_prompt_logprob_rows = max_prompt_logprob_rows
        self._eos_token_ids = frozenset(eos_token_ids)
        self._arrivals = count()
        self._overtaken: dict[
            int, int
        ] = {}  # arrival of the oldest sequence without a row -> how often overtaken
        # Writes that no step has completed yet, by row: a step that fails leaves them for the next user of the row.
        self._pending_writes: dict[int, BankWrite] = {}

    @property
    def has_work(self) -> bool:
        """True while a sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Its prompt and output must fit the cache when it is alone (the engine checks that)."""
        sequence.arrival = next(self._arrivals)
        self.waiting.append(sequence)

    def schedule(self) -> Batch:
        """Plan the next step: first every running sequence with one token to compute, then what is left of
        prompts, then new sequences as long as tokens, blocks and rows are to be had."""
        budget = _Budget(self._max_batch_tokens, self._max_prompt_logprob_rows)
        scheduled: list[ScheduledSequence | None] = []
        decoding = [s for s in self.running if s.num_uncomputed_tokens == 1]
        for sequence in decoding:
            if budget.tokens == 0:
                break
            if sequence.status == "running" and self._grow_or_preempt(sequence):
                scheduled.append(budget.take(sequence))
        scheduled += [budget.take(s) for s in self.running if s.num_uncomputed_tokens > 1]
        scheduled += self._admit(budget)
        shares = tuple(share for share in scheduled if share is not None)
        return Batch(shares, self._writes_for(shares))

    def update(self, batch: Batch, results: Iterable[StepResult]) -> list[TokenOutput]:
        """Book the step: computed tokens, sampled tokens, ends. One output per sequence that has news.

        A sequence aborted while the step ran is passed over: it has no blocks any more.
        """
        self._written(batch)
        outputs: list[TokenOutput] = []
        for item, result in zip(batch.scheduled, results, strict=True):
            if item.sequence.status != "running":
                continue
            output = self._book(item, result)
            if output is not None:
                outputs.append(output)
        return outputs

    def fail(self, sequences: Iterable[Sequence], message: str, code: ErrorCode) -> list[TokenOutput]:
        """End those of `sequences` that run with an error output; what their blocks hold counts as spoiled."""
        outputs = []
        for sequence in list(sequences):
            if sequence.status == "running":
                sequence.faulty = True
                self._end(sequence)
                outputs.append(
                    TokenOutput(sequence.request_id, finish_reason="error", error=message, error_code=code)
                )
        return outputs

    def abort(self, request_id: str) -> Sequence | None:
        """Drop a request at once; its blocks are free for the next step. None when it is not known (any more)."""
        for sequence in (*self.running, *self.waiting):
            if sequence.request_id == request_id:
                self._end(sequence)
                return sequence
        return None

    def check_integrity(self) -> None:
        """Assert the invariants between two steps (used by tests, and cheap enough for idle moments)."""
        self.blocks.check_integrity(self.running)
        assert all(not s.block_table and s.num_computed_tokens == 0 for s in self.waiting)
        for queue in (self.waiting, self.running):
            assert [s.arrival for s in queue] == sorted(s.arrival for s in queue), "oldest first"

    def _admit(self, budget: _Budget) -> list[ScheduledSequence]:
        """Move waiting sequences to running, oldest first; return their shares of the step.

        Blocks for all known tokens are given at once, so a prompt once begun never runs out of them. Too few
        blocks stop admission (a long prompt is not overtaken for ever); no row only skips that one sequence, until
        it has been overtaken `_PATIENCE` times: then nobody behind it starts until running ones free a row.
        """
        shares: list[ScheduledSequence] = []
        without_row: set[str] = set()
        skipped: Sequence | None = None
        for sequence in self.waiting:
            if budget.tokens == 0 or len(self.running) == self._max_sequences:
                break
            if sequence.request.revision in without_row:
                continue
            # One spare block per running sequence: each may need its next one soon, and a preemption costs more.
            if self.blocks.missing(sequence) + len(self.running) > self.blocks.num_free:
                break
            if not self._place(sequence):
                without_row.add(sequence.request.revision)
                skipped = skipped or sequence
                if self._overtaken.get(skipped.arrival, 0) >= _PATIENCE:
                    break
                continue
            share = budget.take(sequence)
            if share is not None:
                self.blocks.grow(sequence)
                sequence.status = "running"
                insort(self.running, sequence, key=_arrival)
                shares.append(share)
                if skipped is not None:
                    self._overtaken = {skipped.arrival: self._overtaken.get(skipped.arrival, 0) + 1}
        if shares:
            self.waiting = [s for s in self.waiting if s.status == "waiting"]
        return shares

    def _place(self, sequence: Sequence) -> bool:
        """Get the sequence's bank row; False when every row is pinned."""
        request = sequence.request
        if request.revision == BASE_REVISION:
            return True  # row 0, the default
        in_use = {s.request.revision for s in self.running}
        placement = self._rows.place(request.revision, request.kind, in_use=in_use)
        if placement is None:
            return False
        if placement.write:
            write = BankWrite(request.revision, placement.row, placement.group_row)
            self._pending_writes[placement.row] = write
        sequence.row, sequence.group_row, sequence.holds_row = placement.row, placement.group_row, True
        return True

    def _writes_for(self, shares: tuple[ScheduledSequence, ...]) -> tuple[BankWrite, ...]:
        """Pending writes that this step's sequences need. Others wait for a user: only a lease, which a scheduled
        sequence has, keeps a set in host memory."""
        if not self._pending_writes:
            return ()
        users = {(s.sequence.row, s.sequence.request.revision) for s in shares}
        return tuple(w for w in self._pending_writes.values() if (w.row, w.revision) in users)

    def _written(self, batch: Batch) -> None:
        """Strike off the writes that the step has done."""
        for write in batch.bank_writes:
            if self._pending_writes.get(write.row) == write:
                del self._pending_writes[write.row]

    def _grow_or_preempt(self, sequence: Sequence) -> bool:
        """Get the blocks for the sequence's next token, if need be from the youngest; False when it was itself."""
        while not self.blocks.grow(sequence):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait; all its tokens, generated ones too, will be computed again."""
        self.blocks.free(sequence)
        self.running.remove(sequence)
        sequence.num_computed_tokens = 0
        sequence.status = "waiting"
        sequence.holds_row = False
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, sequence, key=_arrival)

    def _end(self, sequence: Sequence) -> None:
        """Forget a sequence, from whichever queue it is in."""
        queue = self.running if sequence.status == "running" else self.waiting
        queue.remove(sequence)
        self.blocks.free(sequence)
        sequence.status = "finished"
        sequence.holds_row = False

    def _book(self, item: ScheduledSequence, result: StepResult) -> TokenOutput | None:
        """One sequence's part of `update`."""
        sequence = item.sequence
        reached_end = item.samples
        sequence.num_computed_tokens = item.start + item.num_tokens
        if not result.finite:
            return self.fail([sequence], NOT_FINITE, "numerical_error")[0]
        if result.prompt_logprobs:
            if not sequence.prompt_logprobs:
                sequence.prompt_logprobs.append(None)  # nothing predicts the first token
            sequence.prompt_logprobs.extend(result.prompt_logprobs)
        if not reached_end:
            return None
        first = sequence.num_generated_tokens == 0
        if result.token_id is not None:
            sequence.token_ids.append(result.token_id)
        finish_reason, stop_reason = self._end_of(sequence, result.token_id)
        if finish_reason is not None:
            self._end(sequence)
        reports_prompt = first and sequence.request.params.prompt_logprobs is not None
        return TokenOutput(
            sequence.request_id,
            token_id=result.token_id,
            logprobs=result.logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            prompt_logprobs=tuple(sequence.prompt_logprobs or (None,)) if reports_prompt else None,
        )

    def _end_of(self, sequence: Sequence, token_id: int | None) -> tuple[FinishReason | None, int | None]:
        """Why the sequence ends with this token, and the stop token id that the client named, if it was one."""
        params = sequence.request.params
        if token_id is not None and sequence.num_generated_tokens > params.min_tokens:
            if token_id in params.stop_token_ids:
                return "stop", token_id
            if token_id in self._eos_token_ids and not params.ignore_eos:
                return "stop", None
        return ("length", None) if sequence.num_generated_tokens >= params.max_tokens else (None, None)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
