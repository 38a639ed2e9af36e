"""The model in fp32 that is measured: transformers' own forward over the decoded weights, no fast kernel between."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peqa_runtime.core import BaseManifest
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.training.batches import collate
from peqa_runtime.training.data import Example
from peqa_runtime.training.text_encoding import TextEncoding
from peqa_runtime.training.token_losses import token_losses
from peqa_runtime.training.tuning import TunableModel, apply_scale_set, drop_scales


class Reference(TextEncoding):
    """A base as it is tuned, see `Measured`; what is on the model counts until `use` is called."""

    computes = "float32"

    def __init__(self, tunable: TunableModel) -> None:
        """`tunable` is this one's from now on."""
        super().__init__(tunable.tokenizer)
        self._tunable = tunable

    @property
    def manifest(self) -> BaseManifest:
        """Of the base."""
        return self._tunable.manifest

    @property
    def max_tokens(self) -> int:
        """Context, in tokens."""
        return self._tunable.max_tokens

    @property
    def bounded_by(self) -> str:
        """See `Measured`."""
        return "the model's"

    def use(self, scale_set: ScaleSet | None) -> None:
        """Put this set on the model; None: make it the base."""
        if scale_set is None:
            drop_scales(self._tunable)
        else:
            apply_scale_set(self._tunable, scale_set)

    def greedy(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        """By transformers' `generate`."""
        eos = self.eos_token_id
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), eos)
        mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        model = self._tunable.model
        with torch.no_grad():
            out = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos,
                pad_token_id=eos,
            )
        answers: list[str] = []
        for ids in out[:, width:].tolist():
            end = ids.index(eos) if eos in ids else len(ids)
            answers.append(str(self.tokenizer.decode(ids[:end], skip_special_tokens=True)))
        return answers

    def logprobs(self, examples: Sequence[Example]) -> list[list[float]]:
        """All examples in one batch."""
        model = self._tunable.model
        batch = collate(examples, self.eos_token_id).to(model.device)
        with torch.no_grad():
            losses = token_losses(self._tunable, model, batch.input_ids, batch.positions, batch.targets)
        return [(-losses[batch.owners == i]).tolist() for i in range(len(examples))]
