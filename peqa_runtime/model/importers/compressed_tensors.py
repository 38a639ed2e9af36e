"""compressed-tensors checkpoints of format pack-quantized (llm-compressor, vLLM's tool-chain).

    weight_packed      int32 [N, words of K]    codes along the inputs, lowest bits first, each plus 2 ** (bits - 1)
    weight_scale       float [N, G]             G = 1: strategy "channel"
    weight_zero_point  int32 [words of N, G]    asymmetric only: packed along the outputs, plus 2 ** (bits - 1) too
    weight_shape       int64 [2]                N, K

w = (code - zero) * scale, where both may be read with the offset. Rows are one stream of bits; files from before that
(until 2025) have 32 // bits codes of 3 bits in a word, which their shape shows, and int8 zeros unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model.base_checkpoint import Precision
from peqa_runtime.model.importers.coded_linear import BITS, CodedLinear
from peqa_runtime.model.importers.words import unpack_words, words_of

FORMAT = "pack-quantized"


class CompressedLayout:
    """Bits and groups are told by the shapes; `bits` are those that the config's groups name."""

    label = f"compressed-tensors {FORMAT}"
    marker = "weight_packed"
    leaves = frozenset({"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"})

    def __init__(self, bits: frozenset[int]) -> None:
        self._bits = bits

    def precision(self, linear: CodedLinear) -> Precision:
        """See `Layout`."""
        bits, dense = self._packing(linear)
        shape = linear.shape("weight_scale")
        if len(shape) != 2 or shape[0] != linear.out_features:
            raise linear.refuse(
                f"weight_scale has shape {list(shape)}; strategies 'group' and 'channel' can be imported, which have "
                f"{linear.out_features} rows of scales"
            )
        precision = linear.precision(bits, shape[1])
        groups = precision.groups(linear.in_features)
        linear.need(
            "weight_packed", (linear.out_features, words_of(linear.in_features, bits, dense=dense)), "I32"
        )
        if "weight_zero_point" in linear:
            if linear.dtype("weight_zero_point") == "I32":
                words = words_of(linear.out_features, bits, dense=dense)
                linear.need("weight_zero_point", (words, groups), "I32")
            else:
                linear.need("weight_zero_point", (linear.out_features, groups), "I8")
        linear.check_groups_in_order("weight_g_idx", groups)
        said = linear.tensor("weight_shape").tolist() if "weight_shape" in linear else None
        if said not in (None, [linear.out_features, linear.in_features]):
            raise linear.refuse(
                f"weight_shape is {said}, the model's is {[linear.out_features, linear.in_features]}"
            )
        return precision

    def read(self, linear: CodedLinear) -> QuantizedWeight:
        """See `Layout`."""
        precision = self.precision(linear)
        bits, dense = self._packing(linear)
        codes = unpack_words(linear.tensor("weight_packed"), bits, linear.in_features, dense=dense)
        groups = precision.groups(linear.in_features)
        return linear.weight(
            codes, linear.tensor("weight_scale"), self._zeros(linear, bits, groups, dense), bits
        )

    def _packing(self, linear: CodedLinear) -> tuple[int, bool]:
        """Bits, and whether a row of words is one stream."""
        shape = linear.shape("weight_packed")
        for dense in (True, False):
            for bits in sorted(self._bits):
                if shape[1:] == (words_of(linear.in_features, bits, dense=dense),):
                    return bits, dense
        raise linear.refuse(
            f"weight_packed of shape {list(shape)} does not hold {linear.in_features} inputs of "
            f"{' or '.join(map(str, sorted(self._bits)))} bits"
        )

    def _zeros(self, linear: CodedLinear, bits: int, groups: int, dense: bool) -> Tensor:
        middle = 1 << (bits - 1)
        if "weight_zero_point" not in linear:
            return torch.full((linear.out_features, groups), float(middle))
        stored = linear.tensor("weight_zero_point")
        if stored.dtype == torch.int8:
            return stored.to(torch.int32) + middle
        return unpack_words(stored.t(), bits, linear.out_features, dense=dense).t()


def compressed_layout(config: Mapping[str, Any]) -> CompressedLayout:
    """The layout that a compressed-tensors `quantization_config` names.

    Raises `InvalidCheckpoint` for one that cannot be imported.
    """
    kind = config.get("format")
    groups = config.get("config_groups")
    if (
        not isinstance(groups, dict)
        or not all(isinstance(group, dict) for group in groups.values())
        or not groups
    ):
        raise InvalidCheckpoint("quantization_config.config_groups must say how linears are quantized")
    if config.get("transform_config"):
        raise InvalidCheckpoint(
            "compressed-tensors checkpoints with a transform_config rotate activations, which cannot be imported"
        )
    bits: set[int] = set()
    for name, group in groups.items():
        bits.add(_bits_of(name, group, group.get("format") or kind))
    return CompressedLayout(frozenset(bits))


def _bits_of(name: str, group: Mapping[str, Any], kind: Any) -> int:
    if kind != FORMAT:
        raise InvalidCheckpoint(f"compressed-tensors of format {kind!r} cannot be imported; {FORMAT!r} can")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise InvalidCheckpoint(f"config_groups.{name} says nothing of weights")
    if group.get("input_activations") or group.get("output_activations"):
        raise InvalidCheckpoint(
            f"config_groups.{name} quantizes activations too, which a base does not; weight-only checkpoints (W4A16, "
            "W8A16) can be imported"
        )
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy not in ("group", "channel"):
        raise InvalidCheckpoint(
            f"config_groups.{name} has strategy {strategy!r}; 'group' and 'channel' can be imported"
        )
    bits = weights.get("num_bits")
    if bits not in BITS or str(weights.get("type", "int")) != "int":
        raise InvalidCheckpoint(
            f"config_groups.{name} has {weights.get('type', 'int')} weights of {bits!r} bits; integers of 2, 3, 4 or "
            "8 can be imported"
        )
    return int(bits)
