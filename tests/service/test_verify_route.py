"""Whether two uploads show the same person, by the threshold that is set or calibrated."""

import pytest
from starlette.testclient import TestClient

from tests.service.conftest import FakeEmbedder, Start, assert_problem
from tests.service.making import GREEN, RED, Files, clip_of, picture, video, zipped


def pair(a: Files, b: Files) -> Files:
    """The files of two uploads in one form."""
    return [(f"{prefix}{name}", file) for prefix, files in (("a_", a), ("b_", b))
            for name, file in files]  # fmt: skip


def test_the_distance_is_that_of_the_embeddings(client: TestClient) -> None:
    one, other = (
        client.post("/embed", files=clip_of(colour)).json()["embedding"] for colour in (RED, GREEN)
    )
    expected = sum((x - y) ** 2 for x, y in zip(one, other, strict=True)) ** 0.5

    body = client.post("/verify", files=pair(clip_of(RED), clip_of(GREEN))).json()

    assert body["distance"] == pytest.approx(expected, rel=1e-5)
    assert (body["same"], body["threshold"]) == (None, None)
    assert body["model"] == "trsa-fake"
    assert body["a"]["frames"] == {"received": 1, "used": 1}
    assert body["a"]["quality"].keys() == body["b"]["quality"].keys()
    assert client.get("/gallery").json()["items"] == []


def test_the_threshold_decides(start: Start) -> None:
    client = start(threshold=0.1)

    same = client.post("/verify", files=pair(clip_of(RED), clip_of(RED))).json()
    other = client.post("/verify", files=pair(clip_of(RED), clip_of(GREEN))).json()

    assert (same["same"], same["distance"], same["threshold"]) == (True, 0, 0.1)
    assert other["same"] is False


def test_both_are_embedded_together(client: TestClient, embedder: FakeEmbedder) -> None:
    client.post("/verify", files=pair(clip_of(RED), clip_of(RED)))

    assert embedder.batches == [[1, 1]]


def test_an_archive_may_be_compared_with_a_video(client: TestClient) -> None:
    files = [("a_archive", zipped([("1.png", picture(RED))])), ("b_video", video())]

    assert client.post("/verify", files=files).status_code == 200


@pytest.mark.parametrize(
    ("files", "status", "slug", "pointer"),
    [
        (pair(clip_of(RED), []), 422, "validation", "/b_frames"),
        (pair([], clip_of(RED)), 422, "validation", "/a_frames"),
        (clip_of(RED), 422, "validation", "/frames"),
        ([("a_frames", picture(RED)), ("b_frames", b"no image")], 415, "unsupported-media", None),
        ([("a_frames", picture(RED, (4, 4))), ("b_frames", picture(RED))], 422, "validation",
         "/a_frames/0"),
    ],
    ids=["no-b", "no-a", "unprefixed", "text", "tiny"],
)  # fmt: skip
def test_a_refusal_says_of_which_upload(
    client: TestClient, files: Files, status: int, slug: str, pointer: str | None
) -> None:
    answer = client.post("/verify", files=files)

    body = assert_problem(answer, status, slug)
    if pointer is not None:
        assert body["errors"][0]["pointer"] == pointer
    if slug != "validation" or pointer != "/frames":
        assert body["detail"].startswith("upload ")
