"""Fields of other servers that this one does not have: taken where they change nothing, else refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping

from peqa_server.errors import ApiError

NEUTRAL_FIELDS: Mapping[str, tuple[object, ...] | None] = {
    # labels and storage of OpenAI's own service
    "store": None,
    "metadata": None,
    "service_tier": None,
    "safety_identifier": None,
    "session_id": None,
    "prompt_cache_key": None,
    # options of other servers at the value that switches them off
    "logit_bias": ({}, []),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "truncation_side": ("left",),
    "spaces_between_special_tokens": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "prompt_embeds": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "top_a": (0, 0.0),
    "typical_p": (1, 1.0),
    "early_stopping": (False,),
    "detokenize": (True,),
}
"""Field -> the values at which it changes nothing (null always is one); None: no value changes anything."""

_REASONS: Mapping[str, str] = {
    "suffix": "the model continues text and cannot fill in before a suffix",
    "use_beam_search": "only sampling and greedy decoding are offered",
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
