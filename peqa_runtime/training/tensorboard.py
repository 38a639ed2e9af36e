"""Losses and learning rates as TensorBoard events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peqa_runtime.errors import InvalidData


def summary_writer() -> Any:
    """The class that writes events, from `pip install tensorboard`; without it `InvalidData`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InvalidData("--tensorboard needs a package that is not here: pip install tensorboard") from None
    return SummaryWriter


def tensorboard_callback(folder: Path) -> Any:
    """A callback of transformers' Trainer that writes to `folder`."""
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(summary_writer()(str(folder)))
