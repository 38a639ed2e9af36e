"""Packages against the ranges that were tested, misspelt variables, and what traces need."""

from __future__ import annotations

import difflib
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from peqa_server.doctor.finding import Asked, Finding
from peqa_server.observe.tracing import tracing_wanted

SHOWN = ("torch", "triton", "transformers", "safetensors", "fastapi", "uvicorn")


def packages(asked: Asked) -> list[Finding]:
    """Python and every package that serving needs."""
    try:
        requirements = metadata.requires("peqa-serve") or []
        version = metadata.version("peqa-serve")
    except metadata.PackageNotFoundError:
        return [
            Finding("packages", "problem", "peqa-serve is not installed for this Python", "pip install -e .")
        ]
    python = f"peqa {version}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    first = Finding("python", "ok", python)
    if sys.platform != "linux":
        first = Finding("python", "warning", python, "only Linux is tested")
    return [first, *compared(requirements, _installed)]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def compared(requirements: Iterable[str], installed: Callable[[str], str | None]) -> list[Finding]:
    """What is missing, what is outside its range, and the versions of the packages that matter most."""
    shown: dict[str, str] = {}
    wrong = []
    for text in requirements:
        wanted = Requirement(text)
        name = canonicalize_name(wanted.name)
        optional = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
        if optional and name not in SHOWN:
            continue
        found = installed(name)
        if found is None:
            if not optional:
                advice = f"pip install '{wanted.name}{wanted.specifier}'"
                wrong.append(Finding("packages", "problem", f"{name} is missing", advice))
            continue
        if name in SHOWN:
            shown[name] = found
        if not wanted.specifier.contains(found, prereleases=True):
            advice = f"tested is {wanted.specifier}: pip install '{wanted.name}{wanted.specifier}'"
            wrong.append(Finding("packages", "warning", f"{name} is {found}", advice))
    listed = ", ".join(f"{name} {shown[name]}" for name in SHOWN if name in shown)
    return list(dict.fromkeys(wrong)) or [Finding("packages", "ok", listed)]


def environment(asked: Asked) -> list[Finding]:
    """PEQA_… variables that no command reads: most likely misspelt, so that a setting is not in force."""
    findings = []
    for name in sorted(asked.environ):
        if name.startswith("PEQA_") and name not in asked.known_variables:
            near = difflib.get_close_matches(name, asked.known_variables, n=1)
            advice = f"perhaps {near[0]}?" if near else "peqa serve --help lists those that are read"
            findings.append(Finding("environment", "warning", f"{name} is set, but nothing reads it", advice))
    used = sorted(name for name in asked.environ if name in asked.known_variables)
    return findings or [Finding("environment", "ok", ", ".join(used) or "no PEQA_ variable is set")]


def traces(asked: Asked) -> list[Finding]:
    """Whether traces that are asked for can be made."""
    endpoint = asked.environ.get("PEQA_OTLP_TRACES_ENDPOINT") or None
    if not tracing_wanted(endpoint, asked.environ):
        return [Finding("traces", "ok", "not asked for")]
    try:
        there = importlib.util.find_spec("opentelemetry.exporter.otlp.proto") is not None
    except ModuleNotFoundError:
        there = False
    if there:
        return [Finding("traces", "ok", "asked for, and OpenTelemetry is installed")]
    advice = "pip install 'peqa-serve[otel]', or set OTEL_SDK_DISABLED=true"
    return [Finding("traces", "problem", "asked for, but OpenTelemetry is not installed", advice)]
