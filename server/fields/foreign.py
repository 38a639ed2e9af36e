"""Fields of other servers that this one does not have: taken where they change nothing, else refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping

from peqa_server.http.errors import ApiError

NEUTRAL_FIELDS: Mapping[str, tuple[object, ...] | None] = {
    # labels and storage of OpenAI's own service
    "store": None,
    "metadata": None,
    "service_tier": None,
    "safety_identifier": None,
    "session_id": None,
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    # how reasoning is told apart from the answer: no text is taken for reasoning here
    "include_reasoning": None,
    "separate_reasoning": None,
    "stream_reasoning": None,
    # options of other servers at the value that switches them off
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "prompt_embeds": (),
    "lora_path": (),
    "lora_request": (),
    "mm_processor_kwargs": ({},),
    "vllm_xargs": ({},),
    "kv_transfer_params": ({},),
    "repetition_detection": (),
    "thinking_token_budget": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "functions": ([],),
    "function_call": ("none",),
    "top_a": (0, 0.0),
    "typical_p": (1, 1.0),
    "guided_decoding_backend": None,
    "guided_whitespace_pattern": (),
    "early_stopping": (False,),
    "detokenize": (True,),
}
"""Field -> the values at which it changes nothing (null always is one); None: no value changes anything."""

_REASONS: Mapping[str, str] = {
    "suffix": "the model continues text and cannot fill in before a suffix",
    "use_beam_search": "only sampling and greedy decoding are offered",
    "length_penalty": "it belongs to beam search, and only sampling and greedy decoding are offered",
    "lora_path": "a task is named by task, adapter_id or model, never by a path",
    "lora_request": "a task is named by task, adapter_id or model, never by a path",
    "prompt_embeds": "prompts are text or token ids",
    "mm_processor_kwargs": "the model reads text only",
    "modalities": "the model writes text only",
    "audio": "the model writes text only",
    "functions": "tools has taken its place",
    "function_call": "tool_choice has taken its place",
}


def is_neutral(name: str, value: object) -> bool:
    """True for a known field of other servers that changes nothing; refuse it when it would change something."""
    if name not in NEUTRAL_FIELDS:
        return False
    allowed = NEUTRAL_FIELDS[name]
    if value is None or allowed is None:
        return True
    if any(value == a and type(value) is type(a) for a in allowed):
        return True
    reason = _REASONS.get(name, "this server does not offer it")
    raise ApiError(
        400, f"{name} is not supported: {reason}; leave it out", code="unsupported_field", param=name
    )
