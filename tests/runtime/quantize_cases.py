"""Small calibrations for quantizing whole folders, random models of two blocks, and what a run leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peqa_runtime.model.quantize import QuantizeOptions
from peqa_runtime.model.quantizers.blockwise import TrainingOptions
from peqa_runtime.model.quantizers.calibration import CalibrationText

Make = Callable[..., Path]


def quantize_options(text: Path, **changes: Any) -> QuantizeOptions:
    values: dict[str, Any] = {
        "calibration": CalibrationText(text, windows=8, tokens=32),
        "training": TrainingOptions(epochs=1, batch=2),
        "device": "cpu",
    }
    return QuantizeOptions(**{**values, **changes})


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "unfinished" in p.name or ".tmp-" in p.name)


def save_random_model(folder: Path, family: str, options: dict[str, Any]) -> Any:
    """A random model of two small blocks, saved in `folder`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model
