"""One step's tensors, as every attention layer needs them. Made by the engine, handed through the model's forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from peqa_kernels.paged_attention import AttentionPlan


@dataclass(frozen=True)
class ForwardContext:
    """Where the step's packed tokens belong. Tokens of one sequence are adjacent, in the order of `block_tables`.

    All tensors are on the model's device; see `peqa_kernels.paged_attention` for what they mean to the op.
    """

    block_tables: Tensor  # int32 [seqs, max_blocks]
    query_starts: (
        Tensor  # int32 [seqs + 1], first token of each sequence in the pack; the last entry is `tokens`
    )
    seq_lens: Tensor  # int32 [seqs], keys of each sequence, this step's tokens included
    slot_mapping: Tensor  # int64 [tokens], block * block_size + offset; -1 = not written (padding)
    plan: AttentionPlan | None = (
        None  # what the host knows of the step: spares a GPU launches that find no work
    )
