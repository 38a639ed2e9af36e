"""The page's files as they are served: public, from this host alone, under a policy that lets nothing else in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from server_stubs import check_error

from peqa_server.page.routes import ASSETS, PUBLIC_PATHS
from peqa_server.settings import ServerSettings

OURS = [asset for asset in ASSETS if asset.file.name not in ("swagger-ui.css", "swagger-ui-bundle.js")]


@pytest.mark.parametrize("asset", ASSETS, ids=lambda asset: asset.path)
def test_every_file_is_served_whole_and_under_its_policy(server: Any, asset: Any) -> None:
    answer = server.client.get(asset.path)
    assert answer.status_code == 200
    assert answer.content == asset.file.read_bytes()
    assert answer.headers["content-type"] == asset.media_type
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    again = server.client.get(asset.path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert "content-security-policy" in again.headers


@pytest.mark.parametrize("asset", OURS, ids=lambda asset: asset.path)
def test_our_files_name_no_other_host_and_no_inline_script(asset: Any) -> None:
    text = asset.file.read_text()
    hosts = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}[^\s\"']*", text))
    assert hosts <= {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
    )
    if asset.file.name.endswith(".html"):
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)|javascript:", text)


def test_every_reference_of_a_file_is_served() -> None:
    for asset in OURS:
        text = asset.file.read_text()
        found = re.findall(r'(?:src|href)="(?!#)([^"]+)"|from "\./([^"]+)"', text)
        paths = {"/" + page.removeprefix("./") if page else f"/page/{module}" for page, module in found}
        assert paths <= PUBLIC_PATHS, asset.path


def test_no_file_beside_them_is_served(server: Any) -> None:
    for path in ("/page", "/page/", "/page/index.html", "/page/../app.py", "/page/%2e%2e/app.py", "/docs/"):
        check_error(server.client.get(path), 404)
    check_error(server.client.post("/"), 405)


def test_with_keys_the_files_are_public_and_what_they_ask_for_is_not(live: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    keys.chmod(0o600)
    server = live(settings=ServerSettings(key_file=keys))
    for path in sorted(PUBLIC_PATHS):
        assert server.client.get(path).status_code == 200, path
    for path in ("/v1/tasks", "/metrics", "/version", "/openapi.json"):
        check_error(server.client.get(path), 401)
        assert server.client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
