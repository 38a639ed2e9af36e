"""Shapes of what OpenAI's routes and the tokenizer's answer, for /openapi.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from peqa_server.tasks.answer_shapes import Answer, ErrorAnswer

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(Answer):
    """`cached_tokens` of the prompts were found computed."""

    cached_tokens: int


class UsageAnswer(Answer):
    """Tokens of one HTTP request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(Answer):
    """Four lists of equal length, one entry per token; a first prompt token has null values."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Answer):
    """`rank` is 1 + the number of tokens that are likelier."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(Answer):
    """One choice; the last three are there where they were asked for."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: list[int] = Field(default_factory=list)
    prompt_token_ids: list[int] = Field(default_factory=list)
    prompt_logprobs: PromptLogprobs = Field(default_factory=list)


class Generated(Answer):
    """What every answer of a generation says: who answered, on which task and revision."""

    id: str
    created: int
    model: str
    task: str | dict[str, float]
    revision: str | None
    system_fingerprint: str


class CompletionAnswer(Generated):
    """Whole, or a chunk of a stream: that has usage, or null, where it was asked for."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: UsageAnswer | None = None


class TokenLogprob(Answer):
    """A token in chat's format; `bytes` are its own, also where it is part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    """A token of the answer."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    """Of each token of the answer."""

    content: list[ChatTokenLogprob]


class CalledFunction(Answer):
    """`arguments` is JSON text as the model wrote it; in a stream it comes in pieces, after the name."""

    name: str = ""
    arguments: str


class CalledTool(Answer):
    """A call. In a stream `index` says which one a piece belongs to, and the first piece has id and type."""

    index: int = 0
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Answer):
    """`content` is null where the answer is calls alone."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    tool_calls: list[CalledTool] = Field(default_factory=list)


class ChatChoice(Answer):
    """One choice."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] = Field(default_factory=list)


class ChatAnswerWhole(Generated):
    """A chat completion; the last two are there where they were asked for."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageAnswer
    prompt_token_ids: list[int] = Field(default_factory=list)
    prompt_logprobs: PromptLogprobs = Field(default_factory=list)


class ChatDelta(Answer):
    """What is new of a message; the first one names the role."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    tool_calls: list[CalledTool] = Field(default_factory=list)


class ChatChunkChoice(Answer):
    """A piece of one choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] = Field(default_factory=list)


class ChatChunk(Generated):
    """A piece of a chat completion; `usage` as in a completion's chunk, the prompt's tokens with the first piece."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | None = None
    prompt_token_ids: list[int] = Field(default_factory=list)


class ModelPermission(Answer):
    """What old clients of OpenAI's list read."""

    id: str
    object: Literal["model_permission"]
    created: int
    allow_create_engine: bool
    allow_sampling: bool
    allow_logprobs: bool
    allow_search_indices: bool
    allow_view: bool
    allow_fine_tuning: bool
    organization: str
    group: str | None
    is_blocking: bool


class ModelAnswer(Answer):
    """The base (`parent` null), or a task on it with its revision."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[ModelPermission]
    revision: str = ""


class ModelListAnswer(Answer):
    """The base and its tasks."""

    object: Literal["list"]
    data: list[ModelAnswer]
    has_more: bool


class TokenizeAnswer(Answer):
    """`token_strs` where asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(Answer):
    """The text."""

    prompt: str


class TokenizerAnswer(Answer):
    """The tokenizer's facts; a special token that it does not have is null."""

    tokenizer_class: str
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str | None
    pad_token_id: int | None
    unk_token: str | None
    unk_token_id: int | None
    all_special_tokens: list[str]
    chat_template: str | dict[str, str] | None
    vocab_size: int
    model_max_length: int


class LoadAnswer(Answer):
    """Generations and uploads in work, by the name that vLLM's clients know."""

    server_load: int


class VersionAnswer(Answer):
    """The version; once the model is loaded, what is served."""

    version: str
    model: str = ""
    base_digest: str = ""
    device: str = ""
    dtype: str = ""
    quantization: str = ""


def stream_of(chunk: type[Answer]) -> dict[str, Any]:
    """The other content of a 200: events, each of them a chunk, the error that ends the stream, or the end."""
    schemas = [
        chunk.model_json_schema(mode="serialization"),
        ErrorAnswer.model_json_schema(mode="serialization"),
    ]
    parts = {name: part for schema in schemas for name, part in schema.pop("$defs", {}).items()}
    parts |= {schema["title"]: schema for schema in schemas}
    content = {"$defs": parts, "anyOf": [{"$ref": f"#/$defs/{schema['title']}"} for schema in schemas]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    event = {
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }
    return {"text/event-stream": {"itemSchema": event}}
