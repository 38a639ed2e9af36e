"""A quantized weight in the layout that the C kernels read (peqa_weight in quant_matmul.h)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from peqa_kernels.native.huge_pages import Arena
from peqa_kernels.packing import unpack_codes
from peqa_kernels.quant_matmul.weight import QuantizedWeight

PANEL = 32  # outputs of one panel; the last panel of each segment may be filled up
UNIT = 32  # inputs whose codes lie together; groups are filled up to a multiple


class WeightStruct(ctypes.Structure):
    """peqa_weight of quant_matmul.h, field by field."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("panel", ctypes.c_void_p),
        ("panels", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("half", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("segments", ctypes.c_int64),
        ("activation_bits", ctypes.c_int64),
    )


class PackedWeight:
    """One weight in the run-time layout, with the C struct that points into it. Its numbers never change."""

    def __init__(
        self,
        weight: QuantizedWeight,
        segments: tuple[int, ...] | None = None,
        *,
        halves: bool = False,
    ) -> None:
        """Lay `weight` out; `segments` are the output sizes of fused siblings (default: one).

        With `halves`, scales and offsets (scale times zero point) are kept as fp16 where that is as good as exact.
        """
        segments = (weight.out_features,) if segments is None else segments
        assert sum(segments) == weight.out_features, (segments, weight.out_features)
        assert weight.qweight.device.type == "cpu", weight.qweight.device
        self.out_features = weight.out_features
        self.in_features = weight.in_features
        self.segments = segments
        index, self._panel = _panels(segments)
        centre = 1 << (weight.bits - 1)
        self._codes = _codes(weight, index)
        centred = bool((weight.zeros == centre).all())
        tables = [weight.scales] if centred else [weight.scales, weight.scales * weight.zeros]
        half = halves and all(_fits_half(table) for table in tables)
        lanes = [_lanes(table.half() if half else table.float(), index) for table in tables]
        self._scales = lanes[0]
        self._offsets = None if centred else lanes[1]
        self.struct = WeightStruct(
            self._codes.data_ptr(),
            self._scales.data_ptr(),
            None if self._offsets is None else self._offsets.data_ptr(),
            self._panel.data_ptr(),
            index.shape[0],
            weight.groups,
            weight.group_size,
            weight.bits,
            int(half),
            weight.in_features,
            weight.out_features,
            len(segments),
            16,
        )
        self.pointer = ctypes.addressof(self.struct)

    def set_activation_bits(self, bits: int) -> None:
        """16, or 8 for products that are quicker and coarser (pack_rows.c); from the next product on."""
        assert bits in (8, 16), bits
        self.struct.activation_bits = bits

    @property
    def room(self) -> int:
        """Bytes that it takes of an arena."""
        return sum(Arena.room(tensor) for tensor in self._tables())

    def move_to(self, arena: Arena) -> None:
        """Lie in `arena` from now on; what held it before is freed. Not while it is multiplied."""
        for name in ("codes", "scales", "offsets"):
            tensor = getattr(self, f"_{name}")
            if tensor is not None:
                moved = arena.copy(tensor)
                setattr(self, f"_{name}", moved)
                setattr(self.struct, name, moved.data_ptr())

    def _tables(self) -> list[Tensor]:
        tensors = (self._codes, self._scales, self._offsets)
        return [tensor for tensor in tensors if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the run-time layout."""
        return sum(tensor.nbytes for tensor in self._tables())


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


def _fits_half(table: Tensor) -> bool:
    """Whether fp16 holds every value, up to the rounding of a fp32 product of two numbers."""
    exact = table.double()
    return bool(((table.half().double() - exact).abs() <= exact.abs() * 2.0**-22).all())


def _lanes(values: Tensor, index: Tensor) -> Tensor:
    """Rearrange [N, G] to [panels, G, PANEL], zero in the filling lanes."""
    picked = values[index.clamp(min=0)].masked_fill(index.unsqueeze(-1) < 0, 0.0)  # [panels, PANEL, G]
    return picked.transpose(1, 2).contiguous()


def _codes(weight: QuantizedWeight, index: Tensor) -> Tensor:
    """Fill each group up to whole units and lay pairs out as codes.h says, int32 [panels, units, bits, PANEL]."""
    codes = unpack_codes(weight.qweight, weight.bits, weight.in_features)
    parts = []
    for some in index.split(256):  # a head of 50 000 outputs would need several GiB at once
        part = codes[some.clamp(min=0)].to(torch.int32)  # [some, PANEL, K]
        part = part.masked_fill_(some.unsqueeze(-1) < 0, 0)
        part = part.view(*part.shape[:2], weight.groups, weight.group_size)
        part = torch.nn.functional.pad(part, (0, -weight.group_size % UNIT)).flatten(2).transpose(1, 2)
        part = part.reshape(len(some), -1, 2, UNIT // 2, PANEL)  # [some, units, half, pairs, PANEL]
        parts.append(_words(part[:, :, 0] | part[:, :, 1] << 16, weight.bits))
    return torch.cat(parts)


def _words(pairs: Tensor, bits: int) -> Tensor:
    """Put the pairs of each unit, [some, units, 16, PANEL], into words, int32 [some, units, bits, PANEL]."""
    per_word = 5 if bits == 3 else UNIT // 2 // bits
    shift = (torch.arange(per_word, dtype=torch.int32) * bits).view(-1, 1)
    split = pairs[:, :, : bits * per_word].unflatten(2, (bits, per_word))
    words = (split << shift).sum(3, dtype=torch.int32)
    if bits == 3:  # each word has one bit left in either half
        words |= (pairs[:, :, 15:] >> torch.arange(3, dtype=torch.int32).view(-1, 1) & 0x10001) << 15
    return words
