"""Whether a model keeps packed examples apart: tried on the model itself before a run relies on it."""

from __future__ import annotations

import random

import torch

from peqa_runtime.errors import UnsupportedModel
from peqa_runtime.training.batches import collate
from peqa_runtime.training.data import Example
from peqa_runtime.training.tuning import TunableModel, logits_at

_TOLERANCE = 1e-3  # relative RMS; what rounding makes of fp32 is 1e-6


def check_packing(tunable: TunableModel) -> None:
    """Compare logits of three random examples in one row with those of each alone; in fp32, no gradient.

    Raises `UnsupportedModel` where they differ: such a model reads its positions elsewhere, or attends across.
    """
    rng = random.Random(0)
    vocab = tunable.model.get_input_embeddings().num_embeddings
    lengths = (9, 5, 7)
    examples = [Example(tuple(rng.randrange(vocab) for _ in range(n)), 1) for n in lengths]
    device = tunable.model.device
    tunable.parts.parts = ()
    with torch.no_grad():
        batch = collate(examples, tunable.eos_token_id, pack=sum(lengths)).to(device)
        packed = logits_at(tunable.model, batch.input_ids, batch.positions, batch.position_ids)
        for i, example in enumerate(examples):
            alone = collate([example], tunable.eos_token_id).to(device)
            wanted = logits_at(tunable.model, alone.input_ids, alone.positions)
            error = (packed[batch.owners == i] - wanted).norm() / wanted.norm()
            if not error <= _TOLERANCE:
                raise UnsupportedModel(
                    "this model does not keep packed examples apart "
                    f"(their logits change by {error.item():.1%}); tune it without --pack"
                )
