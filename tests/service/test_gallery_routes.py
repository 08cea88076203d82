"""Stored tracklets: enrol, list, read, change, erase."""

import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from index.embedded import EmbeddedGallery
from index.gallery import NotFoundError
from model.frames import choose_frames
from service import schemas
from service.settings import LimitSettings
from tests.service.conftest import FakeEmbedder, Start, assert_problem, assert_refused, enrol
from tests.service.making import (
    BLUE,
    GOOD,
    GREEN,
    RED,
    as_frames,
    as_video,
    clip_of,
    picture,
    video,
)


def test_a_record_has_the_shape_of_the_contract(client: TestClient) -> None:
    record = enrol(
        client,
        identity="p17",
        camera="c2",
        tracklet_id="a:b.c-1_2",
        start_time="2026-11-22T13:00:00+02:00",
        end_time="2026-11-22T11:00:05Z",
        metadata='{"gate": 4}',
    )

    created = datetime.fromisoformat(record.pop("created_at"))
    assert len(record.pop("content")) == 64
    assert record.pop("quality").keys() == {
        "frames", "shortest_side", "sharpness", "brightness", "frame_distance"
    }  # fmt: skip
    assert abs((datetime.now(UTC) - created).total_seconds()) < 60
    assert record == {
        "tracklet_id": "a:b.c-1_2",
        "identity": "p17",
        "camera": "c2",
        "start_time": "2026-11-22T11:00:00Z",
        "end_time": "2026-11-22T11:00:05Z",
        "metadata": {"gate": 4},
        "frames": {"received": 3, "used": 3},
        "model": "trsa-fake",
        "expires_at": None,
    }


def test_everything_but_the_upload_is_optional(client: TestClient) -> None:
    record = enrol(client)

    assert re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{26}", record["tracklet_id"])
    optional = ("identity", "camera", "start_time", "end_time")
    assert [record[name] for name in optional] == [None] * 4
    assert record["metadata"] == {}


def test_fields_left_blank_in_a_form_are_not_given(client: TestClient) -> None:
    assert enrol(client, identity="", metadata="")["identity"] is None


def test_an_enrolment_says_where_it_is(client: TestClient) -> None:
    answer = client.post("/gallery", files=GOOD, data={"tracklet_id": "t1"})

    assert answer.headers["location"] == "/gallery/t1"
    assert client.get(answer.headers["location"]).json() == answer.json()


def test_an_acknowledged_enrolment_is_found_at_once(client: TestClient) -> None:
    record = enrol(client, identity="p1")

    matches = client.post("/query", files=GOOD).json()["matches"]

    assert [match["tracklet"] for match in matches] == [record]


def test_the_same_again_answers_what_is_stored(client: TestClient, embedder: FakeEmbedder) -> None:
    first = enrol(client, tracklet_id="t1", identity="p1")

    again = client.post("/gallery", files=GOOD, data={"tracklet_id": "t1", "identity": "p1"})

    assert again.status_code == 200
    assert again.json() == first
    assert again.headers["location"] == "/gallery/t1"
    assert len(embedder.batches) == 1  # nothing was embedded for it


@pytest.mark.parametrize(
    ("colours", "fields"),
    [((RED, RED, BLUE), {}), ((RED, RED), {}), ((RED, RED, RED), {"identity": "p2"})],
    ids=["frames", "fewer", "fields"],
)
def test_the_same_id_with_other_content_is_refused(
    client: TestClient, colours: Any, fields: dict[str, str]
) -> None:
    first = enrol(client, tracklet_id="t1")

    answer = client.post("/gallery", files=clip_of(*colours), data={"tracklet_id": "t1", **fields})

    assert_problem(answer, 409, "already-exists")
    assert client.get("/gallery").json()["items"] == [first]


def test_the_same_again_after_a_change_answers_the_changed_record(client: TestClient) -> None:
    """A retried enrolment must not undo what was corrected meanwhile."""
    enrol(client, tracklet_id="t1", identity="p1")
    changed = client.patch("/gallery/t1", json={"identity": "p2"}).json()

    again = client.post("/gallery", files=GOOD, data={"tracklet_id": "t1", "identity": "p1"})

    assert again.status_code == 200
    assert again.json() == changed


def test_the_same_enrolment_twice_at_once_is_stored_once(
    client: TestClient, embedder: FakeEmbedder
) -> None:
    embedder.gate.clear()

    def send() -> Any:
        return client.post("/gallery", files=GOOD, data={"tracklet_id": "t1"})

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(send) for _ in range(4)]
        assert embedder.entered.wait(20)
        embedder.gate.set()
        answers = [one.result() for one in running]

    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 201]
    assert len({answer.text for answer in answers}) == 1
    assert len(client.get("/gallery").json()["items"]) == 1


def test_the_same_id_twice_at_once_with_other_content_is_refused_once(
    client: TestClient, embedder: FakeEmbedder
) -> None:
    embedder.gate.clear()

    def send(colour: Any) -> int:
        files = clip_of(colour)
        return client.post("/gallery", files=files, data={"tracklet_id": "t1"}).status_code

    with ThreadPoolExecutor(2) as pool:
        running = pool.map(send, [RED, BLUE])
        assert embedder.entered.wait(20)
        embedder.gate.set()

        assert sorted(running) == [201, 409]


BAD_FIELDS = [
    {"tracklet_id": "a/b"},
    {"tracklet_id": "x" * 129},
    {"tracklet_id": "a b"},
    {"tracklet_id": "a\n"},
    {"tracklet_id": "ä"},
    {"identity": "x" * 129},
    {"identity": "a/b"},
    {"camera": "x" * 65},
    {"start_time": "2026-11-22T12:00:00"},
    {"start_time": "2026-11-22"},
    {"start_time": "yesterday"},
    {"start_time": "1700000000"},
    {"start_time": "0001-01-01T00:00:00+14:00"},
    {"end_time": "9999-12-31T23:59:59-14:00"},
    {"start_time": "2026-11-22T12:00:00Z", "end_time": "2026-11-22T11:59:59Z"},
    {"metadata": "[1]"},
    {"metadata": '"text"'},
    {"metadata": "null"},
    {"metadata": "{"},
    {"metadata": '{"a": NaN}'},
    {"metadata": '{"a": -Infinity}'},
    {"metadata": '{"a": 1e999}'},
    {"metadata": '{"a": "\\ud800"}'},
    {"metadata": '{"\\udfff": 1}'},
    {"metadata": '{"a":' * 40 + "1" + "}" * 40},
    {"metadata": '{"a":' + "[" * 6000 + "]" * 6000 + "}"},
    {"metadata": '{"a": ' + "9" * 5000 + "}"},
]


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=lambda fields: repr(fields)[:50])
def test_a_bad_field_is_refused(client: TestClient, fields: dict[str, str]) -> None:
    answer = client.post("/gallery", files=GOOD, data=fields)

    assert_refused(client, answer, 422, "validation")


def test_limits_of_fields_are_inclusive(client: TestClient) -> None:
    record = enrol(client, tracklet_id="t" * 128, identity="p" * 128, camera="c" * 64)

    assert client.get(f"/gallery/{'t' * 128}").json() == record


def test_metadata_over_its_limit_is_refused(client: TestClient) -> None:
    fits = json.dumps({"a": "x" * (16 * 1024 - 9)})
    enrol(client, metadata=fits, tracklet_id="fits")
    client.delete("/gallery/fits")

    answer = client.post("/gallery", files=GOOD, data={"metadata": fits.replace("xx", "xxx", 1)})

    assert_refused(client, answer, 413, "payload-too-large")


def test_metadata_far_over_its_limit_is_refused(client: TestClient) -> None:
    metadata = json.dumps({"a": "x" * 1_000_000})

    answer = client.post("/gallery", files=GOOD, data={"metadata": metadata})

    assert_refused(client, answer, 413, "payload-too-large")


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": [1, 2.5, None, True, {"b": "ü 漢 😀 \u0000 \u2028"}]},
        {"": 0},
        {"n": 10**40},
        {"f": 1e-7},
    ],
)
def test_metadata_comes_back_as_it_went(client: TestClient, metadata: dict[str, Any]) -> None:
    record = enrol(client, metadata=json.dumps(metadata))

    assert record["metadata"] == metadata
    assert client.get("/gallery").json()["items"][0]["metadata"] == metadata


def test_unknown_query_parameters_are_refused_at_enrolment(client: TestClient) -> None:
    """``POST /gallery?identity=p1`` would otherwise store the tracklet without its name."""
    answer = client.post("/gallery?identity=p1", files=GOOD)

    assert_refused(client, answer, 422, "validation")


def enrol_many(client: TestClient, count: int) -> list[str]:
    return [enrol(client, clip_of(RED), tracklet_id=f"t{n}")["tracklet_id"] for n in range(count)]


@pytest.mark.parametrize("limit", [1, 3, 7, 8, 1000])
def test_pages_hold_everything_once_and_in_order(client: TestClient, limit: int) -> None:
    ids = enrol_many(client, 7)
    seen: list[str] = []
    cursor = None

    for _ in range(10):
        parameters = {"limit": limit} | ({"cursor": cursor} if cursor else {})
        page = client.get("/gallery", params=parameters).json()
        assert len(page["items"]) <= limit
        seen += [record["tracklet_id"] for record in page["items"]]
        if (cursor := page["next_cursor"]) is None:
            break

    assert seen == ids
    assert cursor is None


def test_paging_goes_on_past_what_was_erased_meanwhile(client: TestClient) -> None:
    enrol_many(client, 4)
    page = client.get("/gallery", params={"limit": 2}).json()
    client.delete("/gallery/t1")
    client.delete("/gallery/t2")

    rest = client.get("/gallery", params={"cursor": page["next_cursor"]}).json()

    assert [record["tracklet_id"] for record in rest["items"]] == ["t3"]


@pytest.mark.parametrize("cursor", ["", "x", "ü", "YWZ0ZXItMTow", "0", "\x00", "A" * 200])
def test_an_invalid_cursor_is_refused(client: TestClient, cursor: str) -> None:
    answer = client.get("/gallery", params={"cursor": cursor})

    assert_problem(answer, 400, "invalid-cursor")


@pytest.mark.parametrize(
    "parameters",
    [{"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"colour": "red"}, {"since": "2026-01-01"},
     {"until": "1700000000"}, {"identity": "a/b"}, {"camera": "c" * 65}, {"unnamed": "perhaps"},
     {"since": "0001-01-01T00:00:00+14:00"}],
    ids=repr,
)  # fmt: skip
def test_bad_list_parameters_are_refused(client: TestClient, parameters: dict[str, Any]) -> None:
    assert_problem(client.get("/gallery", params=parameters), 422, "validation")


@pytest.fixture
def peopled(client: TestClient) -> TestClient:
    """A client of a gallery with four tracklets."""
    enrol(client, tracklet_id="a", identity="p1", camera="c1", start_time="2026-01-01T00:00:00Z")
    enrol(client, tracklet_id="b", identity="p1", camera="c2", start_time="2026-01-02T00:00:00Z")
    enrol(client, tracklet_id="c", identity="p2", camera="c1", start_time="2026-01-03T00:00:00Z")
    enrol(client, tracklet_id="d", camera="c2")
    return client


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, "abcd"),
        ({"identity": "p1"}, "ab"),
        ({"identity": "nobody"}, ""),
        ({"camera": "c1"}, "ac"),
        ({"camera": "c1", "identity": "p1"}, "a"),
        ({"unnamed": "true"}, "d"),
        ({"since": "2026-01-02T00:00:00Z"}, "bc"),
        ({"until": "2026-01-02T00:00:00Z"}, "ab"),
        ({"since": "2026-01-02T01:00:00+02:00", "until": "2026-01-02T00:00:00Z"}, "b"),
    ],
)
def test_filters_of_a_listing(
    peopled: TestClient, parameters: dict[str, str], expected: str
) -> None:
    items = peopled.get("/gallery", params=parameters).json()["items"]

    assert "".join(record["tracklet_id"] for record in items) == expected


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
def test_an_unknown_tracklet_is_not_found(client: TestClient, method: str) -> None:
    answer = client.request(method, "/gallery/nobody", json={} if method == "PATCH" else None)

    assert_problem(answer, 404, "not-found")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_id_out_of_the_alphabet_is_refused(client: TestClient, method: str) -> None:
    assert_problem(client.request(method, "/gallery/a%20b"), 422, "validation")
    assert_problem(client.request(method, f"/gallery/{'x' * 129}"), 422, "validation")
    assert_problem(client.request(method, "/gallery/a%2Fb"), 404, "not-found")


def test_a_patch_changes_what_it_names_and_nothing_else(client: TestClient) -> None:
    before = enrol(client, tracklet_id="t", identity="p1", camera="c1", metadata='{"a": 1}')

    after = client.patch("/gallery/t", json={"identity": "p2"}).json()

    assert after == before | {"identity": "p2"}
    assert client.get("/gallery/t").json() == after


@pytest.mark.parametrize("name", ["identity", "camera", "start_time", "end_time"])
def test_null_removes(client: TestClient, name: str) -> None:
    time = "2026-01-01T00:00:00Z"
    enrol(client, tracklet_id="t", identity="p", camera="c", start_time=time, end_time=time)

    after = client.patch("/gallery/t", json={name: None}).json()

    assert after[name] is None


def test_null_metadata_becomes_an_empty_object(client: TestClient) -> None:
    enrol(client, tracklet_id="t", metadata='{"a": 1}')

    assert client.patch("/gallery/t", json={"metadata": None}).json()["metadata"] == {}


def test_metadata_is_merged_deeply(client: TestClient) -> None:
    """RFC 7396: objects merge, null removes, everything else replaces."""
    before = {"keep": 1, "drop": 2, "deep": {"keep": [1], "drop": 0, "list": [1, 2]}}
    enrol(client, tracklet_id="t", metadata=json.dumps(before))
    patch = {"drop": None, "new": {"x": None, "y": 1}, "deep": {"drop": None, "list": [3]}}

    after = client.patch("/gallery/t", json={"metadata": patch}).json()

    assert after["metadata"] == {"keep": 1, "new": {"y": 1}, "deep": {"keep": [1], "list": [3]}}


@pytest.mark.parametrize(
    "patch",
    [
        {"colour": "red"},
        {"tracklet_id": "u"},
        {"model": "other"},
        {"identity": "a/b"},
        {"identity": ""},
        {"identity": 5},
        {"camera": "c" * 65},
        {"start_time": "2026-01-01T00:00:00"},
        {"start_time": 1700000000},
        {"start_time": "0001-01-01T00:00:00+14:00"},
        {"end_time": "2025-01-01T00:00:00Z"},
        {"metadata": [1]},
        {"metadata": {"a": "\ud800"}},
        [],
        None,
    ],
    ids=repr,
)
def test_a_bad_patch_is_refused_and_changes_nothing(client: TestClient, patch: Any) -> None:
    before = enrol(client, tracklet_id="t", identity="p", start_time="2026-01-01T00:00:00Z")

    headers = {"Content-Type": "application/json"}
    answer = client.patch("/gallery/t", content=json.dumps(patch), headers=headers)

    assert_problem(answer, 422, "validation")
    assert client.get("/gallery/t").json() == before


@pytest.mark.parametrize(
    "body", ["{", "", '{"metadata": NaN', "[" * 100_000, '{"metadata": ' + '{"a":' * 20_000, "\xff"]
)
def test_a_patch_that_is_not_json_is_refused(client: TestClient, body: str) -> None:
    enrol(client, tracklet_id="t")
    headers = {"Content-Type": "application/json"}

    answer = client.patch("/gallery/t", content=body.encode("latin-1"), headers=headers)

    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_patch_with_nan_is_refused(client: TestClient) -> None:
    enrol(client, tracklet_id="t")
    headers = {"Content-Type": "application/json"}

    answer = client.patch("/gallery/t", content='{"metadata": {"a": NaN}}', headers=headers)

    assert_problem(answer, 422, "validation")


def test_metadata_cannot_grow_over_its_limit_by_patches(client: TestClient) -> None:
    enrol(client, tracklet_id="t", metadata=json.dumps({"a": "x" * 10_000}))

    answer = client.patch("/gallery/t", json={"metadata": {"b": "x" * 10_000}})

    assert_problem(answer, 413, "payload-too-large")


def test_patches_at_once_do_not_lose_each_other(
    client: TestClient, gallery: EmbeddedGallery
) -> None:
    """Each merges one key into the metadata; all are there at the end."""
    enrol(client, tracklet_id="t")

    def patch(number: int) -> int:
        return client.patch("/gallery/t", json={"metadata": {f"k{number}": 1}}).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(patch, range(40)))

    assert statuses == [200] * 40
    assert len(gallery.get("t").metadata) == 40


def test_a_deleted_tracklet_is_gone(client: TestClient) -> None:
    enrol(client, tracklet_id="t", identity="p1")

    answer = client.delete("/gallery/t")

    assert (answer.status_code, answer.content) == (204, b"")
    for method, path in (("DELETE", "/gallery/t"), ("GET", "/gallery/t"),
                         ("GET", "/gallery/t/strip.jpg")):  # fmt: skip
        assert_problem(client.request(method, path), 404, "not-found")
    assert client.post("/query", files=GOOD).json()["matches"] == []
    assert client.get("/info").json()["gallery"]["tracklets"] == 0


def test_a_deleted_id_may_be_used_again(client: TestClient) -> None:
    enrol(client, tracklet_id="t")
    client.delete("/gallery/t")

    assert enrol(client, clip_of(GREEN), tracklet_id="t")["tracklet_id"] == "t"


def test_a_strip_shows_the_frames(client: TestClient) -> None:
    enrol(client, clip_of(RED, GREEN, BLUE), tracklet_id="t")

    answer = client.get("/gallery/t/strip.jpg")

    assert answer.headers["content-type"] == "image/jpeg"
    strip = Image.open(io.BytesIO(answer.content))
    assert strip.size == (3 * 64, 128)
    strongest = []
    for place in (32, 96, 160):
        pixel = strip.getpixel((place, 64))
        assert isinstance(pixel, tuple)
        strongest.append(pixel.index(max(pixel)))
    assert strongest == [0, 1, 2]


def test_a_strip_has_8_frames_at_most(client: TestClient) -> None:
    enrol(client, clip_of(*[RED] * 15), tracklet_id="t")

    strip = Image.open(io.BytesIO(client.get("/gallery/t/strip.jpg").content))

    assert strip.size == (8 * 64, 128)


def test_no_strip_is_kept_where_thumbnails_are_off(start: Start) -> None:
    client = start(thumbnails=False)
    enrol(client, tracklet_id="t")

    assert_problem(client.get("/gallery/t/strip.jpg"), 404, "not-found")


def test_a_gallery_of_another_model_takes_nothing(
    start: Start, embedder: FakeEmbedder, gallery: EmbeddedGallery
) -> None:
    client = start()
    record = enrol(client)
    embedder.model = "trsa-other"

    for path in ("/gallery", "/query"):
        answer = client.post(path, files=GOOD)
        assert_problem(answer, 409, "model-mismatch")

    assert client.get("/gallery").json()["items"] == [record]
    assert gallery.counts().tracklets == 1


def test_a_metadata_limit_of_the_settings_is_kept(start: Start) -> None:
    client = start(limits=LimitSettings(metadata_bytes=20))

    answer = client.post("/gallery", files=GOOD, data={"metadata": '{"a": "0123456789ab"}'})

    assert_refused(client, answer, 413, "payload-too-large")


def test_the_used_frames_are_kept_where_that_is_asked_for(
    start: Start, gallery: EmbeddedGallery
) -> None:
    client = start(keep_frames=True, frames_per_tracklet=2)
    sent = [picture(colour) for colour in (RED, GREEN, BLUE, RED)]

    record = enrol(client, as_frames(sent))
    filmed = client.post("/gallery", files=as_video(video())).json()

    kept = gallery.frames(record["tracklet_id"])
    assert kept == tuple(sent[at] for at in choose_frames(4, 2))
    for jpeg in gallery.frames(filmed["tracklet_id"]):
        assert jpeg.startswith(b"\xff\xd8")


def test_no_frame_is_kept_unasked(start: Start, gallery: EmbeddedGallery) -> None:
    record = enrol(start())

    with pytest.raises(NotFoundError):
        gallery.frames(record["tracklet_id"])


NOON = datetime(2126, 11, 22, 12, tzinfo=UTC)
# What has passed at noon UTC, or passes then, wherever it is written down.
_OVER = (
    "2126-11-22T12:00:00Z",
    "2126-11-22T12:00:00.000000+00:00",
    "2126-11-22T14:00:00+02:00",
    "2126-11-22T13:59:59.999999+02:00",
    "2126-11-22T00:30:00-11:30",
    "2126-11-22t12:00:00z",
    "2126-11-21T23:59:59Z",
    "1970-01-01T00:00:00Z",
    "0001-01-01T00:00:00Z",
)
_TO_COME = (
    "2126-11-22T12:00:00.000001Z",
    "2126-11-22T12:00:01Z",
    "2126-11-22T14:00:01+02:00",
    "2126-11-22T00:30:01-11:30",
    "2126-11-23T01:59:59+13:59",
    "9999-12-31T23:59:59Z",
)


@pytest.fixture
def at_noon(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A service where it is noon in 2126."""
    monkeypatch.setattr(schemas, "now", lambda: NOON)
    return client


@pytest.mark.parametrize("time", _OVER)
def test_a_tracklet_that_would_be_erased_at_once_is_refused(at_noon: TestClient, time: str) -> None:
    """A wrong zone or year must not destroy footage without a word."""
    answer = at_noon.post("/gallery", files=GOOD, data={"expires_at": time})

    [error] = assert_refused(at_noon, answer, 422, "validation")["errors"]
    assert error["pointer"] == "/expires_at"
    assert error["detail"] == (
        "expected a time to come, later than 2126-11-22T12:00:00Z, got one that is over"
    )


@pytest.mark.parametrize("time", _OVER)
def test_a_change_to_a_time_that_is_over_changes_nothing(at_noon: TestClient, time: str) -> None:
    before = enrol(at_noon, tracklet_id="t", expires_at="2127-01-01T00:00:00Z", camera="c1")

    answer = at_noon.patch("/gallery/t", json={"expires_at": time, "camera": "c2"})

    [error] = assert_problem(answer, 422, "validation")["errors"]
    assert error["pointer"] == "/body/expires_at"
    assert "later than 2126-11-22T12:00:00Z" in error["detail"]
    assert at_noon.get("/gallery/t").json() == before


@pytest.mark.parametrize("time", _TO_COME)
def test_a_tracklet_may_expire_at_any_time_to_come(at_noon: TestClient, time: str) -> None:
    expected = datetime.fromisoformat(time)

    enrolled = enrol(at_noon, tracklet_id="a", expires_at=time)
    enrol(at_noon, tracklet_id="b")
    changed = at_noon.patch("/gallery/b", json={"expires_at": time})

    assert changed.status_code == 200
    for record in (enrolled, changed.json()):
        assert datetime.fromisoformat(record["expires_at"]) == expected
        assert record["expires_at"].endswith("Z")


def test_what_has_expired_by_now_can_be_given_more_time_and_changed_otherwise(
    at_noon: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrol(at_noon, tracklet_id="t", expires_at="2126-11-22T13:00:00Z")
    monkeypatch.setattr(schemas, "now", lambda: NOON + timedelta(hours=2))

    assert at_noon.patch("/gallery/t", json={"camera": "c2"}).status_code == 200
    longer = {"expires_at": "2126-11-22T15:00:00Z"}
    assert at_noon.patch("/gallery/t", json=longer).json()["expires_at"] == longer["expires_at"]


def test_a_stored_tracklet_explains_nothing_and_says_why(client: TestClient) -> None:
    enrol(client, tracklet_id="t")

    for value in ("true", "false"):
        answer = client.get("/gallery/t/matches", params={"explain": value})

        [error] = assert_problem(answer, 422, "validation")["errors"]
        assert error["pointer"] == "/query/explain"
        assert "there are no frames to look at" in error["detail"]
    assert client.post("/query", files=GOOD, params={"explain": "true"}).json()["attention"]
