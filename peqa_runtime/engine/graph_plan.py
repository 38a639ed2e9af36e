"""Which decode steps get a CUDA graph, and the memory that these graphs will want. Plain numbers, no device."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

FIRST_REACH = 4096
"""Up to here a launch of attention has 16 programs per sequence and head; one for 128 000 keys has 81, most of which
a short sequence leaves without work. So contexts up to this length have graphs of their own, longer ones the others."""

_OBJECTS_PER_LAYER = (
    512 << 10
)  # what the driver may keep of one layer's launches in one graph: a guess, on the safe side
_TEMPORARIES = 8  # widest results that are alive at a time within a layer, in fp32


class Bucket(NamedTuple):
    """One graph: a decode step of up to `sequences`, none of which has more than `reach` tokens."""

    sequences: int
    reach: int
    grouped: bool = False  # some of them under `group` sets


@dataclass(frozen=True)
class GraphPlan:
    """The buckets: `sizes` of batches and `reaches` of contexts, both ascending, as are those of no more than these.

    Powers of two, because the quantized matmul takes the same tiles for all batches up to 8, 16, 32, 64 … rows: sizes
    between them would compute the same. The block tables of a graph are as wide as its reach: a kernel reads no entry
    behind a sequence's own, so width costs a copy of 4 bytes a block and nothing else.
    """

    sizes: tuple[int, ...]
    reaches: tuple[int, ...]

    @classmethod
    def of(cls, max_sequences: int, max_model_len: int) -> GraphPlan:
        """The plan of an engine that runs at most so many sequences of so many tokens at once."""
        sizes = [1 << i for i in range((max_sequences - 1).bit_length())]
        reaches = [FIRST_REACH] if max_model_len > FIRST_REACH else []
        return cls((*sizes, max_sequences), (*reaches, max_model_len))

    @property
    def buckets(self) -> list[Bucket]:
        """All of them without group sets, the largest first: what they take is then reused by the smaller ones."""
        return [Bucket(size, reach) for reach in reversed(self.reaches) for size in reversed(self.sizes)]

    def find(self, sequences: int, longest: int, *, grouped: bool = False) -> Bucket | None:
        """The smallest bucket for so many sequences, the longest of which has so many tokens; None: none is enough."""
        size = next((size for size in self.sizes if sequences <= size), None)
        reach = next((reach for reach in self.reaches if longest <= reach), None)
        return None if size is None or reach is None else Bucket(size, reach, grouped)


def graph_bytes(
    plan: GraphPlan, *, vocab_size: int, widths: Items[int], heads: int, d_v: int, layers: int, splits: int
) -> int:
    """Device memory to leave for the plan's graphs: an estimate from shapes, held against the truth in the log.

    The graphs share their memory, so the largest one counts: logits (the result, and once more on their way), the
    temporaries of a layer, the parts in which attention is computed. And what the driver keeps of each.

    Args:
        plan: the graphs.
        vocab_size: width of the logits.
        widths: inputs and outputs together of each linear.
        heads, d_v: query heads and width of a value, of the layer that has the most.
        layers: how many.
        splits: parts of the keys at the longest reach.
    """
    rows = plan.sizes[-1]
    logits = 3 * rows * vocab_size * 4
    activations = _TEMPORARIES * rows * max(widths) * 4
    attention = rows * splits * heads * (d_v + 2) * 4
    return logits + activations + attention + len(plan.buckets) * layers * _OBJECTS_PER_LAYER
