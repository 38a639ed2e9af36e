"""The app over the real engine and a tiny real model: what stubs cannot show. And the openai client, unchanged."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from server_stubs import check_error, wait_until

from peqa_runtime.export.folder import export_folder
from peqa_runtime.model import quantize_folder, read_manifest
from peqa_runtime.model.quantize import QuantizeOptions
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_server.app import create_loading_app
from peqa_server.start.loading import SEEDED, Report, ServeOptions, find_base, load_services, seed_tasks


def scale_set(base: Path, seed: int, kind: str = "channel") -> bytes:
    """A scale set that changes the tiny model's answers."""
    manifest = read_manifest(base)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.out_scale": 1 + 0.3 * torch.rand(shape.out_features, generator=generator)
        for name, shape in manifest.linears.items()
    }
    return bytes(ScaleSet.build(kind, tensors, manifest, task="noted", prompt_format="<{prompt}>").to_bytes())


class Real:
    def __init__(self, url: str, services: Any, report: Report) -> None:
        self.url, self.services, self.report = url, services, report
        self.client = httpx.Client(base_url=url, timeout=30)

    def complete(self, prompt: Any = "the cat", **body: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "return_token_ids": True} | body
        answer = self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def metric(self, name: str) -> float:
        rows = self.client.get("/metrics").text.splitlines()
        return sum(float(row.rsplit(" ", 1)[1]) for row in rows if row.startswith(f"{name} "))


@pytest.fixture(scope="module")
def real(run_app: Any, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    store = tmp_path_factory.mktemp("real") / "store"
    options = ServeOptions(
        tiny_base, home=store.parent, store=store, engine={"num_blocks": 64, "task_rows": 4}
    )
    services, report = load_services(options, lambda line: None)
    app = create_loading_app()
    url, loop = run_app(app)
    loop.call_soon_threadsafe(app.state.gate.open, services)
    server = Real(url, services, report)
    wait_until(lambda: server.client.get("/ready").status_code == 200)
    for seed, task in enumerate(("one", "two")):
        put = server.client.put(f"/v1/tasks/{task}", content=scale_set(tiny_base, seed))
        assert put.status_code == 200, put.text
    yield server
    services.engine.stop()


def test_tasks_change_the_answer(real: Real) -> None:
    answers = {task: real.complete(task=task, max_tokens=12) for task in ("base", "one", "two")}
    assert len({tuple(a["choices"][0]["token_ids"]) for a in answers.values()}) == 3
    for answer in answers.values():
        assert answer["usage"]["completion_tokens"] == 12
    assert answers["one"]["revision"] == real.client.get("/v1/tasks/one").json()["revision"]


def test_a_kept_revision_answers_while_another_is_current(real: Real, tiny_base: Path) -> None:
    for seed in (10, 11):
        put = real.client.put("/v1/tasks/pinned", content=scale_set(tiny_base, seed))
        assert put.status_code == 200, put.text
    rows = real.client.get("/v1/tasks/pinned/revisions").json()["data"]
    new, old = (row["revision"] for row in rows)
    now = real.complete(task="pinned", max_tokens=8)
    for fields in (
        {"task": f"pinned@{old[:4]}"},
        {"model": f"base:pinned@{old}"},
        {"adapter_id": f"pinned@{old[:9]}"},
    ):
        then = real.complete(max_tokens=8, **fields)
        assert (then["task"], then["revision"]) == ("pinned", old)
        assert then["choices"][0]["token_ids"] != now["choices"][0]["token_ids"]
    assert real.complete(task="pinned", max_tokens=8)["choices"] == now["choices"]
    blend = real.complete(task={f"pinned@{old[:4]}": 1.0}, max_tokens=8)
    assert blend["choices"] == then["choices"]
    assert real.client.get(f"/v1/models/pinned@{old[:4]}").json()["revision"] == old
    real.client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "task": f"pinned@{old}"}
    )
    text = real.client.get("/metrics").text
    assert 'task="pinned"' in text
    assert f"pinned@{old[:4]}" not in text, "the label stays the task's name"
    unknown = next(p for p in ("0000", "1111", "2222") if not old.startswith(p) and not new.startswith(p))
    for name, status, code in (
        (f"pinned@{unknown}", 404, "revision_not_found"),
        ("pinned@12", 400, "invalid_value"),
    ):
        for field in ("task", "adapter_id", "model"):
            answer = real.client.post("/v1/completions", json={"prompt": "x", field: name})
            error = check_error(answer, status)
            assert (error["code"], error["param"]) == (code, field)
    both = real.client.post(
        "/v1/completions", json={"prompt": "x", "task": f"pinned@{old[:4]}", "model": "one"}
    )
    assert check_error(both, 400)["code"] == "task_conflict"
    assert real.client.delete("/v1/tasks/pinned").status_code == 200


def test_the_report_says_what_is_served(real: Real, tiny_base: Path) -> None:
    assert real.report.model == "tiny-llama"
    assert real.report.quantization == "4 bits, groups of 32, 14 linears"
    assert real.report.kv_tokens == 64 * 16
    assert real.report.base == str(tiny_base)
    assert real.client.get("/v1/tasks/one").json()["prompt_format"] == "<{prompt}>"


def test_streamed_equals_whole_and_echoed_logprobs_equal_generated(real: Real) -> None:
    whole = real.complete(task="one", max_tokens=8, logprobs=3)
    text = ""
    body = {
        "prompt": "the cat",
        "task": "one",
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": 8,
        "stream": True,
    }
    with real.client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                text += httpx.Response(200, text=line[6:]).json()["choices"][0]["text"]
    choice = whole["choices"][0]
    assert text == choice["text"]
    scored = real.complete(choice["prompt_token_ids"] + choice["token_ids"], task="one", max_tokens=0, echo=True,
                           logprobs=3)["choices"][0]  # fmt: skip
    count = len(choice["prompt_token_ids"])
    assert scored["logprobs"]["token_logprobs"][0] is None
    assert scored["logprobs"]["token_logprobs"][count:] == pytest.approx(
        choice["logprobs"]["token_logprobs"], abs=1e-3
    )
    for value, top in zip(
        choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True
    ):
        assert value == max(top.values()), (
            "greedy: the chosen token's value is the very same float as the largest"
        )


def test_scoring_as_evaluation_tools_ask_for_it(real: Real) -> None:
    """Lists of ids, echo, one token, logprobs 1; "the very float of the largest" is their test of greedy."""
    choice = real.complete(task="one", max_tokens=8, return_token_ids=True)["choices"][0]
    greedy = choice["prompt_token_ids"] + choice["token_ids"]
    other = [*greedy[:-1], (greedy[-1] + 1) % 200]
    count = len(choice["prompt_token_ids"])
    answer = real.complete([greedy, other], task="one", max_tokens=1, echo=True, logprobs=1, seed=1234)
    verdicts = []
    for ids, row in zip((greedy, other), answer["choices"], strict=True):
        values, tops = row["logprobs"]["token_logprobs"], row["logprobs"]["top_logprobs"]
        assert len(values) == len(tops) == len(ids) + 1
        verdicts.append([v == max(t.values()) for v, t in zip(values[count:-1], tops[count:-1], strict=True)])
    assert verdicts == [[True] * 8, [True] * 7 + [False]]


def test_sampling_is_seeded_and_choices_differ(real: Real) -> None:
    one = real.complete(temperature=1.0, seed=5, n=3, max_tokens=10)
    again = real.complete(temperature=1.0, seed=5, n=3, max_tokens=10)
    ids = [c["token_ids"] for c in one["choices"]]
    assert ids == [c["token_ids"] for c in again["choices"]]
    assert len({tuple(i) for i in ids}) == 3


def test_limits_of_the_model_and_its_cache(real: Real) -> None:
    error = check_error(
        real.client.post("/v1/completions", json={"prompt": [5] * 500, "max_tokens": 13}), 400
    )
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"]
    check_error(real.client.post("/v1/completions", json={"prompt": [300]}), 400)


def test_a_wrong_set_changes_nothing(real: Real, tiny_base: Path) -> None:
    before = real.client.get("/v1/tasks").json()
    good = scale_set(tiny_base, 0)
    check_error(real.client.put("/v1/tasks/one", content=good[:-10]), 422)
    digest = read_manifest(tiny_base).base_digest.encode()
    check_error(real.client.put("/v1/tasks/one", content=good.replace(digest, b"0" * 64)), 409)
    check_error(real.client.put("/v1/tasks/tiny-llama", content=good), 422)
    assert real.client.get("/v1/tasks").json() == before
    assert not list(real.services.spool_folder.glob("upload-*"))


def test_answers_during_uploads_belong_to_one_revision(real: Real, tiny_base: Path) -> None:
    files = [scale_set(tiny_base, 11), scale_set(tiny_base, 12)]
    expected = {}
    for file in files:
        real.client.put("/v1/tasks/swing", content=file)
        answer = real.complete(task="swing", max_tokens=24)
        expected[answer["revision"]] = answer["choices"][0]["token_ids"]
    assert len({tuple(ids) for ids in expected.values()}) == 2
    seen: list[dict[str, Any]] = []
    threads = [
        threading.Thread(
            target=lambda: seen.extend(real.complete(task="swing", max_tokens=24) for _ in range(8))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for i in range(30):
        revision = real.client.put("/v1/tasks/swing", content=files[i % 2]).json()["revision"]
        fresh = real.complete(task="swing", max_tokens=1)
        assert fresh["revision"] == revision, "live at its 200"
    for thread in threads:
        thread.join()
    assert len(seen) == 24
    for answer in seen:
        assert answer["choices"][0]["token_ids"] == expected[answer["revision"]]


def test_a_client_that_leaves_frees_its_blocks(real: Real) -> None:
    wait_until(lambda: real.metric("peqa_kv_blocks_used") == 0)
    body = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 2, "task": "one"}
    with real.client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    wait_until(
        lambda: real.metric("peqa_kv_blocks_used") == 0 and real.metric("peqa_requests_running") == 0, 2.0
    )
    wait_until(lambda: real.services.tasks.registry.counts().leases == 0, 2.0)


def test_the_openai_client(real: Real) -> None:
    client = openai.OpenAI(base_url=real.url + "/v1", api_key="none")
    assert {m.id for m in client.models.list()} >= {"tiny-llama", "one", "two"}
    assert client.models.retrieve("one").id == "one"
    answer = client.completions.create(
        model="tiny-llama",
        prompt="the cat",
        max_tokens=6,
        temperature=0,
        logprobs=2,
        extra_body={"task": "one"},
    )
    assert answer.task == "one"  # type: ignore[attr-defined]
    assert answer.choices[0].logprobs is not None
    same = client.completions.create(model="one", prompt="the cat", max_tokens=6, temperature=0)
    assert same.choices[0].text == answer.choices[0].text
    stream = client.completions.create(
        model="one",
        prompt="the cat",
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == answer.choices[0].text
    assert chunks[-1].usage is not None
    chat = client.chat.completions.create(
        model="tiny-llama",
        messages=[{"role": "user", "content": "hi"}],
        max_completion_tokens=5,
        logprobs=True,
        top_logprobs=2,
    )
    assert chat.choices[0].message.role == "assistant"
    pieces = client.chat.completions.create(
        model="two", messages=[{"role": "user", "content": "hi"}], max_tokens=5, stream=True, temperature=0
    )
    assert next(p.choices[0].delta.role for p in pieces) == "assistant"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nope", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="one", prompt="x", max_tokens=10_000)


def test_the_async_openai_client_runs_many(real: Real) -> None:
    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=real.url + "/v1", api_key="none") as client:
            calls = [
                client.completions.create(
                    model=("one", "two", "tiny-llama")[i % 3], prompt=f"cat {i}", max_tokens=8, temperature=0
                )
                for i in range(12)
            ]
            return list(await asyncio.gather(*calls))

    for i, answer in enumerate(asyncio.run(ask_all())):
        task = ("one", "two", "base")[i % 3]
        alone = real.client.post(
            "/v1/completions", json={"prompt": f"cat {i}", "task": task, "max_tokens": 8, "temperature": 0}
        ).json()
        assert answer.task == task
        assert answer.choices[0].text == alone["choices"][0]["text"]


def test_a_folder_of_floats_is_quantized_once(tiny_hf_folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options = ServeOptions(tiny_hf_folder, home=tmp_path, bits=3, group_size=-1)
    base, sets = find_base(options, said.append)
    assert (sets, len(said)) == ((), 1)
    assert read_manifest(base).model_id == "tiny-llama"
    assert find_base(options, said.append)[0] == base
    assert len(said) == 1
    other = ServeOptions(tiny_hf_folder, home=tmp_path, bits=4, group_size=32)
    assert find_base(other, said.append)[0] != base


def test_a_checkpoint_of_codes_is_imported_once(tiny_hf_folder: Path, tmp_path: Path) -> None:
    integers = QuantizeOptions(integer_zeros=True)
    quantize_folder(tiny_hf_folder, tmp_path / "base", 4, 32, options=integers, progress=False)
    export_folder(tmp_path / "base", tmp_path / "tiny-gptq", "gptq", progress=False)
    said: list[str] = []
    options = ServeOptions(tmp_path / "tiny-gptq", home=tmp_path / "home", bits=3, group_size=-1)
    base, _ = find_base(options, said.append)
    assert said == [f"importing tiny-gptq into {base} (once)"]
    manifests = [read_manifest(folder) for folder in (base, tmp_path / "base")]
    assert manifests[0].linears == manifests[1].linears
    assert manifests[0].model_id == "tiny-gptq"
    assert find_base(options, said.append)[0] == base
    assert len(said) == 1


def test_demo_tasks_are_seeded_once(real: Real, tiny_base: Path, tmp_path: Path) -> None:
    files = []
    for seed, task in enumerate(("seed-a", "seed-b")):
        files.append(tmp_path / f"{task}.safetensors")
        files[-1].write_bytes(scale_set(tiny_base, seed))
    bad = tmp_path / "seed-bad.safetensors"
    bad.write_bytes(b"junk")
    tasks = real.services.tasks
    seed_tasks(tasks, tmp_path, (files[0], bad))
    seed_tasks(tasks, tmp_path, (*files, bad))
    assert {"seed-a", "seed-b"} <= {info.task for info in tasks.page()}
    assert (tmp_path / SEEDED).read_text().split() == ["seed-a", "seed-b"]
    tasks.delete("seed-a")
    seed_tasks(tasks, tmp_path, tuple(files))
    assert "seed-a" not in {info.task for info in tasks.page()}, "what was deleted stays deleted"
    tasks.delete("seed-b")


def test_usage_and_metrics_say_what_was_found_computed(real: Real) -> None:
    prompt = list(range(1, 41))
    queries = real.metric("peqa_engine_prefix_cache_queries_total")
    hits = real.metric("peqa_engine_prefix_cache_hits_total")
    found = []
    for salt in ("a", "a", "b"):
        answer = real.complete(prompt, task="two", cache_salt=salt, priority=-1, max_tokens=3)
        found.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert found == [0, 32, 0]
    assert real.metric("peqa_engine_prefix_cache_queries_total") - queries == 120
    assert real.metric("peqa_engine_prefix_cache_hits_total") - hits == 32
    assert real.metric("peqa_prefix_cache_blocks") >= 4
    body = {"prompt": prompt, "task": "two", "cache_salt": "a", "max_tokens": 3, "stream": True}
    options = {"stream_options": {"include_usage": True}}
    with real.client.stream("POST", "/v1/completions", json=body | options) as answer:
        last = [line for line in answer.iter_lines() if line.startswith("data: {")][-1]
    assert '"prompt_tokens_details":{"cached_tokens":32}' in last


def test_every_number_of_the_engine_is_explained(real: Real) -> None:
    from peqa_server.observe.engine_metrics import HELP

    missing = set(real.services.engine.stats()) - set(HELP)
    assert not missing, f"server/observe/engine_metrics.py says nothing about {missing}"


def test_the_engine_says_what_its_tasks_are_at(real: Real) -> None:
    real.complete(task="one", max_tokens=1)
    before = {
        name: real.metric(f"peqa_engine_{name}_total") for name in ("set_hits", "row_writes", "step_tokens")
    }
    text = real.client.get("/metrics").text
    queued = sum(
        float(row.split()[-1]) for row in text.splitlines() if row.startswith("peqa_queue_seconds_count")
    )
    engine = real.services.engine
    # Read while it runs, not after its first token: by then the little model may be at its last one.
    answer = threading.Thread(target=partial(real.complete, task="two", max_tokens=400))
    answer.start()
    wait_until(lambda: engine.tasks_in_work() == ({"two": 1}, {}))
    answer.join()
    wait_until(lambda: engine.tasks_in_work() == ({}, {}))
    after = {name: real.metric(f"peqa_engine_{name}_total") for name in before}
    assert after["set_hits"] == before["set_hits"] + 1
    assert after["row_writes"] >= before["row_writes"]
    assert after["step_tokens"] > before["step_tokens"]
    rows = real.client.get("/metrics").text.splitlines()
    assert (
        sum(float(row.split()[-1]) for row in rows if row.startswith("peqa_queue_seconds_count"))
        == queued + 1
    )
    assert real.metric("peqa_engine_row_writes_total") >= 2, "both tasks have been put on the device"


def test_the_table_of_numbers_has_none_that_the_engine_lacks(real: Real) -> None:
    from peqa_server.observe.engine_metrics import HELP

    assert not set(HELP) - set(real.services.engine.stats())
