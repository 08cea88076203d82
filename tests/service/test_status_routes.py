"""How the service is, what it is, and what its documentation says of it."""

import pytest
from starlette.testclient import TestClient

from index.embedded import EmbeddedGallery
from index.gallery import StorageFullError
from tests.service.conftest import FakeEmbedder, Start, assert_problem, enrol
from tests.service.making import GOOD

ROUTES = {
    ("post", "/gallery"),
    ("get", "/gallery"),
    ("get", "/gallery/{tracklet_id}"),
    ("patch", "/gallery/{tracklet_id}"),
    ("delete", "/gallery/{tracklet_id}"),
    ("get", "/gallery/{tracklet_id}/strip.jpg"),
    ("post", "/query"),
    ("post", "/embed"),
    ("get", "/info"),
    ("get", "/livez"),
    ("get", "/readyz"),
}


def test_info_says_what_runs_and_what_it_takes(client: TestClient) -> None:
    enrol(client, identity="p1")
    enrol(client)

    info = client.get("/info").json()

    assert info["model"]["fingerprint"] == "trsa-fake"
    assert info["gallery"] == {
        "tracklets": 2, "identities": 1, "model": "trsa-fake", "index": "Flat"
    }  # fmt: skip
    assert info["limits"]["frames"] == 512
    assert info["limits"]["file_bytes"] == 16 * 2**20
    assert info["limits"]["request_bytes"] == 64 * 2**20
    assert info["limits"]["frame_pixels"] == 40_000_000
    assert info["limits"]["side_pixels"] == 8
    assert info["version"]


def test_info_keeps_the_keys_to_itself(start: Start) -> None:
    client = start(api_keys=("hush-hush",))

    answer = client.get("/info", headers={"X-API-Key": "hush-hush"})

    assert answer.status_code == 200
    assert "hush" not in answer.text


def test_a_ready_service_says_so(client: TestClient) -> None:
    client.post("/embed", files=GOOD)  # answered by a worker that is warm

    answer = client.get("/readyz")

    assert answer.status_code == 200
    parts = ("service", "worker", "decoders", "store")
    assert answer.json()["checks"] == dict.fromkeys(parts, "ok")


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_a_probe_may_ask_for_the_head_alone(start: Start, path: str) -> None:
    answer = start().head(path)

    assert answer.status_code == 200
    assert answer.content == b""


def test_a_service_that_warms_up_is_alive_but_not_ready(
    start: Start, embedder: FakeEmbedder
) -> None:
    embedder.warm_gate.clear()
    client = start()

    answer = client.get("/readyz")
    alive = client.get("/livez")
    embedder.warm_gate.set()

    body = assert_problem(answer, 503, "not-ready")
    assert "worker: the embedding worker is warming up" in body["detail"]
    assert answer.headers["retry-after"].isdigit()
    assert alive.status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_could_not_warm_up_is_not_ready(
    start: Start, embedder: FakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise SystemExit

    monkeypatch.setattr(embedder, "warm_up", fail)
    client = start()

    answer = client.post("/embed", files=GOOD)

    assert_problem(answer, 503, "worker-unavailable")
    assert answer.headers["retry-after"].isdigit()
    assert "worker" in assert_problem(client.get("/readyz"), 503, "not-ready")["detail"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_worker_is_not_ready(client: TestClient, embedder: FakeEmbedder) -> None:
    """A dead worker behind a green health check is the most hated bug of embedding servers."""

    def die(_: object) -> None:
        raise SystemExit

    embedder.refuse = die
    in_flight = client.post("/embed", files=GOOD)
    later = client.post("/embed", files=GOOD)

    assert_problem(in_flight, 503, "worker-unavailable")
    assert_problem(later, 503, "worker-unavailable")
    detail = assert_problem(client.get("/readyz"), 503, "not-ready")["detail"]
    assert "worker" in detail
    assert "store" not in detail
    assert client.get("/livez").status_code == 200


def test_a_closed_gallery_is_not_ready(client: TestClient, gallery: EmbeddedGallery) -> None:
    client.post("/embed", files=GOOD)
    gallery.close()

    detail = assert_problem(client.get("/readyz"), 503, "not-ready")["detail"]

    assert "store" in detail
    assert "worker" not in detail
    assert client.get("/livez").status_code == 200


def test_a_full_disk_is_named_and_the_service_is_ready_again_once_there_is_room(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        raise StorageFullError("cannot write the gallery: the disk is full")

    client.post("/embed", files=GOOD)
    with monkeypatch.context() as full:
        readiness = client.app.state.readiness  # type: ignore[attr-defined]
        full.setattr(readiness._questions["store"], "_check", fail)
        detail = assert_problem(client.get("/readyz"), 503, "not-ready")["detail"]
        assert client.post("/query", files=GOOD).status_code == 200

    assert detail == "store: cannot write the gallery: the disk is full"
    assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/gallery"), ("GET", "/gallery/t"), ("DELETE", "/gallery/t"), ("GET", "/info"),
     ("POST", "/gallery"), ("POST", "/query"), ("GET", "/gallery/t/strip.jpg")],
)  # fmt: skip
def test_a_closed_gallery_is_unavailable(
    client: TestClient, gallery: EmbeddedGallery, method: str, path: str
) -> None:
    gallery.close()

    answer = client.request(method, path, files=GOOD if method == "POST" else None)

    assert_problem(answer, 503, "gallery-unavailable")
    assert answer.headers["retry-after"].isdigit()


def test_a_browser_is_sent_somewhere_useful(client: TestClient) -> None:
    answer = client.get("/")

    assert answer.status_code == 200
    assert "html" in answer.headers["content-type"]
    assert client.get("/docs").status_code == 200


def test_every_route_is_documented(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]

    documented = {(method, path) for path, methods in paths.items() for method in methods}
    assert documented >= ROUTES


@pytest.mark.parametrize("path", ["/gallery", "/query", "/embed"])
def test_uploads_are_documented_as_forms(client: TestClient, path: str) -> None:
    route = client.get("/openapi.json").json()["paths"][path]["post"]

    content = route["requestBody"]["content"]
    assert content.keys() == {"multipart/form-data"}
    assert content["multipart/form-data"]["schema"]["properties"].keys() >= {
        "frames", "archive", "video"
    }  # fmt: skip


def test_the_enrolment_form_documents_its_fields(client: TestClient) -> None:
    route = client.get("/openapi.json").json()["paths"]["/gallery"]["post"]

    schema = route["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert schema["properties"].keys() == {
        "frames", "archive", "video", "identity", "camera", "tracklet_id", "start_time",
        "end_time", "metadata", "expires_at",
    }  # fmt: skip


def test_limits_of_parameters_are_documented(client: TestClient) -> None:
    route = client.get("/openapi.json").json()["paths"]["/query"]["post"]

    schemas = {one["name"]: one["schema"] for one in route["parameters"]}
    assert (schemas["top_k"]["minimum"], schemas["top_k"]["maximum"]) == (1, 500)
    assert schemas["top_k"]["default"] == 10
    assert schemas["group_by"]["enum"] == ["identity", "tracklet"]
    assert schemas["camera"]["type"] == "array"


def test_problems_are_documented_with_their_media_type(client: TestClient) -> None:
    responses = client.get("/openapi.json").json()["paths"]["/gallery"]["post"]["responses"]

    for status in ("400", "409", "413", "415", "422", "429", "503", "504", "507"):
        assert "application/problem+json" in responses[status]["content"], status
