"""The load-time check: the same random prompts through plain attention and through the paged path must agree.

Some models accept a registered attention and then ignore it, or mix packed sequences; they would be wrong in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peqa_runtime.errors import UnsupportedModel
from peqa_runtime.model.attention import ATTENTION
from peqa_runtime.model.forward_context import ForwardContext

if TYPE_CHECKING:
    from peqa_runtime.model.loader import LoadedModel

logger = logging.getLogger(__name__)

_Forward = Callable[[ForwardContext, Tensor, Tensor, Tensor], Tensor]

_BLOCK_SIZE = 8
_LENGTHS = (13, 6)  # two sequences, packed; the longer one crosses a block
_CUT = 7  # ... and comes in two chunks
# Relative RMS difference that is rounding. Measured in fp32 over 23 architectures: 1e-8 to 4e-7, and 1e-4 where the
# products round activations to 16-bit integers and two ways to compute them round differently; models that are wrong
# start at 0.02. 16-bit activations round at 4e-3 (bf16), over many layers.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def self_check(loaded: LoadedModel) -> float:
    """Largest relative RMS difference of logits, plain against paged, lean and fused; leaves no cache bound.

    Raises `UnsupportedModel` when they differ by more than rounding. A fused decoder that does is taken away, with a
    warning: the modules that it stands for were right.
    """
    model, layers = loaded.model, loaded.layers
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, loaded.vocab_size, (length,), generator=generator).to(loaded.device)
        for length in _LENGTHS
    ]
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            dense = [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in prompts]
    finally:
        model.set_attn_implementation(ATTENTION)
    expected = torch.cat([dense[0][:_CUT], dense[1], dense[0][_CUT:]])
    before = [layer.calls for layer in layers]
    name = type(model).__name__
    difference = _difference(_paged(loaded, prompts, loaded.forward_through_modules), expected)
    if any(layer.calls - calls != 2 for layer, calls in zip(layers, before, strict=True)):
        raise UnsupportedModel(f"{name} does not call the paged attention once per layer and step")
    if not difference <= _TOLERANCE[loaded.dtype]:
        raise UnsupportedModel(
            f"{name} gives other logits with paged attention than with its own (relative difference {difference:.2g}); "
            "it cannot be served correctly"
        )
    if loaded.lean is not None:
        lean = _difference(_paged(loaded, prompts, loaded.forward), expected)
        if not lean <= _TOLERANCE[loaded.dtype]:
            raise UnsupportedModel(
                f"{name} gives other logits in the CPU's own decoder than in transformers (relative difference "
                f"{lean:.2g}); it cannot be served correctly"
            )
        difference = max(difference, lean)
    if loaded.fused is not None:
        fused = _difference(_paged(loaded, prompts, loaded.fused.forward), expected)
        if not fused <= _TOLERANCE[loaded.dtype]:
            logger.warning(
                "%s gives other logits in the GPU's own decoder than in transformers (relative difference %.2g): it "
                "runs as transformers' modules, in more launches",
                name,
                fused,
            )
            loaded.fused = None
            return difference
        difference = max(difference, fused)
    return difference


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def _paged(loaded: LoadedModel, prompts: list[Tensor], forward: _Forward) -> Tensor:
    """Logits of the same tokens in two packed steps, blocks in scattered order."""
    _bind(loaded, 4)
    long, short = prompts
    tables = [[3, 1], [2, 0]]
    try:
        first = _step(loaded, [(long[:_CUT], 0, tables[0]), (short, 0, tables[1])], forward)
        return torch.cat([first, _step(loaded, [(long[_CUT:], _CUT, tables[0])], forward)])
    finally:
        for layer in loaded.layers:
            layer.bind(None, None)


def packed_logits(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """Logits fp32 [tokens, vocab] of one sequence (int64 [tokens]) through the served path, in one step."""
    blocks = -(-len(ids) // _BLOCK_SIZE)
    _bind(loaded, blocks)
    try:
        return _step(loaded, [(ids.to(loaded.device), 0, list(range(blocks)))], loaded.forward)
    finally:
        for layer in loaded.layers:
            layer.bind(None, None)


def _bind(loaded: LoadedModel, blocks: int) -> None:
    for layer, spec in zip(loaded.layers, loaded.kv_spec, strict=True):
        shape = (blocks, _BLOCK_SIZE, spec.kv_heads)
        layer.bind(
            torch.zeros(*shape, spec.d_k, device=loaded.device, dtype=loaded.dtype),
            torch.zeros(*shape, spec.d_v, device=loaded.device, dtype=loaded.dtype),
        )


def _step(loaded: LoadedModel, chunks: list[tuple[Tensor, int, list[int]]], forward: _Forward) -> Tensor:
    """One forward over (token ids, position of the first, block table) of each sequence; logits of all tokens."""
    device = loaded.device
    positions = [start + i for ids, start, _ in chunks for i in range(len(ids))]
    slots = [
        table[p // _BLOCK_SIZE] * _BLOCK_SIZE + p % _BLOCK_SIZE
        for ids, start, table in chunks
        for p in range(start, start + len(ids))
    ]
    starts = [0]
    for ids, _, _ in chunks:
        starts.append(starts[-1] + len(ids))
    context = ForwardContext(
        block_tables=torch.tensor([table for _, _, table in chunks], dtype=torch.int32, device=device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(
            [start + len(ids) for ids, start, _ in chunks], dtype=torch.int32, device=device
        ),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
    )
    return forward(
        context,
        torch.cat([ids for ids, _, _ in chunks]),
        torch.tensor(positions, dtype=torch.int64, device=device),
        torch.arange(len(positions), device=device),
    )
