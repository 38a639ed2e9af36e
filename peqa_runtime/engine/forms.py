"""One step of answers that keep to a form: what is chosen is checked, and chosen again where the form refuses it.

A form refuses little of what a model that was told about it likes best, and to check one token takes a fraction of
what it takes to find all that are allowed. So the first choice is free; only a row whose choice is refused is masked
and chosen again, with a random number of its own. That gives the distribution of a mask from the start, as
p(t) + P(refused) p(t) / P(allowed) = p(t) / P(allowed). (Where a form forces its text, masks hold the usual tokens of
that text only, and the first choice may cut it otherwise.) Rows that narrow what they draw from are masked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf, isfinite
from typing import Literal

from torch import Tensor

from peqa_runtime.engine.guidance import Guide, NoTokenLeft
from peqa_runtime.engine.token_masks import TokenMasks
from peqa_runtime.engine.token_rules import RuledRow

Keep = Callable[[Iterable[int]], None]
"""Told of rows of logits before they are changed."""


class FormStep:
    """The rows of a step that have a form. `forms` and `refusals` by row: what became of them, where it is news."""

    def __init__(self, ruled: list[RuledRow], masks: TokenMasks) -> None:
        """Bring every guide to where its answer stands."""
        self._masks = masks
        self.forms: dict[int, Literal["complete", "ended"]] = {}
        self.refusals: dict[int, str] = {}
        self._masked: set[int] = set()
        self._guides = [(item, item.rules.guide) for item in ruled if item.rules.guide is not None]
        for item, guide in self._guides:
            try:
                guide.follow(item.sequence.token_ids, item.sequence.num_prompt_tokens)
            except NoTokenLeft as error:
                self.refusals[item.row] = str(error)

    def narrowing(self) -> list[RuledRow]:
        """Rows that must be masked before anything is chosen."""
        return [item for item, _ in self._open() if item.sequence.request.params.narrows]

    def refused(self, best: list[float], choices: list[int]) -> list[RuledRow]:
        """Rows whose free choice the form does not allow. `best`: each row's highest logit."""
        found = []
        for item, guide in self._open():
            if item.row not in self._masked and isfinite(best[item.row]):
                allowed = True
                try:
                    allowed = guide.allows(choices[item.row])
                except NoTokenLeft as error:
                    self.refusals[item.row] = str(error)
                if not allowed:
                    found.append(item)
        return found

    def mask(self, rows: list[RuledRow], logits: Tensor, keep: Keep) -> None:
        """Take what the form does not allow out of rows of logits [rows, vocab]."""
        keep([item.row for item in rows])
        guides = [(item.row, item.rules.guide) for item in rows if item.rules.guide is not None]
        self._masked.update(row for row, _ in guides)
        self.refusals |= self._masks.forbid(guides, logits) if guides else {}

    def take(self, best: list[float], choices: list[int]) -> None:
        """Go on with the tokens that were chosen. Where none is left but the form is complete, the answer ends."""
        for item, guide in self._open():
            row = item.row
            try:
                if isfinite(best[row]):
                    if guide.take(choices[row]) == "complete":
                        self.forms[row] = "complete"
                elif best[row] == -inf and guide.accepts():
                    best[row], choices[row] = 0.0, guide.end_token
                    self.forms[row] = "ended"
            except NoTokenLeft as error:
                self.refusals[row] = str(error)

    def _open(self) -> list[tuple[RuledRow, Guide]]:
        return [(item, guide) for item, guide in self._guides if item.row not in self.refusals]
