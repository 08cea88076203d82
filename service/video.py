"""Frames out of a video file, without a file system or a network behind it.

FFmpeg reads hundreds of formats, most of them old, and playlists that name further files. It sees
a file only after its first bytes have said which of a few containers it is, may take it for no
other, may use a few codecs, and has to come to an end in time.
"""

import io
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
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
# How a container begins: at which byte, with what, and which demuxers may look at it then. None of
# them is a playlist (HLS, DASH, concat), which would name further files.
_MOV = "mov,mp4,m4a,3gp,3g2,mj2"
_SIGNATURES = (
    *((4, box, _MOV) for box in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")),
    (0, b"\x1aE\xdf\xa3", "matroska,webm"),
    (8, b"AVI ", "avi"),
    (0, b"FLV\x01", "flv"),
    (0, b"OggS", "ogg"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "asf"),
    (0, b"DKIF", "ivf"),
    (0, b"GIF8", "gif"),
    (0, b"\x06\x0e+4", "mxf"),
    (0, b"nut/multimedia container\0", "nut"),
    (0, b"\xb7\xd8\0 7I\xda\x11", "wtv"),
    (0, b"\x1f\x07\0", "dv"),
    (0, b"\x12\0\n", "av1,obu"),
    (0, b"\xff\xd8\xff", "mjpeg"),
    (0, b"\0\0\1\xba", "mpeg"),
    # Bare streams, and streams of MPEG, which begin alike: FFmpeg tells them apart.
    (0, b"\0\0\1", "mpegvideo,m4v,h264,hevc,vc1"),
    (0, b"\0\0\0\1", "h264,hevc"),
)
# Where packets of an MPEG transport stream begin, and how long they are; the second are a disc's.
_TS_PACKETS = ((0, 188), (4, 192), (0, 204))
_TS_SYNC = 0x47
# Also what one image begins with: a file of which nothing comes is no damaged video.
_NO_VIDEO_ALONE = frozenset({"mjpeg", "gif"})
# What cameras, telephones and editors write. FFmpeg has 300 more, among them those of old games.
_CODECS = (
    *("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9", "vp3", "theora"),
    *("mpeg4", "msmpeg4", "msmpeg4v1", "msmpeg4v2", "mpeg1video", "mpeg2video", "mpegvideo"),
    *("h263", "h263p", "flv", "vp6f", "wmv1", "wmv2", "wmv3", "vc1", "dvvideo"),
    *("mjpeg", "prores", "dnxhd", "ffv1", "huffyuv", "ffvhuff", "rawvideo", "gif", "png"),
)
# How many times the pixels of the limit FFmpeg may take memory for, to say how many a frame has.
_LOOK_TIMES = 4
# Seconds for all of a video: far more than the largest within the limits of a crop takes, and less
# than `service.decoding` gives a decoder before it ends it.
VIDEO_S = 30.0
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
        UnsupportedMediaError: It is no video container, or of a codec that is not taken.
        NoUsableFramesError: It has no video stream, or no frame.
        UndecodableFrameError: It is cut off or damaged.
        TooManyFramesError: It has more frames than the limit.
        PayloadTooLargeError: Its frames have more pixels than the limit, or it takes too long.
        ValidationError: Its frames are smaller than the limit.
    """
    video = _Video(content, limits)
    expected = _count_packets(video, limits)
    frames: dict[int, Made] = {}
    # A packet is a frame but in a few codecs (fields, hidden frames): then the second round knows
    # better.
    for _ in range(2):
        received, frames = _decode(video, frozenset(choose(expected)), prepare, limits)
        if received == expected:
            return received, frames
        if received == 0:
            raise NoUsableFramesError("expected a video with frames, got one without")
        expected = received
    return expected, frames


class _Video:
    """A file of which a video can be made, and the time that is left for it.

    Args:
        content: The file.
        limits: Of its frames' pixels.

    Raises:
        UnsupportedMediaError: It begins like no container that is taken.
    """

    def __init__(self, content: bytes, limits: FrameLimits) -> None:
        self._content = content
        self._started = time.monotonic()
        self._formats = _formats_of(content)
        self._options = {
            "format_whitelist": self._formats,
            "protocol_whitelist": "",
            "codec_whitelist": ",".join(_CODECS),
            # While FFmpeg looks what there is. Of larger frames it would not tell the size.
            "max_pixels": str(_LOOK_TIMES * limits.frame_pixels),
        }

    def open(self) -> InputContainer:
        """Open it, from its beginning.

        Raises:
            UndecodableFrameError: It is cut off or damaged.
            UnsupportedMediaError: Nothing says that it is a video.
            PayloadTooLargeError: See `check_time`.
        """
        try:
            return av.open(
                _TimedFile(self._content, self.check_time),
                mode="r",
                options=self._options,
                io_open=_refuse_to_open,
                metadata_errors="replace",  # nobody reads it
            )
        except (av.FFmpegError, ValueError) as error:
            if self._formats in _NO_VIDEO_ALONE:
                raise _no_video() from error
            raise UndecodableFrameError(
                "expected a video, got one that is cut off or damaged"
            ) from error

    def check_time(self) -> None:
        """Return while there is time.

        Raises:
            PayloadTooLargeError: It is over: a small file can ask for very much work.
        """
        if time.monotonic() - self._started > VIDEO_S:
            raise PayloadTooLargeError(
                f"expected a video that can be decoded within {VIDEO_S:g} s, got one that takes "
                "longer"
            )


class _TimedFile(io.BytesIO):
    """A file in memory that FFmpeg reads for a bounded time: damage can send it round in circles.

    Args:
        content: Of the file.
        check_time: Raises once the time is over; PyAV passes it on.
    """

    def __init__(self, content: bytes, check_time: Callable[[], None]) -> None:
        super().__init__(content)
        self._check_time = check_time

    def read(self, size: int | None = -1, /) -> bytes:
        """Read on."""
        self._check_time()
        return super().read(size)


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    """What FFmpeg hears that wants to open a file or an address that a video names."""
    del url, flags, options
    raise UnsupportedMediaError("expected a video in one file, got one that names others")


def _formats_of(content: bytes) -> str:
    """The demuxers that may look at a file, by how it begins.

    Raises:
        UnsupportedMediaError: There are none.
    """
    for at, beginning, formats in _SIGNATURES:
        if content.startswith(beginning, at) and (formats != "avi" or content[:4] == b"RIFF"):
            return formats
    for at, length in _TS_PACKETS:
        if len(content) >= length and all(
            byte == _TS_SYNC for byte in content[at : at + 3 * length : length]
        ):
            return "mpegts"
    raise _no_video()


def _no_video() -> UnsupportedMediaError:
    return UnsupportedMediaError("expected a video file, got another kind of file")


def _video_stream(container: InputContainer) -> VideoStream:
    """The first video stream.

    Raises:
        NoUsableFramesError: There is none.
        UnsupportedMediaError: It is of a codec that is not taken.
    """
    if not container.streams.video:
        raise NoUsableFramesError("expected a video stream, got a file without one")
    stream = container.streams.video[0]
    # None where FFmpeg itself has no decoder, whatever PyAV's types say.
    context: VideoCodecContext | None = stream.codec_context
    if context is None or context.codec.name not in _CODECS:
        raise UnsupportedMediaError("expected a video of a common codec, got another one")
    context.thread_count = 1  # as many uploads are decoded at a time as there are cores
    return stream


def _count_packets(video: _Video, limits: FrameLimits) -> int:
    """Read the packets without decoding them; refuse what is too large or cut off."""
    with video.open() as container:
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
    video: _Video,
    wanted: frozenset[int],
    prepare: Callable[[Pixels], Made],
    limits: FrameLimits,
) -> tuple[int, dict[int, Made]]:
    frames: dict[int, Made] = {}
    received = 0
    with video.open() as container:
        stream = _video_stream(container)
        stream.codec_context.options = {"max_pixels": str(limits.frame_pixels)}
        try:
            for frame in container.decode(stream):
                video.check_time()
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
