"""What Prometheus sees: the contract's names, true numbers, and no series of a client's making."""

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from fastapi import FastAPI, Request
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse
from pydantic import SecretStr
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from index.embedded import EmbeddedGallery
from index.gallery import Counts, GalleryUnavailableError
from service import problems
from service.access import KeyMiddleware
from service.keys import KeyRing
from service.logs import note
from service.metrics import DISTANCES, FRAMES, REASONS, STAGE_S, Metrics
from service.middleware import RequestMiddleware
from service.routes import metrics as metrics_routes
from service.settings import LimitSettings
from tests.service.conftest import Start, assert_problem, enrol
from tests.service.making import GOOD, as_frames

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
# The contract's, without their prefix: type and labels.
CONTRACT = {
    "requests": ("counter", {"route", "status"}),
    "request_duration_seconds": ("histogram", {"route"}),
    "requests_in_flight": ("gauge", set()),
    "queue_tracklets": ("gauge", set()),
    "queue_wait_seconds": ("histogram", set()),
    "batch_frames": ("histogram", set()),
    "embed_duration_seconds": ("histogram", set()),
    "decode_duration_seconds": ("histogram", set()),
    "search_duration_seconds": ("histogram", set()),
    "rejected": ("counter", {"reason"}),
    "gallery_tracklets": ("gauge", set()),
    "gallery_identities": ("gauge", set()),
    "nearest_distance": ("histogram", set()),
    "decisions": ("counter", {"decision"}),
    "build_info": ("gauge", {"version", "model"}),
}
# What there is beside them.
FURTHER: dict[str, tuple[str, set[str]]] = {
    "ready": ("gauge", {"part"}),
    "disk_free_bytes": ("gauge", set()),
    "disk_size_bytes": ("gauge", set()),
}


@pytest.fixture
def metrics() -> Metrics:
    """The metrics of an app whose queue, gallery, disk and readiness are watched."""
    made = Metrics(version="1.2.3", model="trsa-fake")
    made.watch(
        queue=lambda: 3, counts=lambda: Counts(tracklets=5, identities=2), data_dir=Path.cwd()
    )
    made.tell_readiness({"worker": "ok", "store": "no"})
    return made


def scrape(metrics: Metrics) -> str:
    text, _ = metrics.expose()
    return text.decode()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """A sample, read as Prometheus reads it; None where there is none."""
    for family in parse(scrape(metrics)):
        for sample in family.samples:
            if sample.name == f"passerby_{name}" and sample.labels == labels:
                return float(sample.value)
    return None


def test_names_types_and_labels_are_the_contracts(metrics: Metrics) -> None:
    metrics.begin_request()
    metrics.end_request("/query", 200, 0.04)

    found = {
        family.name.removeprefix("passerby_"): (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for family in parse(scrape(metrics))
        if family.name.startswith("passerby_")
    }
    assert found == CONTRACT | FURTHER


def test_counters_end_in_total_and_nothing_in_created(metrics: Metrics) -> None:
    metrics.begin_request()
    metrics.end_request("/query", 200, 0.04)

    for text in (scrape(metrics), metrics.expose("application/openmetrics-text")[0].decode()):
        assert 'passerby_requests_total{route="/query",status="200"} 1.0' in text
        assert "_created" not in text


def test_what_runs_is_told(metrics: Metrics) -> None:
    assert value(metrics, "build_info", version="1.2.3", model="trsa-fake") == 1


def test_the_process_is_told_by_its_usual_names(metrics: Metrics) -> None:
    names = {family.name for family in parse(scrape(metrics))}

    assert {"process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds"} <= names


def test_two_apps_in_a_process_count_apart(metrics: Metrics) -> None:
    other = Metrics(version="1.2.3", model="trsa-other")

    metrics.reject("overloaded")

    assert value(metrics, "rejected_total", reason="overloaded") == 1
    assert value(other, "rejected_total", reason="overloaded") == 0


@pytest.mark.parametrize(
    ("name", "observe", "total"),
    [
        ("queue_wait_seconds", lambda one: one.observe_queue_wait(0.25), 0.25),
        ("decode_duration_seconds", lambda one: one.observe_decode(0.5), 0.5),
        ("search_duration_seconds", lambda one: one.observe_search(0.125), 0.125),
        ("embed_duration_seconds", lambda one: one.observe_batch(45, 0.75), 0.75),
        ("batch_frames", lambda one: one.observe_batch(45, 0.75), 45),
        ("nearest_distance", lambda one: one.observe_decision(1.5, None), 1.5),
    ],
)
def test_an_observation_goes_where_its_name_says(
    metrics: Metrics, name: str, observe: Callable[[Metrics], None], total: float
) -> None:
    observe(metrics)

    assert value(metrics, f"{name}_count") == 1
    assert value(metrics, f"{name}_sum") == total


def test_decisions_are_counted_and_none_is_not_one(metrics: Metrics) -> None:
    for nearest, decision in ((0.5, "match"), (1.5, "no_match"), (0.7, "match"), (None, None)):
        metrics.observe_decision(nearest, decision)

    assert value(metrics, "decisions_total", decision="match") == 2
    assert value(metrics, "decisions_total", decision="no_match") == 1
    assert value(metrics, "nearest_distance_count") == 3


def test_every_reason_is_there_before_its_first_refusal(metrics: Metrics) -> None:
    """The rate of a series that begins at 1 misses the refusal that began it."""
    assert {"overloaded", "payload-too-large", "undecodable-frame"} <= set(REASONS)
    assert all(value(metrics, "rejected_total", reason=reason) == 0 for reason in REASONS)


def test_a_reason_that_nobody_knows_makes_no_series(metrics: Metrics) -> None:
    metrics.reject("http-418")

    assert value(metrics, "rejected_total", reason="http-418") is None
    assert value(metrics, "rejected_total", reason="other") == 1


def test_gauges_are_read_when_they_are_asked_for(metrics: Metrics) -> None:
    queue, stored = [0], [Counts(0, 0)]
    metrics.watch(queue=lambda: queue[0], counts=lambda: stored[0])
    queue[0], stored[0] = 7, Counts(tracklets=9, identities=4)

    assert value(metrics, "queue_tracklets") == 7
    assert value(metrics, "gallery_tracklets") == 9
    assert value(metrics, "gallery_identities") == 4


def test_a_gallery_out_of_reach_does_not_end_the_scrape(metrics: Metrics) -> None:
    def fail() -> Counts:
        raise GalleryUnavailableError("closed")

    metrics.watch(queue=lambda: 3, counts=fail)

    assert value(metrics, "gallery_tracklets") is None
    assert value(metrics, "gallery_identities") is None
    assert value(metrics, "queue_tracklets") == 3


def test_each_part_is_ready_or_not(metrics: Metrics) -> None:
    assert value(metrics, "ready", part="worker") == 1
    assert value(metrics, "ready", part="store") == 0


def test_the_disk_is_that_of_the_data_directory(metrics: Metrics, tmp_path: Path) -> None:
    size = value(metrics, "disk_size_bytes")
    metrics.watch(queue=lambda: 0, counts=lambda: Counts(0, 0), data_dir=tmp_path / "not-yet")

    assert size == shutil.disk_usage(Path.cwd()).total
    assert value(metrics, "disk_free_bytes") is None


def test_buckets_tell_apart_what_the_service_is_made_for() -> None:
    """A millisecond from a minute, one default tracklet from two, thresholds of both kinds."""
    assert (STAGE_S[0], STAGE_S[-1]) == (0.001, 60)
    assert (FRAMES[0], FRAMES[-1]) == (1, 512)
    assert bucket(FRAMES, 15) < bucket(FRAMES, 30) < bucket(FRAMES, 60)
    assert bucket(DISTANCES, 0.85) < bucket(DISTANCES, 0.95)
    assert bucket(DISTANCES, 9.1) < bucket(DISTANCES, 11.2)
    assert max(DISTANCES) == 100


def bucket(bounds: tuple[float, ...], amount: float) -> int:
    return sum(amount > bound for bound in bounds)


def test_threads_that_count_at_a_time_lose_nothing(metrics: Metrics) -> None:
    def observe() -> None:
        for _ in range(500):
            metrics.observe_batch(15, 0.01)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert value(metrics, "batch_frames_count") == 2000
    assert value(metrics, "batch_frames_sum") == 30000


def test_who_asks_for_openmetrics_gets_it(metrics: Metrics) -> None:
    asked = "application/openmetrics-text; version=1.0.0; q=0.8, text/plain; q=0.5"

    text, kind = metrics.expose(asked)

    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    parse_strictly: Callable[[str], Iterator[Metric]] = parse_openmetrics
    names = {family.name for family in parse_strictly(text.decode())}
    assert {f"passerby_{name}" for name in CONTRACT if name != "build_info"} <= names


@pytest.mark.parametrize("asked", ["", "*/*", "text/plain;version=1.0.0", "x;version=ä", ",;=,"])
def test_anybody_else_gets_prometheus_own_format(metrics: Metrics, asked: str) -> None:
    assert metrics.expose(asked)[1] == "text/plain; version=0.0.4; charset=utf-8"


def test_the_page_describes_every_metric() -> None:
    page = PAGE.read_text(encoding="utf-8")

    for name, (kind, labels) in (CONTRACT | FURTHER).items():
        shown = f"passerby_{name}" + ("_total" if kind == "counter" else "")
        assert f"`{shown}`" in page
        assert all(f"`{label}`" in page for label in labels)


# Through a small app.


async def all_are_well() -> dict[str, str]:
    return {"worker": "ok"}


@pytest.fixture
def app(metrics: Metrics) -> FastAPI:
    """An app with the middleware, an upload route and a route with a parameter."""
    made = FastAPI()
    made.state.parts = SimpleNamespace(metrics=metrics)
    made.state.readiness = SimpleNamespace(ask=all_are_well)
    made.include_router(metrics_routes.router)
    problems.install(made)

    @made.get("/gallery/{tracklet_id}")
    def get_one(tracklet_id: str) -> str:
        return tracklet_id

    @made.patch("/gallery/{tracklet_id}")
    @made.post("/identities/{identity}/merge")
    @made.post("/query")
    async def refuse(slug: str, status: int) -> JSONResponse:
        note(problem=slug)
        return JSONResponse({}, status)

    @made.post("/embed")
    async def fail() -> None:
        raise RuntimeError("a mistake")

    @made.post("/verify")
    async def read(request: Request) -> int:
        return len(await request.body())

    made.add_middleware(RequestMiddleware, metrics=metrics)
    return made


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    """A client of it."""
    with TestClient(app) as running:
        yield running


def routes_seen(metrics: Metrics) -> set[str]:
    return {
        sample.labels["route"]
        for family in parse(scrape(metrics))
        for sample in family.samples
        if "route" in sample.labels
    }


def test_a_request_is_counted_by_the_template_of_its_route(
    client: TestClient, metrics: Metrics
) -> None:
    client.get("/gallery/one")
    client.get("/gallery/two")

    assert value(metrics, "requests_total", route="/gallery/{tracklet_id}", status="200") == 2
    assert value(metrics, "request_duration_seconds_count", route="/gallery/{tracklet_id}") == 2


def test_no_path_and_no_method_makes_a_series(client: TestClient, metrics: Metrics) -> None:
    for number in range(20):
        client.get(f"/nowhere/{number}")
        client.get(f"/gallery/{number}")
        client.request(f"X{number}", "/gallery/t")
        client.get("/nowhere", headers={"X-Request-ID": str(number)})

    assert routes_seen(metrics) == {"unknown", "/gallery/{tracklet_id}"}
    assert value(metrics, "requests_total", route="unknown", status="404") == 40


def test_a_mistake_is_counted_and_leaves_nothing_in_flight(
    client: TestClient, metrics: Metrics
) -> None:
    assert_problem(client.post("/embed"), 500, "internal-error")

    assert value(metrics, "requests_total", route="/embed", status="500") == 1
    assert value(metrics, "requests_in_flight") == 0


def test_a_scrape_sees_itself_in_flight(client: TestClient) -> None:
    answer = client.get("/metrics")

    assert "passerby_requests_in_flight 1.0" in answer.text


def test_a_client_that_hung_up_is_counted_as_499(app: FastAPI, metrics: Metrics) -> None:
    drive(app, [{"type": "http.disconnect"}])

    assert value(metrics, "requests_total", route="/verify", status="499") == 1
    assert value(metrics, "requests_in_flight") == 0


def drive(app: FastAPI, messages: list[Message]) -> None:
    """Send an upload, message by message."""

    async def receive() -> Message:
        return messages.pop(0)

    async def send(_: Message) -> None:
        pass

    scope: Scope = {
        "type": "http", "method": "POST", "path": "/verify", "headers": [],
        "query_string": b"", "root_path": "",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))


def test_a_request_that_is_cut_off_is_counted_as_it_is_answered(metrics: Metrics) -> None:
    async def hang(_: Scope, __: Receive, ___: Send) -> None:
        raise asyncio.CancelledError

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/query", "headers": []}
    asyncio.run(RequestMiddleware(hang, metrics)(scope, receive, send))

    assert value(metrics, "requests_total", route="unknown", status="503") == 1
    assert value(metrics, "requests_in_flight") == 0


def test_a_refused_upload_is_counted_by_its_problem(client: TestClient, metrics: Metrics) -> None:
    for _ in range(2):
        client.post("/query?slug=overloaded&status=429")

    assert value(metrics, "rejected_total", reason="overloaded") == 2
    assert value(metrics, "rejected_total", reason="validation") == 0


def test_what_is_refused_elsewhere_is_no_rejected_upload(
    client: TestClient, metrics: Metrics
) -> None:
    client.patch("/gallery/t?slug=storage-full&status=507")
    client.post("/identities/p1/merge?slug=storage-full&status=507")

    assert value(metrics, "rejected_total", reason="storage-full") == 0


def test_metrics_need_a_key_where_keys_are_set(app: FastAPI) -> None:
    app.user_middleware.clear()
    app.add_middleware(KeyMiddleware, keys=KeyRing(given=[SecretStr("k")]))
    app.add_middleware(RequestMiddleware)
    client = TestClient(app)

    assert client.get("/metrics", headers={"X-API-Key": "k"}).status_code == 200
    assert_problem(client.get("/metrics"), 401, "unauthenticated")


@pytest.mark.parametrize("kind", ["text/plain", "application/openmetrics-text"])
def test_the_route_answers_in_the_kind_that_is_asked_for(client: TestClient, kind: str) -> None:
    answer: httpx2.Response = client.get("/metrics", headers={"Accept": kind})

    assert answer.headers["content-type"].startswith(f"{kind}; version=")


def test_the_documentation_shows_an_example(client: TestClient) -> None:
    described = client.get("/openapi.json").json()["paths"]["/metrics"]["get"]["responses"]

    assert set(described) == {"200", "401"}
    for kind in ("text/plain", "application/openmetrics-text"):
        example = described["200"]["content"][kind]["example"]
        assert "passerby_requests_total" in example
        assert list(parse(example.removesuffix("# EOF\n")))


# Through the service itself.


def scraped(client: TestClient) -> dict[str, float]:
    """Every sample without labels but the reason's and the part's, by name."""
    return {
        sample.name.removeprefix("passerby_") + "".join(sample.labels.values()): sample.value
        for family in parse(client.get("/metrics").text)
        for sample in family.samples
        if sample.labels.keys() <= {"reason", "part"}
    }


def test_an_enrolment_and_a_query_leave_their_marks(start: Start) -> None:
    client = start(threshold=100.0)
    enrol(client, identity="p1")
    assert client.post("/query", files=GOOD).json()["decision"] == "match"

    found = scraped(client)

    for stage in ("decode_duration_seconds", "queue_wait_seconds", "embed_duration_seconds"):
        assert found[f"{stage}_count"] == 2, stage
    assert found["search_duration_seconds_count"] == found["nearest_distance_count"] == 1
    assert (found["batch_frames_count"], found["batch_frames_sum"]) == (2, 6)
    assert (found["gallery_tracklets"], found["gallery_identities"]) == (1, 1)
    assert (found["queue_tracklets"], found["requests_in_flight"]) == (0, 1)
    assert 'decisions_total{decision="match"} 1.0' in client.get("/metrics").text


def test_uploads_that_the_service_refuses_are_counted_by_their_reason(start: Start) -> None:
    client = start(limits=LimitSettings(request_bytes=100_000))
    client.post("/query", files=as_frames([b"not an image"]))
    client.post("/gallery", files=as_frames([bytes(200_000)]))

    found = scraped(client)

    assert found["rejected_totalunsupported-media"] == 1
    assert found["rejected_totalpayload-too-large"] == 1


def test_a_scrape_of_a_closed_gallery_tells_the_rest(
    start: Start, gallery: EmbeddedGallery
) -> None:
    client = start()
    gallery.close()

    found = scraped(client)

    assert found["readystore"] == 0
    assert found["readyworker"] in (0, 1)  # it may still be warming up
    assert "gallery_tracklets" not in found
    assert found["queue_tracklets"] == 0
