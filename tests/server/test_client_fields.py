"""Every field that the newest `openai` client or users of vLLM can send: offered, harmless, or refused for a reason."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin, get_type_hints

import openai
import pytest
from openai.types.chat import (
    ChatCompletionMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionToolChoiceOptionParam,
    completion_create_params,
)
from pydantic import BaseModel

from peqa_server.fields.chat_schemas import (
    ROLES,
    ChatCompletionRequest,
    ChatMessage,
    FunctionCall,
    RefusalPart,
    TextPart,
    ToolCall,
)
from peqa_server.fields.foreign import FOREIGN, HARMLESS
from peqa_server.fields.forms import ResponseFormat, StructuredOutputs
from peqa_server.fields.schemas import CompletionRequest, StreamOptions

CLIENT = openai.OpenAI(api_key="none")
ROUTES = [
    ("/v1/completions", CLIENT.completions.create, CompletionRequest),
    ("/v1/chat/completions", CLIENT.chat.completions.create, ChatCompletionRequest),
]
OF_HTTP = {"extra_headers", "extra_query", "extra_body", "timeout"}

OF_VLLM = """
    frequency_penalty logit_bias max_tokens n presence_penalty seed stop stream stream_options suffix temperature top_p
    user use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids include_stop_str_in_output
    ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
    allowed_token_ids prompt_logprobs logprob_token_ids bad_words add_special_tokens response_format structured_outputs
    priority request_id session_id return_tokens_as_token_ids return_token_ids cache_salt vllm_xargs stream_interval
    prompt_embeds repetition_detection thinking_token_budget kv_transfer_params echo logprobs
"""
OF_VLLM_CHAT = """
    messages top_logprobs max_completion_tokens tools tool_choice parallel_tool_calls reasoning_effort
    add_generation_prompt continue_final_message chat_template chat_template_kwargs documents mm_processor_kwargs
    media_io_kwargs include_reasoning
"""


@pytest.mark.parametrize(("route", "create", "schema"), ROUTES, ids=lambda v: v if isinstance(v, str) else "")
def test_every_parameter_of_the_client_is_known(route: str, create: Any, schema: type[BaseModel]) -> None:
    parameters = inspect.signature(create).parameters.keys() - OF_HTTP
    assert len(parameters) > 15
    assert parameters - schema.model_fields.keys() - HARMLESS - FOREIGN.keys() == set()


def test_every_field_of_vllm_is_known() -> None:
    known = HARMLESS | FOREIGN.keys()
    assert set(OF_VLLM.split()) - known - CompletionRequest.model_fields.keys() == set()
    chat = set(OF_VLLM.split()) | set(OF_VLLM_CHAT.split())
    assert chat - known - ChatCompletionRequest.model_fields.keys() == set()
    kinds = {"json", "regex", "choice", "grammar", "json_object", "structural_tag"}
    assert kinds <= {field.alias or name for name, field in StructuredOutputs.model_fields.items()}


def test_no_field_is_known_in_two_ways() -> None:
    offered = CompletionRequest.model_fields.keys() | ChatCompletionRequest.model_fields.keys()
    assert not offered & (HARMLESS | FOREIGN.keys())
    assert not HARMLESS & FOREIGN.keys()


def members(union: Any) -> Iterator[Any]:
    """The types that a hint is made of, whatever lists and options they stand in."""
    if get_origin(union) in (Union, type(str | int)):
        for part in get_args(union):
            yield from members(part)
    else:
        yield union


def hints(typed: Any) -> dict[str, Any]:
    """Names and types of a TypedDict's entries."""
    return dict(get_type_hints(typed))


def test_every_entry_of_what_the_client_nests_is_known() -> None:
    messages = list(members(ChatCompletionMessageParam))
    assert {get_args(hints(kind)["role"])[0] for kind in messages} == set(ROLES)
    for kind in messages:
        assert hints(kind).keys() <= ChatMessage.model_fields.keys(), kind
    assert hints(ChatCompletionStreamOptionsParam).keys() <= StreamOptions.model_fields.keys()
    choices = [
        kind for kind in members(ChatCompletionToolChoiceOptionParam) if hasattr(kind, "__annotations__")
    ]
    found = {get_args(hints(kind)["type"])[0] for kind in choices}
    assert found == {"function", "allowed_tools", "custom"}, "custom: refused, functions only"
    formats = members(hints(completion_create_params.CompletionCreateParamsBase)["response_format"])
    for kind in formats:
        assert hints(kind).keys() <= ResponseFormat.model_fields.keys()
    answered = openai.types.chat.ParsedChatCompletionMessage
    assert answered.model_fields.keys() <= ChatMessage.model_fields.keys(), "clients send answers back"
    call = openai.types.chat.ParsedFunctionToolCall
    assert call.model_fields.keys() <= ToolCall.model_fields.keys()
    assert call.model_fields["function"].annotation.model_fields.keys() <= FunctionCall.model_fields.keys()
    for part, ours in ((openai.types.chat.ChatCompletionContentPartTextParam, TextPart),
                       (openai.types.chat.ChatCompletionContentPartRefusalParam, RefusalPart)):  # fmt: skip
        assert hints(part).keys() <= ours.model_fields.keys()


@pytest.mark.parametrize("field", sorted(FOREIGN))
def test_what_would_change_the_answer_is_refused_with_its_own_reason(server: Any, field: str) -> None:
    foreign = FOREIGN[field]
    assert len(foreign.reason) > 20
    for route, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        error = server.error(400, path=route, **body, **{field: {"other": "value"}})
        assert (error["param"], error["code"]) == (field, "unsupported_field")
        assert foreign.reason in error["message"]
        for value in (None, *foreign.neutral):
            assert server.post(route, max_tokens=1, **body, **{field: value}).status_code == 200, value


def test_what_changes_nothing_is_taken_whatever_it_holds(server: Any) -> None:
    for value in (None, "x", True, {"a": 1}, [1]):
        fields = dict.fromkeys(HARMLESS, value)
        assert server.post("/v1/completions", prompt="x", max_tokens=1, **fields).status_code == 200


def test_verbosity_is_taken_where_it_asks_for_nothing(server: Any) -> None:
    say = [{"role": "user", "content": "hi"}]
    path = "/v1/chat/completions"
    assert server.post(path, messages=say, max_tokens=1, verbosity="medium").status_code == 200
    for value in ("low", "high"):
        assert "message" in server.error(400, path=path, messages=say, verbosity=value)["message"]
