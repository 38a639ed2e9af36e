"""Types of the op: a quantized weight as files hold it, and one linear's part of the scale bank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from peqa_kernels.quant_matmul.checks import check_weight


@dataclass(frozen=True)
class QuantizedWeight:
    """A frozen linear: w[n, k] = scales[n, g(k)] * (code[n, k] - zeros[n, g(k)]), g(k) = k // group_size.

    Zero points may be fractional. One group per row (G = 1) is "per channel".
    """

    qweight: Tensor  # uint8 [N, ceil(K * bits / 8)], see peqa_kernels.packing
    scales: Tensor  # float32 [N, G]
    zeros: Tensor  # float32 [N, G]
    bits: int  # 2, 3, 4 or 8
    in_features: int  # K

    def __post_init__(self) -> None:
        """Raise QuantMatmulInputError for tensors that are not what the fields above say."""
        check_weight(self)

    @property
    def out_features(self) -> int:
        """N."""
        return self.scales.shape[0]

    @property
    def groups(self) -> int:
        """G, groups per row."""
        return self.scales.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs per group."""
        return self.in_features // self.groups

    def shapes(self) -> QuantizedWeight:
        """The same weight without its numbers: on the device "meta"."""
        tensors = {name: getattr(self, name).to("meta") for name in ("qweight", "scales", "zeros")}
        return replace(self, **tensors)

    def present(self) -> QuantizedWeight:
        """This weight; RuntimeError when its numbers were freed for serving."""
        if self.qweight.is_meta:
            raise RuntimeError("this weight serves and has no codes any more: load the base anew to use them")
        return self


@dataclass
class LinearBank:
    """One linear's device rows: each row holds one task's scales relative to the base (1.0 = base).

    Row 0 of each tensor is the base and always ones. Fused siblings (q/k/v, gate/up) share one LinearBank:
    `segments` are their output sizes, and each segment has an input scale of its own. Tensors are allocated
    once and only ever copied into; `in_scale` and `group_scale` stay None until a set needs them.
    """

    segments: tuple[int, ...]  # sum = N
    out_scale: Tensor  # float32, or float16 where `bank_dtype` says so, [rows, N]
    in_scale: Tensor | None = None  # the same dtype [rows, len(segments), K]
    group_scale: Tensor | None = None  # the same dtype [group_rows, G, N]
