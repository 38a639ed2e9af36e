"""The op: a quantized linear of which every activation row may belong to another task.

    y[m, n] = b[n] + out[row[m], n] * sum_g s[m, n, g] * sum_{k in g} (x[m, k] * in[row[m], k]) * (q[n, k] - z[n, g])
    s[m, n, g] = s0[n, g] * group_scale[group_row[m], g, n]

q, z and s0 are frozen; a task owns only `out`, `in` and `group_scale`, kept in the rows of a LinearBank. The inner
sum never depends on the task, so one launch serves a batch of many tasks. Importing this loads no triton.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from peqa_kernels.quant_matmul.backward import scaled_linear
from peqa_kernels.quant_matmul.checks import QuantMatmulInputError, check_inputs, check_segments
from peqa_kernels.quant_matmul.compiled import Handle, quant_matmul_op
from peqa_kernels.quant_matmul.cpu import NativeCpu, TorchCpu
from peqa_kernels.quant_matmul.dense import DenseCopies
from peqa_kernels.quant_matmul.reference import dequantize, quant_matmul_reference
from peqa_kernels.quant_matmul.weight import LinearBank, QuantizedWeight

if TYPE_CHECKING:
    from peqa_kernels.native import NativeOps, PackedWeight
    from peqa_kernels.quant_matmul.gpu import TritonGpu

__all__ = [
    "ACTIVATION_BITS",
    "BACKENDS",
    "LinearBank",
    "PreparedWeight",
    "QuantMatmulInputError",
    "QuantizedWeight",
    "bank_dtype",
    "dequantize",
    "lay_together",
    "prepare",
    "quant_matmul",
    "quant_matmul_reference",
    "scaled_linear",
]

BACKENDS = ("reference", "torch", "native", "gpu")
ACTIVATION_BITS = (16, 8)


class Backend(Protocol):
    """One way to compute the formula on one weight in that way's own layout."""

    def matmul(
        self,
        x: Tensor,
        bias: Tensor | None,
        bank: LinearBank | None,
        row: Tensor | None,
        group_row: Tensor | None,
    ) -> Tensor:
        """Give [M, N], in fp32 or x.dtype."""
        ...


class PreparedWeight:
    """A quantized weight in the layout of the backend that multiplies it. Opaque: made by `prepare` only."""

    def __init__(self, weight: QuantizedWeight, segments: tuple[int, ...], backend: str) -> None:
        """Lay the weight out for `backend`; RuntimeError when that one is not to be had here."""
        self.weight = weight
        self.device = weight.scales.device
        self.segments = segments
        self.backend = backend
        self.out_features = weight.out_features
        self.in_features = weight.in_features
        self._copies = DenseCopies(weight)
        self.bank_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
        """Dtypes that a bank may have."""
        self.seen_bank: tuple[Tensor, Tensor | None, Tensor | None] | None = None
        """Of the last call, whose shapes were found to fit."""
        self.impl = self._make(backend)
        self.handle = Handle(self.impl.matmul)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Give the dequantized base weight [N, K], kept per dtype until `drop_dense`."""
        return self._copies.get(dtype)

    def drop_dense(self) -> None:
        """Free the dense copies; the next `dense` makes them anew."""
        self._copies.drop()

    def set_row_invariant(self, on: bool) -> None:
        """Make a row's bits the same in every batch; on the CPU they always are. On a GPU it costs time."""
        if self.backend == "gpu":
            self._gpu().set_row_invariant(on)

    def set_activation_bits(self, bits: int) -> None:
        """Round activations to integers of 16 bits, or of 8: quicker and coarser, see native/pack_rows.c.

        Raises RuntimeError for 8 where the compiled CPU kernels do not compute, ValueError for other numbers.
        """
        if bits not in ACTIVATION_BITS:
            raise ValueError(f"activation bits must be one of {ACTIVATION_BITS}, not {bits}")
        if isinstance(self.impl, NativeCpu):
            self.impl.packed.set_activation_bits(bits)
        elif bits != 16:
            raise RuntimeError(
                f"activations of {bits} bits need the compiled CPU kernels; this is {self.backend!r}"
            )

    def packed(self) -> PackedWeight | None:
        """What the compiled CPU kernels read of it; None on another backend."""
        return self.impl.packed if isinstance(self.impl, NativeCpu) else None

    def release(self) -> bool:
        """For serving: keep what the backend laid out, and of `weight` the shapes (on the device "meta") only.

        `quant_matmul` works as before; `dense` and gradients do not any more. False, and nothing is freed, where the
        backend reads the weight itself.
        """
        if self.backend not in ("native", "gpu"):
            return False
        self.weight = self.weight.shapes()
        self._copies = DenseCopies(self.weight)
        if self.backend == "gpu":
            self._gpu().release_codes(self.weight)
        return True

    def _gpu(self) -> TritonGpu:
        from peqa_kernels.quant_matmul.gpu import TritonGpu

        assert isinstance(self.impl, TritonGpu), self.backend
        return self.impl

    def _make(self, backend: str) -> Backend:
        if backend == "reference":
            return _Reference(self.weight)
        if backend == "torch":
            return TorchCpu(self._copies, self.segments)
        if backend == "native":
            ops = _native_ops()
            if ops is None:
                raise RuntimeError("the compiled CPU kernels are not there: use backend='torch'")
            if ops.halves:
                self.bank_dtypes = (torch.float32, torch.float16)
            return NativeCpu(ops, ops.pack(self.weight, self.segments))
        if backend == "gpu":
            from peqa_kernels.quant_matmul.gpu import TritonGpu

            self.bank_dtypes = (torch.float32, torch.float16)
            return TritonGpu(self.weight, self.segments)
        raise ValueError(f"backend must be one of {BACKENDS}, not {backend!r}")


def bank_dtype(device: torch.device) -> torch.dtype:
    """The dtype of banks whose tasks cost least on `device`.

    Their scales are read anew in every step, so fp16 halves a task's own bytes: on a GPU always, on a CPU where the
    compiled kernels read it.
    """
    if device.type == "cuda":
        return torch.float16
    ops = _native_ops() if device.type == "cpu" else None
    return torch.float16 if ops is not None and ops.halves else torch.float32


def prepare(
    weight: QuantizedWeight, *, segments: tuple[int, ...] | None = None, backend: str | None = None
) -> PreparedWeight:
    """Lay a weight out for its device.

    `segments` are the output sizes of fused siblings (q/k/v), which may have different input scales; their sum is N.
    `backend` is one of BACKENDS; None chooses: Triton on a CUDA device, on the CPU the compiled kernels if they were
    built and torch alone if not. Raises QuantMatmulInputError for segments that do not fit, RuntimeError when a named
    backend is not to be had, ValueError for another name.
    """
    segments = (weight.out_features,) if segments is None else tuple(segments)
    check_segments(segments, weight.out_features)
    if backend is None:
        if weight.scales.device.type == "cuda":
            backend = "gpu"
        else:
            backend = "torch" if _native_ops() is None else "native"
    return PreparedWeight(weight, segments, backend)


def lay_together(weights: Iterable[PreparedWeight]) -> None:
    """Move what the CPU's kernels read of `weights` into one piece of memory, in their order, in huge pages.

    For weights that are there to stay, in the order in which they are multiplied; it copies at the speed of memory. On
    other backends nothing is done.
    """
    from peqa_kernels.native.huge_pages import Arena  # here, since that package imports this one's types

    packed = [found for weight in weights if (found := weight.packed()) is not None]
    arena = Arena(sum(weight.room for weight in packed))
    for weight in packed:
        weight.move_to(arena)


def quant_matmul(
    x: Tensor,  # [M, K]
    prepared: PreparedWeight,
    *,
    bias: Tensor | None = None,  # [N]
    bank: LinearBank | None = None,
    row: Tensor | None = None,  # int32 [M]
    group_row: Tensor | None = None,  # int32 [M]
) -> Tensor:
    """Multiply each row of x by the frozen weight under its own task's scales; [M, N] in x.dtype.

    `row[m]` is the bank row of activation m for output and input scales, `group_row[m]` the one for group scales;
    None (or no bank) means the base. Row 0 is the base too, and gives the same bits as None. A gradient reaches x where
    no row is given; tasks are trained by `scaled_linear`. Raises QuantMatmulInputError for arguments that do not fit
    (rows outside the bank where they lie in host memory; a GPU is not asked), RuntimeError when x wants a gradient
    through rows.
    """
    if torch.compiler.is_compiling():
        banks = (None, None, None) if bank is None else (bank.out_scale, bank.in_scale, bank.group_scale)
        number = prepared.handle.tensor
        return quant_matmul_op(
            x, number, prepared.out_features, prepared.segments, bias, *banks, row, group_row
        )
    check_inputs(x, prepared, bias, bank, row, group_row)
    if x.requires_grad and torch.is_grad_enabled():
        if bank is not None and (row is not None or group_row is not None):
            raise RuntimeError(
                "quant_matmul with task rows has no gradient: use scaled_linear, or torch.no_grad()"
            )
        return scaled_linear(x, prepared, bias)
    y = prepared.impl.matmul(x, bias, bank, row, group_row)
    return y if y.dtype == x.dtype else y.to(x.dtype)


class _Reference:
    def __init__(self, weight: QuantizedWeight) -> None:
        self._weight = weight

    def matmul(
        self,
        x: Tensor,
        bias: Tensor | None,
        bank: LinearBank | None,
        row: Tensor | None,
        group_row: Tensor | None,
    ) -> Tensor:
        return quant_matmul_reference(x, self._weight, bias, bank, row, group_row)


def _native_ops() -> NativeOps | None:
    """Give the compiled kernels, or None where they were not built."""
    from peqa_kernels.native import load  # here, since it imports this package's types

    return load()
