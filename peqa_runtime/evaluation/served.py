"""The engine that is measured: what it answers is what a server answers, at a server's speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peqa_runtime.core import BASE_TASK, BaseManifest
from peqa_runtime.engine.allocation import fitting_tokens
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.engine.offline import Choice, Completion
from peqa_runtime.errors import InvalidCheckpoint, UnsupportedModel
from peqa_runtime.model.loader import load
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.training.data import Example
from peqa_runtime.training.text_encoding import TextEncoding

_ROWS_OF_LOGITS = 512  # of prompts in a step; fewer make the head's products thin, more cost memory
_TOKENS = 1 << 15  # whose keys and values have room together; what is more waits


class Served(TextEncoding):
    """A base in an engine of its own, see `Measured`. A context manager; `close` frees it."""

    def __init__(self, base: Path, *, device: str = "auto", longest: int | None = None) -> None:
        """`longest`: tokens of the only row to come, if there is one; None: many rows, of up to the model's context.

        Raises `InvalidCheckpoint` for a folder that is no base, `UnsupportedModel` for one that cannot be served here.
        """
        model = load(base, device=device)
        config = EngineConfig(
            task_rows=2,
            group_rows=2,
            max_sequences=EngineConfig.max_sequences if longest is None else 1,
            max_batch_tokens=_ROWS_OF_LOGITS,
            max_prompt_logprob_rows=_ROWS_OF_LOGITS,
            enforce_eager=longest is not None,  # one answer is not worth the time that graphs take
        )
        try:
            room = fitting_tokens(model, config)
            wanted = min(longest or model.max_model_len, model.max_model_len)
            self._short = room < wanted
            context = min(wanted, room)
            together = context if longest is not None else max(context, min(room, _TOKENS))
            blocks = -(-together // config.block_size)
            self._engine = Engine(model, config=replace(config, max_model_len=context, num_blocks=blocks))
        except ValueError as error:
            raise UnsupportedModel(f"{base} cannot be served here: {error}") from error
        super().__init__(model.tokenizer)
        self._set: Choice = BASE_TASK

    @property
    def computes(self) -> str:
        """Where, and in what."""
        model = self._engine.model
        return f"served, {model.device.type}, {str(model.dtype).removeprefix('torch.')}"

    @property
    def manifest(self) -> BaseManifest:
        """Of the base."""
        return self._engine.model.manifest

    @property
    def max_tokens(self) -> int:
        """Context, in tokens; less than the model's where memory is short."""
        return self._engine.max_model_len

    @property
    def bounded_by(self) -> str:
        """See `Measured`."""
        return "as much as fits into memory" if self._short else "the model's"

    def use(self, scale_set: ScaleSet | None) -> None:
        """Answer under this set; None: as the base."""
        self._set = BASE_TASK if scale_set is None else scale_set

    def greedy(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[str]:
        """Raises `InvalidCheckpoint` when the model gives NaN or infinity."""
        found = self._generate(prompts, SamplingParams(max_tokens=max_new_tokens, temperature=0.0))
        return [completion.text for completion in found]

    def logprobs(self, examples: Sequence[Example]) -> list[list[float]]:
        """Raises as `greedy` does."""
        params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)
        result: list[list[float]] = []
        found = self._generate([example.token_ids for example in examples], params)
        for example, completion in zip(examples, found, strict=True):
            assert completion.prompt_logprobs is not None
            own = completion.prompt_logprobs[example.loss_from :]
            result.append([token.logprob for token in own if token is not None])
        return result

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Completion]:
        completions = self._engine.generate(prompts, params, task=self._set)
        for completion in completions:
            if completion.error is not None:
                what = "the set" if isinstance(self._set, ScaleSet) else "the base"
                raise InvalidCheckpoint(f"{what} cannot be measured: {completion.error}")
        return completions
