"""Which CUDA device a Triton launch goes to."""

from __future__ import annotations

import contextlib

import torch


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` the current one: Triton launches there, wherever its tensors lie. Free where it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
