"""The page's columns in headless Chromium: they stop, break off, go on as chats, are read with the keyboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from page_visit import Visit
from server_stubs import Script, StubEngine, wait_until

from peqa_runtime.core import Request

pytestmark = pytest.mark.slow


def test_a_stopped_answer_ends_on_the_server_too(
    live: Callable[..., Any], visit: Callable[..., Visit]
) -> None:
    server = live(engine=StubEngine(lambda request: Script(list(b"tick " * 500), delay=0.02)))
    tab = visit(server.url)
    page = tab.open()
    page.get_by_label("Prompt").fill("hello")
    page.get_by_label("Prompt").press("Control+Enter")
    tab.column("base").locator(".token").nth(3).wait_for()
    page.get_by_role("button", name="Stop").click()
    assert len(tab.answered("base", "Stopped")) >= 4
    assert page.evaluate("document.activeElement.id") == "run"
    wait_until(lambda: len(server.engine.cancelled) == 1)
    page.get_by_label("Prompt").press("Control+Enter")
    tab.column("base").locator(".token").nth(3).wait_for()
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Escape")
    tab.answered("base", "Stopped")
    wait_until(lambda: server.idle)


def test_an_answer_that_breaks_off_is_told(live: Callable[..., Any], visit: Callable[..., Visit]) -> None:
    tab = visit(live(engine=StubEngine(lambda request: Script(list(b"tick tock"), dies=True))).url)
    page = tab.open()
    page.get_by_label("Prompt").fill("hello")
    page.get_by_role("button", name="Run").click()
    assert tab.answered("base", "the engine stopped.*") == "tick toc"
    tab.context.set_offline(True)
    page.get_by_role("button", name="Run").click()
    tab.column("base").locator(".state").filter(has_text="the server cannot be reached").wait_for()
    tab.complaints.clear()  # the browser tells of each request that it could not send


def test_a_chat_keeps_its_turns(live: Callable[..., Any], visit: Callable[..., Visit]) -> None:
    prompts: list[str] = []

    def script(request: Request) -> Script:
        prompts.append(bytes(request.prompt_token_ids).decode())
        return Script(list(f"answer {len(prompts)}".encode()))

    server = live(engine=StubEngine(script))
    tab = visit(server.url)
    page = tab.open()
    page.get_by_text("Chat", exact=True).click()
    page.get_by_label("System message").fill("be kind")
    page.get_by_label("Max tokens").fill("30")
    for message in ("first", "second"):
        page.get_by_label("Message", exact=True).fill(message)
        page.get_by_role("button", name="Send").click()
        tab.column("base").get_by_text(f"answer {len(prompts) or 1}").wait_for()
        page.get_by_role("button", name="Send").wait_for()
    assert prompts[0] == "[system]be kind[user]first[assistant]"
    assert prompts[1] == "[system]be kind[user]first[assistant]answer 1[user]second[assistant]"
    page.get_by_role("button", name="New conversation").click()
    assert tab.column("base").locator(".text").count() == 0


def test_keyboard_and_screen_readers(live: Callable[..., Any], visit: Callable[..., Visit]) -> None:
    tab = visit(live().url)
    page = tab.open()
    page.get_by_text("The model without a task's scales").wait_for()
    nameless = page.evaluate(
        """[...document.querySelectorAll("input, textarea, button, summary")].filter(node => node.checkVisibility() &&
            !node.labels?.length && !node.getAttribute("aria-label") && !node.textContent.trim())
            .map(node => node.outerHTML)"""
    )
    assert nameless == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the prompt"
    page.keyboard.press("Enter")
    page.keyboard.type("hello")
    page.keyboard.press("Control+Enter")
    text = tab.answered("base")
    page.locator("#said").filter(has_text="base: ").wait_for(state="attached")
    tab.column("base").locator(".text").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".pointed").text_content() == text[1]
    assert page.locator("#said").text_content().startswith(f"{text[1]} ")
    assert page.locator("#alternatives tr.chosen").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#alternatives").is_visible()
