"""HQQ checkpoints in safetensors (hqq's save_to_safetensors): a linear and its meta data, tensor by tensor.

    W_q    the codes [N * G, group size] (axis 1), packed along the rows: 8 bits as they are, 4 bits the first half of
           the rows above the second, 2 bits in quarters, 3 bits in tenths, the first in the highest bits of an int32
    scale  zero   [N * G, 1]; w = (code - zero) * scale, zeros are fractions
    nbits  group_size  shape  axis ...   small tensors

With axis 0 the weights of a group lie across rows, which a base does not have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.model.base_checkpoint import Precision
from peqa_runtime.model.importers.coded_linear import CodedLinear

_PARTS = {8: 1, 4: 2, 3: 10, 2: 4}
_META = (
    *(
        "nbits",
        "group_size",
        "shape",
        "axis",
        "packing",
        "unpack_view_dtype",
        "view_as_float",
        "compute_dtype",
    ),
    *("quant_scale", "quant_zero", "channel_wise", "optimize", "round_zero"),
    *("offload_meta", "encoded_state_dict", "stores_quant_config"),
)


class HqqLayout:
    """Everything is told by the linear's own tensors."""

    label = "hqq"
    marker = "W_q"
    leaves = frozenset(("W_q", "scale", "zero", *_META))

    def precision(self, linear: CodedLinear) -> Precision:
        """See `Layout`."""
        if "scale" not in linear or "zero" not in linear:
            raise linear.refuse(
                "HQQ's quantized scales and zeros (quant_scale, quant_zero) cannot be imported; quantize with both off"
            )
        shape = [linear.out_features, linear.in_features]
        if "shape" in linear and linear.tensor("shape").tolist() != shape:
            raise linear.refuse(f"its shape is {linear.tensor('shape').tolist()}, the model's is {shape}")
        axis = int(_number(linear, "axis"))
        if axis != 1:
            raise linear.refuse(
                f"HQQ's axis {axis} groups weights across outputs, which a base does not; quantize with axis=1"
            )
        rows = linear.shape("scale")[0] if linear.shape("scale") else 1
        if rows % linear.out_features:
            raise linear.refuse(
                f"HQQ's {rows} groups do not divide into {linear.out_features} rows: groups lie across outputs "
                "(channel_wise off, or a group size that does not divide the inputs), which a base does not have"
            )
        bits = _number(linear, "nbits")
        precision = linear.precision(int(bits) if bits == int(bits) else 0, rows // linear.out_features)
        for leaf in ("scale", "zero"):
            linear.need(leaf, (rows, 1))
        return precision

    def read(self, linear: CodedLinear) -> QuantizedWeight:
        """See `Layout`."""
        precision = self.precision(linear)
        rows = linear.out_features * precision.groups(linear.in_features)
        packed = linear.tensor("W_q")
        try:
            packed = packed.view(torch.int32 if precision.bits == 3 else torch.uint8)  # view_as_float
        except RuntimeError:  # of a size that no words fit
            raise linear.refuse(f"W_q must hold {precision.bits}-bit codes, not {packed.dtype}") from None
        columns = linear.in_features * linear.out_features // rows
        if tuple(packed.shape) != (-(-rows // _PARTS[precision.bits]), columns):
            raise linear.refuse(
                f"W_q of shape {list(packed.shape)} does not hold {rows} x {columns} codes of {precision.bits} bits"
            )
        codes = _unpack(packed, precision.bits)[:rows].reshape(linear.out_features, linear.in_features)
        scales, zeros = (linear.tensor(leaf).view(linear.out_features, -1) for leaf in ("scale", "zero"))
        return linear.weight(codes, scales, zeros, precision.bits)


def _number(linear: CodedLinear, leaf: str) -> Any:
    value = linear.tensor(leaf)
    if value.numel() != 1 or not bool(torch.isfinite(value).all()):
        raise linear.refuse(f"{leaf} must be one number")
    return value.item()


def _unpack(packed: Tensor, bits: int) -> Tensor:
    parts = _PARTS[bits]
    fields = [(packed >> (bits * (parts - 1 - i))) & ((1 << bits) - 1) for i in range(parts)]
    return torch.cat(fields).to(torch.uint8)
