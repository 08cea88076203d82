"""What a tracklet looks like is told, and refused where it is too poor."""

from dataclasses import replace

import numpy as np
import pytest

from model.frames import Clip
from service.quality import measure_quality
from tests.service.conftest import FakeEmbedder, Start, assert_problem, assert_refused
from tests.service.making import GOOD, RED, clip_of, picture


def laplacian_variance(frame: Clip) -> float:
    """One frame, pixel by pixel."""
    weights = np.array([299, 587, 114]) / 1000
    grey = np.round(frame.astype(float) @ weights)
    rows, columns = grey.shape
    values = [
        grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x]
        for y in range(1, rows - 1)
        for x in range(1, columns - 1)
    ]
    return float(np.var(values))


def test_sharpness_and_brightness_are_those_of_a_slow_loop() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (3, 16, 8, 3), dtype=np.uint8)

    quality = measure_quality(clip, 16)

    slow = np.mean([laplacian_variance(frame) for frame in clip])
    assert quality.sharpness == pytest.approx(slow, rel=0.01)
    assert quality.brightness == pytest.approx(
        (clip.astype(float) @ [0.299, 0.587, 0.114]).mean() / 255, abs=0.005
    )


def test_what_is_blurred_is_less_sharp_and_what_is_dark_less_bright() -> None:
    sharp = np.random.default_rng(0).integers(0, 256, (4, 64, 32, 3), dtype=np.uint8)
    blurred = np.repeat(np.repeat(sharp[:, ::8, ::8], 8, axis=1), 8, axis=2)

    seen = [measure_quality(clip, 32) for clip in (sharp, blurred, sharp // 4)]

    assert seen[0].sharpness > 3 * seen[1].sharpness
    assert seen[2].brightness == pytest.approx(seen[0].brightness / 4, rel=0.05)


def test_an_answer_tells_the_smallest_used_frame(start: Start) -> None:
    client = start()
    files = [("frames", picture(RED, (40, 30))), ("frames", picture(RED, (64, 128)))]

    quality = client.post("/gallery", files=files).json()["quality"]

    assert quality["shortest_side"] == 30
    assert quality["frames"] == 2
    assert quality["frame_distance"] == 0


@pytest.mark.parametrize(
    ("minimum", "told"),
    [
        ({"min_frames": 4}, "at least 4 used frames, got 3"),
        ({"min_side_pixels": 1000}, "at least 1000 pixels on the shortest side"),
        ({"min_sharpness": 1e6}, "at least 1e+06 sharpness"),
        ({"min_brightness": 1.0}, "at least 1 brightness"),
        ({"max_brightness": 0.0}, "at most 0 brightness"),
    ],
)
def test_a_minimum_refuses_with_the_reason(
    start: Start, embedder: FakeEmbedder, minimum: dict[str, float], told: str
) -> None:
    client = start(quality=minimum)

    for path in ("/gallery", "/query"):
        body = assert_problem(client.post(path, files=GOOD), 422, "validation")
        assert told in body["detail"]
    assert embedder.batches == []
    assert client.get("/gallery").json()["items"] == []


def test_frames_that_disagree_are_refused_where_a_bound_is_set(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start(quality={"max_frame_distance": 0.5})
    embed = FakeEmbedder.embed

    def disagree(self: FakeEmbedder, *given: object, **named: object) -> object:
        return [replace(one, frame_distance=0.7) for one in embed(self, *given, **named)]  # type: ignore[arg-type]

    with monkeypatch.context() as changed:
        changed.setattr(FakeEmbedder, "embed", disagree)
        refused = client.post("/gallery", files=GOOD)

    body = assert_refused(client, refused, 422, "validation")
    assert "at most 0.5 distance of the frames to their tracklet, got 0.7" in body["detail"]
    assert client.post("/query", files=clip_of(RED)).status_code == 200
