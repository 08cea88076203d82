"""Every error has an answer, and every answer is a problem."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from index.embedded import EmbeddedGallery
from index.gallery import GalleryError, StorageFullError
from model.errors import ModelError
from service.errors import ServiceError
from service.problems import KINDS, START_ONLY
from tests.service.conftest import FakeEmbedder, Start, assert_problem, enrol
from tests.service.making import GOOD

CONTRACT = {
    400: {"invalid-request", "invalid-cursor"},
    401: {"unauthenticated"},
    403: {"forbidden"},
    404: {"not-found"},
    409: {"already-exists", "model-mismatch"},
    413: {"payload-too-large", "too-many-frames"},
    415: {"unsupported-media"},
    422: {"validation", "undecodable-frame", "no-usable-frames"},
    429: {"overloaded"},
    503: {"not-ready", "worker-unavailable", "gallery-unavailable"},
    504: {"deadline-exceeded"},
    507: {"storage-full"},
}


def children(error: type[Exception]) -> Iterator[type[Exception]]:
    """All subclasses, theirs included; a module's own have the status of their base."""
    for child in error.__subclasses__():
        if not child.__name__.startswith("_"):
            yield child
        yield from children(child)


@pytest.mark.parametrize("base", [GalleryError, ModelError, ServiceError])
def test_every_error_has_a_status(base: type[Exception]) -> None:
    """A new error cannot ship without someone choosing what a client sees."""
    missing = set(children(base)) - KINDS.keys() - START_ONLY

    assert missing == set()


def test_no_error_is_both_answered_and_of_the_start_only() -> None:
    assert KINDS.keys() & START_ONLY == set()


def test_the_kinds_are_those_of_the_contract() -> None:
    kinds: dict[int, set[str]] = {}
    for kind in KINDS.values():
        if kind.status != 500:
            kinds.setdefault(kind.status, set()).add(kind.slug)

    assert kinds == CONTRACT


def test_an_unknown_route_is_a_problem(client: TestClient) -> None:
    assert_problem(client.get("/nowhere"), 404, "not-found")


@pytest.mark.parametrize(("method", "path"), [("PUT", "/gallery"), ("GET", "/query")])
def test_a_wrong_method_is_a_problem(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, path)

    assert_problem(answer, 405, "method-not-allowed")
    assert "POST" in answer.headers["allow"]


def test_a_bug_in_a_route_is_a_problem_without_its_trace(
    client: TestClient, gallery: EmbeddedGallery, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(_: str) -> None:
        raise RuntimeError("secret path /var/lib/passerby")

    monkeypatch.setattr(gallery, "get", fail)
    answer = client.get("/gallery/t", headers={"X-Request-ID": "find-me"})

    body = assert_problem(answer, 500, "internal-error")
    [record] = [one for one in caplog.records if one.levelname == "ERROR"]
    assert "secret" not in answer.text
    assert body["request_id"] == "find-me"
    assert record.exc_info is not None


def test_a_bug_in_the_gallery_leaves_the_service_running(
    client: TestClient, gallery: EmbeddedGallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(gallery, "add", fail)
        assert_problem(client.post("/gallery", files=GOOD), 500, "internal-error")
    with monkeypatch.context() as patch:
        patch.setattr(gallery, "search", fail)
        assert_problem(client.post("/query", files=GOOD), 500, "internal-error")

    assert client.get("/gallery").json()["items"] == []
    enrol(client)


def test_a_bug_in_the_embedder_fails_the_tracklet_alone(
    client: TestClient, embedder: FakeEmbedder
) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("secret detail")

    embedder.refuse = fail
    answer = client.post("/gallery", files=GOOD)
    embedder.refuse = lambda _: None

    assert_problem(answer, 503, "worker-unavailable")
    assert "secret" not in answer.text
    assert client.get("/gallery").json()["items"] == []
    enrol(client)


def test_a_full_disk_has_its_own_status(
    client: TestClient, gallery: EmbeddedGallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise StorageFullError("no room for a write")

    monkeypatch.setattr(gallery, "add", fail)

    assert_problem(client.post("/gallery", files=GOOD), 507, "storage-full")


def test_a_problem_does_not_list_more_than_a_client_can_use(client: TestClient) -> None:
    enrol(client, tracklet_id="t")

    answer = client.patch("/gallery/t", json={f"f{number}": 1 for number in range(5000)})

    assert_problem(answer, 422, "validation")
    assert len(answer.content) < 10_000


def test_a_problem_can_carry_any_name_from_the_request(client: TestClient) -> None:
    """Half of a surrogate pair is JSON when escaped, and nothing that UTF-8 can carry."""
    enrol(client, tracklet_id="t")

    headers = {"Content-Type": "application/json"}
    answer = client.patch("/gallery/t", content=b'{"\\ud800": 1}', headers=headers)

    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


def test_the_values_of_a_bad_request_are_not_repeated(start: Start) -> None:
    answer = start().post("/gallery", files=GOOD, data={"identity": "Jane Doe, 4 High St"})

    assert "Jane" not in assert_problem(answer, 422, "validation")["detail"]
    assert "Jane" not in answer.text
