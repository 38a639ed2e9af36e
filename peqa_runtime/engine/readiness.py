"""What a GPU does before the first request: choose the mode of its kernels, compile them and try each for exactness."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import Tensor

from peqa_kernels.quant_matmul import PreparedWeight
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.model.attention import warm_up_attention
from peqa_runtime.model.equal_bits import set_equal_bits
from peqa_runtime.model.loader import LoadedModel
from peqa_runtime.model.quantized_linear import QuantizedLinear, TiedHead

logger = logging.getLogger(__name__)


def make_ready(model: LoadedModel, config: EngineConfig) -> None:
    """Set the model to `config.row_invariant`; on a GPU also compile what batches up to the configured sizes run.

    Compiling takes minutes the first time and seconds afterwards, from Triton's cache on disk. Kinds of scale sets
    other than `channel` compile when the first of their sets is used. RuntimeError where a GPU computes wrongly,
    ValueError for activation bits that the device's kernels do not have.
    """
    weights = list(_weights(model))
    for prepared, _ in weights:
        prepared.set_row_invariant(config.row_invariant)
        _set_activation_bits(prepared, config.activation_bits)
    if model.device.type != "cuda":
        return
    if config.row_invariant and (uncovered := set_equal_bits(model.model)):
        logger.warning(
            "row_invariant does not reach %d modules that multiply by floats in a way of their own (%s, …): the last "
            "bits of an answer may depend on what runs beside it",
            len(uncovered),
            ", ".join(uncovered[:3]),
        )
    from peqa_kernels.quant_matmul.gpu_tune import warm_up
    from peqa_kernels.quant_matmul.tuning import BUCKETS, bucket

    largest = bucket(config.max_batch_tokens)
    warm_up(weights, [size for size in BUCKETS if size <= largest], model.dtype)
    warm_up_attention(model.layers, model.dtype, row_invariant=config.row_invariant)


def _set_activation_bits(prepared: PreparedWeight, bits: int) -> None:
    try:
        prepared.set_activation_bits(bits)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _weights(model: LoadedModel) -> Iterator[tuple[PreparedWeight, Tensor | None]]:
    for module in (*(linear.module for linear in model.linears), *model.model.modules()):
        if isinstance(module, QuantizedLinear):
            yield module.prepare(), module.bias
        elif isinstance(module, TiedHead):
            yield module.embedding.prepare(), None
