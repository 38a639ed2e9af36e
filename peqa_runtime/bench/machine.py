"""The speed that this machine has at the moment, in the one number that other machines' figures are scaled by."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peqa_kernels.bench.machine import device_name
from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Call, Timer, Way

REFERENCE_US = 2123.0  # the same call on the machine that the served figures of other engines come from
SIZE, ROWS = 4096, 8
WEIGHTS = 4  # 32 MiB each: no cache holds one until its next turn


def speed_of_the_day(timer: Timer) -> Row:
    """Microseconds of F.linear in bf16, 4096x4096 at 8 rows."""
    weights = [torch.randn(SIZE, SIZE).bfloat16() for _ in range(WEIGHTS)]
    x = torch.randn(ROWS, SIZE).bfloat16()

    def call(weight: torch.Tensor) -> Call:
        return lambda: F.linear(x, weight)

    with torch.inference_mode():
        timing = timer.compare("F.linear", Way("linear", [call(weight) for weight in weights]))["linear"]
    micros = timing.median * 1e6
    facts = {"device": device_name(torch.device("cpu")), "factor": REFERENCE_US / micros}
    return Row("engine/machine/linear-bf16-4096x4096-8-rows", micros, "us", "<=", None, facts)
