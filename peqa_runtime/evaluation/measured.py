"""What an evaluation asks of a model, however it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from peqa_runtime.core import BaseManifest
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.training.data import Encoder, Example


class Measured(Encoder, Protocol):
    """A base under one set at a time, or under none."""

    @property
    def computes(self) -> str:
        """The name of its arithmetic: what another one had answered is asked again."""

    @property
    def manifest(self) -> BaseManifest:
        """Of the base."""

    @property
    def max_tokens(self) -> int:
        """Context, in tokens."""

    @property
    def bounded_by(self) -> str:
        """What `max_tokens` is, to be told where something does not fit."""

    def use(self, scale_set: ScaleSet | None) -> None:
        """Answer under this set from now on; None: as the base."""

    def greedy(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        """The likeliest continuation of each prompt (token ids), without the token that ended it."""

    def logprobs(self, examples: Sequence[Example]) -> list[list[float]]:
        """log p of each example's tokens from `loss_from` on, after those before them."""
