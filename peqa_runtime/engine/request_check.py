"""What is wrong with a request before any of it is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from peqa_runtime.core import Request
from peqa_runtime.errors import InvalidRequest, PromptTooLong
from peqa_runtime.sampling_params import SamplingParams


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
    fields = (
        ("prompt", prompt),
        ("stop_token_ids", params.stop_token_ids),
        ("logprob_token_ids", params.logprob_token_ids),
    )
    for name, ids in (*fields, *_ids_of_rules(params)):
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
    if params.allowed_token_ids is not None:
        _check_allowed(params, params.allowed_token_ids, model.eos_token_ids)
    if len(prompt) + params.max_tokens > limit:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}, together more than the "
            f"{limit} tokens that fit; shorten one of them",
            param="prompt" if len(prompt) >= limit else "max_tokens",
        )


def _ids_of_rules(params: SamplingParams) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Token ids of the fields that most requests do not have, with the fields' names."""
    if params.ruled:
        yield "logit_bias", tuple(token for token, _ in params.logit_bias)
        yield "allowed_token_ids", params.allowed_token_ids or ()
        yield "bad_words", tuple(token for word in params.bad_words for token in word)


def _check_allowed(params: SamplingParams, allowed: tuple[int, ...], eos: tuple[int, ...]) -> None:
    """Raise `InvalidRequest` when nothing that is allowed can be chosen first."""
    left = set(allowed) - {word[0] for word in params.bad_words if len(word) == 1}
    if params.min_tokens:
        left -= {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    if not left:
        raise InvalidRequest(
            "allowed_token_ids holds only tokens that bad_words or min_tokens forbid; allow another one",
            param="allowed_token_ids",
        )
