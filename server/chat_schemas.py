"""What clients may send to the chat route, and to the routes of the tokenizer, which take chats too."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from peqa_server.field_types import valid_text
from peqa_server.schemas import GenerationFields, Strict


class ChatMessage(Strict):
    """One message; `content` is text, or a list of text parts."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The message's text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class TextPart(Strict):
    """One part of a message's content; only text is understood."""

    type: str
    text: str


class ChatCompletionRequest(GenerationFields):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class TokenizeRequest(Strict):
    """Body of POST /tokenize."""

    prompt: Annotated[str, BeforeValidator(valid_text)]
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None


ChatMessage.model_rebuild()
ChatCompletionRequest.model_rebuild()
