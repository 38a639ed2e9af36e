"""Modules that multiply by floats in a way of their own, as experts and their routers do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial, update_wrapper
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from peqa_kernels.quant_matmul.cpu import ROW_MULTIPLE
from peqa_runtime.model.float_linear import SteadyLinear
from peqa_runtime.model.quantized_linear import QuantizedEmbedding, QuantizedLinear

_COVERED = (SteadyLinear, QuantizedLinear, QuantizedEmbedding, nn.Embedding)
_PRODUCTS = dict.fromkeys(
    (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), 0
)
"""Functions that multiply, with the place of the rows among their arguments; the matrix comes after them."""
_PRODUCTS[torch.addmm] = 1  # of transformers' Conv1D, whose first is the bias


def modules_with_own_products(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name that have float matrices and are none of those whose products are known."""
    return {name: module for name, module in model.named_modules() if _multiplies_floats(module)}


def _multiplies_floats(module: nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return not isinstance(module, _COVERED) and any(p.dim() > 1 and p.is_floating_point() for p in own)


def steady_own_products(model: PreTrainedModel) -> None:
    """On a CPU: have a model with such modules give a row the bits that it has alone, however many an expert gets.

    Experts then run one after the other. Their other implementations hand all of them to one function, which takes
    other kernels for another number of rows.
    """
    if not modules_with_own_products(model):
        return
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    layers = model.base_model  # all of it: a module may multiply by another one's matrix
    layers.forward = update_wrapper(partial(_steadily, layers.forward), layers.forward)


def _steadily(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with _WholeMultiples():
        return forward(*args, **options)


class _WholeMultiples(TorchFunctionMode):
    """Within it products see whole multiples of ROW_MULTIPLE rows, as those of a `SteadyLinear` do."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        first = _PRODUCTS.get(func)
        if first is None or [x.dim() > 1 for x in args[: first + 2]] != [False] * first + [True, True]:
            return func(*args, **options)
        rows = args[first].shape[-2]
        x = F.pad(args[first], (0, 0, 0, -rows % ROW_MULTIPLE))
        return func(*args[:first], x, *args[first + 1 :], **options)[..., :rows, :]
