"""One step's tensors, and what the engine needs of the model that computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from peqa_runtime.model.forward_context import ForwardContext


@dataclass(frozen=True)
class StepInputs:
    """One step's tensors: packed tokens, where they belong, which of them need logits, whose scales they use."""

    context: ForwardContext
    ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens]
    logits_at: Tensor  # int64 [rows of logits]
    row: Tensor | None  # int32 [tokens]; None: the base
    group_row: Tensor | None  # int32 [tokens]; None: no group scales


class Rows(Protocol):
    """Which bank row each token of the step uses (the model's `StepRows`)."""

    row: Tensor | None
    group_row: Tensor | None


class Model(Protocol):
    """What the runner needs of a loaded model."""

    @property
    def device(self) -> torch.device:
        """Where inputs go."""

    @property
    def step_rows(self) -> Rows:
        """Read by every quantized linear during the forward."""

    def forward(
        self, context: ForwardContext, input_ids: Tensor, positions: Tensor, logits_at: Tensor
    ) -> Tensor:
        """float32 logits [len(logits_at), vocab] of packed tokens."""
