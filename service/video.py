"""Frames out of a video file, without a file system or a network behind it."""

import io
from collections.abc import Callable, Sequence
from typing import TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from service.errors import (
    NoUsableFramesError,
    PayloadTooLargeError,
    TooManyFramesError,
    UndecodableFrameError,
    UnsupportedMediaError,
    ValidationError,
)
from service.limits import FrameLimits

Pixels = NDArray[np.uint8]
Made = TypeVar("Made")
# Containers that hold a video themselves. Playlists (HLS, DASH, concat) would name further files.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,flv,asf,ogg,ivf,h264,hevc,"
    "mjpeg,gif,mxf,nut,wtv,rm,dv,av1,obu,vc1"
)
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": ""}
# A header's duration and the last packet's end differ by a frame or so; a cut is larger.
_SLACK_S = 0.5


def read_video(
    content: bytes,
    choose: Callable[[int], Sequence[int]],
    prepare: Callable[[Pixels], Made],
    limits: FrameLimits,
) -> tuple[int, dict[int, Made]]:
    """Count the frames of a video, choose among them, and prepare only the chosen ones.

    Args:
        content: The file.
        choose: From how many frames there are to which are wanted.
        prepare: Makes something small of a frame, (H, W, 3) uint8 RGB. It is called as each one
            comes: to hold them all at full size would take gigabytes.
        limits: How many frames, and of which size.

    Returns:
        How many frames the video has, and the prepared ones by frame index.

    Raises:
        UnsupportedMediaError: No video container can be made of it.
        NoUsableFramesError: It has no video stream, or no frame.
        UndecodableFrameError: It is cut off or damaged.
        TooManyFramesError: It has more frames than the limit.
        PayloadTooLargeError: Its frames have more pixels than the limit.
        ValidationError: Its frames are smaller than the limit.
    """
    expected = _count_packets(content, limits)
    frames: dict[int, Made] = {}
    # A packet is a frame but in a few codecs (fields, hidden frames): then the second round knows
    # better.
    for _ in range(2):
        received, frames = _decode(content, frozenset(choose(expected)), prepare, limits)
        if received == expected:
            return received, frames
        if received == 0:
            raise NoUsableFramesError("expected a video with frames, got one without")
        expected = received
    return expected, frames


def _open(content: bytes) -> InputContainer:
    try:
        return av.open(io.BytesIO(content), mode="r", options=_OPTIONS)
    except (av.FFmpegError, ValueError) as error:
        if _looks_like_video(content):
            raise UndecodableFrameError(
                "expected a video, got one that is cut off or damaged"
            ) from error
        raise UnsupportedMediaError("expected a video file, got another kind of file") from error


def _looks_like_video(content: bytes) -> bool:
    return (
        content[4:8] in (b"ftyp", b"moov", b"mdat")
        or content.startswith((b"\x1aE\xdf\xa3", b"FLV", b"OggS"))
        or (content.startswith(b"RIFF") and content[8:12] == b"AVI ")
    )


def _video_stream(container: InputContainer) -> VideoStream:
    if not container.streams.video:
        raise NoUsableFramesError("expected a video stream, got a file without one")
    return container.streams.video[0]


def _count_packets(content: bytes, limits: FrameLimits) -> int:
    """Read the packets without decoding them; refuse what is too large or cut off."""
    with _open(content) as container:
        stream = _video_stream(container)
        _check_size(stream.codec_context.width, stream.codec_context.height, limits)
        packets, damaged, end = 0, False, 0.0
        try:
            for packet in container.demux(stream):
                if not packet.size:
                    continue  # the flush at the end
                packets += 1
                damaged |= packet.is_corrupt
                if packet.pts is not None and packet.time_base is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packets > limits.frames:
                    raise TooManyFramesError(f"expected at most {limits.frames} frames, got more")
        except av.FFmpegError as error:
            raise UndecodableFrameError(
                "expected a whole video, got one that is damaged"
            ) from error
        start = float((stream.start_time or 0) * (stream.time_base or 0))
        lasts = (container.duration or 0) / 1_000_000
        if damaged or packets < stream.frames or end - start < 0.9 * lasts - _SLACK_S:
            raise UndecodableFrameError("expected a whole video, got one that is cut off")
        if packets == 0:
            raise NoUsableFramesError("expected a video with frames, got one without")
        return packets


def _check_size(width: int, height: int, limits: FrameLimits) -> None:
    if width * height > limits.frame_pixels:
        raise PayloadTooLargeError(
            f"expected frames of at most {limits.frame_pixels} pixels, got {width}x{height}"
        )
    if 0 < min(width, height) < limits.side_pixels:
        raise ValidationError(
            f"expected at least {limits.side_pixels} pixels on the shortest side, "
            f"got {width}x{height}",
            "/video",
        )


def _decode(
    content: bytes,
    wanted: frozenset[int],
    prepare: Callable[[Pixels], Made],
    limits: FrameLimits,
) -> tuple[int, dict[int, Made]]:
    frames: dict[int, Made] = {}
    received = 0
    with _open(content) as container:
        try:
            for frame in container.decode(_video_stream(container)):
                _check_size(frame.width, frame.height, limits)  # it may change in mid-stream
                if frame.is_corrupt:
                    raise UndecodableFrameError(
                        f"frame {received}: expected a whole frame, got a damaged one"
                    )
                if received in wanted:
                    frames[received] = prepare(_upright(frame))
                received += 1
                if received > limits.frames:
                    raise TooManyFramesError(f"expected at most {limits.frames} frames, got more")
        except av.FFmpegError as error:
            raise UndecodableFrameError(
                f"frame {received}: expected a frame that can be decoded, got a damaged one"
            ) from error
    return received, frames


def _upright(frame: av.VideoFrame) -> Pixels:
    """RGB pixels, turned as the container says (telephones film sideways)."""
    pixels = frame.to_ndarray(format="rgb24")
    quarter_turns = round(frame.rotation / 90) % 4  # counter-clockwise
    return np.ascontiguousarray(np.rot90(pixels, quarter_turns))
