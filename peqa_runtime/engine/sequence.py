"""A request in work: its tokens, how many of them are computed, and what it holds. Plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peqa_runtime.core import Request, TokenLogprobs

SequenceStatus = Literal["waiting", "running", "finished"]


@dataclass(eq=False)
class Sequence:
    """A request in work. Tokens `[0, num_computed_tokens)` have their K/V in the blocks of `block_table`.

    [ computed ............ | to compute ...... ]
    0        num_computed_tokens       num_tokens

    `arrival` orders sequences by age; `seed` is the request's, or the one drawn for it; `prompt_logprobs` grows
    with the prompt's chunks and outlives a preemption. `form`: the answer's, compiled; held here, it is compiled once.
    `faulty`: it ended with an error, so what its blocks hold must
    not be shared with anybody. Compared by identity.

    For the scheduler: `num_served_tokens` counts positions computed at least once, `num_overtaken` those that started
    while it lacked a bank row. For the prefix cache: `block_keys` of full blocks, how many of them can be found by
    others (`num_published_blocks`), and the prompt's `num_cached_tokens` that were found computed when it started.
    `started`: when it first did, on `time.perf_counter`'s clock.
    """

    request: Request
    token_ids: list[int]
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    status: SequenceStatus = "waiting"
    row: int = 0
    group_row: int = 0
    holds_row: bool = False
    num_preemptions: int = 0
    arrival: int = 0
    seed: int = 0
    form: Any = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    faulty: bool = False
    num_served_tokens: int = 0
    num_overtaken: int = 0
    num_cached_tokens: int = 0
    num_published_blocks: int = 0
    block_keys: list[bytes] = field(default_factory=list)
    started: float | None = None

    def forget_place(self) -> None:
        """Wait again, with its tokens but no blocks and no row: those that it had are nobody's any more."""
        self.block_table.clear()
        self.num_computed_tokens = self.num_published_blocks = 0
        self.row = self.group_row = 0
        self.holds_row = False
        self.status = "waiting"

    @property
    def request_id(self) -> str:
        """Identity of the request."""
        return self.request.request_id

    @property
    def priority(self) -> int:
        """The request's; a lower one runs earlier."""
        return self.request.priority

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated so far."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose K/V is still to be computed."""
        return self.num_tokens - self.num_computed_tokens
