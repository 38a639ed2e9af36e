"""What an operator can choose about the HTTP side. Frozen; the environment is read by the CLI alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MIB = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """Limits and keys of one app.

    `key_file` None: no key is asked for. `open_metrics`: none for /metrics. `own_host`: where a server without keys
    listens that only this machine reaches; it then answers to no other name.
    `max_bodies_bytes`: of all JSON bodies that are on their way, in memory.
    `max_upload_bytes` None: the largest set that the base can have.
    `metric_tasks`: how many task names become labels of their own; later ones count as "other".
    `client_chat_templates`: clients may send a chat template of their own, a program that then runs here, sandboxed.
    `max_uploads`: so many at once; more are told to come again. `body_bytes_per_second`: a body that comes slower is
    refused once `body_idle_seconds` are over. `stalled_stream_seconds`: a stream whose client reads nothing is cut.
    `discard_bytes`: of a refused body are read on, so that the client sees the answer, not a reset; for as long as one
    comes every `discard_seconds`, and a minute at most.
    `metrics_compat`: whose metric names `/metrics` has beside its own.
    """

    key_file: Path | None = None
    open_metrics: bool = False
    own_host: str | None = None
    max_request_bytes: int = 8 * MIB
    max_bodies_bytes: int = 256 * MIB
    max_upload_bytes: int | None = None
    max_uploads: int = 16
    body_idle_seconds: float = 30.0
    body_bytes_per_second: int = 4096
    stalled_stream_seconds: float = 60.0
    discard_bytes: int = 256 * MIB
    discard_seconds: float = 5.0
    max_choices: int = 1024  # prompts × n of one HTTP request
    metric_tasks: int = 64
    metrics_compat: Literal["vllm"] | None = None
    drain_seconds: float = 30.0
    client_chat_templates: bool = False
