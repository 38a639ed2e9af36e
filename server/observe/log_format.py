"""How log lines look: `text` for people, `json` for programs. An event is a short message and named fields.

What clients send (paths, request ids) is quoted where it is not plain, so that no line can be forged.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")

_PLAIN = re.compile(r"[\w.,:;/@%+~*?&={}\[\]()-]+", re.ASCII)
# Libraries that report at INFO what the events here already say, or what nobody operating a server asks for.
_NOISY = ("httpx", "httpcore", "urllib3", "filelock", "asyncio", "uvicorn.error")


def event(
    logger: logging.Logger,
    level: int,
    message: str,
    /,
    *,
    said: Mapping[str, object] | None = None,
    **fields: object,
) -> None:
    """Log `message` with fields; None is left out. `said`: fields that the message itself says to people."""
    if logger.isEnabledFor(level):
        kept = {name: value for name, value in fields.items() if value is not None}
        logger.log(level, "%s", message, extra={"fields": kept, "said": dict(said or {})})


def shown(value: object) -> str:
    """A value on one line: plain words as they are, everything else as JSON."""
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, default=str)


class TextFormatter(logging.Formatter):
    """`2026-11-22T07:40:12.123Z INFO    peqa.access  POST /v1/completions 200  task=sql ms=312.4`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback after it where there is one."""
        fields: Mapping[str, object] = getattr(record, "fields", {})
        words = [f"{_time(record)} {record.levelname:<7} {record.name}  {record.getMessage()}"]
        if fields:
            words.append(" ".join(f"{name}={shown(value)}" for name, value in fields.items()))
        return "\n".join(["  ".join(words), *_trace(self, record)])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the event's fields beside them."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback stands in `exception`."""
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "said", {}),
            **getattr(record, "fields", {}),
        }
        trace = _trace(self, record)
        if trace:
            line["exception"] = "\n".join(trace)
        return json.dumps(line, default=str)


def set_up_logging(level: str, form: LogFormat, stream: TextIO | None = None) -> None:
    """Send every log line of the process to `stream` (default: stderr) in one form, unless it has a log already."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    return [formatter.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
