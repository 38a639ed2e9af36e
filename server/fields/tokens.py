"""Fields that say token by token what may be chosen, as the runtime's parameters have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peqa_runtime.errors import InvalidRequest
from peqa_runtime.sampling_params import MAX_BAD_WORDS, SamplingParams
from peqa_runtime.text import encode
from peqa_server.fields.schemas import GenerationFields
from peqa_server.openai.structured import AnswerForm
from peqa_server.services import ServedModel

MAX_BAD_WORD = 256
"""Characters of one of `bad_words`."""


def with_controls(
    model: ServedModel, wanted: GenerationFields, form: AnswerForm | None, params: SamplingParams
) -> SamplingParams:
    """`params` with logit_bias, allowed_token_ids, bad_words and the answer's form. Raises `InvalidRequest`."""
    if form is not None:
        params = replace(params, structured=form.constraint)
    if wanted.logit_bias:
        params = replace(params, logit_bias=wanted.logit_bias)
    if wanted.allowed_token_ids is not None:
        if len(wanted.allowed_token_ids) > model.vocab_size:
            raise InvalidRequest(
                f"allowed_token_ids has {len(wanted.allowed_token_ids)} ids, more than the {model.vocab_size} of the "
                "vocabulary; name each token once",
                param="allowed_token_ids",
            )
        params = replace(params, allowed_token_ids=tuple(dict.fromkeys(wanted.allowed_token_ids)))
    if wanted.bad_words:
        params = replace(params, bad_words=tuple(dict.fromkeys(_bad_words(model, wanted.bad_words))))
    return params


def _bad_words(model: ServedModel, words: list[str]) -> Iterator[tuple[int, ...]]:
    """Each word's tokens at the start of a text, and within one, where a space comes before it."""
    if len(words) > MAX_BAD_WORDS // 2:
        raise InvalidRequest(f"bad_words may have at most {MAX_BAD_WORDS // 2} words", param="bad_words")
    for word in words:
        if not word.strip() or len(word) > MAX_BAD_WORD:
            raise InvalidRequest(
                f"bad_words must be texts of 1 to {MAX_BAD_WORD} characters that are not all spaces",
                param="bad_words",
            )
        for text in (word, " " + word.lstrip()):
            yield tuple(encode(model.tokenizer, text, add_special_tokens=False))
