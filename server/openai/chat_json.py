"""The JSON of chat completions, whole and in chunks, function calls included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peqa_runtime.core import Lease
from peqa_server.openai.choice import Piece, TokenPiece
from peqa_server.openai.completion_json import Answer, AnswerStyle, Gathered, Json, finite
from peqa_server.services import ServedModel
from peqa_server.tools.parser import CallDelta, CallReader


class ChatAnswer(Answer):
    """The chat forms: `message` whole, `delta` in chunks, and chat's own logprobs format.

    `reader` makes what finds function calls in a choice's text (None: no function was offered). `begun`: the text of
    the assistant's message that the answer goes on with, where the client wants to see it again.
    """

    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prompt_on_top = True

    def __init__(
        self,
        model: ServedModel,
        lease: Lease,
        style: AnswerStyle,
        model_name: str | None = None,
        request_id: str | None = None,
        *,
        reader: Callable[[], CallReader] | None = None,
        begun: str = "",
    ) -> None:
        super().__init__(model, lease, style, model_name, request_id)
        self._reader = reader
        self._readers: dict[int, CallReader] = {}
        self._begun = begun

    def whole_choice(self, gathered: Gathered) -> Json:
        """`message` and `logprobs`."""
        message: Json = {"role": "assistant", "content": self._begun + gathered.text}
        reason = gathered.finish_reason
        if self._reader is not None:
            reader = self._reader()
            parsed = [reader.push(gathered.text), reader.finish()]
            content = self._begun + "".join(p.content for p in parsed)
            message["content"] = content or (None if reader.num_calls else "")
            if reader.num_calls:
                message["tool_calls"] = _whole_calls([call for p in parsed for call in p.calls])
            reason = reader.finish_reason(reason)
        return {
            "message": message,
            "logprobs": self._chat_logprobs(gathered.tokens),
            "finish_reason": reason,
        }

    def chunk_choice(self, index: int, piece: Piece) -> Json | None:
        """`delta` and `logprobs`."""
        if self._reader is None:
            return super().chunk_choice(index, piece)
        reader = self._readers.setdefault(index, self._reader())
        parsed = [reader.push(piece.text)]
        if piece.finish_reason is not None:
            parsed.append(reader.finish())
        content = "".join(p.content for p in parsed)
        calls = [call for p in parsed for call in p.calls]
        if not (content or calls or piece.finish_reason):
            return None
        delta: Json = {"content": content} if content or not calls else {}
        if calls:
            delta["tool_calls"] = [_call_delta(call) for call in calls]
        return {
            "delta": delta,
            "logprobs": self._chat_logprobs(piece.tokens),
            "finish_reason": reader.finish_reason(piece.finish_reason),
        }

    def empty_choice(self, piece: Piece) -> Json:
        """`delta` and `logprobs`, of a piece whose text is content, or is held back."""
        text = piece.text if self._reader is None else ""
        return {
            "delta": {"content": text},
            "logprobs": self._chat_logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    def opening(self, index: int) -> Json:
        """The first chunk of a choice, which names the role."""
        row = {
            "index": index,
            "delta": {"role": "assistant", "content": self._begun},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._head | {"object": self.chunk_object, "choices": [row]}

    def _chat_logprobs(self, tokens: Sequence[TokenPiece]) -> Json | None:
        if self._style.logprobs is None:
            return None
        content = []
        for token in tokens:
            if token.logprobs is None:
                continue
            top = list(token.logprobs.top[: self._style.logprobs])
            known = {token_id for token_id, _ in top}
            top += [pair for pair in token.logprobs.asked if pair[0] not in known]
            content.append(
                self._entry(token.token_id, token.logprobs.logprob)
                | {"top_logprobs": [self._entry(t, value) for t, value in top]}
            )
        return {"content": content}

    def _entry(self, token_id: int, logprob: float) -> Json:
        # Kept bytes are not looked into by the garbage collector, which a large answer's lists of them kept busy.
        spelt = self._texts.bytes(token_id)
        return {"token": self._name(token_id), "logprob": finite(logprob), "bytes": spelt}


def _whole_calls(deltas: Sequence[CallDelta]) -> list[Json]:
    calls: list[Json] = []
    for delta in deltas:
        if delta.name is not None:
            function = {"name": delta.name, "arguments": ""}
            calls.append({"id": delta.id, "type": "function", "function": function})
        calls[delta.index]["function"]["arguments"] += delta.arguments
    return calls


def _call_delta(delta: CallDelta) -> Json:
    function: Json = {"arguments": delta.arguments}
    if delta.name is None:
        return {"index": delta.index, "function": function}
    return {
        "index": delta.index,
        "id": delta.id,
        "type": "function",
        "function": {"name": delta.name, **function},
    }
