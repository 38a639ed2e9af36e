"""What clients may send to the chat route, and to the routes of the tokenizer, which take chats too."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from peqa_runtime.sampling_params import MAX_LOGPROBS
from peqa_server.fields.schemas import GenerationFields
from peqa_server.fields.types import ListOf, Strict, TaskChoice, between, one_of, valid_text

MAX_TOOLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
FunctionKind = Annotated[str, one_of("function")]
Text = Annotated[str, BeforeValidator(valid_text)]


class Function(Strict):
    """A function that the model may call; `parameters` is a JSON schema of its arguments."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """One entry of `tools`."""

    type: FunctionKind
    function: Function


class FunctionChoice(Strict):
    """The function that a `tool_choice` names."""

    name: FunctionName


class ToolChoice(Strict):
    """A `tool_choice` that names the one function to call."""

    type: FunctionKind
    function: FunctionChoice


class AllowedTools(Strict):
    """Those of `tools` that the model may use for this answer. "auto": it may call one; "required": it must."""

    mode: Annotated[str, one_of("auto", "required")]
    tools: ListOf[Tool] = Field(min_length=1)


class AllowedToolChoice(Strict):
    """A `tool_choice` that allows some of `tools` only."""

    type: Annotated[str, one_of("allowed_tools")]
    allowed_tools: AllowedTools


class FunctionCall(Strict):
    """A call that was made earlier; `arguments` is JSON text, as the model wrote it.

    `parsed_arguments` is what the `openai` client has made of them, and sends back beside them.
    """

    name: str
    arguments: str
    parsed_arguments: Any = None


class ToolCall(Strict):
    """One call of an assistant's message. (`index` is what clients keep of a stream.)"""

    id: str
    type: FunctionKind = "function"
    function: FunctionCall
    index: int | None = None


class TextPart(Strict):
    """One part of a message's content; only text is understood.

    The other two mark where OpenAI's and Anthropic's caches of prompts may end. Here every beginning of a prompt is
    found again without them.
    """

    type: Annotated[str, one_of("text")]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None


class RefusalPart(Strict):
    """A refusal of the assistant's, as one part of its message's content."""

    type: Annotated[str, one_of("refusal")]
    refusal: str


_PARTS: dict[str, type[Strict]] = {"text": TextPart, "refusal": RefusalPart}


def _part(part: object) -> str:
    """The text of one part of a content."""
    kind = part.get("type") if isinstance(part, dict) else None
    schema = _PARTS.get(kind) if isinstance(kind, str) else None
    if schema is None or not isinstance(part, dict) or not isinstance(part.get(str(kind)), str):
        raise PydanticCustomError(
            "content", 'may hold parts {"type": "text", "text": …} only: the model reads text'
        )
    for name in part:
        if name not in schema.model_fields:
            raise PydanticCustomError(
                "content", "holds a part with the unknown field {name}", {"name": repr(str(name)[:80])}
            )
    return str(part[kind])


def _content(value: object) -> object:
    """The text of a content, which may come in parts. (A union of types would describe its failures all at once.)"""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string, or a list of parts of type 'text'")
    return "".join(map(_part, value))


Content = Annotated[
    str,
    BeforeValidator(valid_text),
    BeforeValidator(_content, json_schema_input_type=str | list[TextPart | RefusalPart]),
]
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class ChatMessage(Strict):
    """One message; `content` is text, which may come in parts.

    The fields without a meaning here are those that an answer's message has, as clients send it back. `reasoning` is
    the newer name of `reasoning_content`. Messages of role
    "function", and `function_call`, are how calls were told before there were `tool_calls`.
    """

    role: Annotated[str, one_of(*ROLES)]
    content: Content | None = None
    name: Text | None = None
    tool_calls: ListOf[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: FunctionCall | None = None
    parsed: Any = None

    @property
    def text(self) -> str:
        """The message's text."""
        return self.content or self.refusal or ""

    def fault(self) -> tuple[str, str] | None:
        """The field that does not go with the message's role, and a sentence about it; None: the message is sound."""
        role = self.role
        if role != "assistant":
            for field in ("tool_calls", "function_call", "refusal"):
                if getattr(self, field):
                    return field, f"only messages of role 'assistant' have {field}"
        if (role == "tool") != (self.tool_call_id is not None):
            return (
                "tool_call_id",
                "a message of role 'tool' says by tool_call_id which call it answers, and no other has one",
            )
        if role == "function" and not self.name:
            return "name", "a message of role 'function' says by name which function gave the result"
        if self.content is not None or role == "function":
            return None
        if role != "assistant":
            return "content", f"a message of role {role!r} needs a content, which may be an empty string"
        if self.tool_calls or self.function_call is not None or self.refusal is not None:
            return None
        return "content", "a message of role 'assistant' without tool_calls or a refusal needs a content"


def _distinct(tools: list[Tool]) -> list[Tool]:
    names = [tool.function.name for tool in tools]
    if len(tools) > MAX_TOOLS:
        raise PydanticCustomError("tools", "must hold at most 128 functions")
    if len(set(names)) < len(names):
        raise PydanticCustomError("tools", "must hold functions with different names")
    return tools


def _tool_choice(value: object) -> object:
    """A word, or an object that names functions. (A union of types would describe its failures all at once.)"""
    if value is None or value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict):
        kind = AllowedToolChoice if value.get("type") == "allowed_tools" else ToolChoice
        with suppress(ValidationError):
            return kind.model_validate(value)
    raise PydanticCustomError(
        "tool_choice",
        "must be 'none', 'auto', 'required', an object that names a function, as "
        '{"type": "function", "function": {"name": …}}, or one that allows some of them, as {"type": "allowed_tools", '
        '"allowed_tools": {"mode": "auto" or "required", "tools": [{"type": "function", "function": {"name": …}}]}}',
    )


ToolChoiceField = Annotated[
    str | ToolChoice | AllowedToolChoice,
    BeforeValidator(
        _tool_choice,
        json_schema_input_type=Literal["none", "auto", "required"] | ToolChoice | AllowedToolChoice,
    ),
]
Tools = Annotated[ListOf[Tool], AfterValidator(_distinct)]
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class ChatFields(Strict):
    """How a conversation becomes a prompt: what the chat route and /tokenize share."""

    messages: ListOf[ChatMessage] = Field(min_length=1)
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: Text | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: ListOf[dict[str, Any]] | None = None
    reasoning_effort: Annotated[str, one_of(*REASONING_EFFORTS)] | None = None
    tool_choice: ToolChoiceField | None = None


class ChatCompletionRequest(GenerationFields, ChatFields):
    """Body of POST /v1/chat/completions."""

    max_completion_tokens: Annotated[int | None, between(0)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, between(0, MAX_LOGPROBS)] = None
    echo: bool | None = None
    parallel_tool_calls: bool | None = None


class TokenizeRequest(Strict):
    """Body of POST /tokenize with a text."""

    prompt: Text
    model: str | None = None
    task: TaskChoice | None = None
    adapter_id: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatFields):
    """Body of POST /tokenize with a conversation."""

    model: str | None = None
    task: TaskChoice | None = None
    adapter_id: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    tokens: ListOf[int]
    model: str | None = None
    task: TaskChoice | None = None
    adapter_id: str | None = None
    skip_special_tokens: bool | None = None
