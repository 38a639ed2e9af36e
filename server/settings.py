"""What an operator can choose about the HTTP side. Frozen; the environment is read by the CLI alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MIB = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """Limits and keys of one app.

    `api_keys` empty: no key is asked. `max_upload_bytes` None: the largest set that the base can have.
    `metric_tasks`: how many task names become labels of their own; later ones count as "other".
    `metrics_compat`: whose metric names `/metrics` has beside its own.
    """

    api_keys: tuple[str, ...] = ()
    max_request_bytes: int = 8 * MIB
    max_upload_bytes: int | None = None
    body_idle_seconds: float = 30.0
    discard_bytes: int = (
        256 * MIB
    )  # of a refused body: read on, so that the client sees the answer, not a reset
    discard_seconds: float = 5.0
    max_choices: int = 1024  # prompts × n of one HTTP request
    metric_tasks: int = 64
    metrics_compat: Literal["vllm"] | None = None
    drain_seconds: float = 30.0
