"""What is asked of a row of logits, and what comes back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Draw(NamedTuple):
    """What to draw from one row. top_k 0, top_p 1 and min_p 0 keep every token."""

    row: int
    best: float  # the row's highest logit, as `row_best` gives it
    uniform: float  # in [0, 1)
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def narrows(self) -> bool:
        """True when it does not draw from the whole row."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


class Likeliest(NamedTuple):
    """The most likely tokens of some rows in falling order, and what turns a row's logits into log-probabilities.

    logprob = (logit - best) - log(sum)
    """

    tokens: Tensor  # int64 [rows, top]
    logits: Tensor  # float32 [rows, top]
    best: Tensor  # float32 [rows], the highest logit
    sums: Tensor  # float64 [rows], of exp(logit - best) over the whole row
