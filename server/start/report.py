"""What the start found, said once: a table for people, one JSON line for programs, and an event in the log."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass

import typer

from peqa_server.observe.log_format import LogFormat, event
from peqa_server.observe.metrics import Compat
from peqa_server.start.loading import Report

log = logging.getLogger("peqa.server")

MAX_LISTED = 20


@dataclass(frozen=True)
class Observing:
    """How a server shows what it does. `began`: when the command did, on `time.perf_counter`'s clock."""

    log_format: LogFormat
    metrics_compat: Compat | None
    traces_endpoint: str | None
    as_json: bool
    began: float

    def say(self, line: str) -> None:
        """Tell what a start is at."""
        if self.log_format == "json":
            log.info("%s", line)
        else:
            typer.echo(line, err=True)


def announce(report: Report, url: str, keys: str, seen: Observing) -> None:
    """Say what is served, where, and which keys are asked for.

    The table is left out where the log is JSON: then a program reads.
    """
    if seen.as_json:
        typer.echo(json.dumps(asdict(report) | {"url": url, "keys": keys}))
    elif seen.log_format == "text":
        _table(report, url, keys)
    event(
        log,
        logging.INFO,
        "serving",
        url=url,
        keys=keys,
        model=report.model,
        base_digest=report.base_digest[:12],
        device=report.device,
        dtype=report.dtype,
        kernels=report.kernels,
        kv_tokens=report.kv_tokens,
        kv_cache_dtype=report.kv_cache_dtype,
        max_model_len=report.max_model_len,
        tasks=len(report.tasks),
        task_rows=report.task_rows,
        unusable=len(report.unusable),
        store=report.store,
        seconds=round(time.perf_counter() - seen.began, 1),
    )
    for line in report.unusable[:MAX_LISTED]:
        task, _, reason = line.partition(": ")
        event(log, logging.WARNING, "task cannot be used", task=task, reason=reason)


def _table(report: Report, url: str, keys: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title="peqa serves", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "model": f"{report.model} (base {report.base_digest[:12]})",
        "weights": report.quantization,
        "device": f"{report.device}, activations in {report.dtype}, kernels: {report.kernels}{_coarse(report)}",
        "KV cache": f"{report.kv_blocks} blocks = {report.kv_tokens} tokens in {report.kv_cache_dtype}; "
        f"context {report.max_model_len}",
        "tasks": f"{_few(('base', *report.tasks))} (up to {report.task_rows} on the device at once)",
        "unusable": _few(report.unusable, "; "),
        "store": report.store,
        "keys": keys,
        "URL": url,
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    Console().print(table)


def _coarse(report: Report) -> str:
    return f" on {report.activation_bits}-bit activations" if report.activation_bits < 16 else ""


def _few(names: tuple[str, ...], between: str = ", ") -> str:
    return between.join(names[:MAX_LISTED]) + (
        f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    )
