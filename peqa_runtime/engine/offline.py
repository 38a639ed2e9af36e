"""Completing a list of prompts without a server: texts in, texts out."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from peqa_runtime.core import Blend, FinishReason, Lease, Request, TokenLogprobs, TokenOutput
from peqa_runtime.errors import InvalidRequest
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.text import IncrementalDecoder, encode

if TYPE_CHECKING:
    from peqa_runtime.engine.engine import Engine

_T = TypeVar("_T")

Choice = str | Path | ScaleSet | Mapping[str, float]
"""What a prompt is completed with: a task of the store, a scale set or its file, or the weights of a blend."""


@dataclass(frozen=True)
class Completion:
    """One prompt's result. `text` is without the token that ended it; `logprobs` has one entry per token.

    `num_cached_tokens` of the prompt were found computed; it says how the result came to be and is not compared.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    task: str
    revision: str
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: str | None = None
    num_cached_tokens: int = field(default=0, compare=False)


def generate(
    engine: Engine,
    prompts: Items[str] | Items[Items[int]],
    params: SamplingParams | Items[SamplingParams],
    task: Choice | Items[Choice],
    *,
    progress: bool = False,
) -> list[Completion]:
    """See `Engine.generate`. The engine must be idle and stepped by nobody else."""
    if isinstance(prompts, str):
        raise InvalidRequest("prompts is a list; for one prompt send a list of one", param="prompts")
    assert not engine.has_work, "generate() steps the engine itself"
    all_params = _one_each(
        "params", [params] if isinstance(params, SamplingParams) else list(params), len(prompts)
    )
    choices = list(task) if isinstance(task, Items) and not isinstance(task, str) else [task]
    all_tasks = _one_each("task", choices, len(prompts))
    ids = [_token_ids(engine, prompt) for prompt in prompts]
    requests: list[Request] = []
    outputs: dict[str, list[TokenOutput]] = {}
    files: dict[Path, ScaleSet] = {}
    try:
        for i, choice in enumerate(all_tasks):
            lease = _lease(engine, choice, files)
            request = Request(f"offline-{i}", ids[i], all_params[i], lease.task, lease.revision, lease.kind)
            engine.add_request(request, lease)
            requests.append(request)
            outputs[request.request_id] = []
        with tqdm(total=len(requests), unit="prompt", disable=not progress) as bar:
            while engine.has_work:
                for output in engine.step():
                    outputs[output.request_id].append(output)
                    bar.update(output.finished)
    finally:
        engine.abort_all()
    return [_completion(engine, request, outputs[request.request_id]) for request in requests]


def _lease(engine: Engine, choice: Choice, files: dict[Path, ScaleSet]) -> Lease:
    """A lease on what one prompt asks for; a file is read once (`files`)."""
    if isinstance(choice, Path):
        if choice not in files:
            files[choice] = engine.tasks.read_file(choice)
        return engine.tasks.hold(str(choice), files[choice])
    if isinstance(choice, ScaleSet):
        return engine.tasks.hold(choice.task or choice.revision, choice)
    if not isinstance(choice, str | Mapping):
        raise InvalidRequest(
            "task is the name of a task, the Path of a scale set file, a ScaleSet, the weights of a blend, or a "
            f"list of these; got {type(choice).__name__}",
            param="task",
        )
    return engine.tasks.acquire(Blend.of(choice) if isinstance(choice, Mapping) else choice)


def _token_ids(engine: Engine, prompt: str | Items[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(encode(engine.model.tokenizer, prompt))
    try:
        return tuple(map(operator.index, prompt))  # numpy's integers too
    except TypeError:
        raise InvalidRequest(
            f"a prompt is a text or a list of token ids, not {str(prompt)[:80]!r}", param="prompts"
        ) from None


def _one_each(name: str, values: list[_T], count: int) -> list[_T]:
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise InvalidRequest(
            f"{name} has {len(values)} entries for {count} prompts; give one, or one each", param=name
        )
    return values


def _completion(engine: Engine, request: Request, outputs: list[TokenOutput]) -> Completion:
    last = outputs[-1]
    assert last.finish_reason is not None
    tokens = tuple(o.token_id for o in outputs if o.token_id is not None)
    logprobs = tuple(o.logprobs for o in outputs if o.logprobs is not None)
    decoder = IncrementalDecoder(engine.model.tokenizer, request.prompt_token_ids)
    shown = tokens[:-1] if last.finish_reason == "stop" and not last.complete else tokens
    return Completion(
        prompt_token_ids=request.prompt_token_ids,
        token_ids=tokens,
        text="".join(map(decoder.push, shown)) + decoder.flush(),
        finish_reason=last.finish_reason,
        task=request.task,
        revision=request.revision,
        logprobs=logprobs if request.params.logprobs is not None else None,
        prompt_logprobs=outputs[0].prompt_logprobs,
        error=last.error,
        num_cached_tokens=outputs[0].num_cached_tokens,
    )
