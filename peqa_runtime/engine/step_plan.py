"""What is left of a step while it is planned, and who got which share of it."""

from __future__ import annotations

from dataclasses import replace

from peqa_runtime.engine.batch import ScheduledSequence
from peqa_runtime.engine.sequence import Sequence


class StepPlan:
    """One budget of tokens for decodes and prompts, and one of rows of logits for prompt log-probabilities."""

    def __init__(self, tokens: int, prompt_rows: int) -> None:
        self.tokens = tokens
        self._prompt_rows = prompt_rows
        self._shares: dict[Sequence, ScheduledSequence] = {}

    @property
    def shares(self) -> tuple[ScheduledSequence, ...]:
        """The shares in the order in which they were given."""
        return tuple(self._shares.values())

    def share(self, sequence: Sequence, start: int) -> ScheduledSequence | None:
        """What the sequence would get if it computes from `start` on; None when nothing is left for it."""
        share = ScheduledSequence(sequence, start, min(sequence.num_tokens - start, self.tokens))
        if sequence.request.params.prompt_logprobs is None:
            return share if share.num_tokens > 0 else None
        positions = share.prompt_logprob_positions
        if len(positions) > self._prompt_rows:
            share = replace(share, num_tokens=positions.start + self._prompt_rows - start)
        return share if share.num_tokens > 0 else None

    def add(self, sequence: Sequence, start: int) -> ScheduledSequence | None:
        """Give the sequence its share."""
        share = self.share(sequence, start)
        if share is not None:
            self.tokens -= share.num_tokens
            self._prompt_rows -= len(share.prompt_logprob_positions)
            self._shares[sequence] = share
        return share

    def drop(self, sequence: Sequence) -> None:
        """The sequence will not run in this step: its share, if it has one, is there for others."""
        share = self._shares.pop(sequence, None)
        if share is not None:
            self.tokens += share.num_tokens
            self._prompt_rows += len(share.prompt_logprob_positions)
