"""Block-wise training of integers (Block-AP of EfficientQAT, arXiv 2407.11062).

The weights, scales and zeros of one transformer block are trained so that the block, rounded, gives what the float
block gives. It sees inputs that came through the quantized blocks before it; its targets came through float ones.
Gradients pass through the rounding as if it were not there. The start is what GPTQ made of the block, with each weight
where it stood within its step when its turn came, so that training moves it over an edge or leaves it.

Everything is trained in units that do not depend on the model: weights in steps of their group, scales as logarithms
relative to their start, zeros in steps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peqa_kernels.packing import pack_codes
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidRequest
from peqa_runtime.model.quantizers.gptq import Rounded
from peqa_runtime.model.quantizers.workbench import HiddenStates

RunBlock = Callable[[Tensor], Tensor]
"""hidden states [1, tokens, D] -> what the block gives for them."""
_MOST_EPOCHS = 1000  # every block is trained so often: more is a typing error
_BETAS = (0.9, 0.95)  # short runs: the second moment must have settled within tens of steps


@dataclass(frozen=True)
class TrainingOptions:
    """`epochs` over the calibration windows, `batch` windows a step. Rates are per step of Adam: `weight_rate` in
    steps of a group, `scale_rate` relative (zeros in steps). `held_out`: part of the windows that decides when to stop
    (after `patience` looks without gain) and what is kept; a look comes `looks` times in an epoch.
    """

    epochs: float = 4.0
    batch: int = 4
    weight_rate: float = 5e-3
    scale_rate: float = 1e-3
    held_out: float = 0.125
    looks: int = 2
    patience: int = 6

    def __post_init__(self) -> None:
        """Raise `InvalidRequest` naming the number that makes no sense."""
        for name in ("epochs", "batch", "weight_rate", "scale_rate", "looks"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                option = {"weight_rate": " (--lr)", "scale_rate": " (--scale-lr)"}.get(name, "")
                raise InvalidRequest(f"{name}{option} must be above 0, not {value}", param=name)
        if self.epochs > _MOST_EPOCHS:
            raise InvalidRequest(f"epochs must be at most {_MOST_EPOCHS}, not {self.epochs}", param="epochs")
        if not 0 < self.held_out <= 0.5:
            raise InvalidRequest(
                f"held_out must be above 0 and at most 0.5, not {self.held_out}", param="held_out"
            )


@dataclass(frozen=True)
class BlockGain:
    """Held-out error of a block before and after training, relative to its outputs, and the steps taken."""

    before: float
    after: float
    steps: int


class _Round(torch.autograd.Function):
    """weight = step * exp(theta) * (clamp(round(place * exp(-theta) + zero)) - zero), straight through the rounding."""

    @staticmethod
    def forward(
        ctx: Any,
        place: Tensor,  # [N, G, k], weight / step
        theta: Tensor,  # [N, G, 1]
        zero: Tensor,  # [N, G, 1]
        step: Tensor,  # [N, G, 1]
        top: int,
    ) -> Tensor:
        position = torch.addcmul(zero, place, torch.exp(-theta))
        codes = position.round()
        inside = (codes >= 0) & (codes <= top)
        codes = codes.clamp_(0, top).sub_(zero)
        ctx.save_for_backward(position.sub_(zero), codes, inside, theta, step)
        return codes * (step * theta.exp())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        position, codes, inside, theta, step = ctx.saved_tensors
        grad = grads[0] * step
        within = grad * inside
        # inside: d/d theta = scale * (code - position); outside: scale * (code - zero)
        by_scale = (
            (grad * codes).sum(-1, keepdim=True) - (within * position).sum(-1, keepdim=True)
        ) * theta.exp()
        by_zero = (within.sum(-1, keepdim=True) - grad.sum(-1, keepdim=True)) * theta.exp()
        return within, by_scale, by_zero, None, None


class TrainedLinear(nn.Module):
    """A linear whose weight is rounded anew between `begin` and `end`, once for all the windows of a step."""

    def __init__(self, start: Rounded, bias: Tensor | None, *, train_zeros: bool) -> None:
        super().__init__()
        weight = start.weight
        rows, groups = weight.scales.shape
        self.bits = weight.bits
        self.top = (1 << weight.bits) - 1
        self.step = weight.scales.detach().clone()[..., None]
        settled = start.settled.to(self.step.device).view(rows, groups, -1)
        # A weight far outside of its range would take many steps to come back to an edge: none is worth them.
        low, high = -weight.zeros[..., None] - 1, self.top - weight.zeros[..., None] + 1
        self.place = nn.Parameter((settled / self.step).clamp_(low, high))
        self.theta = nn.Parameter(torch.zeros_like(self.step))
        self.zero = nn.Parameter(weight.zeros.detach().clone()[..., None], requires_grad=train_zeros)
        self.bias = bias

    def begin(self) -> None:
        """Round the weight; forwards use it until `end`."""
        weight: Tensor = _Round.apply(self.place, self.theta, self.zero, self.step, self.top)
        self._rounded = weight.view(weight.shape[0], -1)
        self._used = self._rounded.detach().requires_grad_(torch.is_grad_enabled())

    def end(self) -> None:
        """Pass the gradient of the rounded weight on to what is trained."""
        if self._used.grad is not None:
            self._rounded.backward(self._used.grad)
        del self._rounded, self._used

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return F.linear(x, self._used, self.bias)

    def parameter_groups(self, options: TrainingOptions) -> list[dict[str, Any]]:
        """For the optimizer."""
        scales = [p for p in (self.theta, self.zero) if p.requires_grad]
        return [
            {"params": [self.place], "lr": options.weight_rate},
            {"params": scales, "lr": options.scale_rate},
        ]

    def state(self) -> list[Tensor]:
        """Copies of what is trained."""
        return [p.detach().clone() for p in (self.place, self.theta, self.zero)]

    def restore(self, state: list[Tensor]) -> None:
        """Go back to an earlier `state`."""
        with torch.no_grad():
            for parameter, value in zip((self.place, self.theta, self.zero), state, strict=True):
                parameter.copy_(value)

    def freeze(self) -> QuantizedWeight:
        """The codes, scales and zeros as they stand."""
        with torch.no_grad():
            codes = torch.addcmul(self.zero, self.place, torch.exp(-self.theta)).round_().clamp_(0, self.top)
            scales = (self.step * self.theta.exp())[..., 0]
            rows = len(codes)
            packed = pack_codes(codes.view(rows, -1).to(torch.uint8), self.bits)
            return QuantizedWeight(
                packed, scales, self.zero.detach()[..., 0].clone(), self.bits, codes[0].numel()
            )


def token_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of the squared error relative to the token's power; [1, tokens, D] each.

    Relative, because a first token often has a hundred times the size of the others, and the norm at the head of the
    next block takes sizes away.
    """
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()


class BlockTrainer:
    """Trains the linears of one block in place of its own; use once."""

    def __init__(
        self,
        linears: Mapping[str, TrainedLinear],
        run: RunBlock,
        inputs: HiddenStates,
        targets: HiddenStates,
        options: TrainingOptions,
        seed: int,
        device: torch.device,
    ) -> None:
        self.linears = list(linears.values())
        self.run = run
        self.inputs, self.targets = inputs, targets
        self.options = options
        self.device = device
        self._rng = random.Random(f"blockwise {seed}")
        order = list(range(inputs.windows))
        self._rng.shuffle(order)
        held = max(1, round(len(order) * options.held_out))
        self.held, self.train = sorted(order[:held]), order[held:]

    def fit(self) -> BlockGain:
        """Train; the linears end in the state with the least held-out error, which may be their start."""
        options = self.options
        groups = [group for linear in self.linears for group in linear.parameter_groups(options)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=_BETAS, fused=True)
        per_epoch = math.ceil(len(self.train) / options.batch)
        steps = max(1, round(options.epochs * per_epoch))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        look = max(1, per_epoch // options.looks)
        before = best = self.error()
        kept = [linear.state() for linear in self.linears]
        idle, step = 0, 0
        for step, batch in enumerate(self._batches(steps), start=1):
            self._gradients(batch)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % look == 0 or step == steps:
                error = self.error()
                idle = 0 if error < best else idle + 1
                if error < best:
                    best, kept = error, [linear.state() for linear in self.linears]
                if idle > options.patience or not math.isfinite(error):
                    break
        for linear, state in zip(self.linears, kept, strict=True):
            linear.restore(state)
        return BlockGain(before, best, step)

    def error(self) -> float:
        """Mean held-out error as it stands."""
        with torch.no_grad(), self._rounded():
            return sum(float(self._loss(window)) for window in self.held) / len(self.held)

    def _gradients(self, batch: list[int]) -> None:
        with self._rounded():
            for window in batch:
                (self._loss(window) / len(batch)).backward()

    def _loss(self, window: int) -> Tensor:
        return token_error(self.run(self._read(self.inputs, window)), self._read(self.targets, window))

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        for linear in self.linears:
            linear.begin()
        yield
        for linear in self.linears:
            linear.end()

    def _read(self, states: HiddenStates, window: int) -> Tensor:
        return states.read(window).to(self.device)

    def _batches(self, steps: int) -> list[list[int]]:
        batches: list[list[int]] = []
        while len(batches) < steps:
            order = list(self.train)
            self._rng.shuffle(order)
            batches += [order[i : i + self.options.batch] for i in range(0, len(order), self.options.batch)]
        return batches[:steps]


def _rate(step: int, steps: int) -> float:
    """Warm-up over a twentieth, then half a cosine down to a twentieth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
