"""Losses and learning rates as TensorBoard events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peqa_runtime.errors import InvalidData


def tensorboard_callback(folder: Path) -> Any:
    """A callback of transformers' Trainer that writes to `folder`; needs `pip install tensorboard`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InvalidData("--tensorboard needs a package that is not here: pip install tensorboard") from None
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))
