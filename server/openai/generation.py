"""One HTTP request's generations: prompts × n choices, all on one pinned revision, cancelled together."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace

from peqa_runtime.core import Lease, Request, TokenOutput
from peqa_runtime.errors import EngineDead, PromptTooLong
from peqa_runtime.sampling_params import SamplingParams
from peqa_server.access.caller import Work
from peqa_server.http.errors import ApiError
from peqa_server.observe.access_log import RequestNote
from peqa_server.observe.meter import ChoiceMeter, RequestMeter
from peqa_server.observe.metrics import Metrics
from peqa_server.openai.choice import LONG_PIECE, Choice, Piece, Prompt, ShownPrompt, TextRules
from peqa_server.openai.completion_json import Usage
from peqa_server.services import ServedModel, Services, TokenStream
from peqa_server.threads import aside

GIVE_WAY_SECONDS = 0.005  # of handing choices to the engine, then others get their turn


@dataclass(frozen=True)
class Job:
    """What is to be generated. `logprobs` asks for the tokens' values; `echo` is in `rules`."""

    prompts: tuple[Prompt, ...]
    n: int
    params: SamplingParams
    rules: TextRules
    priority: int = 0
    cache_salt: str = ""

    @property
    def num_choices(self) -> int:
        """Choices of the answer; choice `p * n + k` is the k-th of prompt p."""
        return len(self.prompts) * self.n


def check_length(model: ServedModel, num_prompt_tokens: int, max_tokens: int) -> None:
    """Raise `PromptTooLong` when prompt and output do not fit the context together."""
    if num_prompt_tokens + max_tokens > model.max_model_len:
        raise PromptTooLong(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, together more than the "
            f"model's context of {model.max_model_len} tokens; shorten one of them",
            param="prompt" if num_prompt_tokens >= model.max_model_len else "max_tokens",
        )


class Generation:
    """Runs a `Job`. Iterate `pieces()` once; call `cancel()` when the client is gone (also after an error)."""

    def __init__(
        self, services: Services, lease: Lease, job: Job, note: RequestNote, metrics: Metrics
    ) -> None:
        self._services = services
        self._lease = lease
        self._job = job
        self._note = note
        self._meter = RequestMeter(metrics, lease, note)
        # Not the client's X-Request-Id alone: two requests may carry the same one.
        self._id = f"{note.request_id}/{uuid.uuid4().hex[:8]}"
        self._work = Work()
        self._streams: list[TokenStream] = []
        self._tokenizer = services.model.tokenizer
        self._shown: list[ShownPrompt] = []
        self._choices = [Choice(self._tokenizer, p, job.rules) for p in job.prompts for _ in range(job.n)]
        self._meters = [ChoiceMeter(self._meter, len(p.token_ids)) for p in job.prompts for _ in range(job.n)]
        self._cached = [0] * job.num_choices
        self.num_prompt_tokens = sum(len(p.token_ids) for p in job.prompts)
        note.prompt_tokens = self.num_prompt_tokens
        note.model, note.params, note.choices = services.model.model_id, job.params, job.num_choices

    @property
    def num_generated_tokens(self) -> int:
        """Generated tokens of all choices so far."""
        return sum(c.num_tokens for c in self._choices)

    @property
    def usage(self) -> Usage:
        """The tokens counted so far; of a prompt's cached ones those that its first choice found."""
        cached = sum(self._cached[:: self._job.n])
        return Usage(self.num_prompt_tokens, self.num_generated_tokens, cached)

    async def submit(self) -> None:
        """Hand every choice to the engine; on a refusal of one, none stays."""
        complete = False
        caller, prompt_tokens = self._note.caller, self.num_prompt_tokens
        self._work = caller.begin(
            self._lease,
            choices=self._job.num_choices,
            prompt_tokens=prompt_tokens,
            priority=self._job.priority,
        )
        self._meter.submitting()
        try:
            due = time.monotonic() + GIVE_WAY_SECONDS
            for index in range(self._job.num_choices):
                if time.monotonic() > due:
                    await asyncio.sleep(0)
                    due = time.monotonic() + GIVE_WAY_SECONDS
                self._streams.append(self._services.engine.submit(self._request(index)))
            complete = True
        finally:
            if not complete:
                self.cancel()
        self._work.charge("prompt", prompt_tokens)
        self._meter.admitted(self.num_prompt_tokens, self._job.n, self._job.params.max_tokens)

    def _request(self, index: int) -> Request:
        params = self._job.params
        k = index % self._job.n
        if params.seed is not None and k:
            # n choices of one prompt and seed must differ: the k-th takes seed + k, wrapped to 64 bits.
            params = replace(params, seed=(params.seed + k + 2**63) % 2**64 - 2**63)
        return Request(
            request_id=f"{self._id}-{index}",
            prompt_token_ids=self._job.prompts[index // self._job.n].token_ids,
            params=params,
            task=self._lease.task,
            revision=self._lease.revision,
            kind=self._lease.kind,
            priority=self._job.priority,
            cache_salt=self._note.caller.salt(self._job.cache_salt),
        )

    def cancel(self) -> None:
        """End every choice that still runs."""
        for stream, choice, meter in zip(self._streams, self._choices, self._meters, strict=False):
            if not choice.finished:
                stream.cancel()
                meter.end("abort")
        self._work.close()

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """`(choice index, piece)` in the order in which tokens come. Raises the named error of a failed choice."""
        try:
            if self._job.rules.echo:
                await aside(self.num_prompt_tokens > LONG_PIECE, self._show_prompts)
            if len(self._streams) == 1:
                async for piece in self._read(0):
                    yield 0, piece
            else:
                async for item in self._merged():
                    yield item
        finally:
            self.cancel()
            usage = self.usage
            self._note.generated_tokens, self._note.cached_tokens = (
                usage.completion_tokens,
                usage.cached_tokens,
            )

    def _show_prompts(self) -> None:
        self._shown = [ShownPrompt(self._tokenizer, p, self._job.rules) for p in self._job.prompts]

    async def _merged(self) -> AsyncIterator[tuple[int, Piece]]:
        queue: asyncio.Queue[tuple[int, Piece] | asyncio.Task[None]] = asyncio.Queue()

        async def pump(index: int) -> None:
            async for piece in self._read(index):
                queue.put_nowait((index, piece))

        tasks = [asyncio.ensure_future(pump(i)) for i in range(len(self._streams))]
        for task in tasks:
            task.add_done_callback(queue.put_nowait)
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, asyncio.Task):
                    left -= 1
                    item.result()  # raises what ended the pump
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    async def _read(self, index: int) -> AsyncIterator[Piece]:
        choice, stream, meter = self._choices[index], self._streams[index], self._meters[index]
        echoed = not self._job.rules.echo
        async for output in stream:
            meter.took(output)
            if output.token_id is not None:
                self._work.charge("generated", 1)
            if output.finish_reason in ("error", "abort"):
                meter.end(output.finish_reason)
                raise _failure(output)
            if not echoed:
                echoed = True
                shown, values = self._shown[index // self._job.n], output.prompt_logprobs
                prompt = await aside(len(values or ()) > LONG_PIECE, shown.piece, values)
                choice.echo(prompt)
                yield prompt
            self._cached[index] = output.num_cached_tokens
            piece = choice.feed(output)
            if choice.finished:
                if not output.finished:
                    stream.cancel()  # a stop string ended the choice; the engine does not know
                meter.end(piece.finish_reason or "stop")
            yield piece
            if choice.finished:
                return
        raise EngineDead("the engine ended before this answer was complete")


def _failure(output: TokenOutput) -> ApiError:
    if output.finish_reason == "abort":
        return ApiError(
            503, "the server stopped this request before it was complete; ask again", code="aborted",
            headers={"Retry-After": "5"},
        )  # fmt: skip
    reason = output.error or "the engine could not compute this request"
    if output.error_code == "engine_restarted":
        return ApiError(503, reason, code="engine_restarted", headers={"Retry-After": "1"})
    if output.error_code == "no_token_left":
        return ApiError(400, reason, code="no_token_left")
    return ApiError(500, reason, code=output.error_code or "generation_failed")
