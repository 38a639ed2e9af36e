"""OpenTelemetry traces, when the extra `peqa-serve[otel]` is installed and somebody asks for them.

A request is one server span, with the client's trace as its parent, and in it the spans queue, prefill and decode. They
are made when the request has ended, from the times that are noted anyway, so serving costs nothing more. Attributes
follow OpenTelemetry's conventions for HTTP and generative AI; prompts, answers and stop strings are never recorded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING

from starlette.types import Scope

from peqa_server.observe.access_log import RequestNote

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

FLUSH_SECONDS = 2.0  # at the end of the process, for spans not sent yet
TRACES_PATH = "/v1/traces"
_OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}


class TracingUnavailable(Exception):
    """Traces were asked for but cannot be made; the message says what to install or change."""


def tracing_wanted(endpoint: str | None, environ: Mapping[str, str]) -> bool:
    """Whether an endpoint was given, or OpenTelemetry's own variables name one (and do not switch it off)."""
    if endpoint is not None:
        return True
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporters = {name.strip() for name in environ.get("OTEL_TRACES_EXPORTER", "").split(",")} - {""}
    if exporters:
        return "otlp" in exporters
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return any(environ.get(name) for name in names)


def open_tracer(endpoint: str | None, environ: Mapping[str, str]) -> RequestTracer:
    """A tracer that sends to `endpoint` (a URL; `/v1/traces` is added to a bare host), or where OTEL_… variables say.

    Raises `TracingUnavailable` when the extra is not installed or the protocol is not to be had.
    """
    protocol = (
        environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "http/protobuf"
    )
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from peqa_server.observe.trace_export import ToldExporter

        exporter = ToldExporter(_exporter(endpoint, protocol))
    except ImportError as error:
        extra = "opentelemetry-exporter-otlp-proto-grpc" if protocol == "grpc" else "'peqa-serve[otel]'"
        raise TracingUnavailable(
            f"traces are asked for, but {error.name or 'OpenTelemetry'} is not installed: pip install {extra}, or "
            "take --otlp-traces-endpoint and the OTEL_ variables away (OTEL_SDK_DISABLED=true)"
        ) from None
    facts: dict[str, str] = {SERVICE_VERSION: metadata.version("peqa-serve")}
    if "OTEL_SERVICE_NAME" not in environ and "service.name=" not in environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        facts[SERVICE_NAME] = "peqa"
    provider = TracerProvider(resource=Resource.create(facts), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return RequestTracer(provider)


def _exporter(endpoint: str | None, protocol: str) -> SpanExporter:
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=None if endpoint is None else _with_path(endpoint))
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

        exporter: SpanExporter = OverGrpc(endpoint=endpoint)
        return exporter
    raise TracingUnavailable(f"OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf or grpc, got {protocol!r}")


def _with_path(endpoint: str) -> str:
    scheme, _, rest = endpoint.partition("://")
    if scheme not in ("http", "https") or not rest:
        raise TracingUnavailable(
            f"the traces endpoint must be a URL such as http://collector:4318, got {endpoint[:80]!r}"
        )
    return endpoint if rest.partition("/")[2] else endpoint.rstrip("/") + TRACES_PATH


class RequestTracer:
    """Makes the spans of ended requests. Not registered with OpenTelemetry's globals: each app has its own."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("peqa_server", metadata.version("peqa-serve"))
        self._parents = TraceContextTextMapPropagator()

    def record(self, scope: Scope, note: RequestNote, status: int, route: str) -> None:
        """The spans of one request, which ends now. A status of 500 or more marks the span as failed."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        now = time.perf_counter()
        epoch = time.time_ns() - int(now * 1e9)  # of the clock that the note's times are on
        span = self._tracer.start_span(
            f"{scope['method'][:16]} {route}",
            context=self._parent(scope),
            kind=SpanKind.SERVER,
            start_time=epoch + int(note.received * 1e9),
        )
        if span.is_recording():
            span.set_attributes(_attributes(scope, note, status, route))
            if status >= 500:
                span.set_status(Status(StatusCode.ERROR, note.error_code))
            inside = set_span_in_context(span)
            for name, begin, end in _stages(note, now):
                child = self._tracer.start_span(name, context=inside, start_time=epoch + int(begin * 1e9))
                child.end(epoch + int(end * 1e9))
        span.end(epoch + int(now * 1e9))

    def close(self) -> None:
        """Send what is left, for at most `FLUSH_SECONDS`; a collector that is away must not hold up the end."""
        ending = threading.Thread(target=self._provider.shutdown, name="peqa-traces", daemon=True)
        ending.start()
        ending.join(FLUSH_SECONDS)

    def _parent(self, scope: Scope) -> Context:
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        return self._parents.extract(carrier)


def _stages(note: RequestNote, now: float) -> list[tuple[str, float, float]]:
    """(name, begin, end) of what the request went through, in order; what did not end, ends now."""
    moments = (note.submitted, note.started, note.first_token, note.last_token)
    stages = []
    for name, begin, end in zip(("queue", "prefill", "decode"), moments, moments[1:], strict=False):
        if begin is None:
            break
        stages.append((name, begin, max(begin, now if end is None else end)))
    return stages


def _attributes(
    scope: Scope, note: RequestNote, status: int, route: str
) -> dict[str, str | int | float | list[str]]:
    """Attributes of the request's span; those without a value are left out."""
    operation, params = _OPERATIONS.get(route), note.params
    found: dict[str, object] = {
        "http.request.method": scope["method"][:16],
        "http.route": route,
        "http.response.status_code": status or None,
        "url.scheme": scope.get("scheme"),
        "error.type": note.error_code,
        "peqa.request_id": note.request_id,
        "peqa.key": note.key_id,
        "peqa.task": note.task,
        "peqa.revision": note.revision or None,
        "peqa.change": note.change,
        "peqa.client_gone": note.client_gone or None,
    }
    if operation is not None:
        found |= {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "peqa",
            "gen_ai.request.model": note.model,
            "gen_ai.response.model": note.model,
            "gen_ai.request.choice.count": note.choices,
            "gen_ai.usage.input_tokens": note.prompt_tokens,
            "gen_ai.usage.output_tokens": note.generated_tokens,
            "gen_ai.usage.cache_read.input_tokens": note.cached_tokens,
            "gen_ai.response.finish_reasons": list(note.finish_reasons) or None,
        }
    if operation is not None and params is not None:
        found |= {
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k if params.top_k > 0 else None,
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.frequency_penalty": params.frequency_penalty,
            "gen_ai.request.presence_penalty": params.presence_penalty,
        }
    if note.first_token is not None:
        found["gen_ai.response.time_to_first_chunk"] = note.first_token - note.received
    return {name: value for name, value in found.items() if isinstance(value, str | int | float | list)}
