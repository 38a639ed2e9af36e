"""Norms and gated feed-forwards for training on a CPU: a pass of the C library each, where torch makes five to twelve.

A pass that writes new memory waits for it to be mapped. Together they were a sixth of a step of 2,044 tokens (SmolLM2,
two cores of a Zen 4). A module is replaced only where its class has the very code of Llama's, and where it gives on
random numbers what the library gives.
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
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from peqa_kernels.native.training import NativeTraining, native_training

_CLOSE = 1e-4  # relative: fp32, summed up otherwise

Forward = Callable[..., Tensor]


@contextmanager
def fused_elementwise(model: PreTrainedModel) -> Iterator[None]:
    """Within it the norms and feed-forwards of a model on a CPU that compute as Llama's do take one pass."""
    native = native_training() if model.device.type == "cpu" else None
    changed: list[nn.Module] = []
    try:
        if native is not None:
            changed += _replace(model, native)
        yield
    finally:
        for module in changed:
            del module.forward


def _replace(model: PreTrainedModel, native: NativeTraining) -> Iterator[nn.Module]:
    """Give modules another forward, one after the other."""
    for module in model.modules():
        if "forward" in vars(module):  # somebody else's
            continue
        found: Forward | None = None
        if _code(module) == _code(LlamaRMSNorm):
            found = _norm_of(module, native)
        elif _code(module) == _code(LlamaMLP):
            found = _feed_forward_of(module, native)
        if found is not None:
            module.forward = found
            yield module


def _code(module: nn.Module | type[nn.Module]) -> tuple[Any, ...] | None:
    """What a class's forward does; the same for classes that were written down twice."""
    kind = module if isinstance(module, type) else type(module)
    code = getattr(kind.forward, "__code__", None)
    return None if code is None else (code.co_code, code.co_names, code.co_consts)


def _norm_of(module: nn.Module, native: NativeTraining) -> Forward | None:
    """The forward to take for a norm by the root mean square; None where its own stays."""
    own, weight, eps = module.forward, module.weight, module.variance_epsilon
    assert isinstance(weight, Tensor)
    assert isinstance(eps, float)
    if weight.requires_grad or weight.dtype != torch.float32 or not weight.is_contiguous():
        return None
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0))
    return partial(_norm, own, native, weight, eps) if _alike(own(x), native.norm(x, weight, eps)) else None


def _norm(own: Forward, native: NativeTraining, weight: Tensor, eps: float, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != torch.float32:
        return own(hidden_states)
    found: Tensor = _Norm.apply(hidden_states.contiguous(), native, weight, eps)
    return found


def _feed_forward_of(module: nn.Module, native: NativeTraining) -> Forward | None:
    """The forward to take for down(silu(gate(x)) * up(x)); None where the activation is another."""
    probe = torch.linspace(-9, 9, 64)
    act: Any = module.act_fn
    return partial(_feed_forward, native, module) if _alike(act(probe), functional.silu(probe)) else None


def _feed_forward(native: NativeTraining, module: nn.Module, x: Tensor) -> Tensor:
    linears: Any = module
    gate, up = linears.gate_proj(x), linears.up_proj(x)
    if gate.dtype not in (torch.bfloat16, torch.float32) or gate.dtype != up.dtype:
        product = linears.act_fn(gate) * up
    else:
        product = _Gate.apply(gate.contiguous(), up.contiguous(), native)
    found: Tensor = linears.down_proj(product)
    return found


def _alike(found: Tensor, expected: Tensor) -> bool:
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
