"""OpenTelemetry traces, an optional extra: one span for every request that asked for tokens, sent over OTLP/HTTP in the background.

Owns the span's names, which are those of OpenTelemetry's conventions for generative AI (times in the queue and to the first token: vLLM's). Imports
OpenTelemetry only when a tracer is made. Spans are made of finished records, so a stream costs nothing while it runs.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from miniinfer.config import ConfigError
from miniinfer.serve.record import Record

_EXTRA = "otlp_endpoint: needs OpenTelemetry, which is not installed: pip install 'miniinfer[otel]'"


def check(endpoint: str) -> None:
    """ConfigError if spans cannot be sent there; asked before a model is loaded."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"otlp_endpoint: expected http://host:port or https://..., got {endpoint!r}")
    try:
        found = find_spec("opentelemetry.sdk") and find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:  # of a package around them
        found = None
    if not found:
        raise ConfigError(_EXTRA)


class Tracer:
    """A sink of records that makes spans of them. `exporter`: tests bring their own."""

    def __init__(self, endpoint: str, exporter: Any = None) -> None:
        """`endpoint`: the collector; without a path, spans go to its /v1/traces."""
        check(endpoint)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if urlsplit(endpoint).path in ("", "/"):
            endpoint = endpoint.rstrip("/") + "/v1/traces"
        self._provider = TracerProvider(resource=Resource.create({"service.name": "miniinfer"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("miniinfer")
        self._extract = TraceContextTextMapPropagator().extract
        self._kind, self._failed = SpanKind.SERVER, Status(StatusCode.ERROR)

    def __call__(self, record: Record) -> None:
        if record.answer_id is None:
            return
        carrier = {"traceparent": record.traceparent, "tracestate": record.tracestate}
        context = self._extract({name: value for name, value in carrier.items() if value is not None})
        operation = "chat" if record.path.endswith(("/chat/completions", "/messages", "/chat", "/responses")) else "text_completion"
        span = self._tracer.start_span(f"{operation} {record.model}", context, self._kind, _attributes(record, operation), start_time=record.wall)
        if record.status >= 500 or record.error:
            span.set_status(self._failed)
        span.end(record.wall + round(record.seconds * 1e9))

    def shutdown(self) -> None:
        """Sends what is waiting. Also done when the process exits."""
        self._provider.shutdown()


def _attributes(record: Record, operation: str) -> dict[str, Any]:
    params = record.params
    values: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "miniinfer",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.response.id": record.answer_id,
        "gen_ai.response.finish_reasons": record.finish_reasons,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.latency.time_in_queue": record.queued,
        "gen_ai.latency.time_to_first_token": record.first_token,
        "gen_ai.latency.e2e": record.seconds,
        "gen_ai.request.id": record.request_id,
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "url.path": record.path,
        "client.address": record.client,
        "error.type": record.error or (str(record.status) if record.status >= 400 else None),
    }
    if params is not None:
        values |= {
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.choice.count": params.n,
        }
    return {name: value for name, value in values.items() if value is not None}
