"""What a request says token by token of what may be chosen: biases, allowed tokens, bad words, a form.

One `TokenRules` for each sequence that has such fields; it lives as long as the sequence. What it does to a row of
logits depends on that sequence alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from peqa_runtime.engine.guidance import Guidance, Guide
from peqa_runtime.engine.logit_rows import LogitRows
from peqa_runtime.engine.sequence import Sequence

NOTHING_LEFT = (
    "no token is left to choose: what the request forbids (by the form of the answer, allowed_token_ids, bad_words or "
    "min_tokens) is together everything"
)


class TokenRules:
    """The rules of one sequence, on the device of its logits."""

    def __init__(
        self, sequence: Sequence, vocab_size: int, device: torch.device, guidance: Guidance | None
    ) -> None:
        params = sequence.request.params
        self._sequence = sequence
        self._device = device
        self._bias: tuple[Tensor, Tensor] | None = None  # token ids and what to add
        if params.logit_bias:
            tokens, values = zip(*params.logit_bias, strict=True)
            self._bias = self._ids(list(tokens)), torch.tensor(values, device=device)
        self._penalties: Tensor | None = None  # 0 or -inf for each token of the vocabulary
        single = [word[0] for word in params.bad_words if len(word) == 1]
        if params.allowed_token_ids is not None or single:
            allowed = params.allowed_token_ids
            self._penalties = torch.full((vocab_size,), 0.0 if allowed is None else -torch.inf, device=device)
            self._penalties[self._ids(list(allowed or ()))] = 0.0
            self._penalties[self._ids(single)] = -torch.inf
        self._words = [word for word in params.bad_words if len(word) > 1]
        self.guide: Guide | None = None
        if params.structured is not None:
            assert guidance is not None, "no engine has given its guidance"
            self.guide = Guide(
                guidance,
                params.structured,
                params.stop_token_ids,
                ignore_eos=params.ignore_eos,
                form=sequence.form,
            )

    def bias(self, logits: Tensor, row: int) -> None:
        """Add the biases to a row of logits [rows, vocab]."""
        if self._bias is not None:
            tokens, values = self._bias
            logits[row, tokens] += values

    def forbid(self, logits: Tensor, row: int) -> None:
        """Take what is not allowed and what would complete a bad word out of a row of logits [rows, vocab]."""
        if self._penalties is not None:
            add(logits, row, self._penalties)
        if self._words and (ends := list(self._ends_of_words())):
            logits[row, self._ids(ends)] = -torch.inf

    def _ends_of_words(self) -> Iterator[int]:
        """The last tokens of bad words whose other tokens the answer ends with."""
        tokens, generated = self._sequence.token_ids, self._sequence.num_generated_tokens
        for word in self._words:
            length = len(word) - 1
            if length <= generated and tuple(tokens[-length:]) == word[:-1]:
                yield word[-1]

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self._device)


def add(logits: Tensor, row: int, values: Tensor) -> None:
    """Add float32 values [vocab] to a row of logits [rows, vocab]. What is NaN stays so, and is found."""
    if logits.device.type == "cpu":
        # Torch shares a row among threads and waits for them: milliseconds on a busy machine, 10 microseconds here.
        sums = logits.numpy()[row]
        np.add(sums, values.numpy(), out=sums)
    else:
        logits[row] += values.to(logits.device)


class RuledRow(NamedTuple):
    """A row of logits whose choice has rules. `place`: its sequence's in the batch."""

    place: int
    row: int
    sequence: Sequence
    rules: TokenRules


class RuleBook:
    """The rules of all sequences in work."""

    def __init__(self, guidance: Guidance | None) -> None:
        self._guidance = guidance
        self._rules: WeakKeyDictionary[Sequence, TokenRules] = WeakKeyDictionary()

    def rows(self, layout: LogitRows, logits: Tensor) -> list[RuledRow]:
        """The step's rows that have rules. Raises `InvalidRequest` when a form cannot be compiled (any more)."""
        found = []
        for place, row, sequence in layout.ruled:
            rules = self._rules.get(sequence)
            if rules is None:
                rules = TokenRules(sequence, logits.shape[-1], logits.device, self._guidance)
                self._rules[sequence] = rules
            found.append(RuledRow(place, row, sequence, rules))
        return found
