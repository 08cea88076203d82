"""Videos made to make FFmpeg do what it must not: open files, call hosts, run odd code, go on."""

import io
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.stream import VideoStream
from starlette.testclient import TestClient

from service import video as videos
from service.decoding import DECODE_S
from service.errors import PayloadTooLargeError, UndecodableFrameError, UnsupportedMediaError
from service.settings import LimitSettings
from service.video import Pixels, read_video
from tests.service.conftest import assert_refused
from tests.service.making import as_video, picture, video

LIMITS = LimitSettings()


def read(content: bytes, limits: LimitSettings = LIMITS) -> int:
    """Read a video; returns how many frames it has."""
    received, _ = read_video(content, range, lambda pixels: pixels.shape, limits)
    return received


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A host that nobody must call."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


def assert_nobody_called(listener: socket.socket) -> None:
    with pytest.raises(BlockingIOError):
        listener.accept()


def playlists(url: str) -> dict[str, bytes]:
    """Files that name a further one, in every form that FFmpeg reads."""
    hls = (
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:0\n"
        f"#EXTINF:1.2,\n{url}\n#EXT-X-ENDLIST\n"
    )
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">'
        '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
        f"<BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>"
    )
    return {
        "hls": hls.encode(),
        "concat": f"ffconcat version 1.0\nfile '{url}'\nduration 1.2\n".encode(),
        "dash": dash.encode(),
        "sdp": f"v=0\ns=x\nc=IN IP4 127.0.0.1\nm=video 1 RTP/AVP 96\na=control:{url}\n".encode(),
        "rtsp redirect": f"RTSPtextRTSP://{url}".encode(),
        "asx": f"[Reference]\nRef1={url}\n".encode(),
    }


# As a file whose name ends in .mp4, and behind the first bytes of a real one.
DISGUISES = {"bare": b"", "mp4": struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 512),
             "matroska": b"\x1aE\xdf\xa3", "mpegts": b"G" + bytes(187)}  # fmt: skip


@pytest.mark.parametrize("kind", playlists(""))
@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_playlist_makes_us_call_nobody(
    client: TestClient, listener: socket.socket, kind: str, disguise: str
) -> None:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/inside.mp4"

    answer = client.post("/gallery", files=as_video(DISGUISES[disguise] + playlists(url)[kind]))

    assert answer.status_code in (415, 422)
    assert client.get("/gallery").json()["items"] == []
    assert_nobody_called(listener)


@pytest.mark.parametrize("kind", playlists(""))
@pytest.mark.parametrize(
    "scheme", ["", "file:", "file://", "crypto+file:", "subfile,,start,0,end,0,,:"]
)
def test_a_playlist_makes_us_open_no_file(
    client: TestClient, tmp_path: Path, kind: str, scheme: str
) -> None:
    """The file that it names would be a fine video."""
    target = tmp_path / "inside.ts"
    target.write_bytes(video("mpegts", 30, codec="libx264"))

    answer = client.post("/gallery", files=as_video(playlists(f"{scheme}{target}")[kind]))

    assert answer.status_code == 415
    assert client.get("/gallery").json()["items"] == []


def test_even_a_format_that_opens_files_could_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two doors are locked: the list of formats, and the call that would open another file."""
    target = tmp_path / "inside.ts"
    target.write_bytes(video("mpegts", 30, codec="libx264"))
    monkeypatch.setattr(videos, "_formats_of", lambda _: "hls,mpegts")

    with pytest.raises((UnsupportedMediaError, UndecodableFrameError)):
        read(playlists(str(target))["hls"])


def referring(content: bytes, target: str) -> bytes:
    """An MP4 whose data reference names another file, as QuickTime's editors wrote them."""
    at = content.index(b"dref")
    size, _ = struct.unpack_from(">I4s", content, at - 4)
    entry = struct.pack(">I4sI", 12 + len(target) + 1, b"url ", 0) + target.encode() + b"\0"
    box = struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry
    longer = len(box) - size
    changed = bytearray(content[: at - 4] + box + content[at - 4 + size :])
    for name in (b"dinf", b"minf", b"mdia", b"trak", b"moov"):  # each holds the one before it
        place = changed.index(name) - 4
        [length] = struct.unpack_from(">I", changed, place)
        struct.pack_into(">I", changed, place, length + longer)
    return bytes(changed)


def test_an_mp4_that_refers_to_another_file_makes_us_call_nobody(
    client: TestClient, listener: socket.socket
) -> None:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/inside.mp4"
    content = referring(video("mp4"), url)

    answer = client.post("/embed", files=as_video(content))

    assert url.encode() in content
    assert answer.status_code in (200, 415, 422)  # what it says of other files is not asked
    assert_nobody_called(listener)


def encoded(container: str, codec: str, pix_fmt: str) -> bytes:
    """Three frames of some codec."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 48, 96, pix_fmt
        for level in (0, 100, 200):
            pixels = np.full((96, 48, 3), level, dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(("container", "codec", "pix_fmt"), [
    ("avi", "zmbv", "bgr0"), ("avi", "flashsv", "bgr24"), ("matroska", "snow", "yuv420p"),
    ("avi", "cinepak", "rgb24"), ("mov", "qtrle", "rgb24"), ("avi", "asv1", "yuv420p"),
])  # fmt: skip
def test_a_codec_of_old_games_is_refused(
    client: TestClient, container: str, codec: str, pix_fmt: str
) -> None:
    content = encoded(container, codec, pix_fmt)

    assert_refused(
        client, client.post("/gallery", files=as_video(content)), 415, "unsupported-media"
    )


@pytest.mark.parametrize(("container", "codec", "pix_fmt"), [
    ("mov", "prores_ks", "yuv422p10le"), ("asf", "wmv2", "yuv420p"), ("flv", "flv", "yuv420p"),
    ("mpeg", "mpeg2video", "yuv420p"), ("mpeg2video", "mpeg2video", "yuv420p"),
    ("ivf", "libvpx-vp9", "yuv420p"), ("gif", "gif", "rgb8"), ("nut", "ffv1", "yuv420p"),
    ("h264", "libx264", "yuv420p"), ("matroska", "libsvtav1", "yuv420p"),
    ("mjpeg", "mjpeg", "yuvj420p"),
    ("ogg", "libvpx", "yuv420p"), ("m4v", "mpeg4", "yuv420p"),
    ("3gp", "libx264", "yuv420p"), ("wtv", "mpeg2video", "yuv420p"), ("avi", "rawvideo", "bgr24"),
])  # fmt: skip
def test_what_cameras_and_editors_write_is_read(container: str, codec: str, pix_fmt: str) -> None:
    """Whatever is in the lists of formats and codecs that this machine's FFmpeg can write."""
    if codec not in av.codec.codecs_available:
        pytest.skip(f"FFmpeg has no encoder {codec}")

    assert read(encoded(container, codec, pix_fmt)) == 3


def test_what_telephones_write_is_read() -> None:
    """HEVC from a file: the encoder of PyAV's wheel writes past its memory at some sizes."""
    assert read((Path(__file__).parent / "samples" / "hevc.mp4").read_bytes()) == 3


def test_an_image_is_no_video_of_one_frame(client: TestClient) -> None:
    answer = client.post("/gallery", files=as_video(picture(kind="GIF")))

    assert answer.status_code in (201, 415)  # a GIF may be either
    assert client.post("/gallery", files=as_video(picture(kind="PNG"))).status_code == 415


def test_a_video_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the time is over at the third frame."""
    prepared = []

    def prepare(pixels: Pixels) -> None:
        prepared.append(pixels.shape)
        if len(prepared) == 3:
            monkeypatch.setattr(videos, "VIDEO_S", -1.0)

    with pytest.raises(PayloadTooLargeError, match="takes longer"):
        read_video(video("mp4", 100), range, prepare, LIMITS)

    assert len(prepared) == 3


def test_a_video_ends_before_its_decoder_is_ended() -> None:
    assert videos.VIDEO_S < DECODE_S


def test_a_container_that_goes_round_in_circles_comes_to_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock is looked at whenever FFmpeg reads, also before there is a frame."""
    monkeypatch.setattr(videos, "VIDEO_S", -1.0)

    with pytest.raises(PayloadTooLargeError):
        read(video("matroska"))


def test_a_frame_that_grows_in_mid_stream_is_refused() -> None:
    """The container announces small frames; what is in it says otherwise."""
    small, large = (video("mpegts", 8, size, codec="libx264") for size in ((48, 96), (480, 960)))
    limits = LimitSettings(frame_pixels=100 * 100)

    with pytest.raises((PayloadTooLargeError, UndecodableFrameError)):
        read(small + large, limits)


def test_metadata_in_another_encoding_is_no_damage() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as output:
        output.metadata["title"] = "Xafe"
        stream = output.add_stream("mpeg4", rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 48, 96, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((96, 48, 3), np.uint8), format="rgb24")
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))

    assert read(buffer.getvalue().replace(b"Xafe", b"caf\xe9")) == 1


def test_what_is_prepared_is_upright_pixels() -> None:
    shapes: list[tuple[int, ...]] = []

    def prepare(pixels: Pixels) -> None:
        shapes.append(pixels.shape)

    read_video(video("mp4", 3), range, prepare, LIMITS)

    assert shapes == [(96, 48, 3)] * 3
