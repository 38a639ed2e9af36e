"""Traces by OpenTelemetry's own in-memory exporter, and over the wire to a collector of the test's."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from server_stubs import MANIFEST, ByteTokenizer, Script, StubEngine, StubTasks, wait_until

from peqa_server.app import create_loading_app
from peqa_server.observe.trace_export import ToldExporter
from peqa_server.observe.tracing import RequestTracer, TracingUnavailable, open_tracer, tracing_wanted
from peqa_server.services import ServedModel, Services

MODEL = ServedModel(MANIFEST, ByteTokenizer(), max_model_len=200, vocab_size=257)
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traced:
    """A server over stubs whose spans stay in memory."""

    def __init__(self, run_app: Any, tmp_path: Any) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.engine, self.tasks = StubEngine(), StubTasks()
        self.tasks.upload("sql", b"SET sql one")
        app = create_loading_app(tracer=RequestTracer(provider))
        url, loop = run_app(app)
        self.client = httpx.Client(base_url=url, timeout=10)
        loop.call_soon_threadsafe(app.state.gate.open, Services(self.engine, self.tasks, MODEL, tmp_path))
        wait_until(lambda: self.client.get("/ready").status_code == 200)

    def spans(self, number: int) -> list[Any]:
        """The spans so far, the request's last: a request's spans end just after its answer."""
        wait_until(lambda: len(self.exporter.get_finished_spans()) >= number)
        found = list(self.exporter.get_finished_spans())
        assert len(found) == number, [span.name for span in found]
        return found


@pytest.fixture
def traced(run_app: Any, tmp_path: Any) -> Traced:
    return Traced(run_app, tmp_path)


def test_a_request_is_a_span_with_three_stages(traced: Traced) -> None:
    traced.engine.script = lambda r: Script([97] * 4, delay=0.02, queued=0.05, cached=1)
    body = {
        "prompt": "my secret",
        "task": "sql",
        "max_tokens": 4,
        "temperature": 0.5,
        "stop": ["hush"],
        "seed": 7,
    }
    answer = traced.client.post(
        "/v1/completions", json=body, headers={"traceparent": PARENT, "x-request-id": "q"}
    )
    queue, prefill, decode, request = traced.spans(4)
    assert [span.name for span in (queue, prefill, decode)] == ["queue", "prefill", "decode"]
    assert (request.name, request.kind) == ("POST /v1/completions", SpanKind.SERVER)
    assert f"{request.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{request.parent.span_id:016x}" == PARENT.split("-")[2]
    assert request.parent.is_remote
    for stage in (queue, prefill, decode):
        assert stage.parent.span_id == request.context.span_id
        assert request.start_time <= stage.start_time <= stage.end_time <= request.end_time
    assert queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time
    assert 0.045e9 < queue.end_time - queue.start_time < 0.3e9
    assert 0.055e9 < decode.end_time - decode.start_time < 0.5e9
    found = dict(request.attributes)
    assert found["gen_ai.operation.name"] == "text_completion"
    assert found["gen_ai.request.model"] == "tiny-base"
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (9, 4)
    assert found["gen_ai.usage.cache_read.input_tokens"] == 1
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert (found["gen_ai.request.temperature"], found["gen_ai.request.seed"]) == (0.5, 7)
    assert (found["peqa.task"], found["peqa.revision"]) == ("sql", answer.json()["revision"])
    assert (found["peqa.request_id"], found["http.response.status_code"]) == ("q", 200)
    assert found["gen_ai.response.time_to_first_chunk"] > 0.06
    text = answer.json()["choices"][0]["text"]
    for hidden in ("my secret", "hush", text):
        assert hidden not in str([span.to_json() for span in traced.exporter.get_finished_spans()])


def test_without_a_parent_a_trace_begins(traced: Traced) -> None:
    for header in ({}, {"traceparent": "nonsense"}, {"traceparent": PARENT.replace("00-", "ff-", 1)}):
        traced.exporter.clear()
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        traced.client.post("/v1/chat/completions", json=body, headers=header)
        request = traced.spans(4)[-1]
        assert request.parent is None
        assert request.attributes["gen_ai.operation.name"] == "chat"


def test_an_unsampled_parent_makes_no_spans(traced: Traced) -> None:
    traced.client.get("/v1/models", headers={"traceparent": PARENT[:-1] + "0"})
    traced.client.get("/v1/models")
    assert traced.spans(1)[0].parent is None


def test_refusals_uploads_and_failures(traced: Traced) -> None:
    traced.client.post("/v1/completions", json={"prompt": "x", "task": "nope"})
    (refused,) = traced.spans(1)
    assert (refused.attributes["error.type"], refused.status.status_code) == (
        "task_not_found",
        StatusCode.UNSET,
    )
    traced.exporter.clear()
    traced.client.put("/v1/tasks/new", content=b"SET new")
    (upload,) = traced.spans(1)
    assert (upload.name, upload.attributes["peqa.change"]) == ("PUT /v1/tasks/{task:path}", "upload")
    assert "gen_ai.operation.name" not in upload.attributes
    traced.exporter.clear()
    traced.engine.script = lambda r: Script([97], error="NaN in the logits of this request")
    traced.client.post("/v1/completions", json={"prompt": "x"})
    failed = traced.spans(3)[-1]
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.attributes["gen_ai.response.finish_reasons"] == ("error",)


def test_probes_and_scrapes_make_no_spans(traced: Traced) -> None:
    for path in ("/health", "/ready", "/metrics"):
        traced.client.get(path)
    traced.client.get("/no/such/route")
    assert traced.spans(1)[0].name == "GET unmatched", "and no path becomes a name"


@pytest.mark.parametrize(
    ("endpoint", "environ", "wanted"),
    [
        (None, {}, False),
        ("http://c:4318", {}, True),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/x"}, True),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        (None, {"OTEL_TRACES_EXPORTER": "otlp"}, True),
        (None, {"OTEL_SERVICE_NAME": "x"}, False),
    ],
)
def test_who_asks_for_traces(endpoint: str | None, environ: dict[str, str], wanted: bool) -> None:
    assert tracing_wanted(endpoint, environ) is wanted


def test_a_missing_extra_is_said_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(TracingUnavailable, match=r"pip install 'peqa-serve\[otel\]'"):
        open_tracer("http://127.0.0.1:4318", {})


@pytest.mark.parametrize(
    ("endpoint", "environ", "said"),
    [
        ("collector:4318", {}, "must be a URL"),
        ("http://c", {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "http/protobuf or grpc"),
        ("http://c", {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "opentelemetry-exporter-otlp-proto-grpc"),
    ],
)
def test_what_cannot_be_done_is_said(
    endpoint: str, environ: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(TracingUnavailable, match=said):
        open_tracer(endpoint, environ)


def test_nothing_is_imported_unless_asked() -> None:
    code = (
        "import sys, peqa_server.app, peqa_server.observe.tracing; "
        "assert not {'opentelemetry.sdk', 'opentelemetry.exporter'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """An OTLP collector that keeps what it gets."""
    got: list[tuple[str, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()


def test_spans_reach_a_collector(collector: Any, run_app: Any, tmp_path: Any) -> None:
    endpoint, got = collector
    tracer = open_tracer(endpoint, {})
    app = create_loading_app(tracer=tracer)
    url, _ = run_app(app)
    with httpx.Client(base_url=url) as client:
        for _ in range(
            2
        ):  # a span is made when its answer is out: by the second answer the first one's is there
            assert client.get("/v1/models").status_code == 503
    tracer.close()
    (path, body), *_ = got
    assert path == "/v1/traces"
    assert b"GET /v1/models" in body
    assert b"service.name" in body
    assert b"peqa" in body


def test_a_collector_that_is_away_is_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    class Away(InMemorySpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.FAILURE

    now = [0.0]
    exporter = ToldExporter(Away(), clock=lambda: now[0])
    spans: list[Any] = [None, None]
    with caplog.at_level("WARNING", logger="peqa.server"):
        for now[0] in (0.0, 5.0, 59.0, 61.0):
            assert exporter.export(spans) is SpanExportResult.FAILURE
    records: list[Any] = caplog.records
    assert [record.fields["lost_spans"] for record in records] == [2, 6]
    assert "cannot be sent" in records[0].getMessage()
