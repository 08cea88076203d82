"""Traces for an OpenTelemetry collector: a span for each request, and for each stage of it.

Nothing here is done, and nothing imported, where no collector is named. Spans hold the route, the
status and the request's id: no path, because names of people may be in it.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.logs import listen_to_notes, note, request_id
from service.settings import InvalidSettingsError, Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
# A request's notes that say how long a stage took, in the order of the stages.
STAGES = {"decode_ms": "decode", "queue_ms": "queue", "embed_ms": "embed", "search_ms": "search"}
UNTRACED_PATHS = frozenset({"/livez", "/readyz", "/metrics"})  # asked every few seconds
# Seconds that the end of the service waits for spans to reach the collector.
FLUSH_S = 2.0


class Tracing:
    """Makes the spans of one app.

    Args:
        provider: Of OpenTelemetry's SDK; says where spans go.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._kind = SpanKind.SERVER
        self._provider = provider
        self._tracer = provider.get_tracer("passerby", version("passerby"))
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def of(cls, settings: Settings, environment: Mapping[str, str] = os.environ) -> Self | None:
        """What the settings ask for; None where they name no collector.

        Args:
            settings: Of the service.
            environment: Where OpenTelemetry's own variables are, which count, too.

        Raises:
            InvalidSettingsError: A collector is named and the extra `otel` is not installed.
        """
        if settings.otlp_endpoint is None and not environment.get(ENDPOINT):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise InvalidSettingsError(
                "PASSERBY_OTLP_ENDPOINT: expected the extra `otel` (pip install 'passerby[otel]'), "
                "got an installation without it"
            ) from error
        # Without an endpoint of ours the exporter reads OpenTelemetry's own variables.
        exporter = (
            OTLPSpanExporter()
            if settings.otlp_endpoint is None
            else OTLPSpanExporter(endpoint=f"{settings.otlp_endpoint.rstrip('/')}/v1/traces")
        )
        named = {"service.name": "passerby", "service.version": version("passerby")}
        if environment.get("OTEL_SERVICE_NAME"):
            del named["service.name"]
        provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def begin(self, scope: Scope) -> "RequestSpan":
        """Begin the span of a request, under the caller's where it names one."""
        headers = {
            name.decode("latin-1"): text.decode("latin-1") for name, text in scope["headers"]
        }
        span = self._tracer.start_span(
            scope["method"],
            context=self._propagator.extract(headers),
            kind=self._kind,
            attributes={
                "http.request.method": scope["method"],
                "passerby.request_id": request_id.get() or "",
            },
        )
        return RequestSpan(self._tracer, span)

    def close(self) -> None:
        """Send what is left, within 2 s; a collector that hangs is not waited for."""
        flushing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        flushing.start()
        flushing.join(FLUSH_S)
        if flushing.is_alive():
            log.warning("the last traces have not reached the collector")


class RequestSpan:
    """The span of a request under way.

    Args:
        tracer: Makes those of its stages.
        span: Its own.
    """

    def __init__(self, tracer: Any, span: Any) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer, self._span = tracer, span
        self._context = set_span_in_context(span)

    @property
    def trace_id(self) -> str:
        """As a collector shows it."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def hear(self, fields: Mapping[str, object]) -> None:
        """Make spans of the stages that have just ended, the last of them now.

        Args:
            fields: What is noted of the request, see `STAGES`.
        """
        end_ns = time.time_ns()
        for field in reversed([one for one in STAGES if one in fields]):
            took_ms = fields[field]
            if not isinstance(took_ms, float | int):
                continue
            start_ns = end_ns - round(took_ms * 1e6)
            span = self._tracer.start_span(
                STAGES[field], context=self._context, start_time=start_ns
            )
            span.end(end_ns)
            end_ns = start_ns

    def end(self, route: str | None, status: int) -> None:
        """End it.

        Args:
            route: Template of the route that answered; None where none did.
            status: HTTP status; 0 where there was no answer.
        """
        from opentelemetry.trace import StatusCode

        if route is not None:
            self._span.update_name(f"{self._span.attributes['http.request.method']} {route}")
            self._span.set_attribute("http.route", route)
        if status:
            self._span.set_attribute("http.response.status_code", status)
        if status == 0 or status >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class TracingMiddleware:
    """Makes a span of each request but probes and scrapes, and notes its trace in the log.

    Args:
        app: What is behind it.
        tracing: Makes spans.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http" or scope["path"] in UNTRACED_PATHS:
            await self._app(scope, receive, send)
            return
        span = self._tracing.begin(scope)
        note(trace_id=span.trace_id)
        listen_to_notes(span.hear)
        status = 0

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        finally:
            span.end(getattr(scope.get("route"), "path", None), status)
