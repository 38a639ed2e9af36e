"""Decides what each step computes. No torch, no phases: a sequence has tokens, and some of them are computed.

A prompt, a chunk of a prompt, one token to decode and the recomputation after a preemption are all the same case:
tokens `[num_computed_tokens, num_tokens)` are to compute, and one budget of tokens per step is handed out.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Generator, Iterable
from collections.abc import Sequence as Items
from contextlib import closing
from itertools import count
from typing import Literal

from peqa_runtime.core import BASE_TASK, ErrorCode, FinishReason, TokenOutput
from peqa_runtime.engine.bank_rows import BankRows, RowPlacer
from peqa_runtime.engine.batch import Batch, ScheduledSequence, StepResult
from peqa_runtime.engine.block_manager import BlockManager
from peqa_runtime.engine.fair_queue import FairQueue
from peqa_runtime.engine.giving_way import GivingWay
from peqa_runtime.engine.sequence import Sequence
from peqa_runtime.engine.step_plan import StepPlan

NOT_FINITE = (
    "the model produced NaN or infinity for this request, so no token could be chosen; "
    "check the task's scale set (other requests are not affected)"
)

_PATIENCE = 64
"""Requests that may start before one whose turn it is but that lacks a bank row. Enough to keep the batch full while
some running request ends (it takes a row's last user to do so), few enough to bound the wait."""

_WORTH_WAITING = 64
"""Tokens of a prompt that must be in work for another request before this one waits for them instead of computing
them too. A step more of waiting costs about what computing as many does on two cores."""

_Start = Literal["started", "not now", "no row", "no room"]


class Scheduler:
    """Waiting and running sequences; `schedule` plans a step, `update` books its result.

    Who starts next is the `FairQueue`'s order: priority, then tasks by tokens served, then age. Running sequences are
    ordered by priority and age; the last is preempted first, so the first always ends. A waiting one takes the place
    or blocks of running ones when its priority is strictly better, and a place of a task that holds several when its
    own holds none. Within a priority everything ends: a task that was served less goes before one served more, a
    task's preempted sequences go before its new ones, and who lacks a bank row is overtaken a bounded number of times.
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
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._rows = BankRows(rows)
        self._way = GivingWay(blocks, self.waiting, self.running, max_sequences)
        self._max_batch_tokens = max_batch_tokens
        self._max_prompt_logprob_rows = max_prompt_logprob_rows
        self._eos_token_ids = frozenset(eos_token_ids)
        self._arrivals = count()
        self._known: dict[str, Sequence] = {}  # by request id: all that wait or run

    @property
    def has_work(self) -> bool:
        """True while a sequence waits or runs."""
        return bool(self._known)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Its prompt and output must fit the cache when it is alone (the engine checks that)."""
        assert sequence.request_id not in self._known
        sequence.arrival = next(self._arrivals)
        self._known[sequence.request_id] = sequence
        self.waiting.add(sequence)

    def schedule(self) -> Batch:
        """Plan the next step within one budget of tokens: first every running sequence with one token to compute,
        then prompts, begun and new ones, as long as tokens, places, blocks and rows are to be had."""
        plan = StepPlan(self._max_batch_tokens, self._max_prompt_logprob_rows)
        for sequence in [s for s in self.running if s.num_uncomputed_tokens == 1]:
            if plan.tokens == 0:
                break
            if sequence.status == "running" and self._grow_or_preempt(sequence):
                self._give(plan, sequence)
        self._compute_prompts(plan)
        return Batch(plan.shares, self._rows.writes_for(plan.shares))

    def update(self, batch: Batch, results: Iterable[StepResult]) -> list[TokenOutput]:
        """Book the step: computed tokens, sampled tokens, ends. One output per sequence that has news.

        A sequence aborted while the step ran is passed over: it has no blocks any more.
        """
        self._rows.written(batch)
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
        sequence = self._known.get(request_id)
        if sequence is not None:
            self._end(sequence)
        return sequence

    def inherit_counts(self, before: Scheduler) -> None:
        """Go on counting where the scheduler that this one replaces stopped."""
        self.num_preemptions = before.num_preemptions
        if self.blocks.cache is not None and before.blocks.cache is not None:
            self.blocks.cache.inherit_counts(before.blocks.cache)

    def check_integrity(self) -> None:
        """Assert the invariants between two steps (used by tests, and cheap enough for idle moments)."""
        self.blocks.check_integrity(self.running)
        assert all(not s.block_table and s.num_computed_tokens == 0 for s in self.waiting)
        assert all(s.status == "waiting" for s in self.waiting)
        assert all(s.status == "running" for s in self.running)
        assert len(list(self.waiting)) == len(self.waiting)
        assert len(self.waiting) + len(self.running) == len(self._known)
        assert [_rank(s) for s in self.running] == sorted(_rank(s) for s in self.running), "first to last"

    def _give(self, plan: StepPlan, sequence: Sequence) -> None:
        """Take the sequence's share off the step, and note for its task what is computed for the first time."""
        share = plan.add(sequence, sequence.num_computed_tokens)
        if share is None:
            return
        end = share.start + share.num_tokens
        new = end - max(sequence.num_served_tokens, share.start)
        if new > 0:
            sequence.num_served_tokens = end
            self.waiting.charge(sequence, new)

    def _compute_prompts(self, plan: StepPlan) -> None:
        """Share what is left of the step among prompts that are begun and ones that start now.

        When a row is lacking, all of them are pinned by running revisions: then only their tasks' requests, which
        need no new row, still start, until the one that lacks it has been overtaken `_PATIENCE` times.
        """
        begun = [s for s in self.running if s.num_uncomputed_tokens > 1]
        stuck = self._start_all(plan, begun, self.waiting.candidates(), None)
        if stuck is not None:
            resident = {BASE_TASK, *(s.request.payer for s in self.running)}
            self._start_all(plan, begun, self.waiting.candidates(resident), stuck)
        for sequence in begun:
            if sequence.status == "running":
                self._give(plan, sequence)

    def _start_all(
        self,
        plan: StepPlan,
        begun: list[Sequence],
        candidates: Generator[Sequence, None, None],
        stuck: Sequence | None,
    ) -> Sequence | None:
        """Start candidates as far as it goes, after those of `begun` whose turn it is; return who lacks a row."""
        computing = list(begun)  # whose prompts are in work
        retry = stuck is not None
        with closing(candidates):
            for sequence in candidates:
                for other in begun.copy():  # one by one: what one gets counts for the next
                    if other.status == "running" and self._goes_on(other, sequence):
                        begun.remove(other)
                        self._give(plan, other)
                if stuck is not None and stuck.num_overtaken >= _PATIENCE:
                    break
                outcome = self._start(sequence, plan, computing)
                if outcome == "no room":
                    break
                if outcome == "started":
                    computing.append(sequence)
                    if stuck is not None:
                        stuck.num_overtaken += 1
                elif outcome == "no row":
                    stuck = stuck or sequence
                    if sequence.request.kind != "group" and not retry:
                        break  # no other that needs a new row would get one
        return stuck

    def _goes_on(self, begun: Sequence, head: Sequence) -> bool:
        """Whether a begun prompt goes before one that could start. It lets a shorter one of a task pass that is
        behind by a whole step: else a long prompt would hold everybody's short ones up."""
        if begun.priority != head.priority:
            return begun.priority < head.priority
        ahead = self.waiting.served(begun) - self.waiting.served(head)
        return ahead < self._max_batch_tokens or begun.num_uncomputed_tokens <= head.num_uncomputed_tokens

    def _start(self, sequence: Sequence, plan: StepPlan, computing: Items[Sequence]) -> _Start:
        """Give a waiting sequence a place, a row, blocks for all its known tokens and a share of the step.

        With all its blocks a prompt once begun never runs out of them. "no room" stops the search: a long prompt is
        not overtaken for ever.
        """
        if plan.tokens == 0:
            return "no room"
        found = self.blocks.find(sequence)
        no_worse = (
            s for s in computing if s.priority <= sequence.priority
        )  # others may have to wait themselves
        if self.blocks.found_soon(sequence, found, no_worse) >= _WORTH_WAITING:
            return "not now"
        victims = self._way.victims(sequence, found)
        if victims is None:
            return "no room"
        if plan.share(sequence, len(found) * self.blocks.block_size) is None:
            return "not now"  # rows for prompt log-probabilities are used up
        if not self._rows.place(sequence, in_use={s.request.revision for s in self.running}):
            return "no row"
        for victim in victims:
            plan.drop(victim)
            self._preempt(victim)
        self.waiting.start(sequence)
        sequence.status = "running"
        if sequence.started is None:
            sequence.started = time.perf_counter()
        insort(self.running, sequence, key=_rank)
        self.blocks.begin(sequence, found)
        self._give(plan, sequence)
        return "started"

    def _grow_or_preempt(self, sequence: Sequence) -> bool:
        """Get the blocks for the sequence's next token, if need be from the last; False when it was itself."""
        while not self.blocks.grow(sequence):
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait; all its tokens, generated ones too, are found or computed again."""
        self.blocks.free(sequence)
        self.running.remove(sequence)
        sequence.num_computed_tokens = 0
        sequence.status = "waiting"
        sequence.holds_row = False
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.put_back(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        running = sequence.status == "running"
        if running:
            self.running.remove(sequence)
        self.waiting.drop(sequence, running=running)
        del self._known[sequence.request_id]
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
        self.blocks.computed(sequence)
        if result.refusal is not None:
            self._end(sequence)
            return TokenOutput(
                sequence.request_id, finish_reason="error", error=result.refusal, error_code="no_token_left"
            )
        if result.prompt_logprobs:
            if not sequence.prompt_logprobs:
                sequence.prompt_logprobs.append(None)  # nothing predicts the first token
            sequence.prompt_logprobs.extend(result.prompt_logprobs)
        if not reached_end:
            return None
        first = sequence.num_generated_tokens == 0
        if result.token_id is not None:
            sequence.token_ids.append(result.token_id)
        finish_reason, stop_reason = self._end_of(sequence, result)
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
            num_cached_tokens=sequence.num_cached_tokens,
            complete=result.form == "complete",
            started=sequence.started,
        )

    def _end_of(self, sequence: Sequence, result: StepResult) -> tuple[FinishReason | None, int | None]:
        """Why the sequence ends with this token, and the stop token id that the client named, if it was one."""
        params, token_id, generated = sequence.request.params, result.token_id, sequence.num_generated_tokens
        if token_id is not None and generated > params.min_tokens:
            if token_id in params.stop_tokens:
                return "stop", token_id
            if token_id in self._eos_token_ids and not params.ignore_eos:
                return "stop", None
        if result.form != "open":
            return "stop", None
        return ("length", None) if generated >= params.max_tokens else (None, None)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.arrival
