"""Ask who a tracklet shows, against distances worked out by brute force."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.service.conftest import FakeEmbedder, Start, assert_problem, enrol
from tests.service.making import BLUE, GOOD, GREEN, GREY, RED, Colour, clip_of, picture

PEOPLE: list[tuple[str, str | None, str | None, str | None, Colour]] = [
    ("a", "p1", "c1", "2026-01-01T00:00:00Z", (200, 30, 30)),
    ("b", "p1", "c2", "2026-01-02T00:00:00Z", (100, 30, 30)),
    ("c", "p2", "c1", "2026-01-03T00:00:00Z", (180, 40, 30)),
    ("d", None, "c2", None, (190, 60, 30)),
    ("e", None, None, "2026-01-04T00:00:00Z", (30, 50, 200)),
]


def distance(one: Colour, other: Colour) -> float:
    """Euclidean distance of two clips of one colour, through JPEG: 8 cells of 3 means."""
    means = [
        np.asarray(Image.open(io.BytesIO(picture(colour)))).astype(float).mean(axis=(0, 1))
        for colour in (one, other)
    ]
    return float(np.sqrt(8 * ((means[0] - means[1]) ** 2).sum()))


@pytest.fixture
def peopled(client: TestClient) -> TestClient:
    """A client of a gallery with people in it."""
    return people(client)


def people(client: TestClient) -> TestClient:
    for tracklet_id, identity, camera, start_time, colour in PEOPLE:
        given = {"identity": identity, "camera": camera, "start_time": start_time}
        fields = {name: value for name, value in given.items() if value is not None}
        enrol(client, clip_of(colour), tracklet_id=tracklet_id, **fields)
    return client


def ask(client: TestClient, colour: Colour = RED, **parameters: Any) -> dict[str, Any]:
    answer = client.post("/query", files=clip_of(colour), params=parameters)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def found(answer: dict[str, Any]) -> str:
    return "".join(match["tracklet"]["tracklet_id"] for match in answer["matches"])


def test_an_answer_has_the_shape_of_the_contract(peopled: TestClient) -> None:
    answer = ask(peopled)

    assert answer.keys() == {
        "matches", "decision", "threshold", "searched", "model", "frames", "quality", "timing_ms"
    }  # fmt: skip
    assert answer["frames"] == {"received": 1, "used": 1}
    assert answer["model"] == "trsa-fake"
    assert answer["timing_ms"].keys() == {"decode", "queue", "embed", "search", "total"}
    assert all(value >= 0 for value in answer["timing_ms"].values())
    assert answer["matches"][0].keys() == {"rank", "identity", "distance", "tracklet"}
    assert answer["matches"][0]["tracklet"] == peopled.get("/gallery/a").json()


def test_identities_are_ranked_by_their_nearest_tracklet(peopled: TestClient) -> None:
    matches = ask(peopled)["matches"]

    assert [(match["rank"], match["identity"]) for match in matches] == [
        (1, "p1"), (2, "p2"), (3, None), (4, None)
    ]  # fmt: skip
    assert [match["tracklet"]["tracklet_id"] for match in matches] == ["a", "c", "d", "e"]
    expected = [distance(RED, colour) for name, *_, colour in PEOPLE if name != "b"]
    assert [match["distance"] for match in matches] == pytest.approx(expected, abs=1e-3)


def test_tracklets_are_ranked_one_by_one(peopled: TestClient) -> None:
    matches = ask(peopled, group_by="tracklet")["matches"]

    order = sorted(PEOPLE, key=lambda person: distance(RED, person[-1]))
    assert [match["tracklet"]["tracklet_id"] for match in matches] == [one[0] for one in order]
    assert [match["rank"] for match in matches] == [1, 2, 3, 4, 5]


def test_ties_are_broken_by_tracklet_id(client: TestClient) -> None:
    for tracklet_id in ("b", "a", "C", "10", "2"):
        enrol(client, tracklet_id=tracklet_id)

    answer = ask(client)

    assert found(answer) == "".join(sorted(("b", "a", "C", "10", "2")))
    assert {match["distance"] for match in answer["matches"]} == {0.0}


@pytest.mark.parametrize(
    ("parameters", "expected", "searched"),
    [
        ({"top_k": 1}, "a", 5),
        ({"top_k": 2}, "ac", 5),
        ({"top_k": 500}, "acde", 5),
        ({"camera": "c1"}, "ac", 2),
        ({"camera": "c2"}, "db", 2),
        ({"camera": ["c1", "c2"]}, "acd", 4),
        ({"camera": "nowhere"}, "", 0),
        ({"exclude_camera": "c1"}, "dbe", 3),
        ({"exclude_camera": ["c1", "c2"]}, "e", 1),
        ({"camera": ["c1", "c2"], "exclude_camera": "c2"}, "ac", 2),
        ({"since": "2026-01-02T00:00:00Z"}, "cbe", 3),
        ({"until": "2026-01-02T02:00:00+02:00"}, "a", 2),
        ({"since": "2026-01-03T00:00:00Z", "until": "2026-01-03T00:00:00Z"}, "c", 1),
        ({"max_distance": 0}, "a", 5),
        ({"max_distance": 70}, "ac", 5),
        ({"top_k": 2, "group_by": "tracklet", "camera": "c2"}, "db", 2),
    ],
    ids=repr,
)
def test_parameters_choose_what_is_found(
    peopled: TestClient, parameters: dict[str, Any], expected: str, searched: int
) -> None:
    answer = ask(peopled, **parameters)

    assert found(answer) == expected
    assert answer["searched"] == searched


def test_an_empty_gallery_finds_nobody(client: TestClient) -> None:
    answer = ask(client)

    assert answer["matches"] == []
    assert answer["searched"] == 0
    assert answer["decision"] is None


@pytest.mark.parametrize(
    ("threshold", "colour", "decision"),
    [(0.0, (200, 30, 30), "match"), (10.0, GREY, "no_match"), (1e6, GREY, "match")],
)
def test_the_threshold_decides(
    start: Start, threshold: float, colour: Colour, decision: str
) -> None:
    answer = ask(people(start(threshold=threshold)), colour)

    assert answer["decision"] == decision
    assert answer["threshold"] == threshold


def test_the_decision_is_by_the_nearest_whatever_max_distance_hides(start: Start) -> None:
    answer = ask(people(start(threshold=1e6)), GREY, max_distance=1)

    assert (answer["matches"], answer["decision"]) == ([], "match")


def test_an_empty_gallery_is_no_match_where_a_threshold_is_set(start: Start) -> None:
    assert ask(start(threshold=5))["decision"] == "no_match"


def test_no_decision_without_a_threshold(peopled: TestClient) -> None:
    answer = ask(peopled)

    assert (answer["decision"], answer["threshold"]) == (None, None)


def test_explain_maps_the_used_frames(client: TestClient) -> None:
    answer = client.post("/query", files=clip_of(*[RED] * 40), params={"explain": "true"}).json()

    maps = np.array([one["map"] for one in answer["attention"]])
    used = [one["frame"] for one in answer["attention"]]
    assert maps.shape == (15, 16, 8)
    assert maps.sum(axis=(1, 2)) == pytest.approx(np.ones(15))
    assert used == [int((part + 0.5) * 40 / 15) for part in range(15)]


def test_no_maps_without_explain(client: TestClient) -> None:
    assert "attention" not in client.post("/query", files=GOOD).json()


@pytest.mark.parametrize(
    "parameters",
    [{"top_k": 0}, {"top_k": 501}, {"top_k": "many"}, {"top_k": 1.5}, {"max_distance": "nan"},
     {"max_distance": "inf"}, {"max_distance": "-inf"}, {"max_distance": -1},
     {"max_distance": "1e400"}, {"group_by": "camera"}, {"explain": "perhaps"}, {"topk": 3},
     {"identity": "p1"}, {"camera": "a/b"}, {"camera": "c" * 65}, {"exclude_camera": ""},
     {"since": "2026-01-01T00:00:00"}, {"until": "1700000000"},
     {"since": "0001-01-01T00:00:00+14:00"}],
    ids=repr,
)  # fmt: skip
def test_bad_parameters_are_refused(
    client: TestClient, embedder: FakeEmbedder, parameters: dict[str, Any]
) -> None:
    answer = client.post("/query", files=GOOD, params=parameters)

    body = assert_problem(answer, 422, "validation")
    assert next(iter(parameters)) in body["errors"][0]["pointer"]
    assert embedder.batches == []


def test_a_query_stores_nothing(client: TestClient) -> None:
    client.post("/query", files=GOOD)
    client.post("/embed", files=GOOD)

    assert client.get("/gallery").json()["items"] == []


def test_an_embedding_can_be_taken_along(client: TestClient, embedder: FakeEmbedder) -> None:
    answer = client.post("/embed", files=clip_of(RED, GREEN, BLUE))

    body = answer.json()
    clip = embedder.clips[0].astype(float)
    first_cell = clip[:, :16, :16].mean(axis=(0, 1, 2))
    assert answer.status_code == 200
    assert body["dim"] == len(body["embedding"]) == 24
    assert body["embedding"][:3] == pytest.approx(first_cell.tolist(), rel=1e-5)
    assert body["model"] == "trsa-fake"
    assert body["frames"] == {"received": 3, "used": 3}


def test_parameters_are_refused_where_none_are_read(client: TestClient) -> None:
    answer = client.post("/embed", params={"top_k": 3}, files=GOOD)

    assert_problem(answer, 422, "validation")


@pytest.mark.parametrize("path", ["/embed", "/query", "/gallery"])
def test_an_embedding_that_is_not_finite_is_our_mistake(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """JSON would carry NaN as null, with status 200."""

    def broken(_: Any) -> Any:
        return np.full(24, np.nan, dtype=np.float32)

    monkeypatch.setattr("tests.service.conftest.mean_colours", broken)
    answer = client.post(path, files=GOOD)

    assert_problem(answer, 500, "internal-error")
    assert client.get("/gallery").json()["items"] == []


def test_with_sampling_all_every_frame_is_used(start: Start) -> None:
    answer = start(sampling="all").post("/embed", files=clip_of(*[RED] * 40)).json()

    assert answer["frames"] == {"received": 40, "used": 40}
