"""From chat messages to a prompt: the task's own prompt format, or the model's chat template."""

from __future__ import annotations

from typing import Any

from peqa_runtime.errors import InvalidRequest
from peqa_runtime.text import encode
from peqa_server.chat_schemas import ChatCompletionRequest, ChatMessage
from peqa_server.choice import Prompt
from peqa_server.errors import ApiError
from peqa_server.task_choice import Admission

PLACEHOLDER = "{prompt}"


def chat_prompt(admission: Admission, wanted: ChatCompletionRequest) -> Prompt:
    """The prompt of a conversation.

    A tuned task knows one prompt at a time, written as in its training: its `prompt_format` is filled with the
    one user message. The base takes the model's chat template.
    """
    for message in wanted.messages:
        if isinstance(message.content, list) and any(part.type != "text" for part in message.content):
            raise InvalidRequest("messages may hold parts of type 'text' only", param="messages")
    lease = admission.lease
    model = admission.services.model
    if lease.revision:
        if lease.prompt_format is None:
            raise InvalidRequest(
                "the tasks of this blend were tuned with different prompt formats, so there is no one way to write "
                "a chat for it; use /v1/completions",
                param="task",
            )
        text = _fill(lease.task, lease.prompt_format, wanted)
        return Prompt(tuple(encode(model.tokenizer, text)), text)
    text = _template(model.tokenizer, wanted)
    return Prompt(tuple(encode(model.tokenizer, text, add_special_tokens=False)), text)


def _fill(task: str, prompt_format: str, wanted: ChatCompletionRequest) -> str:
    only_option = wanted.add_generation_prompt is False or wanted.continue_final_message
    if len(wanted.messages) != 1 or wanted.messages[0].role != "user" or only_option:
        raise InvalidRequest(
            f"task {task!r} was tuned on single prompts: send exactly one message, of role 'user'",
            param="messages",
        )
    if not prompt_format:
        return wanted.messages[0].text
    if prompt_format.count(PLACEHOLDER) != 1:
        raise InvalidRequest(
            f"the prompt format that task {task!r} records does not hold {PLACEHOLDER} once; use /v1/completions",
            param="task",
        )
    return prompt_format.replace(PLACEHOLDER, wanted.messages[0].text)


def _template(tokenizer: Any, wanted: ChatCompletionRequest) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ApiError(
            400,
            "this model has no chat template; use /v1/completions",
            code="no_chat_template",
            param="messages",
        )
    goes_on = bool(wanted.continue_final_message)
    generate = not goes_on if wanted.add_generation_prompt is None else wanted.add_generation_prompt
    if goes_on and generate:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt cannot both be true",
            param="continue_final_message",
        )
    try:
        text = tokenizer.apply_chat_template(
            [_plain(m) for m in wanted.messages],
            tokenize=False,
            add_generation_prompt=generate,
            continue_final_message=goes_on,
        )
    except (TemplateError, ValueError) as error:
        raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from None
    return str(text)


def _plain(message: ChatMessage) -> dict[str, str]:
    plain = {"role": message.role, "content": message.text}
    return plain | ({"name": message.name} if message.name is not None else {})
