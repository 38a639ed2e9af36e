"""Trainer, server and export compute the same: what was tuned is served, and can be taken along."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Orders in a made-up code language: short prompts with a fixed, learnable answer."""
    rng = random.Random(seed)
    things = ["apple", "hammer", "lamp", "kettle", "brush", "violin", "ladder", "basket"]
    out = []
    for _ in range(count):
        amount, thing = rng.randint(2, 99), rng.choice(things)
        out.append(
            {
                "prompt": f"Please send {amount} of the {thing}s.\nOrder:",
                "completion": f" {thing.upper()}={amount};",
            }
        )
    return out


def write(path: Path, items: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_server_gives_the_trainers_logprobs(
    demo_server: Any, smollm2_base: Path, tmp_path: Path, together: Callable[..., list[Any]]
) -> None:
    from peqa_runtime.training import completion_logprobs

    data = write(tmp_path / "train.jsonl", rows(96, seed=1))
    out = tmp_path / "orders.safetensors"
    train = [sys.executable, "-m", "peqa_runtime", "train", str(smollm2_base), str(data), "--task", "orders"]
    done = subprocess.run(
        [*train, "-o", str(out), "--steps", "12"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

    held_out = rows(20, seed=2)
    expected = completion_logprobs(smollm2_base, out, held_out)  # per row: token ids and logprobs
    untuned = completion_logprobs(smollm2_base, None, held_out)
    moved = max(
        abs(a - b)
        for e, u in zip(expected, untuned, strict=True)
        for a, b in zip(e.logprobs, u.logprobs, strict=True)
    )
    assert moved > 0.5, "the set does change the model"

    put = httpx.put(f"{demo_server.url}/v1/tasks/orders", content=out.read_bytes(), timeout=60)
    assert put.status_code == 200, put.text

    def ask(token_ids: tuple[int, ...]) -> list[float]:
        answer = demo_server.complete(list(token_ids), "orders", max_tokens=0, echo=True, logprobs=0)
        return list(answer["choices"][0]["logprobs"]["token_logprobs"])

    neighbours = [
        lambda i=i: demo_server.complete(
            f"{i} bottles of", ("sql", "slots", "base")[i % 3], max_tokens=40, ignore_eos=True
        )
        for i in range(9)
    ]
    answers = together([*[lambda r=r: ask(r.token_ids) for r in expected], *neighbours])
    largest = 0.0
    for row, got in zip(expected, answers[: len(expected)], strict=True):
        assert len(got) == len(row.token_ids)
        start = len(row.token_ids) - len(row.logprobs)  # the first completion token
        for a, b in zip(got[start:], row.logprobs, strict=True):
            largest = max(largest, abs(a - b))
    print(f"\nlargest difference of a token's logprob, served dtype float32: {largest:.2e}")
    assert largest <= 1e-2


@pytest.mark.parametrize(
    ("task", "prompts"),
    [
        ("intents", ["I lost my card, what now?", "Why was I charged twice?", "How do I change my PIN?"]),
        (
            "sql",
            [
                "table t(country, score, place, player)\nWhich player has a score of 70?",
                "table t(year, team, wins)\nHow many wins had Leeds in 1992?",
            ],
        ),
    ],
)
def test_an_export_answers_as_the_server_does(
    demo_server: Any, smollm2_base: Path, tmp_path: Path, task: str, prompts: list[str]
) -> None:
    """The very tokens, of a tuned set merged into floats that transformers loads, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    from peqa_runtime.export.folder import export_folder

    scale_set = tmp_path / "set.safetensors"
    scale_set.write_bytes(httpx.get(f"{demo_server.url}/v1/tasks/{task}/content", timeout=10).content)
    export_folder(smollm2_base, tmp_path / "floats", "hf", scale_set=scale_set, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32)
    for prompt in prompts:
        choice = demo_server.complete(prompt, task, max_tokens=32)["choices"][0]
        ids = torch.tensor([choice["prompt_token_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, pad_token_id=0
        )
        ends = model.generation_config.eos_token_id
        expected = [token for token in out[0, ids.shape[1] :].tolist() if token != ends]
        assert [token for token in choice["token_ids"] if token != ends] == expected, prompt
        assert choice["finish_reason"] == "stop"
        assert len(expected) > 1
