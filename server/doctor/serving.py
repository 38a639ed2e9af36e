"""The port, who answers on it already, and the keys."""

from __future__ import annotations

import os
import stat
from typing import Any

import httpx

from peqa_server.access import key_file
from peqa_server.access.browser_guard import is_loopback
from peqa_server.access.key_json import KeyFileError
from peqa_server.doctor.finding import Asked, Finding
from peqa_server.start.run import CannotBind, listen

SECONDS = 3.0


def port(asked: Asked) -> list[Finding]:
    """Whether the port is free; else who answers there, and how a peqa server does."""
    try:
        listen(asked.host, asked.port).close()
    except CannotBind as error:
        refused = str(error).partition(";")[0]
    else:
        return [Finding("port", "ok", f"{asked.host}:{asked.port} is free")]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(asked.host, asked.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{asked.port}"
    headers = {} if asked.api_key is None else {"Authorization": f"Bearer {asked.api_key}"}
    try:
        with httpx.Client(base_url=url, timeout=SECONDS, headers=headers, trust_env=False) as client:
            return running(client)
    except (httpx.HTTPError, httpx.InvalidURL):
        return [
            Finding("port", "problem", refused, "choose another with --host and --port, or end who has it")
        ]


def running(client: httpx.Client) -> list[Finding]:
    """How the server does that has the port. Raises `httpx.HTTPError` when it does not answer."""
    health = client.get("/health")
    told = _json(health)
    peqa = health.headers.get("x-request-id") and ("status" in told or "error" in told)
    if not peqa:
        found = f"{client.base_url} answers, but not as a peqa server does"
        return [Finding("port", "problem", found, "choose another with --port, or end who has it")]
    if health.status_code != 200:
        found = f"a peqa server at {client.base_url} is broken: {_reason(told)}"
        return [Finding("server", "problem", found, "restart it; its log says why")]
    findings = [Finding("server", "ok", f"a peqa server answers at {client.base_url}: {told.get('status')}")]
    if told.get("status") == "draining":
        findings[0] = Finding("server", "warning", findings[0].found, "it takes no new requests and will end")
    return findings + _tasks(client)


def _tasks(client: httpx.Client) -> list[Finding]:
    """Tasks that the running server has set aside, or cannot use."""
    answer = client.get("/v1/tasks")
    if answer.status_code in (401, 403):
        found = "its tasks are not shown without a key"
        return [Finding("server", "note", found, "give --api-key or PEQA_API_KEY to have them looked at")]
    if answer.status_code != 200:
        return [Finding("server", "note", f"its tasks cannot be listed now: {_reason(_json(answer))}")]
    listed = _json(answer)
    aside = [row for row in listed.get("data", []) if row.get("status") == "quarantined"]
    findings = [
        Finding(
            "server",
            "warning",
            f"{row['task']} is in quarantine: {row.get('status_reason')}",
            f"peqa tasks rollback {row['task']}, or upload it anew",
        )
        for row in aside[:20]
    ]
    findings += [
        Finding(
            "server",
            "warning",
            f"{row['task']} cannot be used: {row['reason']}",
            "upload it again or delete it",
        )
        for row in listed.get("unusable", [])[:20]
    ]
    return findings


def _json(answer: httpx.Response) -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _reason(told: dict[str, Any]) -> str:
    error = told.get("error")
    return str(error.get("message")) if isinstance(error, dict) else "no reason given"


def keys(asked: Asked) -> list[Finding]:
    """The file of keys: there, whole, and nobody else's business; and whether one is needed."""
    path = asked.key_file
    if path is None:
        return [_no_keys(asked)]
    try:
        found, form, _ = key_file.read(path)
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except (KeyFileError, OSError) as error:
        advice = "peqa keys make NAME --file FILE makes one; it is for its owner alone"
        return [Finding("keys", "problem", str(error), advice)]
    text = f"{path}: {len(found.keys)} keys ({form})"
    if mode & 0o027:
        advice = f"chmod 600 {path}"
        return [Finding("keys", "warning", f"{text}, open to other users (mode {mode:03o})", advice)]
    return [Finding("keys", "ok", text)]


def _no_keys(asked: Asked) -> Finding:
    if is_loopback(asked.host):
        return Finding("keys", "ok", f"none; {asked.host} is reached from this machine only")
    found = f"none, though {asked.host} is reached from other machines"
    advice = "peqa keys make NAME --role admin --file keys.json, and --api-key-file keys.json"
    if asked.environ.get("PEQA_INSECURE_OPEN_TO_NETWORK", "").lower() in ("1", "true", "t", "yes", "y", "on"):
        return Finding("keys", "warning", f"{found}: whoever reaches it may do everything", advice)
    return Finding("keys", "problem", f"{found}: peqa serve refuses to start so", advice)
