"""The memory of an engine, allocated once and bound to the model's layers: keys and values, and the scale bank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peqa_kernels.paged_attention import cache_dtype
from peqa_kernels.quant_matmul import bank_dtype
from peqa_runtime.engine.canary import blocks_needed
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.graph_setup import reserved_bytes
from peqa_runtime.engine.kv_cache import KVCache, available_memory, fitting_blocks, most_blocks
from peqa_runtime.scales.scale_bank import ScaleBank

if TYPE_CHECKING:
    from peqa_runtime.model.loader import LoadedModel


def bound_kv_cache(model: LoadedModel, config: EngineConfig, max_model_len: int) -> KVCache:
    """Return the cache that the model's layers read and write from now on, with blocks for the canary behind it.

    As many blocks as the configuration says, else as fit beside all that is allocated and the graphs to come. Raises
    `ValueError` when not one context of `max_model_len` tokens does, or for a dtype that is not to be had here.
    """
    dtype = kv_dtype(config.kv_cache_dtype, model.device, model.dtype)
    num_blocks = config.num_blocks or fitting_blocks(
        model.kv_spec,
        block_size=config.block_size,
        dtype=dtype,
        available_bytes=available_memory(model.device) - reserved_bytes(model, config, max_model_len),
        device=model.device,
        max_model_len=max_model_len,
        max_sequences=config.max_sequences,
    )
    cache = KVCache(
        model.kv_spec,
        num_blocks=num_blocks,
        spare_blocks=blocks_needed(config.block_size),
        block_size=config.block_size,
        device=model.device,
        dtype=dtype,
    )
    for layer, caches in zip(model.layers, cache.layers, strict=True):
        layer.bind(*caches)
    return cache


def fitting_tokens(model: LoadedModel, config: EngineConfig) -> int:
    """Tokens whose keys and values fit into the memory that is left, with room for what else takes memory.

    Raises `ValueError` when that is not even a block, or for a dtype that is not to be had here.
    """
    dtype = kv_dtype(config.kv_cache_dtype, model.device, model.dtype)
    left = available_memory(model.device) - reserved_bytes(model, config, config.block_size)
    return config.block_size * most_blocks(model.kv_spec, config.block_size, dtype, left, model.device)


def kv_dtype(name: str, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What `EngineConfig.kv_cache_dtype` means on `device` for a model that computes in `dtype`.

    Raises `ValueError` for fp16 where the CPU's kernels do not read it, and on a GPU for another dtype than `dtype`.
    """
    best = cache_dtype(device, dtype)
    if name == "auto":
        return best
    wanted = {"float16": torch.float16, "float32": torch.float32}[name]
    if wanted in (best, dtype):
        return wanted
    if device.type == "cuda":
        computed = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"kv_cache_dtype {name} needs a model that computes in {name}: on a GPU keys and values are kept in what "
            f"it computes in, here {computed}; choose auto, or dtype {name}"
        )
    if wanted == torch.float16 and cache_dtype(device, torch.float32) != wanted:
        raise ValueError(
            "kv_cache_dtype float16 needs the compiled CPU kernels on a processor with AVX2 and F16C, AVX-512 or "
            "64-bit ARM, which are not to be had here; choose auto or float32"
        )
    return wanted


def attached_bank(model: LoadedModel, config: EngineConfig) -> ScaleBank:
    """Return the bank whose rows the model's linears read from now on."""
    bank = ScaleBank(
        model.linears,
        rows=config.task_rows,
        group_rows=config.group_rows,
        device=model.device,
        dtype=bank_dtype(model.device),
    )
    for linear, rows in zip(model.linears, bank.banks, strict=True):
        linear.module.attach(rows, model.step_rows)
    return bank
