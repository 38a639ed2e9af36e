"""From chat messages to a prompt: the task's own prompt format, or the model's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from peqa_runtime.core import Lease
from peqa_runtime.errors import InvalidRequest
from peqa_runtime.prompt_format import CHAT_FORMAT, PLACEHOLDER
from peqa_runtime.text import encode
from peqa_server.fields.chat_schemas import ChatFields, ChatMessage, FunctionCall
from peqa_server.http.errors import ApiError
from peqa_server.openai.choice import Prompt
from peqa_server.services import ServedModel
from peqa_server.settings import ServerSettings
from peqa_server.tools.prompt import with_tools_as_text
from peqa_server.tools.use import ToolUse

_RESERVED = frozenset(
    {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"}
    | {"conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"}
)
"""What `chat_template_kwargs` cannot set: fields of the request, and parameters of transformers' method."""

_TEMPLATE_FAULTS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip
"""What a template's code can raise besides Jinja's own errors."""


class ChatTemplate:
    """A template's source, and what its code reads. (Found when it is asked for: most chats need not know.)"""

    def __init__(self, source: str) -> None:
        self.source = source

    def reads(self, *names: str) -> bool:
        """Whether the code mentions one of these names, as a variable, an attribute or a quoted word."""
        return not self._names.isdisjoint(names)

    @cached_property
    def _names(self) -> frozenset[str]:
        """Every name and quoted word: neither comments nor the text around the code."""
        from jinja2 import Environment, TemplateSyntaxError

        try:
            tokens = list(Environment().lex(self.source))
        except TemplateSyntaxError:
            return frozenset(re.findall(r"\w+", self.source))  # applying it says what is wrong
        return frozenset(value.strip("'\"") for _, kind, value in tokens if kind in ("name", "string"))


def chat_prompt(
    model: ServedModel, lease: Lease, wanted: ChatFields, use: ToolUse | None, settings: ServerSettings
) -> Prompt:
    """The prompt of a conversation.

    A tuned task knows one prompt at a time, written as in its training: its `prompt_format` is filled with the
    one user message. The base, and a task that was tuned on conversations, take the model's chat template.

    Raises `InvalidRequest`, `ApiError`.
    """
    for index, message in enumerate(wanted.messages):
        if (fault := message.fault()) is not None:
            field, sentence = fault
            raise InvalidRequest(sentence, param=f"messages[{index}].{field}")
    if lease.revision and lease.prompt_format != CHAT_FORMAT:
        text = _filled(lease, wanted)
        special = wanted.add_special_tokens is not False
    else:
        text = _templated(model.tokenizer, wanted, use, settings)
        special = bool(wanted.add_special_tokens)  # the template has written them
    return Prompt(tuple(encode(model.tokenizer, text, add_special_tokens=special)), text)


def _filled(lease: Lease, wanted: ChatFields) -> str:
    """The task's prompt format with the one user message in it."""
    if lease.prompt_format is None:
        raise InvalidRequest(
            "the tasks of this blend were tuned with different prompt formats, so there is no one way to write "
            "a chat for it; use /v1/completions",
            param="task",
        )
    for field in ("tools", "documents", "chat_template", "chat_template_kwargs", "continue_final_message"):
        if getattr(wanted, field):
            raise InvalidRequest(
                f"task {lease.task!r} was tuned on single prompts, which have no place for {field}; leave it out, "
                "or ask the base",
                param=field,
            )
    if (
        len(wanted.messages) != 1
        or wanted.messages[0].role != "user"
        or wanted.add_generation_prompt is False
    ):
        raise InvalidRequest(
            f"task {lease.task!r} was tuned on single prompts: send exactly one message, of role 'user'",
            param="messages",
        )
    text = wanted.messages[0].text
    if not lease.prompt_format:
        return text
    if lease.prompt_format.count(PLACEHOLDER) != 1:
        raise InvalidRequest(
            f"the prompt format that task {lease.task!r} records does not hold {PLACEHOLDER} once; use "
            "/v1/completions",
            param="task",
        )
    return lease.prompt_format.replace(PLACEHOLDER, text)


def _templated(tokenizer: Any, wanted: ChatFields, use: ToolUse | None, settings: ServerSettings) -> str:
    from jinja2 import TemplateError

    tools = use.templated() if use is not None else None
    template = ChatTemplate(_source(tokenizer, wanted, tools, settings))
    options = _options(wanted, template)
    goes_on = bool(wanted.continue_final_message)
    generate = not goes_on if wanted.add_generation_prompt is None else wanted.add_generation_prompt
    if goes_on and generate:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt cannot both be true",
            param="continue_final_message",
        )
    messages = [_plain(message, template) for message in wanted.messages]
    has_tools = bool(tools) or any(
        message["role"] == "tool" or message.get("tool_calls") for message in messages
    )
    as_text = has_tools and not template.reads("tools", "tool_calls")
    if as_text:
        messages = with_tools_as_text(messages, tools or [])
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=None if as_text else tools,
            documents=wanted.documents,
            chat_template=template.source,
            tokenize=False,
            add_generation_prompt=generate,
            continue_final_message=goes_on,
            **options,
        )
    except (TemplateError, *_TEMPLATE_FAULTS) as error:
        raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from None
    return str(text)


def _source(
    tokenizer: Any, wanted: ChatFields, tools: list[dict[str, Any]] | None, settings: ServerSettings
) -> str:
    """The template's source. A client's own is a program: it runs only where the operator lets it."""
    if wanted.chat_template is not None:
        if settings.client_chat_templates:
            return wanted.chat_template
        raise ApiError(
            400,
            "chat_template is not taken from clients here, because a template is a program that would run on this "
            "server; leave it out (an operator can allow it: --trust-request-chat-template)",
            code="unsupported_field",
            param="chat_template",
        )
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):  # several by name
        name = "tool_use" if tools and "tool_use" in template else "default"
        template = template.get(name)
    if not template:
        raise ApiError(
            400,
            "this model has no chat template; use /v1/completions",
            code="no_chat_template",
            param="messages",
        )
    return str(template)


def _options(wanted: ChatFields, template: ChatTemplate) -> dict[str, Any]:
    """The template's variables besides messages and tools. What the template does not read is refused."""
    options = dict(wanted.chat_template_kwargs or {})
    for name in options:
        if name in _RESERVED:
            raise InvalidRequest(
                f"chat_template_kwargs cannot set {name[:80]!r}; it is a field of the request or set by the server",
                param="chat_template_kwargs",
            )
        if not template.reads(name):
            raise InvalidRequest(
                f"the chat template has no variable {name[:80]!r}, so chat_template_kwargs would change nothing",
                param="chat_template_kwargs",
            )
    if wanted.documents and not template.reads("documents"):
        raise InvalidRequest(
            "the chat template has no place for documents; write them into a message", param="documents"
        )
    if wanted.reasoning_effort is not None and template.reads("reasoning_effort"):
        options.setdefault("reasoning_effort", wanted.reasoning_effort)
    return options


def _plain(message: ChatMessage, template: ChatTemplate) -> dict[str, Any]:
    """A message as templates read it.

    Where a template does not know the role 'developer', it is the system's. A function's result of the older kind is
    a tool's, and the call that it answers has the function's name as its id.
    """
    role = message.role
    if role == "developer" and not template.reads("developer"):
        role = "system"
    plain: dict[str, Any] = {"role": role, "content": message.text}
    for field in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, field)) is not None:
            plain[field] = value
    if message.reasoning is not None:
        plain.setdefault("reasoning_content", message.reasoning)
    if role == "function":
        plain |= {"role": "tool", "tool_call_id": message.name}
    calls = [(call.id, call.function) for call in message.tool_calls or ()]
    if message.function_call is not None:
        calls.append((message.function_call.name, message.function_call))
    if calls:
        plain["tool_calls"] = [_plain_call(name, call) for name, call in calls]
    return plain


def _plain_call(call_id: str, call: FunctionCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        raise InvalidRequest(
            f"the arguments of the tool call {call_id[:80]!r} are no valid JSON", param="messages"
        ) from None
    return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
