"""AWQ checkpoints of version GEMM (AutoAWQ's WQLinear_GEMM): 4 bits, packed along the outputs.

    qweight  int32 [K, N / 8]    field i of word c holds output 8 c + ORDER[i]
    qzeros   int32 [G, N / 8]    in the same order, as they are
    scales   float [G, N]

Activation scales are folded into the norms and linears before, which come from the same checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model.base_checkpoint import Precision
from peqa_runtime.model.importers.coded_linear import CodedLinear
from peqa_runtime.model.importers.words import unpack_words

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = [_ORDER.index(i) for i in range(8)]
_BITS = 4


class AwqLayout:
    """The one layout."""

    label = "awq"
    marker = "qweight"
    leaves = frozenset({"qweight", "qzeros", "scales"})

    def precision(self, linear: CodedLinear) -> Precision:
        """See `Layout`."""
        if linear.out_features % 8:
            raise linear.refuse(
                f"AWQ packs outputs by eights, and there are {linear.out_features}; the file is damaged"
            )
        shape = linear.shape("scales")
        precision = linear.precision(_BITS, shape[0] if shape else 0)
        groups = precision.groups(linear.in_features)
        linear.need("qweight", (linear.in_features, linear.out_features // 8), "I32")
        linear.need("qzeros", (groups, linear.out_features // 8), "I32")
        linear.need("scales", (groups, linear.out_features))
        return precision

    def read(self, linear: CodedLinear) -> QuantizedWeight:
        """See `Layout`."""
        self.precision(linear)
        codes, zeros = (_columns(linear.tensor(leaf), linear.out_features) for leaf in ("qweight", "qzeros"))
        return linear.weight(codes.t(), linear.tensor("scales").t(), zeros.t(), _BITS)


def _columns(words: Tensor, count: int) -> Tensor:
    """int32 [R, N / 8] -> uint8 [R, N] in the order of outputs."""
    return unpack_words(words, _BITS, count).view(len(words), -1, 8)[..., _PLACE].flatten(1)


def awq_layout(config: Mapping[str, Any]) -> AwqLayout:
    """The layout that an AWQ `quantization_config` (or quant_config.json) names.

    Raises `InvalidCheckpoint` for one that cannot be imported.
    """
    version = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm")
    if version.lower() != "gemm":
        raise InvalidCheckpoint(f"AWQ checkpoints of version {version!r} cannot be imported; 'gemm' can")
    bits = config.get("bits", config.get("w_bit", _BITS))
    if bits != _BITS:
        raise InvalidCheckpoint(f"AWQ checkpoints of {bits!r} bits cannot be imported; 4 can")
    return AwqLayout()
