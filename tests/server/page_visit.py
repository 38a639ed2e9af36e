"""A tab of headless Chromium in which the page is used as a person uses it. $PEQA_SCREENSHOTS: where pictures go."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

CHROMIUM = os.environ.get("PEQA_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


class Visit:
    """One tab, and everything that went wrong in it."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url = url
        self.context = browser.new_context(**{"viewport": {"width": 1440, "height": 1000}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.outside: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", self._requested)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _requested(self, request: Any) -> None:
        if not request.url.startswith((self.url + "/", "data:", "blob:")):
            self.outside.append(request.url)

    def _said(self, message: Any) -> None:
        if (
            message.type in ("error", "warning")
            and "the server responded with a status of 4" not in message.text
        ):
            self.complaints.append(message.text)  # a refusal that a test asks for is no fault of the page

    def open(self, path: str = "/") -> Any:
        self.page.goto(self.url + path)
        return self.page

    def task(self, name: str) -> Any:
        return self.page.locator(f'[data-task="{name}"]')

    def column(self, name: str) -> Any:
        return self.page.locator(".column").filter(
            has=self.page.get_by_role("heading", name=name, exact=True)
        )

    def answered(self, name: str, state: str = "Done|Stopped at max tokens") -> str:
        """The text of a column, once its answer is complete."""
        column = self.column(name)
        column.locator(".state").filter(has_text=re.compile(f"^({state})$")).wait_for()
        return str(column.locator(".text").last.text_content())

    def upload(self, name: str, content: bytes) -> Any:
        """Choose a file, and send it; its row."""
        file = {"name": f"{name}.safetensors", "mimeType": "application/octet-stream", "buffer": content}
        self.page.locator("#files").set_input_files(file)
        row = self.page.locator("#uploads > li").first
        row.get_by_role("button", name=re.compile("Upload|Replace")).click()
        return row

    def drop(self, name: str, content: bytes) -> Any:
        """Let a file fall on the page, and send it; its row."""
        make = """([name, bytes]) => {
            const moved = new DataTransfer();
            moved.items.add(new File([new Uint8Array(bytes)], name));
            return moved;
        }"""
        moved = self.page.evaluate_handle(make, [f"{name}.safetensors", list(content)])
        self.page.dispatch_event("#drop", "drop", {"dataTransfer": moved})
        row = self.page.locator("#uploads > li").first
        row.get_by_role("button", name="Replace").click()
        return row

    def confirm(self, button: str) -> None:
        self.page.get_by_role("dialog").get_by_role("button", name=button, exact=True).click()

    def photograph(self, name: str) -> None:
        if folder := os.environ.get("PEQA_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
