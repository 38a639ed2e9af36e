"""An engine's CUDA graphs: whether it has any, the memory to leave for them, and their capture at its start."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.cuda_recorder import CudaRecorder
from peqa_runtime.engine.decode_graphs import DecodeGraphs
from peqa_runtime.engine.graph_plan import GraphPlan, graph_bytes
from peqa_runtime.engine.kv_cache import KVCache
from peqa_runtime.engine.model_runner import ModelRunner
from peqa_runtime.scales.scale_bank import ScaleBank

if TYPE_CHECKING:
    from peqa_runtime.model.loader import LoadedModel

logger = logging.getLogger(__name__)


def planned_graphs(model: LoadedModel, config: EngineConfig, max_model_len: int) -> GraphPlan | None:
    """The graphs to capture; None on a CPU and where the operator wants none."""
    if model.device.type != "cuda" or config.enforce_eager:
        return None
    return GraphPlan.of(min(config.max_sequences, config.max_batch_tokens), max_model_len)


def reserved_bytes(model: LoadedModel, config: EngineConfig, max_model_len: int) -> int:
    """Device memory that the KV cache is to leave for the graphs: an estimate, 0 where there are none."""
    plan = planned_graphs(model, config, max_model_len)
    if plan is None:
        return 0
    from peqa_kernels.paged_attention.tiles import most_splits

    heads = [layer.use.heads for layer in model.layers if layer.use is not None]
    return graph_bytes(
        plan,
        vocab_size=model.vocab_size,
        widths=[linear.in_features + linear.out_features for linear in model.linears],
        heads=max(heads),
        d_v=max(spec.d_v for spec in model.kv_spec),
        layers=len(model.layers),
        splits=most_splits(max_model_len, None),
    )


def capture_graphs(
    runner: ModelRunner,
    model: LoadedModel,
    bank: ScaleBank,
    cache: KVCache,
    config: EngineConfig,
    max_model_len: int,
) -> DecodeGraphs | None:
    """Capture the graphs of an engine whose kernels are compiled; None where its steps are to run eagerly."""
    plan = planned_graphs(model, config, max_model_len)
    if plan is None:
        if model.device.type == "cuda":
            logger.info("no CUDA graphs: enforce_eager is set, every step runs eagerly")
        return None
    free = torch.cuda.mem_get_info(model.device)[0]
    graphs = DecodeGraphs(
        plan,
        CudaRecorder(model.device),
        runner.forward,
        bank,
        block_size=config.block_size,
        scratch_block=cache.spare[0],
        vocab_size=model.vocab_size,
        device=model.device,
        row_invariant=config.row_invariant,
    )
    if not graphs.capture():
        return None
    logger.info(
        "CUDA graphs take %d MiB (%d MiB were left for them)",
        (free - torch.cuda.mem_get_info(model.device)[0]) >> 20,
        reserved_bytes(model, config, max_model_len) >> 20,
    )
    return graphs
