"""Images and archives, good and bad, against the running app."""

import contextlib
import io
import struct
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from starlette.testclient import TestClient

from service.errors import ServiceError
from service.settings import LimitSettings
from service.uploads import FrameChoice, decode, unpack
from tests.service.conftest import FakeEmbedder, Start, assert_problem, assert_refused, enrol
from tests.service.making import (
    BLUE,
    GOOD,
    GREEN,
    RED,
    as_archive,
    as_frames,
    as_video,
    encode,
    noise,
    picture,
    png,
    video,
    zipped,
)

PLAIN = [("0.jpg", picture(RED)), ("1.jpg", picture(GREEN))]


def test_an_upload_without_a_file_is_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files={"identity": (None, "p1")})

    assert_refused(client, answer, 422, "validation")


def test_frames_and_a_video_at_once_are_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files=GOOD + as_video(video()))

    assert_refused(client, answer, 422, "validation")


def test_two_archives_are_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files=2 * as_archive(zipped(PLAIN)))

    assert_refused(client, answer, 422, "validation")


def test_an_empty_image_is_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files=as_frames([picture(), b""]))

    body = assert_refused(client, answer, 422, "undecodable-frame")
    assert "frame 1" in body["detail"]


@pytest.mark.parametrize("field", ["archive", "video"])
def test_an_empty_archive_or_video_file_is_refused(client: TestClient, field: str) -> None:
    answer = client.post("/gallery", files=[(field, ("empty", b""))])

    assert_refused(client, answer, 415, "unsupported-media")


def test_file_inputs_that_an_html_form_left_blank_do_not_count(client: TestClient) -> None:
    """A browser sends them as a part with an empty file name."""
    body = (
        b'--xyz\r\nContent-Disposition: form-data; name="frames"; filename="0.jpg"\r\n\r\n'
        + picture()
        + b'\r\n--xyz\r\nContent-Disposition: form-data; name="video"; filename=""\r\n'
        + b"Content-Type: application/octet-stream\r\n\r\n\r\n--xyz--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=xyz"}

    answer = client.post("/gallery", content=body, headers=headers)

    assert answer.status_code == 201


def test_a_text_file_called_jpg_is_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files=as_frames([b"not at all an image\n" * 20]))

    assert_refused(client, answer, 415, "unsupported-media")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "ICO", "PPM"])
def test_images_of_other_kinds_are_refused(client: TestClient, kind: str) -> None:
    answer = client.post("/gallery", files=as_frames([picture(RED, (32, 64), kind)]))

    assert_refused(client, answer, 415, "unsupported-media")


TRUNCATED = {
    "JPEG": encode(noise(), "JPEG"),
    "progressive": encode(noise(), "JPEG", progressive=True),
    "large": encode(noise(size=(256, 512)), "JPEG"),  # decoded at a smaller scale
    "PNG": encode(noise()),
    "WEBP": encode(noise(), "WEBP", lossless=True),
    "BMP": encode(noise(), "BMP"),
}


@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
@pytest.mark.parametrize("kind", TRUNCATED)
@pytest.mark.parametrize("part", [0.02, 0.6, 0.999])
def test_a_truncated_image_is_refused_used_or_not(
    client: TestClient, kind: str, part: float, used: bool
) -> None:
    whole = TRUNCATED[kind]
    images = [picture()] * 40
    # Of 40 frames 15 are used: the middle ones of each part, so 1, but not 0.
    images[1 if used else 0] = whole[: int(part * len(whole))]

    answer = client.post("/gallery", files=as_frames(images))

    assert_refused(client, answer, 422, "undecodable-frame")


@pytest.mark.parametrize("kind", TRUNCATED)
def test_the_same_images_are_accepted_whole(client: TestClient, kind: str) -> None:
    answer = client.post("/gallery", files=as_frames([TRUNCATED[kind]]))

    assert answer.status_code == 201


def test_bytes_behind_a_jpeg_do_not_hurt(client: TestClient) -> None:
    """Cameras append their own."""
    answer = client.post("/gallery", files=as_frames([picture() + b"maker's notes"]))

    assert answer.status_code == 201


def test_a_jpeg_with_a_thumbnail_inside_is_still_seen_as_cut_off(client: TestClient) -> None:
    """The thumbnail's end marker is not the image's."""
    thumbnail = picture(GREEN, (16, 16))
    application = b"\xff\xe5" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    whole = TRUNCATED["JPEG"]
    images = [picture()] * 40
    images[0] = (whole[:2] + application + whole[2:])[:-500]

    answer = client.post("/gallery", files=as_frames(images))

    assert_refused(client, answer, 422, "undecodable-frame")


@pytest.mark.parametrize("size", [(1, 1), (7, 64), (64, 7)])
def test_a_tiny_image_is_refused(client: TestClient, size: tuple[int, int]) -> None:
    answer = client.post("/gallery", files=as_frames([picture(), picture(RED, size, "PNG")]))

    body = assert_refused(client, answer, 422, "validation")
    assert body["errors"][0]["pointer"] == "/frames/1"


def test_the_smallest_image_allowed_is_taken(client: TestClient) -> None:
    enrol(client, as_frames([picture(RED, (8, 8))]))


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (10_000, 5_000),  # over our limit
        (10_000, 10_000),  # where Pillow warns
        (60_000, 60_000),  # where Pillow refuses
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_huge_image_is_refused_before_it_is_decoded(
    client: TestClient, width: int, height: int
) -> None:
    rows = bytes((width // 8 + 1) * min(height, 5000))
    image = png(width, height, 1, 0, rows)

    answer = client.post("/gallery", files=as_frames([image]))

    assert_refused(client, answer, 413, "payload-too-large")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_an_animated_image_is_refused(client: TestClient, kind: str) -> None:
    others = [noise(1), noise(2)]
    animated = encode(noise(0), kind, save_all=True, append_images=others)

    answer = client.post("/gallery", files=as_frames([animated]))

    assert_refused(client, answer, 415, "unsupported-media")


def used_pixels(embedder: FakeEmbedder) -> NDArray[np.float64]:
    """The first frame that reached the embedder."""
    return np.asarray(embedder.clips[0][0], dtype=np.float64)


def halves(left: int, right: int) -> Image.Image:
    """A grey image, dark left and light right."""
    pixels = np.full((64, 32), left, dtype=np.uint8)
    pixels[:, 16:] = right
    return Image.fromarray(pixels)


def grey_16_bit() -> bytes:
    """Left 0x4000, right 0xC000, big-endian as PNG has it."""
    row = b"\x00" + b"\x40\x00" * 16 + b"\xc0\x00" * 16
    return png(32, 64, 16, 0, row * 64)


def rgb_16_bit() -> bytes:
    row = b"\x00" + b"\x40\x00" * 48 + b"\xc0\x00" * 48
    return png(32, 64, 16, 2, row * 64)


def one_bit() -> bytes:
    return encode(halves(0, 255).convert("1"))


def palette() -> bytes:
    return encode(halves(64, 192).convert("RGB").quantize(4))


def transparent_palette() -> bytes:
    """Right half transparent, whatever the palette says there."""
    image = Image.fromarray((np.asarray(halves(0, 255)) > 0).astype(np.uint8), "L")
    image = image.convert("P")
    image.putpalette([64, 64, 64, 255, 0, 0] + [0] * 762)
    return encode(image, transparency=1)


def rgba() -> bytes:
    image = halves(64, 255).convert("RGBA")
    image.putalpha(halves(255, 0))
    return encode(image)


def grey_with_alpha() -> bytes:
    image = halves(64, 255).convert("LA")
    image.putalpha(halves(255, 0))
    return encode(image)


def cmyk() -> bytes:
    """Left C=M=Y=K=0 with K = 191: 64; right K = 63: 192."""
    zero = Image.new("L", (32, 64), 0)
    return encode(Image.merge("CMYK", (zero, zero, zero, halves(191, 63))), "JPEG", quality=95)


BACKGROUND = (124, 116, 104)  # the ImageNet mean, which normalises to zero


@pytest.mark.parametrize(
    ("make", "left", "right"),
    [
        (lambda: encode(halves(64, 192)), (64, 64, 64), (192, 192, 192)),
        (grey_16_bit, (64, 64, 64), (192, 192, 192)),
        (rgb_16_bit, (64, 64, 64), (192, 192, 192)),
        (one_bit, (0, 0, 0), (255, 255, 255)),
        (palette, (64, 64, 64), (192, 192, 192)),
        (transparent_palette, (64, 64, 64), BACKGROUND),
        (rgba, (64, 64, 64), BACKGROUND),
        (grey_with_alpha, (64, 64, 64), BACKGROUND),
        (cmyk, (64, 64, 64), (192, 192, 192)),
        (lambda: encode(halves(64, 192).convert("RGB"), "BMP"), (64,) * 3, (192,) * 3),
        (
            lambda: encode(halves(64, 192).convert("RGB"), "WEBP", lossless=True),
            (64, 64, 64),
            (192, 192, 192),
        ),
    ],
    ids=["grey", "grey-16", "rgb-16", "1-bit", "palette", "palette-transparent", "rgba", "la",
         "cmyk", "bmp", "webp"],
)  # fmt: skip
def test_images_of_all_modes_become_the_right_rgb(
    client: TestClient,
    embedder: FakeEmbedder,
    make: Callable[[], bytes],
    left: tuple[int, int, int],
    right: tuple[int, int, int],
) -> None:
    enrol(client, as_frames([make()]))

    pixels = used_pixels(embedder)
    assert pixels[:, 2:14].mean(axis=(0, 1)) == pytest.approx(left, abs=3)
    assert pixels[:, 18:30].mean(axis=(0, 1)) == pytest.approx(right, abs=3)


def test_an_image_turned_by_exif_is_taken_upright(
    client: TestClient, embedder: FakeEmbedder
) -> None:
    """Orientation 6 says: turn clockwise by a quarter to see it right."""
    upright = np.zeros((64, 32, 3), dtype=np.uint8)
    upright[:16] = RED
    upright[16:, :16] = GREEN
    upright[16:, 16:] = BLUE
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(np.rot90(upright).copy())  # counter-clockwise

    enrol(client, as_frames([encode(lying, "PNG", exif=exif)]))

    assert used_pixels(embedder) == pytest.approx(upright.astype(float))


def test_frames_are_used_in_the_order_they_were_sent(
    client: TestClient, embedder: FakeEmbedder
) -> None:
    enrol(client, as_frames([picture(RED), picture(GREEN), picture(BLUE)]))

    strongest = [int(frame.mean(axis=(0, 1)).argmax()) for frame in embedder.clips[0]]
    assert strongest == [0, 1, 2]


def test_15_frames_spread_evenly_are_used_of_40(client: TestClient, embedder: FakeEmbedder) -> None:
    greys = [encode(Image.new("L", (16, 16), 5 * level)) for level in range(40)]

    record = enrol(client, as_frames(greys))

    used = [round(float(frame.mean()) / 5) for frame in embedder.clips[0]]
    assert record["frames"] == {"received": 40, "used": 15}
    assert used == [int((part + 0.5) * 40 / 15) for part in range(15)]


def test_512_frames_are_taken_and_513_refused(start: Start) -> None:
    client = start()
    small = picture(RED, (8, 8))

    answer = client.post("/gallery", files=as_frames([small] * 513))

    assert_refused(client, answer, 413, "too-many-frames")
    assert enrol(client, as_frames([small] * 512))["frames"]["received"] == 512


def test_a_file_over_16_mib_is_refused(client: TestClient) -> None:
    whole = picture()
    at_limit = whole + bytes(16 * 1024 * 1024 - len(whole))

    answer = client.post("/gallery", files=as_frames([at_limit + b"\0"]))

    assert_refused(client, answer, 413, "payload-too-large")
    enrol(client, as_frames([at_limit]))


def test_zip_and_files_of_the_same_frames_are_the_same_content(client: TestClient) -> None:
    as_files = enrol(client, as_frames(content for _, content in PLAIN), tracklet_id="t1")

    answer = client.post(
        "/gallery", files=as_archive(zipped(PLAIN)), data={"tracklet_id": "t1"}
    )  # fmt: skip

    assert answer.status_code == 200
    assert answer.json() == as_files


def test_a_zip_is_read_in_natural_order(client: TestClient, embedder: FakeEmbedder) -> None:
    members = [("10.jpg", picture(BLUE)), ("2.jpg", picture(GREEN)), ("1.jpg", picture(RED))]

    enrol(client, as_archive(zipped(members, zipfile.ZIP_DEFLATED)))

    strongest = [int(frame.mean(axis=(0, 1)).argmax()) for frame in embedder.clips[0]]
    assert strongest == [0, 1, 2]


def test_folders_and_what_a_mac_adds_are_left_out_of_a_zip(client: TestClient) -> None:
    junk = [("__MACOSX/._0.jpg", b"x"), ("walk/.DS_Store", b"x"), ("walk/", b"")]
    members = junk + [(f"walk/{name}", content) for name, content in PLAIN]

    assert enrol(client, as_archive(zipped(members)))["frames"]["received"] == 2


@pytest.mark.parametrize(
    "name",
    ["../x.jpg", "a/../../x.jpg", "/x.jpg", "\\x.jpg", "..\\x.jpg", "C:\\x.jpg", "../x/",
     "__MACOSX/../../x.jpg"],
)  # fmt: skip
def test_a_zip_with_a_path_outside_itself_is_refused(client: TestClient, name: str) -> None:
    content = zipped([*PLAIN, (name, b"" if name.endswith("/") else picture())])

    answer = client.post("/gallery", files=as_archive(content))

    assert_refused(client, answer, 422, "validation")


def test_a_zip_bomb_is_refused(client: TestClient) -> None:
    """Each file is within its limit; together they are over the request's."""
    block = bytes(15 * 1024 * 1024)
    content = zipped([(f"{n}.bmp", block) for n in range(5)], zipfile.ZIP_DEFLATED)

    answer = client.post("/gallery", files=as_archive(content))

    assert len(content) < 100_000
    assert_refused(client, answer, 413, "payload-too-large")


def with_directory_sizes(content: bytes, size: int) -> bytes:
    """The zip with another unpacked size in its directory's first entry."""
    entry = content.index(b"PK\x01\x02")
    return content[: entry + 24] + struct.pack("<I", size) + content[entry + 28 :]


@pytest.mark.parametrize("claimed", [10, 14 * 1024 * 1024])
def test_a_zip_that_lies_about_a_size_is_refused(client: TestClient, claimed: int) -> None:
    content = zipped([("0.bmp", bytes(15 * 1024 * 1024))], zipfile.ZIP_DEFLATED)

    answer = client.post("/gallery", files=as_archive(with_directory_sizes(content, claimed)))

    assert_refused(client, answer, 422, "undecodable-frame")


def test_a_zip_bomb_that_claims_to_be_small_is_refused(client: TestClient) -> None:
    content = zipped([("0.bmp", bytes(64 * 1024 * 1024))], zipfile.ZIP_DEFLATED)

    answer = client.post("/gallery", files=as_archive(with_directory_sizes(content, 1000)))

    assert_refused(client, answer, 422, "undecodable-frame")


def test_a_zip_that_hides_a_long_directory_is_refused_before_it_is_read() -> None:
    """A hundred thousand empty members, of which the end record admits one."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *[0] * 9, 1, *[0] * 6) + b"a"
    directory = entry * 100_000
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), 0, 0)
    opened = zipfile.ZipFile(io.BytesIO(directory + end))

    with pytest.raises(ServiceError, match="got 100000 members"):
        unpack({"archive": [directory + end]}, LimitSettings())

    assert len(opened.infolist()) == 100_000  # so the standard library would have read it


def test_an_encrypted_zip_is_refused(client: TestClient) -> None:
    content = bytearray(zipped(PLAIN))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1

    answer = client.post("/gallery", files=as_archive(bytes(content)))

    assert_refused(client, answer, 415, "unsupported-media")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_compressed_in_an_unusual_way_is_refused(
    client: TestClient, compression: int
) -> None:
    answer = client.post("/gallery", files=as_archive(zipped(PLAIN, compression)))

    assert_refused(client, answer, 415, "unsupported-media")


@pytest.mark.parametrize("members", [[], [("a/", b""), ("a/b/", b"")]], ids=["empty", "folders"])
def test_a_zip_without_a_file_is_refused(
    client: TestClient, members: list[tuple[str, bytes]]
) -> None:
    answer = client.post("/gallery", files=as_archive(zipped(members)))

    assert_refused(client, answer, 422, "no-usable-frames")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_zip_is_refused(client: TestClient, part: float) -> None:
    whole = zipped(PLAIN)

    answer = client.post("/gallery", files=as_archive(whole[: int(part * len(whole))]))

    assert_refused(client, answer, 422, "undecodable-frame")


def test_a_zip_with_a_damaged_member_is_refused(client: TestClient) -> None:
    content = bytearray(zipped([("0.png", encode(noise()))], zipfile.ZIP_DEFLATED))
    content[60:200] = b"\xff" * 140

    answer = client.post("/gallery", files=as_archive(bytes(content)))

    assert_refused(client, answer, 422, "undecodable-frame")


def test_a_zip_with_a_text_file_is_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files=as_archive(zipped([*PLAIN, ("notes.txt", b"hello")])))

    assert_refused(client, answer, 415, "unsupported-media")


def test_a_zip_of_513_frames_is_refused(client: TestClient) -> None:
    small = picture(RED, (8, 8))
    content = zipped((f"{number}.jpg", small) for number in range(513))

    answer = client.post("/gallery", files=as_archive(content))

    assert_refused(client, answer, 413, "too-many-frames")


def test_something_else_as_archive_is_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files=as_archive(picture()))

    assert_refused(client, answer, 415, "unsupported-media")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    at=st.integers(0, 10_000),
    change=st.binary(min_size=1, max_size=8),
    compression=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
)
def test_a_zip_damaged_anywhere_is_read_or_refused(
    at: int, change: bytes, compression: int
) -> None:
    """Whatever the damage leads to in `zipfile`, it is our refusal that comes out."""
    content = bytearray(zipped([("a.bin", b"abc" * 20), ("b.bin", b"xyz" * 9)], compression))
    at %= len(content)
    content[at : at + len(change)] = change

    try:
        kind, files = unpack({"archive": [bytes(content)]}, LimitSettings())
    except ServiceError:
        return

    assert kind == "frames"
    assert files


@pytest.mark.parametrize("offset", range(22 + 46 + 35))
def test_a_zip_with_any_directory_byte_inverted_is_read_or_refused(offset: int) -> None:
    content = bytearray(zipped([("a.bin", b"abc" * 20)], zipfile.ZIP_DEFLATED))
    content[offset % len(content)] ^= 0xFF

    with contextlib.suppress(ServiceError):  # what matters is that nothing else comes out
        unpack({"archive": [bytes(content)]}, LimitSettings())


@pytest.mark.parametrize("bit", range(16))
def test_a_zip_with_any_flag_is_read_or_refused(client: TestClient, bit: int) -> None:
    content = bytearray(zipped(PLAIN))
    flags = content.index(b"PK\x01\x02") + 8
    content[flags + bit // 8] |= 1 << bit % 8

    answer = client.post("/gallery", files=as_archive(bytes(content)))

    assert answer.status_code in (201, 415, 422)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(kind=st.sampled_from(sorted(TRUNCATED)), at=st.integers(0), change=st.binary(min_size=1))
@pytest.mark.filterwarnings("ignore")
def test_an_image_damaged_anywhere_is_decoded_or_refused(kind: str, at: int, change: bytes) -> None:
    content = bytearray(TRUNCATED[kind])
    at %= min(len(content), 600)  # headers
    content[at : at + len(change)] = change
    choice = FrameChoice(1, "even", FakeEmbedder.preprocessing)

    try:
        decoded = decode("frames", [bytes(content)], choice, LimitSettings())
    except ServiceError:
        return

    assert decoded.clip.shape == (1, 64, 32, 3)


def test_a_refusal_does_not_repeat_what_was_sent(client: TestClient) -> None:
    answer = client.post("/gallery", files=as_frames([b"secret face bytes"]))

    assert "secret" not in assert_problem(answer, 415, "unsupported-media")["detail"]
