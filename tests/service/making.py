"""Makers of what clients send: images, archives, videos and multipart bodies, good and bad."""

import io
import struct
import wave
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

Colour = tuple[int, int, int]
Files = list[tuple[str, tuple[str, bytes]]]
RED, GREEN, BLUE, GREY = (200, 30, 30), (30, 180, 40), (30, 50, 200), (128, 128, 128)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as a file of some kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def picture(
    colour: Colour = RED, size: tuple[int, int] = (32, 64), kind: str = "JPEG", **options: Any
) -> bytes:
    """An image file of one colour; (width, height)."""
    return encode(Image.new("RGB", size, colour), kind, **options)


@cache
def noise(seed: int = 0, size: tuple[int, int] = (32, 64)) -> Image.Image:
    """An RGB image that compresses badly, so that half a file is half an image."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_frames(images: Iterable[bytes]) -> Files:
    """Images as the form's files."""
    return [("frames", (f"{position}.jpg", image)) for position, image in enumerate(images)]


def clip_of(*colours: Colour) -> Files:
    """One JPEG frame a colour."""
    return as_frames(picture(colour) for colour in colours)


GOOD = clip_of(RED, RED, RED)


def zipped(members: Iterable[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of named members, with exactly these names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return buffer.getvalue()


def as_archive(content: bytes) -> Files:
    """A zip as the form's file."""
    return [("archive", ("frames.zip", content))]


def as_video(content: bytes) -> Files:
    """A video as the form's file."""
    return [("video", ("tracklet.mp4", content))]


@cache
def video(
    container: str = "mp4",
    frames: int = 30,
    size: tuple[int, int] = (48, 96),
    codec: str = "mpeg4",
) -> bytes:
    """A video whose brightness grows from black to white."""
    width, height = size
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for level in np.linspace(0, 255, frames):
            pixels = np.full((height, width, 3), level, dtype=np.uint8)
            pixels[::2, ::3] ^= 8  # something to encode
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


@cache
def audio_only(container: str = "mp4") -> bytes:
    """A container that could hold a video and holds sound."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono"
        )
        sound.sample_rate = 16000
        output.mux(stream.encode(sound))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def sound_file() -> bytes:
    """A WAV, which no video container is."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as output:
        output.setparams((1, 2, 8000, 0, "NONE", "NONE"))
        output.writeframes(bytes(16000))
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG, with its checksum."""
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG written by hand, of kinds that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def form(parts: Sequence[tuple[str, str | None, bytes]], boundary: str = "xyz") -> bytes:
    """A multipart body of (name, file name, content), byte for byte."""
    body = b""
    for name, file_name, content in parts:
        disposition = f'form-data; name="{name}"'
        if file_name is not None:
            disposition += f'; filename="{file_name}"'
        body += f"--{boundary}\r\nContent-Disposition: {disposition}\r\n\r\n".encode()
        body += content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


FORM_TYPE = {"Content-Type": "multipart/form-data; boundary=xyz"}


def mean_colours(clip: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean colours of a clip's 4x2 cells, (24,) float32: what the fake embedder answers."""
    frames, height, width, _ = clip.shape
    cells = clip.reshape(frames, 4, height // 4, 2, width // 2, 3)
    return np.asarray(cells.mean(axis=(0, 2, 4)), dtype=np.float32).ravel()
