"""What is wrong with a request before any of it is computed."""

from __future__ import annotations

from typing import Protocol

from peqa_runtime.core import Request
from peqa_runtime.errors import InvalidRequest, PromptTooLong


class Vocabulary(Protocol):
    """What is asked of the model."""

    @property
    def vocab_size(self) -> int:
        """Token ids go from 0 to one less."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""


def check_request(request: Request, model: Vocabulary, limit: int) -> None:
    """Raise `InvalidRequest`, or `PromptTooLong` when prompt and output are more than `limit` tokens."""
    prompt, params, vocab_size = request.prompt_token_ids, request.params, model.vocab_size
    if not prompt:
        raise InvalidRequest("the prompt has no tokens; send at least one", param="prompt")
    for name, ids in (("prompt", prompt), ("stop_token_ids", params.stop_token_ids)):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(i for i in ids if not 0 <= i < vocab_size)
            raise InvalidRequest(
                f"token id {wrong} is outside the vocabulary: ids go from 0 to {vocab_size - 1}", param=name
            )
    # Else the sampler would find no number to choose by, as when the model fails, and the task would pay for it.
    if params.min_tokens and len({*params.stop_token_ids, *model.eos_token_ids}) >= vocab_size:
        raise InvalidRequest(
            "stop_token_ids hold the whole vocabulary, so min_tokens leaves no token to choose",
            param="stop_token_ids",
        )
    if len(prompt) + params.max_tokens > limit:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}, together more than the "
            f"{limit} tokens that fit; shorten one of them",
            param="prompt" if len(prompt) >= limit else "max_tokens",
        )
