"""Norms and gated feed-forwards for training on a CPU: a pass of the C library each, where torch makes five to twelve.

A pass that writes new memory waits for it to be mapped. Together they were a sixth of a step of 2,044 tokens (SmolLM2,
two cores of a Zen 4). A module is replaced only where it gives on random numbers what the library gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from peqa_kernels.native.training import NativeTraining, native_training

_CLOSE = 1e-4  # relative: fp32, summed up otherwise


@contextmanager
def fused_elementwise(model: PreTrainedModel) -> Iterator[None]:
    """Within it the norms and feed-forwards of a model on a CPU that compute as Llama's do take one pass."""
    native = native_training() if model.device.type == "cpu" else None
    changed: list[nn.Module] = []
    known: dict[type[nn.Module], bool] = {}
    try:
        for module in model.modules() if native is not None else ():
            found = _norm_of(module, native, known) or _feed_forward_of(module, native, known)
            if found is not None and "forward" not in vars(module):
                module.forward = found
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _norm_of(
    module: nn.Module, native: NativeTraining | None, known: dict[type[nn.Module], bool]
) -> Callable[..., Tensor] | None:
    """The forward to take for a norm by the root mean square; None where the module is something else."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if native is None or not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.requires_grad:
        return None
    if (
        weight.dtype != torch.float32
        or not weight.is_contiguous()
        or getattr(module, "bias", None) is not None
    ):
        return None
    own = module.forward
    if type(module) not in known:
        x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            known[type(module)] = _alike(lambda: own(x), lambda: native.norm(x, weight, eps))
    return partial(_norm, own, native, weight, eps) if known[type(module)] else None


def _norm(
    own: Callable[..., Tensor], native: NativeTraining, weight: Tensor, eps: float, hidden_states: Tensor
) -> Tensor:
    if hidden_states.dtype != torch.float32:
        return own(hidden_states)
    found: Tensor = _Norm.apply(hidden_states.contiguous(), native, weight, eps)
    return found


def _feed_forward_of(
    module: nn.Module, native: NativeTraining | None, known: dict[type[nn.Module], bool]
) -> Callable[..., Tensor] | None:
    """The forward to take for down(silu(gate(x)) * up(x)); None where the module is something else."""
    linears = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    if native is None or not all(isinstance(linear, nn.Module) for linear in linears):
        return None
    own, act, width = (
        module.forward,
        getattr(module, "act_fn", None),
        getattr(linears[0], "in_features", None),
    )
    probe = torch.linspace(-9, 9, 64)
    if (
        not isinstance(width, int)
        or not callable(act)
        or not _alike(lambda: act(probe), lambda: functional.silu(probe))
    ):
        return None
    forward = partial(_feed_forward, native, module)
    if type(module) not in known:
        x = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            known[type(module)] = _alike(lambda: own(x), lambda: forward(x))
    return forward if known[type(module)] else None


def _feed_forward(native: NativeTraining, module: nn.Module, x: Tensor) -> Tensor:
    linears: Any = module
    gate, up = linears.gate_proj(x), linears.up_proj(x)
    if gate.dtype not in (torch.bfloat16, torch.float32) or gate.dtype != up.dtype:
        product = linears.act_fn(gate) * up
    else:
        product = _Gate.apply(gate.contiguous(), up.contiguous(), native)
    found: Tensor = linears.down_proj(product)
    return found


def _alike(compute: Callable[[], Any], expect: Callable[[], Tensor]) -> bool:
    """Whether both give the same; what cannot be called so gives something else."""
    try:
        found, expected = compute(), expect()
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool((found - expected).abs().max() <= _CLOSE * expected.abs().max())


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, native: NativeTraining, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.native, ctx.eps = native, eps
        return native.norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return ctx.native.norm(x, weight, ctx.eps, grads[0].contiguous()), None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, native: NativeTraining) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.native = native
        return native.gate(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *ctx.native.gate_back(gate, up, grads[0].contiguous()), None
