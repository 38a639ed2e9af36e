"""Tokens of texts as a server makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peqa_runtime.errors import InvalidCheckpoint, InvalidData, InvalidRequest
from peqa_runtime.text import apply_chat_template, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextEncoding:
    """What a tokenizer makes of texts, for whatever has one: an `Encoder`."""

    tokenizer: PreTrainedTokenizerBase

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @property
    def eos_token_id(self) -> int:
        """The token that ends a completion."""
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise InvalidCheckpoint("the tokenizer names no end-of-sequence token")
        return eos

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special tokens added: what follows a prompt."""
        return encode(self.tokenizer, text, add_special_tokens=False)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt as a server has them: after the begin-of-text token, where the model has one."""
        return encode(self.tokenizer, text)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to the assistant's answer, as the model's chat template writes it."""
        try:
            text = apply_chat_template(self.tokenizer, messages)
        except InvalidRequest as error:
            raise InvalidData(str(error)) from None
        return encode(self.tokenizer, text, add_special_tokens=False)
