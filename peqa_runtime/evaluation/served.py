"""The engine that is measured: what it answers is what a server answers, at a server's speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from peqa_runtime.core import BASE_TASK, BaseManifest
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.engine.offline import Choice, Completion
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.training.data import Example
from peqa_runtime.training.text_encoding import TextEncoding

_ROWS_OF_LOGITS = 512  # of prompts in a step; fewer make the head's products thin, more cost memory


class Served(TextEncoding):
    """A base in an engine of its own, see `Measured`. A context manager; `close` frees it."""

    computes = "served"

    def __init__(self, base: Path, *, device: str = "auto") -> None:
        """Raises `InvalidCheckpoint` for a folder that is no base, `UnsupportedModel` for one that cannot be served."""
        config = EngineConfig(
            task_rows=2,
            group_rows=2,
            max_prompt_logprob_rows=_ROWS_OF_LOGITS,
            max_batch_tokens=_ROWS_OF_LOGITS,
        )
        self._engine = Engine(base, config=config, device=device)
        self._set: Choice = BASE_TASK

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's."""
        return self._engine.model.tokenizer

    @property
    def manifest(self) -> BaseManifest:
        """Of the base."""
        return self._engine.model.manifest

    @property
    def max_tokens(self) -> int:
        """Context, in tokens."""
        return self._engine.max_model_len

    def use(self, scale_set: Path | None) -> None:
        """Answer under this set; None: as the base. Raises `InvalidScaleSet`, `WrongBase`."""
        if scale_set is not None:
            self._engine.tasks.read_file(scale_set)
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
                raise InvalidCheckpoint(f"{self._set} cannot be measured: {completion.error}")
        return completions
