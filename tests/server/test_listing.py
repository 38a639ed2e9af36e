"""Lists of thousands of tasks: complete for clients that know no pages, in pages for those that ask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from server_stubs import Live, StubTasks, check_error

COUNT = 777


@pytest.fixture(scope="module")
def many(start: Callable[..., Live]) -> Live:
    tasks = StubTasks()
    for i in range(COUNT):
        tasks.history[f"t{i:04d}"] = [b"SET %d" % i]
    return start(tasks=tasks)


NAMES = [f"t{i:04d}" for i in range(COUNT)]


def test_the_whole_list_comes_without_asking_for_pages(many: Live) -> None:
    listed = many.client.get("/v1/tasks").json()
    assert [row["task"] for row in listed["data"]] == NAMES
    assert (listed["object"], listed["has_more"]) == ("list", False)
    assert [row["task"] for row in listed["unusable"]] == ["foreign"]
    assert "note" not in listed["data"][0], "a list is short; GET /v1/tasks/{task} has the note"
    models = many.client.get("/v1/models").json()
    assert [row["id"] for row in models["data"]] == ["tiny-base", *NAMES]
    assert all(row["object"] == "model" for row in models["data"])


@pytest.mark.parametrize(("path", "key"), [("/v1/tasks", "task"), ("/v1/models", "id")])
@pytest.mark.parametrize("limit", [97, 100, 250, 777, 778, 779, 5000])
def test_pages_make_the_same_list(many: Live, path: str, key: str, limit: int) -> None:
    found, after = [], ""
    for _ in range(20):
        page = many.client.get(path, params={"limit": limit} | ({"after": after} if after else {})).json()
        assert len(page["data"]) <= limit
        found += [row[key] for row in page["data"]]
        if not page["has_more"]:
            break
        assert len(page["data"]) == limit
        after = found[-1]
    assert found == (["tiny-base"] if key == "id" else []) + NAMES


def test_a_page_of_one_model_is_the_base(many: Live) -> None:
    page = many.client.get("/v1/models", params={"limit": 1}).json()
    assert [row["id"] for row in page["data"]] == ["tiny-base"]
    assert page["has_more"]
    page = many.client.get("/v1/models", params={"limit": 2, "after": "tiny-base"}).json()
    assert [row["id"] for row in page["data"]] == NAMES[:2]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=-1", "limit=x", "limit=1e3", "limit=99999999999", "limt=3"]
)
def test_a_wrong_query_is_refused(many: Live, query: str) -> None:
    for path in ("/v1/tasks", "/v1/models"):
        check_error(many.client.get(f"{path}?{query}"), 400)
