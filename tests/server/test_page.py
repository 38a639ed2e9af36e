"""The page in headless Chromium, as a person uses it: tasks, hostile text, load, looks, and the documentation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from key_stubs import key, text_of, write_keys
from page_visit import Visit
from server_stubs import Script, StubEngine, StubTasks, wait_until

from peqa_runtime.model import read_manifest
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_server.app import create_loading_app
from peqa_server.settings import ServerSettings
from peqa_server.start.loading import ServeOptions, load_services

pytestmark = pytest.mark.slow

HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
ADMIN = "admin-key-of-this-test"


@pytest.fixture(scope="module")
def served(run_app: Any, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tiny model behind a key."""
    folder = tmp_path_factory.mktemp("page")
    keys = folder / "keys"
    keys.write_text(ADMIN + "\n")
    keys.chmod(0o600)
    engine = {"num_blocks": 64, "task_rows": 4}
    options = ServeOptions(tiny_base, home=folder, store=folder / "store", engine=engine)
    services, _ = load_services(options, lambda line: None)
    app = create_loading_app(ServerSettings(key_file=keys))
    url, loop = run_app(app)
    loop.call_soon_threadsafe(app.state.gate.open, services)
    wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200)
    yield url
    services.engine.stop()


def scale_set(base: Path, seed: int) -> bytes:
    """A scale set that changes the tiny model's answers."""
    manifest = read_manifest(base)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.out_scale": 1 + 0.4 * torch.rand(shape.out_features, generator=generator)
        for name, shape in manifest.linears.items()
    }
    return bytes(ScaleSet.build("channel", tensors, manifest).to_bytes())


def enter_key(page: Any, key: str) -> None:
    page.get_by_role("dialog").get_by_label("Key").fill(key)
    page.get_by_role("button", name="Use this key").click()


def test_a_task_from_its_upload_to_its_end(served: str, tiny_base: Path, visit: Callable[..., Visit]) -> None:
    first, second = (scale_set(tiny_base, seed) for seed in (1, 2))
    api = httpx.Client(base_url=served, headers={"Authorization": f"Bearer {ADMIN}"})
    tab = visit(served)
    page = tab.open()
    page.get_by_role("dialog").wait_for()
    enter_key(page, "not-the-key")
    page.locator("#key-problem").filter(has_text="key").wait_for()
    enter_key(page, ADMIN)
    page.get_by_text("The model without a task's scales").wait_for()
    page.get_by_role("heading", name="Upload").wait_for()
    assert page.locator("#key-button").text_content() == "Key in use"

    tab.upload("Desk One", first).get_by_text("desk-one is live").wait_for()
    revision = api.get("/v1/tasks/desk-one").json()["revision"]
    tab.task("desk-one").get_by_role("checkbox").check()
    page.get_by_label("Prompt").fill("the cat and the dog")
    page.get_by_label("Max tokens").fill("12")
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Run").click()
    texts = {name: tab.answered(name) for name in ("base", "desk-one")}
    body = {"prompt": "the cat and the dog", "max_tokens": 12, "temperature": 0}
    for name, text in texts.items():
        assert text == api.post("/v1/completions", json=body | {"task": name}).json()["choices"][0]["text"]
    assert texts["base"] != texts["desk-one"]
    facts = tab.column("desk-one").locator(".facts dd").all_text_contents()
    assert re.fullmatch(r"\d+ ms|\d+\.\d\d s", facts[0])
    assert float(facts[1]) > 0
    assert facts[2] == "12"
    assert tab.column("desk-one").locator(".revision").text_content() == revision[:12]

    tab.drop("desk-one", second).get_by_text("desk-one is live").wait_for()
    assert api.get("/v1/tasks/desk-one").json()["revision"] != revision
    tab.task("desk-one").get_by_text("Details").click()
    tab.task("desk-one").get_by_role("button", name="Roll back").click()
    tab.confirm("Roll back")
    tab.task("desk-one").get_by_text(revision[:8], exact=True).wait_for()
    assert api.get("/v1/tasks/desk-one").json()["revision"] == revision

    tab.task("desk-one").get_by_role("button", name=re.compile("^Compare desk-one@")).click()
    page.get_by_role("button", name="Run").click()
    older = page.locator(".column h3").last.text_content()
    assert tab.answered(older) not in (texts["base"], tab.answered("desk-one"))
    assert tab.answered("desk-one") == texts["desk-one"]
    tab.photograph("task")

    refused = tab.upload("desk-one", b"no scale set at all")
    refused.get_by_role("alert").wait_for()
    assert len(refused.get_by_role("alert").text_content()) > 20
    assert api.get("/v1/tasks/desk-one").json()["revision"] == revision

    tab.task("desk-one").get_by_role("button", name="Delete").click()
    tab.confirm("Cancel")
    assert api.get("/v1/tasks/desk-one").status_code == 200
    tab.task("desk-one").get_by_role("button", name="Delete").click()
    tab.confirm("Delete")
    tab.task("desk-one").wait_for(state="detached")
    assert api.get("/v1/tasks/desk-one").status_code == 404
    assert page.locator(".column h3").all_text_contents() == ["base"]

    kept = page.evaluate("[location.href, JSON.stringify(localStorage), document.cookie]")
    assert all(ADMIN not in text for text in kept)
    assert page.evaluate("sessionStorage.getItem('peqa.key')") == ADMIN


def test_the_page_offers_what_the_key_may_do(
    live: Callable[..., Any], visit: Callable[..., Visit], tmp_path: Path
) -> None:
    keys = write_keys(
        tmp_path / "keys.json",
        key("reader", "user", base=False),
        key("writer", "uploader"),
    )
    tasks = StubTasks({"acme-sql": [b"SET one", b"SET two"], "other": [b"SET one"]})
    tab = visit(live(tasks=tasks, settings=ServerSettings(key_file=keys)).url)
    page = tab.open()
    assert page.locator("#upload").is_hidden()
    enter_key(page, text_of("reader"))
    tab.task("acme-sql").wait_for()
    page.locator("#key-button").filter(has_text="Key in use").wait_for()
    assert page.locator("#key-button").get_attribute("title") == "reader, user"
    base = page.get_by_text("The model without a task's scales")
    assert tab.task("other").count() == 0
    base.wait_for(state="hidden")
    page.locator(".column").wait_for(state="detached")
    assert page.locator("#upload").is_hidden()
    tab.task("acme-sql").get_by_text("Details").click()
    row = tab.task("acme-sql")
    row.get_by_role("button", name=re.compile("^Compare acme-sql@")).first.wait_for()
    for name in ("Roll back", "Download", "Delete", "Make current"):
        assert row.get_by_role("button", name=name).count() == 0, name
    moved = page.evaluate_handle(
        "() => { const d = new DataTransfer(); d.items.add(new File(['x'], 'x')); return d }"
    )
    page.dispatch_event("#tasks", "drop", {"dataTransfer": moved})
    assert page.locator("#uploads > li").count() == 0
    tab.photograph("reader")

    page.locator("#key-button").click()
    enter_key(page, text_of("writer"))
    page.locator("#upload").get_by_text("Drop scale sets here").wait_for()
    base.wait_for()
    tab.task("acme-sql").get_by_text("Details").click()
    for name in ("Roll back", "Download", "Delete", "Make"):
        tab.task("acme-sql").get_by_role("button", name=re.compile(f"^{name}")).first.wait_for()
    tab.photograph("writer")

    page.locator("#key-button").click()
    page.get_by_role("button", name="Forget it").click()
    page.get_by_role("dialog").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.locator("#key-button").filter(has_text="Enter a key").wait_for()
    page.locator("#upload").wait_for(state="hidden")

    page.get_by_label("Find a task").fill("acme")  # any call asks, and what the new key may do is shown
    enter_key(page, text_of("writer"))
    page.locator("#upload").get_by_text("Drop scale sets here").wait_for()
    page.locator("#key-button").filter(has_text="Key in use").wait_for()


def test_without_keys_nobody_is_asked_for_one(live: Callable[..., Any], visit: Callable[..., Visit]) -> None:
    tab = visit(live().url)
    page = tab.open()
    page.locator("#upload").get_by_text("Drop scale sets here").wait_for()
    assert page.locator("#key-button").is_hidden()
    page.get_by_label("Prompt").fill("hello")
    for count, said in ((1, "1 token"), (2, "2 tokens")):
        page.get_by_label("Max tokens").fill(str(count))
        page.get_by_role("button", name="Run").click()
        tab.answered("base")
        page.locator("#said").filter(has_text=re.compile(f", {said}$")).wait_for(state="attached")


def test_text_from_outside_is_never_markup(live: Callable[..., Any], visit: Callable[..., Visit]) -> None:
    tasks = StubTasks({HOSTILE: [b"SET one"]}, set_aside={HOSTILE: HOSTILE})
    server = live(engine=StubEngine(lambda request: Script(list(HOSTILE.encode()))), tasks=tasks)
    tab = visit(server.url)
    page = tab.open()
    row = page.locator("#task-list .task").nth(1)
    assert row.locator(".name").text_content() == HOSTILE
    row.get_by_role("checkbox").check()
    page.get_by_label("Prompt").fill(HOSTILE)
    page.get_by_label("Max tokens").fill("100")
    page.get_by_role("button", name="Run").click()
    assert tab.answered("base") == HOSTILE
    tab.column("base").locator(".token").first.hover()
    page.locator("#alternatives").wait_for()
    row.get_by_text("Details").click()
    row.get_by_role("alert").wait_for()  # the server refuses such a name
    tab.upload(HOSTILE, b"no set").get_by_role("alert").wait_for()
    assert page.evaluate("window.hit") is None
    assert page.locator("main img, main script, aside img, aside script, dialog img").count() == 0


def test_the_load_is_asked_for_gently(live: Callable[..., Any], visit: Callable[..., Visit]) -> None:
    tab = visit(live().url)
    tab.page.clock.install()
    asked: list[float] = []
    tab.page.on("requestfinished", lambda request: "/metrics" in request.url and asked.append(1))

    def look(seconds: int) -> int:
        before = len(asked)
        for _ in range(seconds):
            tab.page.clock.run_for(1000)
            tab.page.wait_for_timeout(20)
        return len(asked) - before

    page = tab.open()
    page.locator(".gauge").filter(has_text="KV cache").get_by_text("25 %").wait_for()
    assert 3 <= look(10) <= 8
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    tell = "document.dispatchEvent(new Event('visibilitychange'))"
    page.evaluate(hide % "true" + tell)
    assert look(60) <= 1
    page.evaluate(hide % "false" + tell)
    assert 3 <= look(10) <= 8


def test_finding_one_of_many_tasks(live: Callable[..., Any], visit: Callable[..., Visit]) -> None:
    tasks = StubTasks({f"task-{number:04}": [b"SET one"] for number in range(300)})
    tab = visit(live(tasks=tasks).url)
    page = tab.open()
    tab.task("task-0049").wait_for()
    assert tab.task("task-0050").count() == 0
    page.get_by_role("button", name="Show more").click()
    tab.task("task-0050").wait_for()
    page.get_by_label("Find a task").fill("task-027")
    tab.task("task-0279").wait_for()
    tab.task("task-0000").wait_for(state="detached")
    assert page.locator("#task-list > li").count() == 10
    page.get_by_label("Find a task").fill("nothing")
    page.get_by_text("No task has such a name.").wait_for()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", {"color_scheme": "light"}),
        ("dark", {"color_scheme": "dark"}),
        ("phone", {"viewport": {"width": 360, "height": 740}, "has_touch": True}),
    ],
)
def test_how_it_looks(
    name: str, options: dict[str, Any], live: Callable[..., Any], visit: Callable[..., Visit]
) -> None:
    tasks = StubTasks({"sql": [b"SET one", b"SET two"], "intents": [b"SET one"]})
    tab = visit(live(tasks=tasks).url, **options)
    page = tab.open()
    tab.task("sql").get_by_role("checkbox").check()
    page.get_by_label("Prompt").fill("hello")
    page.get_by_role("button", name="Run").click()
    for column in ("base", "sql"):
        tab.answered(column)
    wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], "the page scrolls sideways"
    ink, ground = (
        page.evaluate(f"getComputedStyle(document.body).{what}") for what in ("color", "backgroundColor")
    )
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, ground)]
    assert (lightness[0] > lightness[1]) is (name == "dark")
    tab.photograph(name)


def test_the_documentation_shows_every_operation(served: str, visit: Callable[..., Visit]) -> None:
    tab = visit(served)
    page = tab.open("/docs")
    page.get_by_label("API key").fill(ADMIN)
    page.get_by_role("button", name="Use").click()
    page.locator(".opblock").first.wait_for()
    paths = httpx.get(f"{served}/openapi.json", headers={"Authorization": f"Bearer {ADMIN}"}).json()["paths"]
    assert page.locator(".opblock").count() == sum(len(operations) for operations in paths.values())
    assert page.locator(".errors-wrapper").count() == 0
    version = page.locator(".opblock").filter(has_text="/version")
    version.get_by_role("button").first.click()
    version.get_by_role("button", name="Execute").click()
    version.get_by_text('"base_digest"').first.wait_for()
    tab.photograph("docs")
