"""Products of float32 matrices on a CPU, by the faster of the two libraries that torch carries.

torch multiplies float32 with MKL, whose kernels for AVX-512 are for Intel's processors alone. On others its oneDNN is
two to three times as fast (AMD Zen 5, one thread, 1024 x 576 times 576 x 3072: 58 against 170 GFLOP/s). torch has no
switch for that, but the operator that its compiler emits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_WORTH = 1 << 18  # multiplications from which the operator's own cost does not matter


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of [..., K] and [K, N]. Float32 on a CPU by the faster library, without gradients; else torch's own."""
    if not _faster_elsewhere(a, b):
        return a @ b
    return _one_dnn(a, b.t())


class FastLinears(TorchFunctionMode):
    """Within it, every `F.linear` of float32 on a CPU takes the faster library, gradients included."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take `F.linear`, pass on the rest."""
        given = kwargs or {}
        if func is F.linear and not given and len(args) in (2, 3) and _faster_elsewhere(args[0], args[1].t()):
            y = _Linear.apply(args[0], args[1])
            return y if len(args) == 2 or args[2] is None else y + args[2]
        return func(*args, **given)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # [..., K], [N, K]
        ctx.save_for_backward(x, weight)
        return _one_dnn(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])
        dx = _one_dnn(dy, weight.t()).view_as(x) if ctx.needs_input_grad[0] else None
        dw = _one_dnn(dy.t(), x.reshape(-1, x.shape[-1]).t()) if ctx.needs_input_grad[1] else None
        return dx, dw


def _faster_elsewhere(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and b.dim() == 2
        and a.numel() * b.shape[1] >= _WORTH
        and not torch.is_autocast_enabled("cpu")
        and _has_one_dnn()
    )


def _one_dnn(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


@cache
def _has_one_dnn() -> bool:
    """Whether this processor has AVX-512 but is not Intel's, and torch has the operator and it multiplies."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _made_by_intel():
        return False
    x, weight = torch.ones(4, 8), torch.ones(16, 8)
    try:
        return torch.equal(_one_dnn(x, weight), torch.full((4, 16), 8.0))
    except (AttributeError, RuntimeError):  # an operator of torch's own: it may go, or change
        return False


def _made_by_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux: leave it to torch
        return True
