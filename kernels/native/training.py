"""What training on a CPU does beside products of matrices (training.c): a pass where torch makes several."""

from __future__ import annotations

import functools
from ctypes import c_float, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peqa_kernels import native

if TYPE_CHECKING:
    from peqa_kernels.native.ops import NativeOps


class NativeTraining:
    """Sums, softmaxes, norms and gates of training, on every thread that torch has."""

    def __init__(self, ops: NativeOps) -> None:
        self._ops = ops
        self._column_dot = ops.function(
            "peqa_column_dot",
            *(None, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
        )
        self._attention_weights = ops.function(
            "peqa_attention_weights",
            *(None, c_void_p, c_int64, *(c_void_p,) * 4, *(c_int64,) * 7, c_float),
        )

        self._losses = ops.function(
            "peqa_losses",
            *(None, c_void_p, c_int64, *(c_void_p,) * 4, *(c_int64,) * 3, *(c_void_p,) * 2),
        )

        self._gate = ops.function("peqa_gate", *(None, c_void_p, c_int64, *(c_void_p,) * 5, *(c_int64,) * 2))
        self._norm = ops.function(
            "peqa_norm", *(None, c_void_p, c_int64, *(c_void_p,) * 4, *(c_int64,) * 2, c_float)
        )

    def column_dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum a * b over the rows: two contiguous [M, N] of bfloat16, or of float32, give float32 [N]."""
        _check_alike(a, b)
        sums = torch.empty(a.shape[1])
        halves = a.dtype == torch.bfloat16
        self._column_dot(*self._threads(), a.data_ptr(), b.data_ptr(), *a.shape, halves, sums.data_ptr())
        return sums

    def attention_weights(
        self,
        scores: Tensor,  # float32 [heads, queries, keys]: products of queries and keys; overwritten
        seen: Tensor
        | None,  # bool [1 or rows, tokens, keys]; None: each token sees itself and those before it
        scale: float,
        first: int = 0,
        heads_each: int = 1,
        slopes: Tensor | None = None,  # bfloat16 like the scores: the gradient by the weights
    ) -> Tensor:
        """Softmax of `scale * scores` over the keys that are seen, bfloat16 like the scores; `slopes` becomes the
        gradient by the scores.

        A head has the tokens of several query heads, one after the other. Head h has the mask
        `(first + h) // heads_each` where there are several. A token that sees nothing weighs all keys alike.
        """
        heads, queries, keys = scores.shape
        tokens, masks = keys if seen is None else seen.shape[1], 1 if seen is None else seen.shape[0]
        assert scores.dtype == torch.float32, scores.dtype
        assert scores.is_contiguous(), scores.stride()
        assert queries % tokens == 0, (queries, tokens)
        if seen is not None:
            assert seen.dtype == torch.bool, seen.dtype
            assert seen.is_contiguous(), seen.stride()
            assert seen.shape[2] == keys, (seen.shape, keys)
            assert masks == 1 or (first + heads - 1) // heads_each < masks, (first, heads, heads_each, masks)
        if slopes is not None:
            assert slopes.dtype == torch.bfloat16, slopes.dtype
            assert slopes.shape == scores.shape, slopes.shape
            assert slopes.is_contiguous(), slopes.stride()
        weights = torch.empty(scores.shape, dtype=torch.bfloat16)
        self._attention_weights(
            *self._threads(),
            scores.data_ptr(),
            None if seen is None else seen.data_ptr(),
            weights.data_ptr(),
            None if slopes is None else slopes.data_ptr(),
            *(heads, queries, tokens, keys, masks, first, heads_each),
            scale,
        )
        return weights

    def losses(self, logits: Tensor, targets: Tensor, slopes: Tensor | None = None) -> Tensor:
        """Cross-entropy of each row, float32 [rows], and into `slopes` its gradient by the logits.

        `logits` [rows, width] are bfloat16 or float32 and contiguous, `slopes` are like them, `targets` int64 [rows]
        from 0 to below the width.
        """
        rows, width = logits.shape
        assert logits.dtype in (torch.bfloat16, torch.float32), logits.dtype
        assert logits.is_contiguous(), logits.stride()
        assert targets.shape == (rows,), targets.shape
        assert targets.dtype == torch.int64, targets.dtype
        assert targets.is_contiguous(), targets.stride()
        if slopes is not None:
            assert slopes.dtype == logits.dtype, slopes.dtype
            assert slopes.shape == logits.shape, slopes.shape
            assert slopes.is_contiguous(), slopes.stride()
        if rows == 0:
            return torch.empty(0)
        assert int(targets.min()) >= 0, "a target is the number of a token"
        assert int(targets.max()) < width, "a target is the number of a token"
        own = logits.gather(1, targets[:, None])[:, 0].float()  # slopes may be the logits
        best, sums = torch.empty(rows), torch.empty(rows, dtype=torch.float64)
        threads = torch.get_num_threads()
        pool, scratch = self._ops.working_memory(threads, threads * width)
        self._losses(
            *(pool, threads, scratch, logits.data_ptr(), targets.data_ptr()),
            None if slopes is None else slopes.data_ptr(),
            *(rows, width, logits.dtype == torch.bfloat16, best.data_ptr(), sums.data_ptr()),
        )
        return (best - own) + sums.log().float()  # in this order: a small loss keeps its digits

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, rounded once: two contiguous tensors of one shape, bfloat16 or float32."""
        _check_alike(gate, up)
        out = torch.empty_like(gate)
        self._gate(
            *(*self._threads(), gate.data_ptr(), up.data_ptr(), None, out.data_ptr(), None),
            *(gate.numel(), gate.dtype == torch.bfloat16),
        )
        return out

    def gate_back(self, gate: Tensor, up: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients by gate and by up, from `slope`, that by the product; all are alike."""
        _check_alike(gate, up)
        _check_alike(gate, slope)
        by_gate, by_up = torch.empty_like(gate), torch.empty_like(gate)
        self._gate(
            *(*self._threads(), gate.data_ptr(), up.data_ptr(), slope.data_ptr()),
            *(by_gate.data_ptr(), by_up.data_ptr(), gate.numel(), gate.dtype == torch.bfloat16),
        )
        return by_gate, by_up

    def norm(self, x: Tensor, weight: Tensor, eps: float, slope: Tensor | None = None) -> Tensor:
        """weight * x / sqrt(mean(x^2) + eps) over the last dimension; with `slope`, the gradient by that, the one by x.

        `x` [..., n] and `weight` [n] are float32 and contiguous, `slope` is like x.
        """
        assert x.dtype == weight.dtype == torch.float32, (x.dtype, weight.dtype)
        assert weight.shape == x.shape[-1:], (weight.shape, x.shape)
        assert weight.is_contiguous(), weight.stride()
        _check_alike(x, x if slope is None else slope)
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._norm(
            *(*self._threads(), x.data_ptr(), weight.data_ptr(), None if slope is None else slope.data_ptr()),
            *(out.data_ptr(), x.numel() // max(1, width), width, eps),
        )
        return out

    def _threads(self) -> tuple[int, int]:
        """The pool's address and the number of threads."""
        threads = torch.get_num_threads()
        pool, _ = self._ops.working_memory(threads, 0)
        return pool, threads


def _check_alike(a: Tensor, b: Tensor) -> None:
    """Two contiguous tensors of one shape and one dtype that the library reads."""
    assert a.shape == b.shape, (a.shape, b.shape)
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    assert a.dtype in (torch.bfloat16, torch.float32), a.dtype
    assert a.is_contiguous(), a.stride()
    assert b.is_contiguous(), b.stride()


@functools.cache
def native_training() -> NativeTraining | None:
    """The functions of the loaded build of the library; None where there is none."""
    ops = native.load()
    return None if ops is None else NativeTraining(ops)
