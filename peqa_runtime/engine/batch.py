"""One step as values: who computes how many tokens, which rows are written first, and what came of it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from peqa_runtime.core import TokenLogprobs
from peqa_runtime.engine.sequence import Sequence


@dataclass(frozen=True)
class BankWrite:
    """Put the set with this revision into this row before the step's forward."""

    revision: str
    row: int
    group_row: int = 0


@dataclass(frozen=True)
class ScheduledSequence:
    """One sequence's share of a step: compute tokens `[start, start + num_tokens)`; sample when it reaches the end."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """True when this step computes the sequence's last known token, so that the next one can be sampled."""
        return self.start + self.num_tokens == self.sequence.num_tokens

    @property
    def prompt_logprob_positions(self) -> range:
        """Positions of this share whose logits give log-probabilities of prompt tokens not yet reported.

        The logits at position i are about token i + 1; entry 0 of `prompt_logprobs` (None) stands for no position.
        """
        sequence = self.sequence
        if sequence.request.params.prompt_logprobs is None:
            return range(0)
        first = max(self.start, len(sequence.prompt_logprobs) - 1)
        return range(first, min(self.start + self.num_tokens, sequence.num_prompt_tokens - 1))


@dataclass(frozen=True)
class Batch:
    """One step's plan: who computes how many tokens, and which bank rows are written first. No tensors."""

    scheduled: tuple[ScheduledSequence, ...]
    bank_writes: tuple[BankWrite, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(s.num_tokens for s in self.scheduled)

    def by_group_row(self) -> Batch:
        """The same step with its sequences ordered by group row.

        A GPU kernel goes through the weight once for each task in a tile, and finds a task's scales in its caches.
        """
        if not any(item.sequence.group_row for item in self.scheduled):
            return self
        return replace(
            self, scheduled=tuple(sorted(self.scheduled, key=lambda item: item.sequence.group_row))
        )


@dataclass(frozen=True)
class StepResult:
    """What a step gave for one scheduled sequence. `token_id` is None when nothing was sampled.

    `prompt_logprobs` are those of the prompt tokens whose predecessors this step computed. `finite` is False when
    a row of logits held NaN or infinity: the numbers are then worthless and the request ends. `form`: whether the form
    that the request asked for is "complete" with this token, has "ended" before it, or is "open" (also: it asked for
    none). `refusal`: no token could be chosen, and why; the request ends.
    """

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finite: bool = True
    form: Literal["open", "complete", "ended"] = "open"
    refusal: str | None = None
