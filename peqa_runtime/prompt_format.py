"""How a tuned task wants its prompts written: as they are, in a text with a place for them, or by the chat template."""

from __future__ import annotations

PLACEHOLDER = "{prompt}"
CHAT_FORMAT = "{messages}"
"""The prompt format of a task that was tuned on conversations: the model's own chat template."""
MAX_PROMPT_FORMAT = 8192  # characters; every list of tasks shows the format, and every chat computes it


def prompt_format_fault(prompt_format: str) -> str | None:
    """Return why a format cannot be filled, as the end of a sentence that begins with what it is; None when it can.

    A format is empty (the prompt alone), text with one `{prompt}` in it, or `{messages}`.
    """
    if prompt_format in ("", CHAT_FORMAT):
        return None
    if len(prompt_format) > MAX_PROMPT_FORMAT:
        return f"must have at most {MAX_PROMPT_FORMAT} characters, got {len(prompt_format)}"
    if prompt_format.count(PLACEHOLDER) != 1:
        return f"must hold {PLACEHOLDER} exactly once, got {prompt_format[:200]!r}"
    return None
