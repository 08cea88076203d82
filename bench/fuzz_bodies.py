"""What a fuzzer sends: good files of every kind that is taken, and ways to spoil them.

Everything comes from a seed, so that a number says which request it was. The files are drawn here,
small, and show noise that compresses badly: a byte changed in them is mostly a byte of an image.
"""

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

BOUNDARY = "fuzz-7d1c"
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
# Where bugs live: the ends of every width, signs, and one more or less than a power of two.
INTERESTING: tuple[int, ...] = (
    *(0, 1, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1),
)
# What the formats call their pieces by: a length stands before it, or its content behind it.
TAGS = (
    *(b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"IEND", b"eXIf", b"iCCP", b"acTL"),
    *(b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xdb", b"\xff\xe1", b"\xff\xdd"),
    *(b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ALPH", b"RIFF", b"WEBP", b"AVI ", b"LIST", b"avih"),
    *(b"strh", b"strf", b"movi", b"idx1", b"00dc", b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"),
    *(b"ftyp", b"moov", b"mdat", b"stsd", b"stsz", b"stco", b"stts", b"elst", b"dref", b"mvhd"),
    *(b"\x1aE\xdf\xa3", b"\x16T\xaek", b"\x1fC\xb6u", b"\r\n\r\n", b"--", b'name="', b"filename"),
)
_SIZE = (24, 48)  # width, height
_FRAMES = 6
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Seed:
    """A good file.

    Args:
        name: Of its kind.
        field: Of the form that takes it.
        content: The file.
    """

    name: str
    field: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Edit:
    """One way to spoil bytes.

    Args:
        kind: One of `EDITS`.
        at: Where, as a part of the length, 0 to 1.
        size: How many bytes, at least 1.
        value: What is written, where something is.
    """

    kind: str
    at: float
    size: int
    value: int


def lots(name: object) -> random.Random:
    """A generator that a name begins; nothing that it draws is a secret."""
    return random.Random(str(name))  # noqa: S311


def _noise(seed: int, mode: str = "RGB") -> Image.Image:
    width, height = _SIZE
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _turned() -> bytes:
    """A JPEG with EXIF data that turns it, and a thumbnail's room in it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 40
    return _encode(_noise(4), "JPEG", exif=exif)


def _archive(compression: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for number in range(4):
            member = zipfile.ZipInfo(f"crops/{number}.jpg")
            archive.writestr(member, _encode(_noise(number), "JPEG"), compression)
    return file.getvalue()


def _video(container: str, codec: str) -> bytes:
    file = io.BytesIO()
    # Bit-exact: without dates and names of libraries, so that a seed is a seed.
    options = {"fflags": "+bitexact"}
    with av.open(file, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=25)
        assert isinstance(stream, VideoStream)  # noqa: S101 a video codec was asked for
        stream.width, stream.height = 48, 96
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(_FRAMES):
            pixels = np.asarray(_noise(number).resize((48, 96)))
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()


@cache
def seeds() -> tuple[Seed, ...]:
    """Good files of every kind, each made once."""
    images = {
        "jpeg": _encode(_noise(0), "JPEG"),
        "jpeg-progressive": _encode(_noise(1), "JPEG", progressive=True),
        "jpeg-grey": _encode(_noise(2, "L"), "JPEG"),
        "jpeg-cmyk": _encode(_noise(3, "CMYK"), "JPEG"),
        "jpeg-exif": _turned(),
        "png": _encode(_noise(5), "PNG"),
        "png-palette": _encode(_noise(6, "P"), "PNG", transparency=3),
        "png-16": _encode(Image.fromarray(np.arange(1152, dtype=np.uint16).reshape(48, 24)), "PNG"),
        "png-alpha": _encode(_noise(7, "RGBA"), "PNG"),
        "webp": _encode(_noise(8), "WEBP"),
        "webp-lossless": _encode(_noise(9), "WEBP", lossless=True),
        "webp-alpha": _encode(_noise(10, "RGBA"), "WEBP"),
        "bmp": _encode(_noise(11), "BMP"),
        "bmp-palette": _encode(_noise(12, "P"), "BMP"),
    }
    archives = {
        "zip-stored": _archive(zipfile.ZIP_STORED),
        "zip-deflated": _archive(zipfile.ZIP_DEFLATED),
    }
    videos = {
        "mp4": _video("mp4", "mpeg4"),
        "mp4-h264": _video("mp4", "libx264"),
        "avi": _video("avi", "mpeg4"),
        "avi-mjpeg": _video("avi", "mjpeg"),
        "matroska": _video("matroska", "mpeg4"),
        "webm": _video("webm", "libvpx"),
        "mpegts": _video("mpegts", "libx264"),
    }
    named = (("frames", images), ("archive", archives), ("video", videos))
    return tuple(
        Seed(name, field, content) for field, kinds in named for name, content in kinds.items()
    )


def _flip(content: bytearray, at: int, edit: Edit) -> None:
    content[at] ^= 1 << (edit.value % 8)


def _write_random(content: bytearray, at: int, edit: Edit) -> None:
    wanted = lots(edit.value).randbytes(edit.size)
    content[at : at + edit.size] = wanted[: len(content) - at]


def _write_number(content: bytearray, at: int, edit: Edit) -> None:
    width = (1, 2, 4, 8)[edit.size % 4]
    number = INTERESTING[edit.value % len(INTERESTING)] % 2 ** (8 * width)
    written = number.to_bytes(width, "little" if edit.value % 2 else "big")
    content[at : at + width] = written[: len(content) - at]


def _write_beside_tag(content: bytearray, at: int, edit: Edit) -> None:
    """A number where a length is likely: just before or just after the name of a piece."""
    tags = [tag for tag in TAGS if tag in content]
    if not tags:
        _write_number(content, at, edit)
        return
    tag = tags[edit.value % len(tags)]
    found = content.find(tag, at)
    place = found if found >= 0 else content.find(tag)
    place += (-4, len(tag), len(tag) + 4, -2, 0)[edit.size % 5]
    _write_number(content, max(0, min(place, len(content) - 1)), edit)


def _delete(content: bytearray, at: int, edit: Edit) -> None:
    del content[at : at + edit.size]


def _repeat(content: bytearray, at: int, edit: Edit) -> None:
    content[at:at] = content[at : at + edit.size] * (1 + edit.value % 4)


def _insert(content: bytearray, at: int, edit: Edit) -> None:
    content[at:at] = lots(edit.value).randbytes(edit.size)


def _zero(content: bytearray, at: int, edit: Edit) -> None:
    length = min(edit.size, len(content) - at)
    content[at : at + length] = bytes([255 * (edit.value % 2)]) * length


def _cut(content: bytearray, at: int, _: Edit) -> None:
    del content[at:]


def _splice(content: bytearray, at: int, edit: Edit) -> None:
    """Go on with another file, from the same place on."""
    other = seeds()[edit.value % len(seeds())].content
    content[at:] = other[int(edit.at * len(other)) :]


def _move(content: bytearray, at: int, edit: Edit) -> None:
    piece = content[at : at + edit.size]
    del content[at : at + edit.size]
    place = edit.value % (len(content) + 1)
    content[place:place] = piece


_Spoil = Callable[[bytearray, int, Edit], None]
_SPOIL: dict[str, _Spoil] = {
    "flip": _flip,
    "random": _write_random,
    "number": _write_number,
    "tag": _write_beside_tag,
    "delete": _delete,
    "repeat": _repeat,
    "insert": _insert,
    "zero": _zero,
    "cut": _cut,
    "splice": _splice,
    "move": _move,
}
EDITS = tuple(_SPOIL)


def spoil(content: bytes, edits: Sequence[Edit]) -> bytes:
    """Apply edits one after the other; what is empty stays so."""
    spoiled = bytearray(content)
    for edit in edits:
        if spoiled:
            at = min(int(edit.at * len(spoiled)), len(spoiled) - 1)
            _SPOIL[edit.kind](spoiled, at, edit)
    return bytes(spoiled)


def mend_checksums(content: bytes) -> bytes:
    """Make the checksums of a PNG's chunks right, so that what is behind them is read, too."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    mended, at = bytearray(content), 8
    while at + 12 <= len(mended):
        [length] = struct.unpack_from(">I", mended, at)
        end = at + 8 + length
        if end + 4 > len(mended):
            break
        struct.pack_into(">I", mended, end, zlib.crc32(mended[at + 4 : end]))
        at = end + 4
    return bytes(mended)


def draw_edits(rng: random.Random, most: int = 4) -> list[Edit]:
    """One to ``most`` edits; mostly few bytes, because much damage is found out early."""
    return [
        Edit(
            kind=rng.choice(EDITS),
            # Headers are where decisions are made: half of the edits go there.
            at=rng.random() ** (4 if rng.random() < 0.5 else 1),
            size=rng.choice((1, 1, 2, 3, 4, 8, 16, 64, 300)),
            value=rng.getrandbits(32),
        )
        for _ in range(rng.randint(1, most))
    ]


def form(parts: Sequence[tuple[str, str | None, bytes]]) -> bytes:
    """A multipart body of (name, file name or None, content)."""
    body = bytearray()
    for name, file_name, content in parts:
        disposition = f'form-data; name="{name}"'
        disposition += "" if file_name is None else f'; filename="{file_name}"'
        body += f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode()
        body += content + b"\r\n"
    return bytes(body + f"--{BOUNDARY}--\r\n".encode())


@dataclass(frozen=True, slots=True)
class Upload:
    """One request of the fuzzer.

    Args:
        path: Of the route.
        content_type: With its boundary, which may be spoiled, too.
        body: All of it.
        seed: Name of the file that it was made of.
    """

    path: str
    content_type: str
    body: bytes
    seed: str

    def request(self) -> bytes:
        """All bytes of the request."""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Length: {len(self.body)}\r\nContent-Type: {self.content_type}\r\n\r\n"
        )
        return head.encode("latin-1", "replace") + self.body


_ROUTES = ("/gallery", "/query", "/embed", "/verify")


def make_upload(seed: Seed, edits: Sequence[Edit], rng: random.Random) -> Upload:
    """An upload of a spoiled file, or a spoiled form around a good one.

    Args:
        seed: The file.
        edits: What becomes of it.
        rng: Draws the route, what else is in the form, and what is spoiled.
    """
    in_form = rng.random() < 0.2
    content = seed.content if in_form else mend_checksums(spoil(seed.content, edits))
    path = rng.choice(_ROUTES)
    parts: list[tuple[str, str | None, bytes]] = []
    for prefix in ("a_", "b_") if path == "/verify" else ("",):
        copies = rng.choice((1, 1, 3)) if seed.field == "frames" else 1
        parts += [(prefix + seed.field, "file", content)] * copies
        if seed.field == "frames" and rng.random() < 0.5:  # company that is well
            parts.append((f"{prefix}frames", "good.jpg", seeds()[0].content))
    if path == "/gallery":
        parts[:0] = [
            ("camera", None, b"c1"),
            # So that what is sent twice is stored once.
            ("tracklet_id", None, f"{rng.getrandbits(64):016x}".encode()),
        ]
        parts += [("metadata", None, b'{"a": [1, null]}')] * (rng.random() < 0.3)
    body, content_type = form(parts), FORM_TYPE
    if in_form:
        body = spoil(body, edits)
        if rng.random() < 0.1:
            spoiled = spoil(content_type.encode(), draw_edits(rng, 1)).decode("latin-1")
            content_type = "".join(one for one in spoiled if one.isprintable())
    return Upload(path, content_type, body, f"{seed.name}{'+form' if in_form else ''}")


def draw_upload(seed: int, number: int) -> Upload:
    """Request ``number`` of a run.

    Args:
        seed: Of the run.
        number: From 0 on.
    """
    rng = lots(f"{seed}/{number}")
    return make_upload(rng.choice(seeds()), draw_edits(rng), rng)
