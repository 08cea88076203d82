"""Identities are corrected over HTTP: renamed, merged, split, erased."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.service.conftest import assert_problem, enrol
from tests.service.making import BLUE, GREEN, RED, clip_of


@pytest.fixture
def peopled(client: TestClient) -> TestClient:
    """Two tracklets of p1, one of p2, one of nobody."""
    for tracklet_id, identity, camera, colour in (
        ("a", "p1", "c2", RED),
        ("b", "p1", "c1", RED),
        ("c", "p2", "c1", GREEN),
        ("d", None, None, BLUE),
    ):
        given = {"tracklet_id": tracklet_id, "identity": identity, "camera": camera}
        fields = {name: value for name, value in given.items() if value is not None}
        enrol(client, clip_of(colour), **fields)
    return client


P1 = {"identity": "p1", "tracklets": 2, "cameras": ["c1", "c2"]}
P2 = {"identity": "p2", "tracklets": 1, "cameras": ["c1"]}


def names(client: TestClient) -> list[str]:
    return [one["identity"] for one in client.get("/identities").json()["items"]]


def identity_of(client: TestClient, tracklet_id: str) -> Any:
    return client.get(f"/gallery/{tracklet_id}").json()["identity"]


def test_identities_are_listed_with_their_tracklets_and_cameras(peopled: TestClient) -> None:
    assert peopled.get("/identities").json() == {"items": [P1, P2], "next_cursor": None}
    assert peopled.get("/identities/p1").json() == P1
    assert_problem(peopled.get("/identities/p3"), 404, "not-found")
    assert_problem(peopled.get("/identities/p%20q"), 422, "validation")


def test_identities_come_a_page_at_a_time(peopled: TestClient) -> None:
    first = peopled.get("/identities", params={"limit": 1}).json()
    second = peopled.get("/identities", params={"limit": 1, "cursor": first["next_cursor"]}).json()

    assert (first["items"], second["items"]) == ([P1], [P2])
    assert second["next_cursor"] is None
    foreign = peopled.get("/gallery", params={"limit": 1}).json()["next_cursor"]
    refused = peopled.get("/identities", params={"cursor": foreign})
    assert_problem(refused, 400, "invalid-cursor")


def test_an_identity_is_renamed_but_not_onto_another(peopled: TestClient) -> None:
    answer = peopled.patch("/identities/p1", json={"identity": "anna"})

    assert answer.json() == {**P1, "identity": "anna"}
    assert names(peopled) == ["anna", "p2"]
    assert identity_of(peopled, "a") == "anna"
    matches = peopled.post("/query", files=clip_of(RED)).json()["matches"]
    assert matches[0]["identity"] == "anna"
    onto = peopled.patch("/identities/anna", json={"identity": "p2"})
    assert_problem(onto, 409, "already-exists")
    assert_problem(peopled.patch("/identities/p9", json={"identity": "x"}), 404, "not-found")
    assert_problem(peopled.patch("/identities/p2", json={"identity": "a b"}), 422, "validation")


def test_an_identity_is_merged_into_another(peopled: TestClient) -> None:
    answer = peopled.post("/identities/p2/merge", json={"into": "p1"})

    assert answer.json() == {"identity": "p1", "tracklets": 3, "cameras": ["c1", "c2"]}
    assert names(peopled) == ["p1"]
    into_itself = peopled.post("/identities/p1/merge", json={"into": "p1"})
    assert_problem(into_itself, 422, "validation")
    into_nobody = peopled.post("/identities/p1/merge", json={"into": "p9"})
    assert_problem(into_nobody, 404, "not-found")


def test_tracklets_are_moved_to_an_identity_all_or_none(peopled: TestClient) -> None:
    moved = peopled.post("/identities/p3/tracklets", json={"tracklet_ids": ["b", "d"]})
    refused = peopled.post("/identities/p4/tracklets", json={"tracklet_ids": ["a", "nobody"]})

    assert moved.json() == {"identity": "p3", "changed": 2}
    assert_problem(refused, 404, "not-found")
    assert names(peopled) == ["p1", "p2", "p3"]
    assert [identity_of(peopled, one) for one in "abcd"] == ["p1", "p3", "p2", "p3"]


def test_an_identity_is_erased_with_all_its_tracklets(peopled: TestClient) -> None:
    answer = peopled.delete("/identities/p1")

    assert answer.json() == {"identity": "p1", "tracklets": ["a", "b"]}
    assert names(peopled) == ["p2"]
    for path in ("/gallery/a", "/gallery/b/strip.jpg", "/identities/p1"):
        assert_problem(peopled.get(path), 404, "not-found")
    query = peopled.post("/query", files=clip_of(RED)).json()
    assert {match["identity"] for match in query["matches"]} == {"p2", None}
    assert_problem(peopled.delete("/identities/p1"), 404, "not-found")


def test_a_stored_tracklet_is_compared_with_the_others(peopled: TestClient) -> None:
    answer = peopled.get("/gallery/a/matches", params={"top_k": 2})

    body = answer.json()
    assert [match["tracklet"]["tracklet_id"] for match in body["matches"]] == ["b", "c"]
    assert body["matches"][0]["distance"] == 0
    assert body["searched"] == 3
    assert body["frames"] == peopled.get("/gallery/a").json()["frames"]
    queried = peopled.post("/query", files=clip_of(RED)).json()
    assert body.keys() == queried.keys()
    only = peopled.get("/gallery/a/matches", params={"exclude_camera": "c1"}).json()
    assert [match["tracklet"]["tracklet_id"] for match in only["matches"]] == ["d"]
    assert_problem(peopled.get("/gallery/x/matches"), 404, "not-found")
    explained = peopled.get("/gallery/a/matches", params={"explain": "true"})
    assert_problem(explained, 422, "validation")
