"""An uploaded tracklet becomes a clip: choose the frames, then decode only those.

Every frame is looked at (kind, size, whether its file is whole), so that what is refused does not
depend on
which frames are used.
"""

import enum
import hashlib
import io
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from model.datasets.tracklets import natural_key
from model.frames import Clip, Preprocessing, Sampling, choose_frames, prepare_frame
from service.errors import (
    NoUsableFramesError,
    PayloadTooLargeError,
    ServiceError,
    TooManyFramesError,
    UndecodableFrameError,
    UnsupportedMediaError,
    ValidationError,
)
from service.limits import FILE_FIELDS, FrameLimits
from service.quality import FrameQuality, measure_quality
from service.strips import film_strip

# Pillow's names. Its JPEG opener also answers MPO, a JPEG with a second picture behind it, as some
# cameras write; MPO itself is no opener, and naming it here fails for every format after it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_EXPECTED_IMAGE = "expected a JPEG, PNG, WebP or BMP image"
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
Stack = Callable[[Sequence[Clip]], Clip]  # frames of one shape become a clip
KEPT_QUALITY = 95  # of the frames of a video, which have no file of their own
_DIRECTORY_ENTRY = b"PK\x01\x02"


class Keep(enum.Flag):
    """What is stored of an upload, besides its embedding."""

    NOTHING = 0
    STRIP = enum.auto()
    FRAMES = enum.auto()


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """Which frames of an upload are used, and what they become.

    Args:
        used: How many frames make an embedding.
        sampling: How they are chosen.
        preprocessing: What they go through.
    """

    used: int
    sampling: Sampling
    preprocessing: Preprocessing


@dataclass(frozen=True, slots=True)
class DecodedTracklet:
    """An upload, ready to be embedded.

    Args:
        clip: (T, height, width, 3) uint8 RGB.
        positions: Which frame of the upload each of the T is.
        received: Frames in the upload.
        shortest_side: Of the smallest of the T as it was sent, pixels.
    """

    clip: Clip
    positions: tuple[int, ...]
    received: int
    shortest_side: int


class Decoded(NamedTuple):
    """All that is made of the files of an upload.

    Args:
        tracklet: Its frames.
        content: Digest of its files.
        strip: A JPEG, where one was asked for; see `service.strips`.
        quality: What its frames look like.
        frames: The used ones as image files, where they are kept; those of a video as JPEG.
    """

    tracklet: DecodedTracklet
    content: str
    strip: bytes | None
    quality: FrameQuality
    frames: tuple[bytes, ...] = ()


def decode_upload(
    files: dict[str, list[bytes]],
    choice: FrameChoice,
    limits: FrameLimits,
    *,
    keep: Keep = Keep.NOTHING,
    stack: Stack = np.stack,
) -> Decoded:
    """Make everything of an upload that takes time.

    Args:
        files: File fields of the form.
        choice: Which frames, and what they become.
        limits: What they may be.
        keep: What else is to be made.
        stack: Makes a clip of its frames, where it is to be.

    Raises:
        ServiceError: The upload is refused; the message says which frame and why.
    """
    kind, unpacked = unpack(files, limits)
    keep_frames = Keep.FRAMES in keep
    if kind == "video":
        tracklet, frames = _decode_video(
            unpacked[0], choice, limits, stack, keep_frames=keep_frames
        )
    else:
        tracklet = decode(kind, unpacked, choice, limits, stack)
        frames = tuple(unpacked[position] for position in tracklet.positions if keep_frames)
    strip = film_strip(tracklet.clip) if Keep.STRIP in keep else None
    quality = measure_quality(tracklet.clip, tracklet.shortest_side)
    return Decoded(tracklet, content_digest(unpacked), strip, quality, frames)


def content_digest(files: Sequence[bytes]) -> str:
    """Name the content of an upload: SHA-256 over its files in order, hex.

    The same frames sent as files or as a zip agree.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(struct.pack(">Q", len(file)))
        digest.update(file)
    return digest.hexdigest()


def unpack(files: dict[str, list[bytes]], limits: FrameLimits) -> tuple[str, list[bytes]]:
    """Take the one upload out of a form.

    Args:
        files: File fields of the form.
        limits: What an archive may hold.

    Returns:
        "frames" with image files in temporal order, or "video" with one file.

    Raises:
        ValidationError: There is none, or more than one.
        NoUsableFramesError: The archive holds no image.
        ServiceError: The archive is refused, see `_unpack_archive`.
    """
    sent = [name for name in FILE_FIELDS if files.get(name)]
    if len(sent) != 1:
        raise ValidationError(
            f"expected exactly one of {', '.join(FILE_FIELDS)}, got {', '.join(sent) or 'none'}",
            f"/{sent[0] if sent else 'frames'}",
        )
    kind = sent[0]
    content = files[kind]
    if kind != "frames" and len(content) > 1:
        raise ValidationError(f"expected one file in {kind}, got {len(content)}", f"/{kind}")
    if kind == "archive":
        return "frames", _unpack_archive(content[0], limits)
    return kind, content


def decode(
    kind: str,
    files: Sequence[bytes],
    choice: FrameChoice,
    limits: FrameLimits,
    stack: Stack = np.stack,
) -> DecodedTracklet:
    """Decode the frames of an upload that are used.

    Args:
        kind: "frames" or "video", from `unpack`.
        files: From `unpack`.
        choice: Which frames, and what they become.
        limits: What a frame may be.
        stack: See `decode_upload`.

    Raises:
        ServiceError: A frame or the video is refused; the message says which and why.
    """
    if kind == "video":
        return _decode_video(files[0], choice, limits, stack)[0]
    positions = choose_frames(len(files), choice.used, choice.sampling)
    chosen = frozenset(positions)
    clip, sides = [], []
    for position, file in enumerate(files):
        wanted = position in chosen
        frame, side = _decode_image(file, position, wanted, choice.preprocessing, limits)
        if frame is not None:
            clip.append(frame)
            sides.append(side)
    return DecodedTracklet(stack(clip), tuple(positions), len(files), min(sides))


def _decode_video(
    content: bytes,
    choice: FrameChoice,
    limits: FrameLimits,
    stack: Stack,
    *,
    keep_frames: bool = False,
) -> tuple[DecodedTracklet, tuple[bytes, ...]]:
    """Decode the used frames of a video; also as JPEG files, where they are kept."""
    from service.video import Pixels, read_video  # a third of a decoder's memory, seldom needed

    def choose(received: int) -> list[int]:
        return choose_frames(received, choice.used, choice.sampling)

    def prepare(pixels: Pixels) -> tuple[Clip, int, bytes]:
        image = Image.fromarray(pixels)
        file = io.BytesIO()
        if keep_frames:
            image.save(file, "JPEG", quality=KEPT_QUALITY)
        return prepare_frame(image, choice.preprocessing), min(image.size), file.getvalue()

    received, frames = read_video(content, choose, prepare, limits)
    positions = tuple(sorted(frames))
    clip, sides, files = zip(*(frames[position] for position in positions), strict=True)
    if (total := sum(map(len, files))) > limits.request_bytes:
        raise PayloadTooLargeError(
            f"expected used frames of at most {limits.request_bytes} bytes as JPEG, got {total}"
        )
    tracklet = DecodedTracklet(stack(clip), positions, received, min(sides))
    return tracklet, files if keep_frames else ()


def _decode_image(
    content: bytes,
    position: int,
    wanted: bool,
    preprocessing: Preprocessing,
    limits: FrameLimits,
) -> tuple[Clip | None, int]:
    """Check one image file; decode it only where it is wanted. Also its shortest side, pixels."""
    place = f"frame {position}"
    if not content:
        raise UndecodableFrameError(f"{place}: {_EXPECTED_IMAGE}, got an empty file")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise _unidentified(content, place) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PayloadTooLargeError(_too_many_pixels(place, limits, "far more")) from error
    except Exception as error:  # Pillow's parsers raise whatever a damaged header leads to
        raise UndecodableFrameError(f"{place}: {_EXPECTED_IMAGE}, got a damaged one") from error
    with image:
        _check_image(image, content, place, limits)
        side = min(image.size)  # before the decoder scales it
        if not wanted:
            return None, side
        try:
            return prepare_frame(image, preprocessing), side
        except Exception as error:  # likewise its decoders
            raise UndecodableFrameError(
                f"{place}: {_EXPECTED_IMAGE}, got one that is cut off or damaged"
            ) from error


def _check_image(image: Image.Image, content: bytes, place: str, limits: FrameLimits) -> None:
    size = f"{image.width}x{image.height}"
    if image.width * image.height > limits.frame_pixels:
        raise PayloadTooLargeError(_too_many_pixels(place, limits, size))
    if min(image.size) < limits.side_pixels:
        raise ValidationError(
            f"{place}: expected at least {limits.side_pixels} pixels on the shortest side, "
            f"got {size}",
            place.replace("frame ", "/frames/"),
        )
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise UnsupportedMediaError(
            f"{place}: expected a still image, got an animated one; send it as frames or as a video"
        )
    if not _WHOLE[image.format or ""](content):
        raise UndecodableFrameError(f"{place}: {_EXPECTED_IMAGE}, got one that is cut off")


def _too_many_pixels(place: str, limits: FrameLimits, got: str) -> str:
    return f"{place}: expected at most {limits.frame_pixels} pixels, got {got}"


def _unidentified(content: bytes, place: str) -> Exception:
    known = (b"\xff\xd8", b"\x89PNG", b"BM")
    if content.startswith(known) or (content.startswith(b"RIFF") and content[8:12] == b"WEBP"):
        return UndecodableFrameError(
            f"{place}: {_EXPECTED_IMAGE}, got one that is cut off or damaged"
        )
    return UnsupportedMediaError(f"{place}: {_EXPECTED_IMAGE}, got another kind of file")


def _jpeg_is_whole(content: bytes) -> bool:
    """Whether an end-of-image marker follows the first scan (one before it is a thumbnail's)."""
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0xDA:  # start of scan
            return content.rfind(b"\xff\xd9") > position
        standalone = marker == 0x01 or 0xD0 <= marker <= 0xD8
        position += 2 if standalone else 2 + int.from_bytes(content[position + 2 : position + 4])
    return False


def _webp_is_whole(content: bytes) -> bool:
    return len(content) >= int.from_bytes(content[4:8], "little") + 8


def _bmp_is_whole(content: bytes) -> bool:
    announced = int.from_bytes(content[2:6], "little")  # 0 where the writer did not care
    return len(content) >= announced


_WHOLE: dict[str, Callable[[bytes], bool]] = {
    "JPEG": _jpeg_is_whole,
    "MPO": _jpeg_is_whole,
    "PNG": lambda content: b"IEND\xaeB`\x82" in content,
    "WEBP": _webp_is_whole,
    "BMP": _bmp_is_whole,
}


def _unpack_archive(content: bytes, limits: FrameLimits) -> list[bytes]:
    """The images of a zip in natural order of their names.

    Raises:
        UnsupportedMediaError: It is no zip, is encrypted, or compressed in an unusual way.
        UndecodableFrameError: It is cut off or damaged.
        ValidationError: A member lies outside it.
        TooManyFramesError: It has more members than the limit.
        PayloadTooLargeError: It unpacks to more than the limit.
        NoUsableFramesError: It holds no file.
    """
    _check_member_count(content, limits)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _check_names(archive.infolist())
            members = [member for member in archive.infolist() if _is_frame(member)]
            _check_members(members, limits)
            members.sort(key=lambda member: natural_key(member.filename))
            return _read_members(archive, members, limits)
    except ServiceError:
        raise
    except Exception as error:  # zipfile and zlib raise whatever a damaged directory leads to
        if content.startswith(b"PK"):
            raise UndecodableFrameError(
                "expected a zip, got one that is cut off or damaged"
            ) from error
        raise UnsupportedMediaError("expected a zip, got another kind of file") from error


def _check_member_count(content: bytes, limits: FrameLimits) -> None:
    """Refuse a long directory before it is read: it may take a hundred times the zip's memory."""
    # Not the number that the end record gives: it may lie, and zipfile does not believe it either.
    members = content.count(_DIRECTORY_ENTRY)
    # Folders and a Mac's shadow files may come on top of the frames.
    if members > 4 * limits.frames:
        raise TooManyFramesError(f"expected at most {limits.frames} frames, got {members} members")


def _check_names(members: Sequence[zipfile.ZipInfo]) -> None:
    for position, member in enumerate(members):
        name = member.filename.replace("\\", "/")
        if name.startswith("/") or ".." in name.split("/") or name[1:2] == ":":
            raise ValidationError(
                f"archive member {position}: expected a name inside the zip, got one outside it",
                f"/archive/{position}",
            )


def _is_frame(member: zipfile.ZipInfo) -> bool:
    parts = member.filename.split("/")
    return not member.is_dir() and parts[0] != "__MACOSX" and parts[-1] != ".DS_Store"


def _check_members(members: list[zipfile.ZipInfo], limits: FrameLimits) -> None:
    if not members:
        raise NoUsableFramesError("expected a zip of images, got one without a file in it")
    if len(members) > limits.frames:
        raise TooManyFramesError(f"expected at most {limits.frames} frames, got {len(members)}")
    for position, member in enumerate(members):
        if member.flag_bits & 0x1:
            raise UnsupportedMediaError("expected a zip without a password, got an encrypted one")
        if member.compress_type not in _COMPRESSIONS:
            raise UnsupportedMediaError(
                f"archive member {position}: expected stored or deflated, got another compression"
            )
        if member.file_size > limits.file_bytes:
            raise PayloadTooLargeError(
                f"archive member {position}: expected at most {limits.file_bytes} bytes, "
                f"got {member.file_size}"
            )
    if (total := sum(member.file_size for member in members)) > limits.request_bytes:
        raise PayloadTooLargeError(
            f"expected a zip that unpacks to at most {limits.request_bytes} bytes, got {total}"
        )


def _read_members(
    archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], limits: FrameLimits
) -> list[bytes]:
    files = []
    spare = limits.request_bytes
    for member in members:
        with archive.open(member) as file:
            # The directory may lie about sizes: never take more than is left, and one byte to
            # notice.
            files.append(file.read(min(spare, limits.file_bytes) + 1))
        spare -= len(files[-1])
        if spare < 0 or len(files[-1]) > limits.file_bytes:
            raise PayloadTooLargeError(
                "expected a zip within the limits, got one that unpacks to more"
            )
    return files
