"""Traces: what spans a request makes, what they say, and that nobody pays who wants none."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from index.embedded import EmbeddedGallery
from model.frames import Clip
from service.app import create_app
from service.settings import InvalidSettingsError, Settings
from service.tracing import ENDPOINT, Tracing
from tests.service.conftest import FakeEmbedder
from tests.service.making import GOOD

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter() -> Any:
    """Keeps what would be sent."""
    memory = pytest.importorskip(
        "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="needs the extra otel"
    )
    return memory.InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: Any) -> Tracing:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider)


@pytest.fixture
def spans(
    tracing: Tracing, exporter: Any, embedder: FakeEmbedder, gallery: EmbeddedGallery
) -> Callable[..., dict[str, Any]]:
    """Ask, and get the finished spans by name."""
    app = create_app(embedder, gallery, Settings(), tracing=tracing)

    def ask(method: str, path: str, **more: Any) -> dict[str, Any]:
        with TestClient(app) as client:
            client.request(method, path, **more)
            return {span.name: span for span in exporter.get_finished_spans()}

    return ask


def test_a_query_is_a_span_with_one_for_each_stage(spans: Callable[..., dict[str, Any]]) -> None:
    made = spans("POST", "/query", files=GOOD, headers={"X-Request-ID": "q1"})

    whole = made["POST /query"]
    assert set(made) == {"POST /query", "decode", "queue", "embed", "search"}
    assert whole.attributes == {
        "http.request.method": "POST",
        "http.route": "/query",
        "http.response.status_code": 200,
        "passerby.request_id": "q1",
    }
    for name in ("decode", "queue", "embed", "search"):
        assert made[name].parent.span_id == whole.context.span_id
        assert whole.start_time <= made[name].start_time <= made[name].end_time <= whole.end_time
    assert made["decode"].end_time <= made["queue"].end_time <= made["embed"].start_time + 1


def test_a_trace_goes_on_where_the_caller_has_begun_one(
    spans: Callable[..., dict[str, Any]],
) -> None:
    made = spans("GET", "/gallery", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})

    span = made["GET /gallery"]
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT


def test_a_span_names_nobody(spans: Callable[..., dict[str, Any]]) -> None:
    """Paths hold identities."""
    made = spans("GET", "/identities/somebody-known?limit=7")

    [span] = made.values()
    assert span.name == "GET /identities/{identity}"
    assert "somebody" not in span.to_json()


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_probes_and_scrapes_make_no_spans(spans: Callable[..., dict[str, Any]], path: str) -> None:
    assert spans("GET", path) == {}


def test_the_log_says_which_trace_a_request_belongs_to(
    spans: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="passerby.request"):
        made = spans("GET", "/gallery")

    [line] = [record for record in caplog.records if record.name == "passerby.request"]
    trace_id = made["GET /gallery"].context.trace_id
    assert vars(line)["trace_id"] == f"{trace_id:032x}"


def test_a_mistake_of_ours_is_an_error_in_its_span(
    spans: Callable[..., dict[str, Any]], embedder: FakeEmbedder
) -> None:
    def fail(_: Clip) -> None:
        raise RuntimeError("a mistake")

    embedder.refuse = fail

    made = spans("POST", "/gallery", files=GOOD)

    assert made["POST /gallery"].attributes["http.response.status_code"] >= 500
    assert made["POST /gallery"].status.status_code.name == "ERROR"


def test_no_traces_are_made_where_nobody_collects_them() -> None:
    assert Tracing.of(Settings(), {}) is None


@pytest.mark.parametrize(
    ("settings", "environment"),
    [(Settings(otlp_endpoint="http://127.0.0.1:1"), {}), (Settings(), {ENDPOINT: "http://x:1"})],
)
def test_a_collector_without_the_extra_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, environment: dict[str, str]
) -> None:
    """Who asks for traces must not be left without them silently."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)

    with pytest.raises(InvalidSettingsError, match="otel"):
        Tracing.of(settings, environment)


def test_a_collector_that_is_away_stops_neither_start_nor_end() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")

    tracing = Tracing.of(Settings(otlp_endpoint="http://127.0.0.1:9"), {})

    assert tracing is not None
    tracing.close()
