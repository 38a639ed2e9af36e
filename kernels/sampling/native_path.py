"""Choosing tokens in the C library (native/sampling.c): 16 rows of SmolLM2 in a tenth of torch's time."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from peqa_kernels.native import load
from peqa_kernels.native.ops import NativeOps
from peqa_kernels.sampling.draws import Draw, Likeliest


class _Draw(ctypes.Structure):
    """draw of sampling.c."""

    _fields_ = (
        ("logits", c_void_p),
        *((name, c_double) for name in ("uniform", "top_p", "min_p")),
        *((name, c_float) for name in ("best", "temperature")),
        *((name, c_int64) for name in ("top_k", "token")),
    )


class NativeSampling:
    """The functions of `peqa_kernels.sampling` for float32 logits [rows, vocab] on the CPU."""

    def __init__(self, ops: NativeOps) -> None:
        self._ops = ops
        pointers = (c_void_p,) * 2
        self._scratch_floats = ops.function("peqa_sampling_scratch", c_int64, c_int64, c_int64)
        self._row_best = ops.function(
            "peqa_row_best", None, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, *pointers
        )
        self._draw = ops.function("peqa_draw", None, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64)
        self._top = ops.function(
            "peqa_top",
            *(None, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64),
            *(c_void_p,) * 4,
        )

    def row_best(self, logits: Tensor) -> tuple[list[float], list[int]]:
        """See `peqa_kernels.sampling.row_best`."""
        rows, width = _shape(logits)
        best, tokens = (c_float * rows)(), (c_int64 * rows)()
        threads, pool, _ = self._memory(width)
        self._row_best(pool, threads, logits.data_ptr(), logits.stride(0), rows, width, best, tokens)
        return list(best), list(tokens)

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        """One token for each draw; see `peqa_kernels.sampling.draw`."""
        _, width = _shape(logits)
        first, stride = logits.data_ptr(), logits.stride(0) * 4
        structs = (_Draw * len(draws))(
            *(
                _Draw(first + d.row * stride, d.uniform, d.top_p, d.min_p, d.best, d.temperature, d.top_k)
                for d in draws
            )
        )
        threads, pool, scratch = self._memory(width)
        self._draw(pool, threads, scratch, structs, len(draws), width)
        return [struct.token for struct in structs]

    def likeliest(self, logits: Tensor, rows: Sequence[int], top: int) -> Likeliest:
        """See `peqa_kernels.sampling.likeliest`."""
        _, width = _shape(logits)
        assert 0 <= top <= width, top
        count = len(rows)
        picked = torch.tensor(rows, dtype=torch.int64)
        tokens, values = torch.empty((count, top), dtype=torch.int64), torch.empty((count, top))
        best, sums = torch.empty(count), torch.empty(count, dtype=torch.float64)
        threads, pool, scratch = self._memory(width)
        self._top(
            *(
                pool,
                threads,
                scratch,
                logits.data_ptr(),
                logits.stride(0),
                picked.data_ptr(),
                count,
                width,
                top,
            ),
            *(best.data_ptr(), sums.data_ptr(), tokens.data_ptr(), values.data_ptr()),
        )
        return Likeliest(tokens, values, best, sums)

    def _memory(self, width: int) -> tuple[int, int, int]:
        """Number of threads, the pool's address and that of scratch for rows of `width`."""
        threads = torch.get_num_threads()
        return threads, *self._ops.working_memory(threads, self._scratch_floats(threads, width))


@functools.cache
def native_sampling() -> NativeSampling | None:
    """Sampling by the loaded build of the library; None where there is none."""
    ops = load()
    return None if ops is None else NativeSampling(ops)


def _shape(logits: Tensor) -> tuple[int, int]:
    assert logits.dtype == torch.float32, logits.dtype
    assert logits.device.type == "cpu", logits.device
    assert logits.stride(1) == 1, logits.stride()
    rows, width = logits.shape
    return rows, width
