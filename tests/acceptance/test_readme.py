"""The README's requests, run as they stand there, give the answers that stand there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
REQUESTS = re.findall(r"```sh\n(curl (?:(?!```).*\n)+)```\n```json\n((?:(?!```).*\n)+)```", README)

PROGRAMS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def what_matters(line: str) -> Any:
    """An answer without its id and time, and without what others had asked before; any other line as it is."""
    try:
        answer = json.loads(line)
    except json.JSONDecodeError:
        return line
    if isinstance(answer, dict) and "usage" in answer:
        answer["usage"].pop("prompt_tokens_details", None)
    return (
        {k: v for k, v in answer.items() if k not in ("id", "created")}
        if isinstance(answer, dict)
        else answer
    )


def here(text: str, server: Any) -> str:
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace(
        " peqa_runtime/", f" {ROOT}/peqa_runtime/"
    )


def test_the_readme_shows_requests() -> None:
    assert len(REQUESTS) == 3, "base, a task, an upload"


@pytest.mark.parametrize(("commands", "shown"), REQUESTS, ids=["base", "task", "upload"])
def test_a_request_gives_what_is_shown(demo_server: Any, tmp_path: Path, commands: str, shown: str) -> None:
    done = subprocess.run(
        # each answer ends without a line break: give it one
        ["bash", "-ec", re.sub(r"(?m)^(curl(?:.*\\\n)*.*)$", r"\1; echo", here(commands, demo_server))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    printed = [line for line in done.stdout.splitlines() if line]
    assert [what_matters(line) for line in printed] == [what_matters(line) for line in shown.splitlines()]


def test_the_openai_client_prints_what_is_shown(demo_server: Any) -> None:
    program = PROGRAMS[0]
    expected = re.findall(r"print\(.*\)  # (.*)", program)
    done = subprocess.run(
        [sys.executable, "-c", here(program, demo_server)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == expected


def test_the_offline_program_runs(smollm2_base: Path) -> None:
    program = PROGRAMS[1].replace(".peqa/bases/smollm2-135m-instruct", str(smollm2_base))
    assert str(smollm2_base) in program
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[0] == "lost_or_stolen_card"
