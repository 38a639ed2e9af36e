"""A quantized weight in the layout that the C kernels read (peqa_weight in quant_matmul.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from peqa_kernels.packing import unpack_codes
from peqa_kernels.quant_matmul.weight import QuantizedWeight

PANEL = 32  # outputs of one panel; the last panel of each segment may be filled up


class WeightStruct(ctypes.Structure):
    """peqa_weight of quant_matmul.h, field by field."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("panel", ctypes.c_void_p),
        ("panels", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("segments", ctypes.c_int64),
    )


class PackedWeight:
    """One weight in the run-time layout, with the C struct that points into it. Frozen once made."""

    def __init__(self, weight: QuantizedWeight, segments: tuple[int, ...] | None = None) -> None:
        """Lay `weight` out; `segments` are the output sizes of fused siblings (default: one)."""
        segments = (weight.out_features,) if segments is None else segments
        assert sum(segments) == weight.out_features, (segments, weight.out_features)
        assert weight.qweight.device.type == "cpu", weight.qweight.device
        self.out_features = weight.out_features
        self.in_features = weight.in_features
        self.segments = segments
        index, self._panel = _panels(segments)
        width = (
            4 if weight.bits == 3 else weight.bits
        )  # 3 bit: shifts of 4 decode faster, and no code spans words
        centre = 1 << (weight.bits - 1)
        self._codes = _codes(weight, index, width, centre)
        self._scales = _lanes(weight.scales.float(), index)
        zeros = weight.zeros.float() - centre
        self._zeros = _lanes(zeros, index) if bool(zeros.any()) else None
        self.struct = WeightStruct(
            self._codes.data_ptr(),
            self._scales.data_ptr(),
            None if self._zeros is None else self._zeros.data_ptr(),
            self._panel.data_ptr(),
            index.shape[0],
            weight.groups,
            weight.group_size,
            width,
            weight.in_features,
            weight.out_features,
            len(segments),
        )
        self.pointer = ctypes.addressof(self.struct)

    @property
    def nbytes(self) -> int:
        """Bytes of the run-time layout."""
        tensors = (self._codes, self._scales, self._zeros)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _panels(segments: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Outputs of each panel, int64 [panels, PANEL] (-1 = filling), and (first, outputs, segment), int32 [panels, 3]."""
    index, panel = [], []
    first = 0
    for segment, size in enumerate(segments):
        for start in range(0, size, PANEL):
            outputs = min(PANEL, size - start)
            lane = torch.arange(PANEL)
            index.append(torch.where(lane < outputs, lane + first + start, -1))
            panel.append((first + start, outputs, segment))
        first += size
    return torch.stack(index), torch.tensor(panel, dtype=torch.int32)


def _lanes(values: Tensor, index: Tensor) -> Tensor:
    """Rearrange [N, G] to [panels, G, PANEL], zero in the filling lanes."""
    picked = values[index.clamp(min=0)].masked_fill(index.unsqueeze(-1) < 0, 0.0)  # [panels, PANEL, G]
    return picked.transpose(1, 2).contiguous()


def _codes(weight: QuantizedWeight, index: Tensor, width: int, centre: int) -> Tensor:
    """Centre the codes, fill each group up to whole words, and put lanes innermost."""
    codes = unpack_codes(weight.qweight, weight.bits, weight.in_features)
    per_word = 4 if width == 8 else 32 // width
    parts = []
    for some in index.split(256):  # a head of 50 000 outputs would need several GiB at once
        part = codes[some.clamp(min=0)].to(torch.int32) - centre  # [some, PANEL, K]
        part = part.masked_fill_(some.unsqueeze(-1) < 0, 0)
        part = part.view(*part.shape[:2], weight.groups, weight.group_size)
        part = torch.nn.functional.pad(part, (0, -weight.group_size % per_word)).flatten(2).transpose(1, 2)
        if width == 8:
            parts.append(part.to(torch.int8).contiguous())
            continue
        part = part.unflatten(1, (-1, per_word)) & ((1 << width) - 1)  # [some, words, per_word, PANEL]
        shift = (torch.arange(per_word, dtype=torch.int32) * width).view(-1, 1)
        parts.append((part << shift).sum(2, dtype=torch.int32))
    return torch.cat(parts)
