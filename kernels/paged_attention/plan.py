"""What the host knows of a step before it runs, so that no launch has to ask the device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionPlan:
    """Upper bounds of one step, the same for all layers, and the mode. The CPU paths need none of it.

    The bounds decide how many programs are launched and nothing else: a token's bits do not hang on them. A CUDA graph
    is captured under the largest bounds that it will be replayed with. Without a plan they follow from the shapes of
    the tensors, which costs programs that find nothing to do.
    """

    max_new: int  # new tokens of the sequence that brings the most
    max_len: int  # keys of the longest sequence, its new tokens included
    invariant: bool = False  # on a GPU: one tile shape for decode and prefill, see `paged_attention`
