"""Videos, good and bad, against the running app."""

import io
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from service.settings import LimitSettings
from service.video import Pixels, read_video
from tests.service.conftest import FakeEmbedder, assert_refused, enrol
from tests.service.making import (
    GOOD,
    as_frames,
    as_video,
    audio_only,
    encode,
    sound_file,
    video,
)

CONTAINERS = [("mp4", "mpeg4"), ("avi", "mpeg4"), ("matroska", "mpeg4"), ("mp4", "libx264"),
              ("webm", "libvpx"), ("mpegts", "libx264")]  # fmt: skip


@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
def test_a_video_is_used_evenly_and_in_order(
    client: TestClient, embedder: FakeEmbedder, container: str, codec: str
) -> None:
    """Its frames grow brighter, so what was used shows when it was."""
    record = enrol(client, as_video(video(container, 30, codec=codec)))

    used = np.array([frame.mean() for frame in embedder.clips[0]])
    expected = np.linspace(0, 255, 30)[[2 * part + 1 for part in range(15)]]
    assert record["frames"] == {"received": 30, "used": 15}
    assert used == pytest.approx(expected, abs=14)


def test_a_video_and_its_frames_agree(client: TestClient, embedder: FakeEmbedder) -> None:
    content = video("avi", 6)
    with av.open(io.BytesIO(content), mode="r") as container:
        images = [encode(Image.fromarray(frame.to_ndarray(format="rgb24")))
                  for frame in container.decode(video=0)]  # fmt: skip
    enrol(client, as_video(content))
    enrol(client, as_frames(images))

    by_video, by_frames = embedder.clips
    assert by_video.astype(int) == pytest.approx(by_frames.astype(int), abs=1)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_file_with_sound_alone_is_refused(client: TestClient, container: str) -> None:
    answer = client.post("/gallery", files=as_video(audio_only(container)))

    assert_refused(client, answer, 422, "no-usable-frames")


@pytest.mark.parametrize("content", [b"\x00" * 5000, b"no video " * 500, sound_file()],
                         ids=["zeros", "text", "wav"])  # fmt: skip
def test_what_is_no_video_is_refused(client: TestClient, content: bytes) -> None:
    answer = client.post("/gallery", files=as_video(content))

    assert_refused(client, answer, 415, "unsupported-media")


def test_an_image_sent_as_video_is_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files=as_video(GOOD[0][1][1]))

    assert_refused(client, answer, 415, "unsupported-media")


@pytest.mark.parametrize(("container", "codec"), CONTAINERS[:4])
@pytest.mark.parametrize("part", [0.3, 0.5, 0.8])
def test_a_video_cut_off_in_the_middle_is_refused(
    client: TestClient, container: str, codec: str, part: float
) -> None:
    whole = video(container, 100, codec=codec)

    answer = client.post("/gallery", files=as_video(whole[: int(part * len(whole))]))

    assert_refused(client, answer, 422, "undecodable-frame")


def test_a_video_with_damage_in_its_middle_is_refused_or_read(client: TestClient) -> None:
    """Codecs hide much; what must not happen is an unexpected error."""
    content = bytearray(video("mp4", 100, codec="libx264"))
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)

    answer = client.post("/gallery", files=as_video(bytes(content)))

    assert answer.status_code in (201, 422)


def test_a_playlist_cannot_make_us_open_a_local_file(client: TestClient, tmp_path: Path) -> None:
    """An HLS playlist names further files; here one that would be a fine video."""
    target = tmp_path / "inside.ts"
    target.write_bytes(video("mpegts", 30, codec="libx264"))
    playlist = (
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:0\n"
        f"#EXTINF:1.2,\n{target}\n#EXT-X-ENDLIST\n"
    )

    answer = client.post("/gallery", files=as_video(playlist.encode()))

    assert_refused(client, answer, 415, "unsupported-media")


def test_a_concat_script_cannot_make_us_open_a_local_file(
    client: TestClient, tmp_path: Path
) -> None:
    target = tmp_path / "inside.mp4"
    target.write_bytes(video())
    script = f"ffconcat version 1.0\nfile '{target}'\nduration 1.2\n"

    answer = client.post("/gallery", files=as_video(script.encode()))

    assert_refused(client, answer, 415, "unsupported-media")


def test_a_video_of_513_frames_is_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files=as_video(video("avi", 513, (16, 16))))

    assert_refused(client, answer, 413, "too-many-frames")


def test_a_video_of_tiny_frames_is_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files=as_video(video("avi", 3, (16, 4))))

    assert_refused(client, answer, 422, "validation")


def test_a_video_of_huge_frames_is_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files=as_video(video("avi", 1, (8000, 6000), "mjpeg")))

    assert_refused(client, answer, 413, "payload-too-large")


def test_a_video_without_a_frame_is_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files=as_video(video("matroska", 0)))

    assert answer.status_code in (415, 422)
    assert client.get("/gallery").json()["items"] == []


def test_frames_of_a_video_are_made_small_as_they_come() -> None:
    """Fifteen raw frames of 40 megapixels would be 1.8 GB."""
    raw: list[weakref.ref[Pixels]] = []
    alive = []

    def prepare(pixels: Pixels) -> Pixels:
        alive.append(sum(frame() is not None for frame in raw))
        raw.append(weakref.ref(pixels))
        return pixels[:8, :8].copy()

    received, frames = read_video(video("avi", 15), range, prepare, LimitSettings())

    assert received == len(frames) == 15
    assert max(alive) <= 1
