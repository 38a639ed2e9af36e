"""Every curl command of docs/api.md runs as it stands there, and gives what is shown."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "api.md").read_text()
BLOCKS = re.findall(r"```(?:bash|console)\n((?:(?!```).*\n)+)```\n(?:```json\n((?:(?!```).*\n)+)```)?", DOCS)


def assert_holds(shown: Any, answer: Any) -> None:
    """Everything that is shown is in the answer."""
    if isinstance(shown, dict):
        for key, value in shown.items():
            assert key in answer
            assert_holds(value, answer[key])
    elif isinstance(shown, list):
        assert len(shown) == len(answer)
        for left, right in zip(shown, answer, strict=True):
            assert_holds(left, right)
    else:
        assert answer == shown


def test_the_document_shows_commands() -> None:
    commands = "".join(commands for commands, _ in BLOCKS)
    for route in (
        "completions",
        "chat/completions",
        "models",
        "tokenize",
        "detokenize",
        "tokenizer_info",
        "load",
    ):
        assert re.search(rf"127\.0\.0\.1:8000/(v1/)?{route}\b", commands), route
    assert len(re.findall("^curl", commands, flags=re.MULTILINE)) == DOCS.count("curl "), (
        "none stands elsewhere"
    )


@pytest.mark.parametrize(("commands", "shown"), BLOCKS, ids=range(len(BLOCKS)))
def test_commands_give_what_is_shown(demo_server: Any, tmp_path: Path, commands: str, shown: str) -> None:
    # each answer ends without a line break: give it one
    script = re.sub(r"(?m)^curl", "echo; curl --fail-with-body", commands)
    done = subprocess.run(
        ["bash", "-ec", script.replace("127.0.0.1:8000", f"127.0.0.1:{demo_server.port}")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    if lines[0].startswith("data: "):
        assert lines[-1] == "data: [DONE]"
        lines = [line.removeprefix("data: ") for line in lines[:-1]]
    answers = [json.loads(line) for line in lines]
    assert len(answers) >= commands.count("curl ")
    if shown:
        for line, answer in zip(shown.splitlines(), answers, strict=True):
            assert_holds(json.loads(line), answer)
