"""Stands in for CUDA graphs on a CPU: replays by running again, and insists on what a graph would take for granted.

A graph replays the launches that it was captured with, on the addresses that they had. So a replay here must call the
same operations with the same numbers in the same order, and read what was not computed within it from the same memory.
Operations that would wait for a GPU, or bring numbers to it from Python, are refused as a capture would refuse them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import peqa_runtime.model.attention as attention_module
import peqa_runtime.model.fused_decoder as fused_module
import peqa_runtime.model.quantized_linear as linear_module
from peqa_kernels.quant_matmul import LinearBank, PreparedWeight

KERNELS = (
    (attention_module, "write_kv"),
    (attention_module, "paged_attention"),
    (linear_module, "quant_matmul"),
    *(
        (fused_module, name)
        for name in ("rms_norm", "add_rms_norm", "rotate_and_write", "silu_mul", "paged_attention")
    ),
)
WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::lift_fresh",  # a tensor of Python's numbers
    "aten::masked_select",
    "aten::nonzero",
    "aten::_unique2",
}


class Trace(TorchDispatchMode):
    """What runs within: names, numbers, and addresses of tensors that come from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self._made: dict[int, Tensor] = {}  # by storage; held, so that no address comes again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, values = func._schema.name, (args, kwargs or {})
        picks = name in ("aten::index", "aten::index_put", "aten::index_put_") and args[1]
        if name in WAITING or (picks and any(i is not None and i.dtype == torch.bool for i in args[1])):
            raise RuntimeError(f"{name} waits for the device")
        return self.note(name, values, lambda: func(*args, **(kwargs or {})))

    def note(self, name: str, values: Any, run: Callable[[], Any]) -> Any:
        """Run and remember a call."""
        leaves = tree_leaves(values)
        self.calls.append((name, *(self._seen(leaf) for leaf in leaves)))
        before = {_storage(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        result = run()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in before:
                self._made[_storage(leaf)] = leaf
        return result

    def _seen(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            where = "made here" if _storage(leaf) in self._made else leaf.data_ptr()
            return where, tuple(leaf.shape), leaf.stride(), leaf.dtype
        return leaf if isinstance(leaf, (int, float, bool, str, type(None))) else repr(leaf)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Trace operations, and each kernel of ours as one call."""
        with ExitStack() as stack:
            for module, name in KERNELS:
                stack.enter_context(patch.object(module, name, self._kernel(name, getattr(module, name))))
            stack.enter_context(self)
            yield

    def _kernel(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                with _disable_current_modes():
                    return kernel(*args, **kwargs)

            return self.note(name, _read_by(args, kwargs), run)

        return call


class StandIn:
    """A `Recorder` that counts what it captures."""

    def __init__(self) -> None:
        self.captures = 0
        self._forgotten = 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        first = _traced(run)
        self.captures += 1
        age = self._forgotten

        def replay() -> None:
            assert age == self._forgotten, "a replay of what was to be forgotten"
            again = _traced(run)
            for now, then in zip(again, first, strict=True):
                assert now == then, f"captured as {then}, now {now}"

        return replay

    def forget(self) -> None:
        self._forgotten += 1


def _traced(run: Callable[[], None]) -> list[tuple[Any, ...]]:
    trace = Trace()
    with trace.watching():
        run()
    return trace.calls


def _read_by(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a kernel of ours reads: of a bank, the scales whose rows are given."""
    given = [id(value) if isinstance(value, PreparedWeight) else value for value in args]
    given += [value for name, value in kwargs.items() if name != "bank"]
    bank: LinearBank | None = kwargs.get("bank")
    if bank is not None and kwargs["row"] is not None:
        given += [bank.out_scale, bank.in_scale]
    if bank is not None and kwargs["group_row"] is not None:
        given += [bank.group_scale]
    return given


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
