"""A model without its weights, whose blocks are filled one at a time from disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from peqa_runtime.errors import InvalidCheckpoint, UnsupportedModel
from peqa_runtime.model.quantizers.float_source import FloatSource


class _Enough(Exception):
    """The blocks were reached."""


@dataclass(frozen=True)
class Call:
    """What a model passes to one of its blocks besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Skeleton:
    """The model of a source with its parameters on the meta device.

    `linears`: inputs of each linear that can be quantized, by name. `heads`: names of embedding and output head.
    `blocks`: names of the blocks, in order; empty when the model has no list of blocks.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.model = model
        self.folder = folder
        outside = [model.get_input_embeddings(), model.get_output_embeddings()]
        self.heads = {n for n, module in model.named_modules() if any(module is other for other in outside)}
        self.linears = {
            name: module.in_features
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name not in self.heads
        }
        if not self.linears:
            raise InvalidCheckpoint(f"{type(model).__name__} has no nn.Linear to quantize")
        self.blocks = self._find_blocks()

    def _find_blocks(self) -> list[str]:
        """Of all module lists, the one that holds most of what is quantized; of nested ones the outermost."""
        sizes: dict[str, int] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList):
                inside = [linear for linear in self.linears if linear.startswith(f"{name}.")]
                sizes[name] = sum(self.model.get_submodule(linear).weight.numel() for linear in inside)
        if not any(sizes.values()):
            return []
        best = max(sizes, key=lambda name: (sizes[name], -len(name)))
        return [f"{best}.{index}" for index in range(len(self.model.get_submodule(best)))]

    def linears_of(self, block: str) -> dict[str, nn.Linear]:
        """The linears of a block, by their whole name."""
        return {name: self.model.get_submodule(name) for name in self.linears if name.startswith(f"{block}.")}

    @contextmanager
    def filled(
        self, names: Sequence[str], source: FloatSource, device: torch.device, *, recurse: bool = True
    ) -> Iterator[None]:
        """Give these modules their parameters from disk, in fp32 on `device`; take them away at the end.

        Not `recurse`: only those that are their own, not of modules inside.

        Raises `InvalidCheckpoint` when the source lacks one, or has it in another shape or not finite.
        """
        filled: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for name in names:
                top = self.model.get_submodule(name)
                for path, parameter in list(top.named_parameters(recurse=recurse)):
                    parent = top.get_submodule(path.rpartition(".")[0])
                    leaf = path.rpartition(".")[2]
                    value = self._value(f"{name}.{path}" if name else path, parameter, source)
                    setattr(parent, leaf, nn.Parameter(value.to(device), requires_grad=False))
                    filled.append((parent, leaf, parameter))
                for module in top.modules() if recurse else [top]:  # tables of positions, for instance
                    for leaf, buffer in module.named_buffers(recurse=False):
                        setattr(module, leaf, buffer.to(device))
            yield
        finally:
            for parent, leaf, empty in filled:
                setattr(parent, leaf, empty)

    def _value(self, name: str, parameter: nn.Parameter, source: FloatSource) -> Tensor:
        if name not in source:
            raise InvalidCheckpoint(
                f"{self.folder} holds no {name}, and gptq and blockwise need a block's own tensors: names and shapes "
                "must be those of transformers' modules (mixtures of experts are stored otherwise); use --method rtn"
            )
        value = source.tensor(name)
        if value.shape != parameter.shape:
            raise InvalidCheckpoint(
                f"{self.folder}: {name} has shape {tuple(value.shape)}, the model needs {tuple(parameter.shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise InvalidCheckpoint(f"{self.folder}: {name}: the weight holds NaN or infinity")
        return value.to(torch.float32)

    def calls(self, window: Tensor, source: FloatSource) -> list[Call]:
        """What each block is called with besides its hidden states, for windows [1, tokens] of this length.

        Raises `UnsupportedModel` for a model that cannot be run block by block: blocks are left out or called twice,
        something happens between them, or they are told of the text.
        """
        with self._entrance(source):
            calls = self._walk(window, len(self.blocks)).calls
            others = self._walk(window.flip(-1), len(self.blocks)).calls
        if not all(_same((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in zip(calls, others, strict=True)):
            raise UnsupportedModel(self._refusal("its blocks depend on the text other than by hidden states"))
        return calls

    def entries(self, windows: Iterable[Tensor], source: FloatSource) -> Iterator[Tensor]:
        """What enters the first block for each window [1, tokens] of ids, [1, tokens, D]."""
        with self._entrance(source):
            for window in windows:
                yield self._walk(window, 1).hidden

    @contextmanager
    def _entrance(self, source: FloatSource) -> Iterator[None]:
        """What stands before the blocks is filled."""
        with self.filled(self._before_blocks(), source, torch.device("cpu"), recurse=False):
            yield

    def _before_blocks(self) -> list[str]:
        """Modules with parameters outside of the blocks, the output head aside."""
        head = self.model.get_output_embeddings()
        parent = self.blocks[0].rpartition(".")[0]
        found: list[str] = []
        for name, module in self.model.named_modules():
            within = name == parent or name.startswith(f"{parent}.")
            if not within and (module is not head) and any(True for _ in module.parameters(recurse=False)):
                found.append(name)
        return found

    @torch.no_grad()
    def _walk(self, ids: Tensor, last: int) -> _Walk:
        """Run a window up to the `last` block, with blocks that give back what they are given."""
        wrongs: list[str] = []
        for as_tuple in (False, True):  # what blocks give back differs between models
            walk = _Walk(as_tuple, last)
            blocks = [self.model.get_submodule(name) for name in self.blocks]
            try:
                for index, block in enumerate(blocks):
                    block.forward = walk.stand_in(index)
                self.model(input_ids=ids, use_cache=False)
                wrongs.append("some of its blocks are not called")
            except _Enough:
                return walk
            except _Wrong as wrong:
                wrongs.append(str(wrong))
            finally:
                for block in blocks:
                    del block.forward
        raise UnsupportedModel(self._refusal(wrongs[0]))

    def _refusal(self, why: str) -> str:
        return (
            f"{type(self.model).__name__} cannot be run block by block ({why}), which gptq and blockwise need; "
            "use --method rtn"
        )


class _Wrong(Exception):
    """The blocks are not called one after the other."""


class _Walk:
    """Records the calls of blocks, and passes the first one's hidden states on."""

    def __init__(self, as_tuple: bool, last: int) -> None:
        self.as_tuple = as_tuple
        self.last = last
        self.calls: list[Call] = []

    def stand_in(self, index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if "hidden_states" in kwargs:
                hidden, rest = kwargs.pop("hidden_states"), args
            else:
                hidden, rest = args[0], args[1:]
            if index != len(self.calls):
                raise _Wrong("its blocks are not called one after the other")
            if index == 0:
                self.hidden: Tensor = hidden.detach().clone()
            elif not (isinstance(hidden, Tensor) and _same(hidden, self.hidden)):
                raise _Wrong("something happens between its blocks")
            self.calls.append(Call(rest, kwargs))
            if len(self.calls) == self.last:
                raise _Enough
            return (hidden,) if self.as_tuple else hidden

        return forward


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or bool(a == b) or (type(a) is type(b) and not isinstance(a, (int, float, str, bool)))


def moved(call: Call, device: torch.device) -> Call:
    """The same call with its tensors on `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(move(item) for item in value)
        return value

    return Call(move(call.args), move(call.kwargs))


def load_skeleton(source: FloatSource) -> Skeleton:
    """The empty model of a source; raises `InvalidCheckpoint` for one that transformers does not know."""
    try:
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # Buffers are real: tables of positions are computed, not stored, and meta tensors would lose them.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, OSError) as error:
        raise InvalidCheckpoint(
            f"{source.folder} is no causal language model that transformers knows: {error}"
        ) from error
    model.eval()
    return Skeleton(model, source.folder)
