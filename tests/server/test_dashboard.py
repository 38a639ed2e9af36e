"""Every query of the dashboard and the alerts names metrics and labels that the server has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/peqa.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())

_KEYWORDS = frozenset(
    {"and", "or", "unless", "bool", "offset", "on", "ignoring", "group_left", "group_right"}
)
_FROM_PROMETHEUS = {"up": {"job", "instance"}}


def metrics_of(query: str) -> Iterator[tuple[str, set[str]]]:
    """Every metric in a PromQL expression, with the labels that it is selected by."""
    selectors = r"([a-zA-Z_:][\w:]*)\s*(?:\{([^}]*)\})?"
    bare = re.sub(r"\b(by|without)\s*\([^)]*\)", " ", query)
    bare = re.sub(r"\[[^\]]*\]", " ", bare)
    for name, inside in re.findall(selectors, re.sub(r"[a-z_0-9]+\s*\((?=)", "(", bare)):
        if name not in _KEYWORDS:
            yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', inside)))


def grouped_by(query: str) -> set[str]:
    return {
        label for group in re.findall(r"\bby\s*\(([^)]*)\)", query) for label in re.split(r"[,\s]+", group)
    } - {""}


def test_the_reader_of_queries_finds_what_is_there() -> None:
    query = 'histogram_quantile(0.9, sum by (le, task) (rate(a_bucket{x="}",y=~"$z"}[5m]))) > 0.2 * b and c'
    assert list(metrics_of(query.replace('"}"', '"k"'))) == [
        ("a_bucket", {"x", "y"}),
        ("b", set()),
        ("c", set()),
    ]
    assert grouped_by(query) == {"le", "task"}


def queries() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield f"panel {panel['title']}", target["expr"]
    for note in DASHBOARD["annotations"]["list"]:
        yield f"annotation {note['name']}", note["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["definition"]
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]


@pytest.fixture
def served(server: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Names of the samples in /metrics, with their labels, of a server that has done a little of everything."""
    from prometheus_client.parser import text_string_to_metric_families

    from peqa_server.observe.engine_metrics import HELP

    monkeypatch.setattr(server.engine, "stats", lambda: dict.fromkeys(HELP, 1.0))
    server.complete(task="sql", max_tokens=3)
    server.client.put("/v1/tasks/new", content=b"SET")
    server.error(404, prompt="x", task="nope")
    monkeypatch.setattr(server.engine, "running", {server.engine.requests[-1].request_id})
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


UNITS = ("seconds", "bytes", "tokens", "choices")


def test_names_are_as_prometheus_wants_them(server: Any, served: dict[str, set[str]]) -> None:
    """Its rules (prometheus.io/docs/practices/naming): `_total` on counters alone, base units, at a histogram's end."""
    kinds: dict[str, set[str]] = {}
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            kinds.setdefault(kind, set()).add(name)
    assert set(kinds) == {"counter", "gauge", "histogram"}
    assert len(kinds["counter"]) > 30
    assert all(name.endswith("_total") for name in kinds["counter"])
    assert not any(name.endswith(("_total", "_count", "_sum", "_bucket")) for name in kinds["gauge"])
    assert all(name.rsplit("_", 1)[1] in UNITS for name in kinds["histogram"])
    named = set().union(*kinds.values())
    assert not [name for name in named if name.endswith("_created")]


@pytest.mark.parametrize(("where", "query"), queries(), ids=lambda value: str(value)[:40])
def test_every_query_names_metrics_and_labels_that_exist(
    where: str, query: str, served: dict[str, set[str]]
) -> None:
    definition = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
    wanted = {definition[2]} if definition else grouped_by(query)
    found = list(metrics_of(definition[1] if definition else query))
    assert found, where
    known: set[str] = {"job", "instance"}
    for name, labels in found:
        has = _FROM_PROMETHEUS.get(name) or served.get(name)
        assert has is not None, f"{where}: there is no metric {name}"
        known |= has
        assert labels <= has | {"job", "instance"}, f"{where}: {name} has no label {labels - has}"
    assert wanted <= known, f"{where}: nothing has the label {wanted - known}"


def test_panels_have_a_place_of_their_own() -> None:
    cells: set[tuple[int, int]] = set()
    ids = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own
        ids.add(panel["id"])
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["description"]
    assert len(ids) == len(DASHBOARD["panels"])


def test_alerts_say_what_to_do() -> None:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert set(rule["annotations"]) == {"summary", "action"}


OPERATING = (DEPLOY.parent / "docs" / "operating.md").read_text()


def test_the_manual_names_metrics_that_exist(served: dict[str, set[str]]) -> None:
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in served}
    named = set(re.findall(r"`(peqa_[a-z_]+)`", OPERATING))
    assert len(named) > 30
    assert named <= families, f"the manual names {named - families}"
    short = re.findall(r"`(peqa_[a-z_]+)`((?:, `_[a-z_]+`)+)", OPERATING)
    assert len(short) >= 5
    for first, rest in short:
        for ending in re.findall(r"`(_[a-z_]+)`", rest):
            parts = first.split("_")
            assert any("_".join(parts[:n]) + ending in families for n in range(1, len(parts))), (
                first,
                ending,
            )


def test_the_manual_lists_every_name_of_vllms(live: Any) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    from peqa_server.observe.engine_metrics import HELP
    from peqa_server.settings import ServerSettings

    server = live(settings=ServerSettings(metrics_compat="vllm"))
    server.engine.stats = lambda: dict.fromkeys(HELP, 1.0)
    text = server.client.get("/metrics").text
    there = {
        family.name for family in text_string_to_metric_families(text) if family.name.startswith("vllm:")
    }
    paragraph = OPERATING.partition("**vLLM's names.**")[2].partition("Left out")[0]
    listed = {f"vllm:{name}" for name in re.findall(r"`([a-z0-9_]+)`", paragraph)} - {
        "vllm:model_name",
        "vllm:engine",
    }
    assert listed == there


def test_the_manual_explains_every_field_of_a_request() -> None:
    source = (DEPLOY.parent / "server" / "observe" / "access_log.py").read_text()
    call = source.partition("def _log_line")[2].partition("def _ms")[0]
    fields = set(re.findall(r"^        (\w+)=", call, re.M)) - {"said"}
    assert len(fields) > 10
    table = OPERATING.partition("| field of a request |")[2].partition("`/health`")[0]
    assert fields <= set(re.findall(r"`(\w+)`", table))
