"""GPTQ checkpoints (AutoGPTQ, GPTQModel, optimum), and EfficientQAT's, which look the same but for zeros and 3 bits.

    qweight  int32 [words of K, N]   codes along the inputs, lowest bits first
    qzeros   int32 [G, words of N]   zeros along the outputs; v1 ("gptq") stores each minus one, v2 ("gptq_v2") as it is
    scales   float [G, N]
    g_idx    int32 [K]               the group of each input

In GPTQ's files a row of words is one stream of bits: 32 codes of 3 bits fill three words. EfficientQAT has 32 // bits
codes in a word, ten of 3 bits, and zeros as they are (its quantize/int_linear_real.py).

A v1 zero of 0 is stored as a field of ones, minus a borrow from its neighbour. So the ones are added to whole words and
carry back, as GPTQModel does on load (convert_gptq_v1_to_v2_format_module); at 3 bits it adds to each field by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model.base_checkpoint import Precision
from peqa_runtime.model.importers.coded_linear import BITS, CodedLinear
from peqa_runtime.model.importers.words import unpack_words, words_of

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class GptqLayout:
    """`minus_one`: zeros are stored minus one. `dense`: a row of words is one stream of bits."""

    label: str
    minus_one: bool
    dense: bool
    bits: int | None = None
    """What the config says for all linears; None: linears may differ, and shapes tell."""
    sorted_inputs: bool = False
    """The config says desc_act, so that g_idx must be there to show whether groups are in order."""
    marker = "qweight"
    leaves = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def precision(self, linear: CodedLinear) -> Precision:
        """See `Layout`."""
        rows = linear.shape("qweight")[0] if linear.shape("qweight") else 0
        fitting = [b for b in BITS if words_of(linear.in_features, b, dense=self.dense) == rows]
        if not fitting or (self.bits is not None and self.bits not in fitting):
            said = f"{self.bits} bits" if self.bits else "2, 3, 4 or 8 bits"
            raise linear.refuse(
                f"qweight of shape {list(linear.shape('qweight'))} does not hold {linear.in_features} inputs of {said} "
                f"as {self.label} packs them"
            )
        bits = fitting[0] if self.bits is None else self.bits
        shape = linear.shape("scales")
        precision = linear.precision(bits, shape[0] if shape else 0)
        groups = precision.groups(linear.in_features)
        linear.need("qweight", (rows, linear.out_features), "I32")
        linear.need("scales", (groups, linear.out_features))
        linear.need("qzeros", (groups, words_of(linear.out_features, bits, dense=self.dense)), "I32")
        if self.sorted_inputs and groups > 1 and "g_idx" not in linear:
            raise linear.refuse(
                "its config says desc_act, and there is no g_idx that shows the order of inputs"
            )
        linear.check_groups_in_order("g_idx", groups)
        return precision

    def read(self, linear: CodedLinear) -> QuantizedWeight:
        """See `Layout`."""
        bits = self.precision(linear).bits
        codes = unpack_words(linear.tensor("qweight").t(), bits, linear.in_features, dense=self.dense)
        zeros = self._zeros(linear.tensor("qzeros"), bits, linear.out_features)
        return linear.weight(codes, linear.tensor("scales").t(), zeros.t(), bits)

    def _zeros(self, words: Tensor, bits: int, count: int) -> Tensor:
        if not self.minus_one:
            return unpack_words(words, bits, count, dense=self.dense)
        if bits == 3:
            return (unpack_words(words, bits, count, dense=self.dense) + 1) & 7
        return unpack_words(words + _ONES[bits], bits, count)


def gptq_layout(config: Mapping[str, Any]) -> GptqLayout:
    """The layout that a GPTQ `quantization_config` (or quantize_config.json) names.

    Raises `InvalidCheckpoint` for one that cannot be imported.
    """
    kind = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if config.get("is_marlin_format"):
        kind = "marlin"
    if kind not in ("gptq", "gptq_v2"):
        raise InvalidCheckpoint(
            f"GPTQ checkpoints of format {kind!r} cannot be imported; 'gptq' and 'gptq_v2' can (GPTQModel converts)"
        )
    bits = config.get("bits")
    if type(bits) is not int or bits not in BITS:
        raise InvalidCheckpoint(f"GPTQ checkpoints of {bits!r} bits cannot be imported; 2, 3, 4 and 8 can")
    return GptqLayout(
        kind,
        kind == "gptq",
        dense=True,
        bits=None if config.get("dynamic") else bits,
        sorted_inputs=bool(config.get("desc_act")),
    )


EFFICIENT_QAT = GptqLayout("efficientqat", minus_one=False, dense=False)
