"""Fields of other servers that this one does not have: taken where they change nothing, else refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peqa_server.http.errors import ApiError


@dataclass(frozen=True)
class Foreign:
    """A field that is refused for `reason`, but at the values at which it changes nothing; null always is one."""

    reason: str
    neutral: tuple[object, ...] = ()


HARMLESS = frozenset(
    {
        # labels, storage and prices of OpenAI's own service
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "session_id",
        # hints for speed: whatever a prompt shares with earlier ones is found here without them
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",
        "guided_decoding_backend",
        # how reasoning is told apart from the answer: no text is taken for reasoning here
        "include_reasoning",
        "separate_reasoning",
        "stream_reasoning",
    }
)
"""Fields that change nothing in the answer, whatever they hold."""

_BEAM = "it belongs to beam search, and only sampling and greedy decoding are offered"
_NO_PATHS = "a task is named by task, adapter_id or model, never by a path"
_WRITES_TEXT = "the model writes text only"
_READS_TEXT = "the model reads text only"

FOREIGN: Mapping[str, Foreign] = {
    "suffix": Foreign("the model continues text and cannot fill in before a suffix", ("",)),
    "use_beam_search": Foreign("only sampling and greedy decoding are offered", (False,)),
    "length_penalty": Foreign(_BEAM, (1, 1.0)),
    "early_stopping": Foreign(_BEAM, (False,)),
    "top_a": Foreign("top_p and min_p are the ways to leave out unlikely tokens", (0, 0.0)),
    "typical_p": Foreign("top_p and min_p are the ways to leave out unlikely tokens", (1, 1.0)),
    "repetition_detection": Foreign("repetition_penalty and frequency_penalty are the ways against repetition"),
    "logits_processors": Foreign("a client's code does not run here; logit_bias and bad_words change logits", ([],)),
    "thinking_token_budget": Foreign("no text is taken for reasoning here; max_tokens bounds the whole answer"),
    "lora_path": Foreign(_NO_PATHS),
    "lora_request": Foreign(_NO_PATHS),
    "prompt_embeds": Foreign("prompts are text or token ids"),
    "mm_processor_kwargs": Foreign(_READS_TEXT, ({},)),
    "media_io_kwargs": Foreign(_READS_TEXT, ({},)),
    "modalities": Foreign(_WRITES_TEXT, (["text"],)),
    "audio": Foreign(_WRITES_TEXT),
    "verbosity": Foreign(
        "the model does not know it; ask for short or long answers in a message, or set max_tokens", ("medium",)
    ),
    "moderation": Foreign("this server has no model that moderates"),
    "web_search_options": Foreign("this server reaches no other; give the model a function that searches, by tools"),
    "functions": Foreign("tools has taken its place", ([],)),
    "function_call": Foreign("tool_choice has taken its place", ("none",)),
    "guided_whitespace_pattern": Foreign(
        "JSON is written with a space, or a line break and its indentation, between its parts; "
        "structured_outputs.disable_any_whitespace leaves them out"
    ),
    "vllm_xargs": Foreign("this server has no plugins that would read it", ({},)),
    "kv_transfer_params": Foreign("this server fetches no computed prompts from others", ({},)),
    "return_hidden_states": Foreign("only text, token ids and log-probabilities are given out", (False,)),
    "detokenize": Foreign("answers are text; return_token_ids adds their token ids", (True,)),
}  # fmt: skip


def is_neutral(name: str, value: object) -> bool:
    """True for a known field of other servers that changes nothing; refuse it when it would change something."""
    if name in HARMLESS:
        return True
    field = FOREIGN.get(name)
    if field is None:
        return False
    if value is None or any(value == a and type(value) is type(a) for a in field.neutral):
        return True
    raise ApiError(
        400, f"{name} is not supported: {field.reason}; leave it out", code="unsupported_field", param=name
    )
