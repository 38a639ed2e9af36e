"""The JSON of completions, whole and in chunks; `chat_answer` has what is different in chats."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peqa_runtime.core import Lease, TokenLogprobs
from peqa_server.openai.choice import LONG_PIECE, Piece, TokenPiece
from peqa_server.services import ServedModel

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say (OpenAI's convention)."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Token counts of one HTTP request; `cached_tokens` of the prompts were found computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def json(self) -> Json:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True)
class AnswerStyle:
    """What the client wants to see besides the text. The numbers are of alternatives for each token."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    token_ids: bool = False
    tokens_as_ids: bool = False


@dataclass
class Gathered:
    """Everything that one choice has produced so far."""

    text: str = ""
    tokens: list[TokenPiece] = field(default_factory=list)
    generated_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        if not piece.is_prompt:
            self.generated_ids += [t.token_id for t in piece.tokens]
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.stop_reason = piece.stop_reason if piece.stop_reason is not None else self.stop_reason
        self.prompt_logprobs = piece.prompt_logprobs or self.prompt_logprobs


class Answer:
    """Writes the JSON of one request's answer. Subclasses differ in the shape of a choice."""

    prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    prompt_on_top = False
    """Whether the answer, and not each choice, tells of the prompt."""

    def __init__(
        self,
        model: ServedModel,
        lease: Lease,
        style: AnswerStyle,
        model_name: str | None = None,
        request_id: str | None = None,
    ) -> None:
        self._texts = model.token_texts
        self._style = style
        self._head: Json = {
            "id": self.prefix + (request_id or uuid.uuid4().hex),
            "object": self.whole_object,
            "created": int(time.time()),
            "model": model_name or model.model_id,
            "task": lease.task if lease.blend is None else dict(lease.blend.shares),
            "revision": lease.revision or None,
            "system_fingerprint": model.fingerprint,
        }

    def is_long(self, num_tokens: int) -> bool:
        """Whether to write of so many tokens takes more than a few milliseconds."""
        shown = 1 + max(self._style.logprobs or 0, self._style.prompt_logprobs or 0)
        return num_tokens * shown > LONG_PIECE

    def whole(self, choices: Sequence[Gathered], prompts: Sequence[tuple[int, ...]], usage: Usage) -> Json:
        """The complete answer; `prompts[i]` are the prompt tokens of choice i."""
        rows: list[Json] = []
        top: Json = {}
        for index, (gathered, prompt) in enumerate(zip(choices, prompts, strict=True)):
            row = {"index": index, **self.whole_choice(gathered), "stop_reason": gathered.stop_reason}
            if self._style.token_ids:
                row["token_ids"] = gathered.generated_ids
            (top if self.prompt_on_top else row).update(self._about_prompt(gathered, prompt))
            rows.append(row)
        return self._head | {"choices": rows, "usage": usage.json()} | top

    def chunk(self, index: int, piece: Piece, prompt: tuple[int, ...] | None, *, always: bool) -> Json | None:
        """One streamed piece; `prompt` is given with the first chunk of a choice.

        None, but for `always`: the piece has nothing to tell, as text held back for a possible stop string has not.
        """
        row = self.chunk_choice(index, piece)
        wants_tokens = self._style.logprobs is not None or self._style.token_ids
        if row is None:
            if not always and not (wants_tokens and piece.tokens):
                return None
            row = self.empty_choice(piece)
        row = {"index": index, **row, "stop_reason": piece.stop_reason}
        if self._style.token_ids:
            row["token_ids"] = [] if piece.is_prompt else [t.token_id for t in piece.tokens]
            if prompt is not None and not self.prompt_on_top:
                row["prompt_token_ids"] = list(prompt)
        chunk = self._head | {"object": self.chunk_object, "choices": [row]}
        if self._style.token_ids and prompt is not None and self.prompt_on_top:
            chunk["prompt_token_ids"] = list(prompt)
        return chunk

    def last(self, usage: Usage) -> Json:
        """The chunk that `stream_options.include_usage` adds at the end."""
        return self._head | {"object": self.chunk_object, "choices": [], "usage": usage.json()}

    def opening(self, index: int) -> Json | None:
        """A chunk before a choice's first piece, where the format has one."""
        return None

    def whole_choice(self, gathered: Gathered) -> Json:
        """The choice's own fields in a complete answer."""
        return {
            "text": gathered.text,
            "logprobs": self._logprobs(gathered.tokens),
            "finish_reason": gathered.finish_reason,
        }

    def chunk_choice(self, index: int, piece: Piece) -> Json | None:
        """The choice's own fields in a chunk; None when they say nothing (but its tokens may)."""
        return self.empty_choice(piece) if piece.text or piece.finish_reason else None

    def empty_choice(self, piece: Piece) -> Json:
        """The choice's own fields in a chunk whose tokens, or usage, are what it tells."""
        return {
            "text": piece.text,
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    def _about_prompt(self, gathered: Gathered, prompt: tuple[int, ...]) -> Json:
        """What a choice tells of its prompt."""
        told: Json = {"prompt_token_ids": list(prompt)} if self._style.token_ids else {}
        if self._style.prompt_logprobs is not None:
            told["prompt_logprobs"] = self._prompt_logprobs(gathered, self._style.prompt_logprobs)
        return told

    def _prompt_logprobs(self, gathered: Gathered, count: int) -> list[Json | None]:
        """vLLM's form: per prompt token its own value and the likeliest ones by token id; the first has none.

        A `rank` is 1 + the number of likelier tokens, so that equally likely ones have the same.
        """
        entries: list[Json | None] = []
        for token in gathered.prompt_logprobs or ():
            if token is None:
                entries.append(None)
                continue
            top = token.top[:count]
            listed = {t: (value, 1 + sum(other > value for _, other in top)) for t, value in top}
            assert token.rank is not None, "the engine counts it for every prompt token"
            listed.setdefault(token.token_id, (token.logprob, token.rank))
            entries.append(
                {
                    str(t): {"logprob": finite(value), "rank": rank, "decoded_token": self._name(t)}
                    for t, (value, rank) in listed.items()
                }
            )
        return entries

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._style.tokens_as_ids else self._texts.text(token_id)

    def _logprobs(self, tokens: Sequence[TokenPiece]) -> Json | None:
        """The completions format: four lists of equal length; a first prompt token has null values."""
        if self._style.logprobs is None:
            return None
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token in tokens:
            if token.logprobs is None:
                values.append(None)
                tops.append(None)
                continue
            chosen = finite(token.logprobs.logprob)
            values.append(chosen)
            top: dict[str, float] = {}
            # Least likely first: of two tokens with the same text the likelier one keeps the name.
            listed = (*token.logprobs.top[: self._style.logprobs], *token.logprobs.asked)
            for token_id, logprob in sorted(listed, key=lambda pair: pair[1]):
                top[self._name(token_id)] = finite(logprob)
            name = self._name(token.token_id)
            top[name] = max(top.get(name, chosen), chosen)
            tops.append(dict(sorted(top.items(), key=lambda item: -item[1])))
        return {
            "tokens": [self._name(t.token_id) for t in tokens],
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": [t.offset for t in tokens],
        }


def finite(logprob: float) -> float:
    """JSON has no infinity: clamp to OpenAI's floor."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
