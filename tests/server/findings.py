"""What every test of `peqa doctor` asks of a finding about something broken."""

from __future__ import annotations

import socket

from peqa_server.doctor.finding import Finding


def is_broken(finding: Finding, state: str, *words: str) -> None:
    """The finding has this state, says these words, and says what to do."""
    assert finding.state == state, finding
    text = f"{finding.found} {finding.advice}"
    assert all(word in text for word in words), finding
    assert finding.advice, finding


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
