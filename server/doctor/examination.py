"""Runs checks side by side, each in a thread that nobody has to wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from peqa_server.doctor import machine, serving, software, storage
from peqa_server.doctor.finding import Asked, Check, Finding

CHECKS: Mapping[str, Check] = {
    "software": software.packages,
    "environment": software.environment,
    "traces": software.traces,
    "machine": machine.processor_and_devices,
    "memory": machine.memory,
    "limits": machine.limits,
    "clock": machine.clock,
    "home": storage.home,
    "base and store": storage.base_and_store,
    "port": serving.port,
    "keys": serving.keys,
}


def examine(asked: Asked, checks: Mapping[str, Check] = CHECKS) -> list[Finding]:
    """The findings of all checks, in their order. One that takes longer than `asked.timeout` is a problem itself."""
    found: dict[str, list[Finding]] = {}

    def run(name: str, check: Check) -> None:
        try:
            found[name] = check(asked)
        except Exception as error:  # noqa: BLE001  the edge of a check: the others are still worth having
            found[name] = [
                Finding(
                    name,
                    "problem",
                    f"the check failed: {type(error).__name__}: {error}",
                    "please report this",
                )
            ]

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in checks.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + asked.timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = f"no answer within {asked.timeout:g} s"
    advice = "look for a disk or driver that hangs: dmesg | tail"
    return [
        finding for name in checks for finding in found.get(name) or [Finding(name, "problem", late, advice)]
    ]
