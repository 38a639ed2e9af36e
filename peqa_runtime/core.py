"""The nouns of the runtime: plain values that every floor above shares. No torch, no I/O.

Lengths are derived properties, never stored twice. `Request` goes into the engine, `TokenOutput` comes out;
both are plain and picklable, so that a process can stand between server and engine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from peqa_runtime.errors import InvalidRequest, InvalidTaskName
from peqa_runtime.sampling_params import SamplingParams

BASE_TASK = "base"
"""The reserved task name that means "no scale set": every scale is 1."""

BASE_REVISION = ""
"""The revision of the base: no scale set, bank row 0."""

NO_TASK = "none"
"""What `if_match` of an upload is when there must be no such task yet."""

MAX_BLEND = 8
"""Tasks of one blend."""

BLEND_TOLERANCE = 1e-3

MAX_CACHE_SALT = 256
"""Characters of a request's `cache_salt`."""

ScaleKind = Literal["channel", "channel+input", "group"]
SCALE_KINDS: tuple[ScaleKind, ...] = ("channel", "channel+input", "group")

FinishReason = Literal["stop", "length", "abort", "error"]

ErrorCode = Literal["numerical_error", "request_failed", "engine_restarted", "no_token_left"]
"""Why a request ended with "error": NaN or infinity in its logits; computing it raised; the engine lost its step; what
it allows (its form, its tokens) left none to choose."""

_TASK_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MEMBER = r"[^+:]+:\d+(\.\d+)?(e-\d+)?"  # of `Blend.name`
_BLEND_NAME = re.compile(rf"{_MEMBER}(\+{_MEMBER})*")


def check_task_name(name: str) -> str:
    """Return `name` when it can name a task; raise `InvalidTaskName` (with what would be right) when not."""
    if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
        raise InvalidTaskName(
            f"task name {str(name)[:80]!r} is not valid: use 1 to 64 characters of a-z, 0-9, '.', '_', '-', "
            "starting with a letter or digit"
        )
    if name == BASE_TASK:
        raise InvalidTaskName(
            f"{BASE_TASK!r} is reserved for the model without a scale set; choose another name"
        )
    return name


@dataclass(frozen=True)
class LinearShape:
    """Shape of one quantized linear: codes `[out_features, in_features]`, scales `[out_features, groups]`."""

    out_features: int
    in_features: int
    groups: int


@dataclass(frozen=True)
class BaseManifest:
    """What a scale set must fit: the identity of a base and the shapes of its quantized linears."""

    model_id: str
    base_digest: str
    linears: Mapping[str, LinearShape]


@dataclass(frozen=True)
class FusedLinear:
    """One launch of the model: the sibling linears that it computes (`names`, in order) and their output sizes.

    A linear that has no siblings is a group of one. All siblings share `in_features` and `groups`.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    in_features: int
    groups: int

    @property
    def out_features(self) -> int:
        """Output features of the launch: the siblings' together."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Request:
    """One generation, as it crosses into the engine. `revision` is pinned: an upload never changes it.

    A lower `priority` runs earlier. Requests share what is computed of equal beginnings only when their `cache_salt`
    is equal, so that nobody can tell by the time it takes what another tenant has asked. Values out of range raise
    `InvalidRequest`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    task: str = BASE_TASK
    revision: str = BASE_REVISION
    kind: ScaleKind = "channel"
    priority: int = 0
    cache_salt: str = ""

    @cached_property
    def payer(self) -> str:
        """The task in whose share of the engine it counts, see `payer_of`."""
        return payer_of(self.task)

    def __post_init__(self) -> None:
        """Check the ranges; the message names the field and the allowed values."""
        if not -(2**31) <= self.priority < 2**31:
            raise InvalidRequest(
                f"priority must be a signed 32-bit integer (lower runs earlier), got {self.priority}",
                param="priority",
            )
        if len(self.cache_salt) > MAX_CACHE_SALT:
            raise InvalidRequest(
                f"cache_salt must have at most {MAX_CACHE_SALT} characters, got {len(self.cache_salt)}",
                param="cache_salt",
            )


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of one token and of the most likely alternatives at its place, most likely first.

    `asked`: of the tokens in `logprob_token_ids`, in that order. `rank`: 1 + how many tokens are likelier;
    counted for the prompt's tokens, None for generated ones.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    asked: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class TokenOutput:
    """One step's result for one request. `token_id` is None when the step only ended the request.

    `prompt_logprobs` comes once, with the first output: one entry per prompt token, the first one None. `error` (a
    sentence) and `error_code` stand where `finish_reason` is "error". `num_cached_tokens`: tokens of the prompt that
    were found computed. `started`: when the request first left the queue, on `time.perf_counter`'s clock; None: never.
    `complete`: the form that the request asked for ended it, and `token_id` belongs to the answer.
    """

    request_id: str
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: str | None = None
    error_code: ErrorCode | None = None
    num_cached_tokens: int = 0
    started: float | None = None
    complete: bool = False

    @property
    def finished(self) -> bool:
        """True for the last output of a request."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class TaskInfo:
    """What is known of a task's current revision. `created` is Unix time in seconds."""

    task: str
    revision: str
    kind: ScaleKind
    num_bytes: int
    created: float
    base_digest: str
    prompt_format: str = ""
    note: Mapping[str, object] = field(default_factory=dict)
    num_revisions: int = 1


@dataclass(frozen=True)
class RevisionInfo:
    """One entry of a task's history."""

    revision: str
    kind: ScaleKind
    num_bytes: int
    created: float
    current: bool


@dataclass(frozen=True)
class Blend:
    """A mix of tasks that one request asks for: (task, share) by name; the shares sum to 1."""

    shares: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Blend:
        """Check the weights and normalise them (they may miss 1 by `BLEND_TOLERANCE`). Raises `InvalidRequest`."""
        if not 1 <= len(weights) <= MAX_BLEND:
            raise InvalidRequest(f"a blend has 1 to {MAX_BLEND} tasks, got {len(weights)}", param="task")
        for task, weight in weights.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not (number and math.isfinite(weight) and weight > 0):
                raise InvalidRequest(
                    f"the weight of {task[:80]!r} must be a finite number greater than 0, got {weight!r}",
                    param="task",
                )
        total = math.fsum(weights.values())
        if abs(total - 1) > BLEND_TOLERANCE:
            raise InvalidRequest(
                f"the weights of a blend must sum to 1 (give or take {BLEND_TOLERANCE:g}), got {total:g}",
                param="task",
            )
        return cls(tuple((task, weights[task] / total) for task in sorted(weights)))

    @property
    def name(self) -> str:
        """What stands for the blend where one task's name would; no task can have this name."""
        return "+".join(f"{task}:{share:.6g}" for task, share in self.shares)


def payer_of(name: str) -> str:
    """The task in whose share of the engine a request counts: of a blend's name the member with the largest weight (of
    equal ones the first), any other name itself. So a thousand blends of two tasks get no more than two tasks do."""
    if not _BLEND_NAME.fullmatch(name):
        return name
    members = (member.split(":") for member in name.split("+"))
    return max(members, key=lambda member: float(member[1]))[0].partition("@")[0]


@dataclass(frozen=True, slots=True)
class Lease:
    """A pinned revision of a task: valid until released, whatever is uploaded or deleted meanwhile.

    `prompt_format` is the task's own at that moment; tasks that share a revision may differ in it. Of a `blend`,
    `task` is its name, and `prompt_format` is None when its tasks have different ones.
    """

    task: str
    revision: str
    kind: ScaleKind = "channel"
    prompt_format: str | None = ""
    blend: Blend | None = None


@dataclass(frozen=True)
class Placement:
    """Where a revision lives on the device. `write`: its tensors must be copied into the row first."""

    row: int
    group_row: int = 0
    write: bool = False
