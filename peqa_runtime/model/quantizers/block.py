"""One block at work: which of its linears share inputs, their Hessians, and the integers that come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peqa_kernels.quant_matmul import dequantize
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model.quantizers.blockwise import (
    BlockGain,
    BlockTrainer,
    TrainedLinear,
    TrainingOptions,
)
from peqa_runtime.model.quantizers.gptq import GptqOptions, Hessian, Rounded, gptq, output_error
from peqa_runtime.model.quantizers.plan import LinearPlan
from peqa_runtime.model.quantizers.rounding import quantize_rtn
from peqa_runtime.model.quantizers.skeleton import Call
from peqa_runtime.model.quantizers.workbench import HiddenStates

_STAGES = 8  # groups of linears with an input of their own; a block with more (experts) counts as one group
_AT_ONCE = 1 << 31  # bytes of activations for which all windows go through a block together
_WIDE = 4  # tensors as wide as its widest linear that a block holds at a time: gate, its activation, up, their product


class _Enough(Exception):
    """The last linear of a stage has its input."""


@dataclass(frozen=True)
class BlockOptions:
    """How integers are made; what is not for a linear's method does not touch it."""

    gptq: GptqOptions
    training: TrainingOptions
    integer_zeros: bool = False
    seed: int = 0


@dataclass(frozen=True)
class BlockResult:
    """Integers of a block's linears, the relative error of each one's outputs, and what training gained. `outputs` of
    all windows [windows, tokens, D] behind the quantized linears, where they came about on the way.
    """

    weights: dict[str, QuantizedWeight]
    errors: dict[str, float]
    gain: BlockGain | None
    outputs: Tensor | None = None


class Block:
    """A block of floats in memory, with the call that its model makes.

    `linears`: those of the block by their whole name, `plans` what is to become of them.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Mapping[str, nn.Linear],
        plans: Mapping[str, LinearPlan | None],
        call: Call,
        device: torch.device,
    ) -> None:
        self.module = module
        self.linears = dict(linears)
        self.plans = {name: plans[name] for name in linears}
        self._call = call
        self._device = device

    def run(self, hidden: Tensor) -> Tensor:
        """hidden states [1, tokens, D] through the block as it stands."""
        out: Any = self.module(hidden, *self._call.args, **self._call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def outputs(self, inputs: HiddenStates) -> Iterator[Tensor]:
        """`run` for every window, without gradients."""
        for window in range(inputs.windows):
            with torch.no_grad():
                found = self.run(inputs.read(window).to(self._device))
            yield found

    def quantize(
        self, inputs: HiddenStates, targets: HiddenStates | None, options: BlockOptions
    ) -> BlockResult:
        """Make integers of all planned linears; the block holds their decoded values afterwards.

        Linears are taken in the order in which inputs reach them, so that each sees what quantized ones give. `targets`
        (what float blocks give) are needed where a plan says blockwise.
        """
        rounded: dict[str, Rounded] = {}
        errors: dict[str, float] = {}

        def finish(stage: list[str], hessians: Mapping[str, Tensor]) -> None:
            for name in stage:
                plan = self.plans[name]
                if plan is not None:
                    rounded[name], errors[name] = self._round(name, plan, hessians[name], options)
            for name in stage:
                if name in rounded:
                    self._settle(name, rounded[name].weight)

        stages, outputs = self._stages(inputs), None
        once = sum(map(len, stages)) == len(set().union(*stages))  # no linear is called with two inputs
        if len(stages) > 1 and once and self._goes_through_together(inputs):
            outputs = self._in_one_pass(stages, inputs, finish)
        else:
            for stage in stages:
                finish(stage, self._hessians(stage, inputs))
        weights = {name: found.weight for name, found in rounded.items()}
        trained = [name for name, plan in self.plans.items() if plan and plan.method == "blockwise"]
        gain = None
        if trained:
            assert targets is not None, "blockwise needs the float block's outputs"
            outputs = None
            gain, better = self._train({name: rounded[name] for name in trained}, inputs, targets, options)
            weights |= better
        made = {name: weights[name] for name in self.linears if name in weights}
        return BlockResult(made, errors, gain, outputs)

    def _round(
        self, name: str, plan: LinearPlan, hessian: Tensor, options: BlockOptions
    ) -> tuple[Rounded, float]:
        weight = self.linears[name].weight.data
        try:
            if plan.method == "rtn":
                found = quantize_rtn(weight, plan.bits, plan.group_size, integer_zeros=options.integer_zeros)
                error = output_error(weight, dequantize(found), hessian)
                return Rounded(found, weight, error), error
            settings = options.gptq
            if plan.precision.groups(weight.shape[1]) == 1 and settings.act_order:
                settings = replace(settings, static_groups=True)
            made = gptq(weight, hessian, plan.precision, settings, integer_zeros=options.integer_zeros)
            return made, made.error
        except ValueError as error:
            raise InvalidCheckpoint(f"{name}: {error}") from error

    def _settle(self, name: str, weight: QuantizedWeight) -> None:
        linear = self.linears[name]
        linear.weight = nn.Parameter(dequantize(weight), requires_grad=False)

    def _stages(self, inputs: HiddenStates) -> list[list[str]]:
        """Linears that share an input, in the order of the forward; those that were not reached come last."""
        stages: list[list[str]] = []
        seen: list[Tensor] = []  # kept, so that no address comes twice

        def look(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                if seen and args[0] is seen[-1]:
                    stages[-1].append(name)
                else:
                    seen.append(args[0])
                    stages.append([name])

            return hook

        with hooked({name: look(name) for name in self.linears}, self.linears), torch.no_grad():
            self.run(inputs.read(0).to(self._device))
        stages = [[name for name in stage if self.plans[name]] for stage in stages]
        reached = {name for stage in stages for name in stage}
        stages.append([name for name, plan in self.plans.items() if plan and name not in reached])
        stages = [list(dict.fromkeys(stage)) for stage in stages if stage]
        return stages if len(stages) <= _STAGES else [[name for stage in stages for name in stage]]

    def _goes_through_together(self, inputs: HiddenStates) -> bool:
        """Whether all windows fit in memory at once, and the call, made for one, gives the same for several."""
        widest = max(max(linear.in_features, linear.out_features) for linear in self.linears.values())
        if 4 * inputs.windows * inputs.tokens * widest * _WIDE > _AT_ONCE or inputs.windows < 2:
            return False
        two = [inputs.read(window).to(self._device) for window in (0, inputs.windows - 1)]
        with torch.no_grad():
            alone = torch.cat([self.run(window) for window in two])
            try:
                together = self.run(torch.cat(two))
            except (RuntimeError, ValueError, IndexError, TypeError):
                return False
        return together.shape == alone.shape and torch.allclose(together, alone, rtol=1e-3, atol=1e-5)

    def _in_one_pass(
        self,
        stages: list[list[str]],
        inputs: HiddenStates,
        finish: Callable[[list[str], Mapping[str, Tensor]], None],
    ) -> Tensor:
        """Every stage is finished when its input is there, and the windows go on through the quantized linears.

        Gives what the block makes of them in the end, [windows, tokens, D].
        """
        open_stages = {stage[0]: stage for stage in stages}

        def reach(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                if name not in open_stages:  # a linear that the block calls again
                    return
                hessian = Hessian(args[0].shape[-1], self._device)
                rows = args[0].reshape(-1, args[0].shape[-1])
                whole = len(rows) % inputs.tokens == 0  # else some went elsewhere
                for part in (
                    (rows.view(-1, inputs.tokens, rows.shape[1]),) if whole else rows.split(inputs.tokens)
                ):
                    hessian.add(part)
                mean, stage = hessian.mean(), open_stages.pop(name)
                finish(stage, dict.fromkeys(stage, mean))

            return hook

        hidden = torch.cat([inputs.read(window) for window in range(inputs.windows)]).to(self._device)
        with hooked({name: reach(name) for name in open_stages}, self.linears), torch.no_grad():
            outputs = self.run(hidden)
        for stage in list(open_stages.values()):  # not reached by any token
            means = {name: Hessian(self.linears[name].in_features, self._device).mean() for name in stage}
            finish(stage, means)
        return outputs

    def _hessians(self, stage: list[str], inputs: HiddenStates) -> dict[str, Tensor]:
        """Second moments of the stage's inputs; linears with the same input share one."""
        found: dict[str, Hessian] = {}
        shared: dict[str, str] = {}
        last: list[tuple[Tensor, str]] = []

        def count(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                if last and last[0][0] is args[0]:
                    shared.setdefault(name, last[0][1])
                else:
                    last[:] = [(args[0], name)]
                    width = args[0].shape[-1]
                    found.setdefault(name, Hessian(width, self._device)).add(args[0].reshape(-1, width))
                if name == stage[-1]:
                    raise _Enough

            return hook

        with hooked({name: count(name) for name in stage}, self.linears), torch.no_grad():
            for window in range(inputs.windows):
                last.clear()
                try:
                    self.run(inputs.read(window).to(self._device))
                except _Enough:
                    continue
        means = {name: hessian.mean() for name, hessian in found.items()}
        for name in stage:
            owner = shared.get(name, name)
            if (
                owner not in means
            ):  # no token came here: all inputs are dead, and rounding to nearest is all there is
                means[owner] = Hessian(self.linears[owner].in_features, self._device).mean()
            means[name] = means[owner]
        return means

    def _train(
        self,
        starts: Mapping[str, Rounded],
        inputs: HiddenStates,
        targets: HiddenStates,
        options: BlockOptions,
    ) -> tuple[BlockGain, dict[str, QuantizedWeight]]:
        modules = {
            name: TrainedLinear(start, self.linears[name].bias, train_zeros=not options.integer_zeros)
            for name, start in starts.items()
        }
        for name, linear in modules.items():
            self.linears[name].forward = linear.forward  # type: ignore[method-assign, assignment]
        try:
            trainer = BlockTrainer(
                modules, self.run, inputs, targets, options.training, options.seed, self._device
            )
            gain = trainer.fit()
        finally:
            for name in modules:
                del self.linears[name].forward
        better = {name: linear.freeze() for name, linear in modules.items()}
        for name, weight in better.items():
            self._settle(name, weight)
        return gain, better


@contextmanager
def hooked(hooks: Mapping[str, Callable[..., None]], linears: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Call `hooks` before the forwards of these linears."""
    handles = [linears[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
