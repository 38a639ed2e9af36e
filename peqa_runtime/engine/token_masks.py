"""Which tokens may come next in answers that keep to a form: bits for all rows of a step at once, then off the logits.

llguidance fills one buffer that is used again in every step, several rows at a time on threads of its own, without the
interpreter's lock. A device gets the bits, a thirty-second of the numbers that they stand for.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peqa_runtime.engine.grammar import llguidance
from peqa_runtime.engine.guidance import Guide, NoTokenLeft
from peqa_runtime.engine.token_rules import add

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_PENALTIES = np.where(_BITS == 1, np.float32(0), np.float32(-np.inf))
"""For each byte of a mask what to add to the logits of its eight tokens: [256, 8]."""


class TokenMasks:
    """The buffer and the threads; belongs to the thread that samples."""

    def __init__(self) -> None:
        self._bits = np.zeros((0, 0), dtype=np.int32)  # [rows, words]
        self._penalties = np.zeros((0, 8), dtype=np.float32)  # of one row
        self._executor: Any = None

    def forbid(self, guides: Items[tuple[int, Guide]], logits: Tensor) -> dict[int, str]:
        """Take what the forms do not allow out of rows of float32 logits [rows, vocab]; what is NaN stays so.

        `guides`: of different rows. Returns the rows whose form can go on with nothing, each with the reason.
        """
        bits = self._filled([guide for _, guide in guides], logits.shape[-1])
        refusals: dict[int, str] = {}
        for (row, guide), mask in zip(guides, bits, strict=True):
            try:
                guide.finish_mask(mask)
            except NoTokenLeft as error:
                refusals[row] = str(error)
        if logits.device.type == "cpu":
            for (row, _), mask in zip(guides, bits, strict=True):
                if row not in refusals:
                    add(logits, row, self._penalties_of(mask, logits.shape[-1]))
        else:
            _add_on_device(logits, [row for row, _ in guides], torch.from_numpy(bits))
        return refusals

    def _filled(self, guides: Items[Guide], vocab_size: int) -> NDArray[np.int32]:
        """A mask for each guide, [guides, words]."""
        words = -(-vocab_size // 32)
        if len(self._bits) < len(guides) or self._bits.shape[1] != words:
            self._bits = np.zeros((len(guides), words), dtype=np.int32)
        bits = self._bits[: len(guides)]
        if len(guides) == 1:
            guides[0].matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        elif guides:
            if self._executor is None:
                self._executor = llguidance.LLExecutor()
            matchers = [(guide.matcher, place) for place, guide in enumerate(guides)]
            self._executor.unsafe_compute_mask_ptr(matchers, bits.ctypes.data, words * 4, len(guides))
        return bits

    def _penalties_of(self, mask: NDArray[np.int32], vocab_size: int) -> Tensor:
        """0 where a token may come, else -inf: [vocab], until the next call."""
        allowed = mask.view(np.uint8)
        if len(self._penalties) != len(allowed):
            self._penalties = np.zeros((len(allowed), 8), dtype=np.float32)
        np.take(_PENALTIES, allowed, axis=0, out=self._penalties, mode="clip")
        return torch.from_numpy(self._penalties.reshape(-1)[:vocab_size])


def _add_on_device(logits: Tensor, rows: list[int], bits: Tensor) -> None:
    """Add 0 or -inf to rows of logits; bits int32 [len(rows), words], in host memory."""
    vocab_size = logits.shape[-1]
    words = bits.to(logits.device).unsqueeze(-1)
    each = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((words >> each) & 1).bool().view(len(rows), -1)[:, :vocab_size]
    at = torch.tensor(rows, dtype=torch.int64, device=logits.device)
    logits.index_add_(0, at, torch.zeros_like(allowed, dtype=logits.dtype).masked_fill_(~allowed, -torch.inf))
