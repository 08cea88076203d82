"""Which frames are used, and how an image becomes input."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from model.errors import InvalidFramesError
from model.frames import (
    Clip,
    Preprocessing,
    Sampling,
    choose_frames,
    normalise,
    prepare_frame,
    read_clip,
    to_rgb,
)

SMALL = Preprocessing(height=64, width=32)


@given(received=st.integers(1, 2000), used=st.integers(1, 64))
def test_even_frames_are_distinct_sorted_and_evenly_spread(received: int, used: int) -> None:
    """Gaps, and what is left before and after, differ by at most one frame."""
    chosen = choose_frames(received, used)

    assert len(chosen) == min(used, received)
    assert chosen == sorted(set(chosen))
    assert chosen[0] >= 0
    assert chosen[-1] < received
    gaps = np.diff(chosen)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
    assert abs(chosen[0] - (received - 1 - chosen[-1])) <= 1


def test_even_takes_the_middle_of_each_part() -> None:
    assert choose_frames(9, 3) == [1, 4, 7]
    assert choose_frames(3, 15) == [0, 1, 2]


@given(received=st.integers(1, 300), seed=st.integers(0, 9))
def test_random_frames_are_in_order_and_always_as_many_as_asked(received: int, seed: int) -> None:
    chosen = choose_frames(received, 15, "random", np.random.default_rng(seed))

    assert len(chosen) == 15
    assert set(chosen) <= set(range(received))
    if received >= 15:
        assert chosen == sorted(set(chosen))
    else:
        assert set(chosen) == set(range(received))


def test_random_frames_repeat_with_their_seed_only() -> None:
    def draw(seed: int) -> list[int]:
        return choose_frames(200, 15, "random", np.random.default_rng(seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_all_takes_all() -> None:
    assert choose_frames(40, 15, "all") == list(range(40))


def test_there_must_be_a_frame_a_count_and_a_known_way() -> None:
    with pytest.raises(InvalidFramesError, match="at least one frame"):
        choose_frames(0, 15)
    with pytest.raises(ValueError, match="at least 1"):
        choose_frames(3, 0)
    with pytest.raises(ValueError, match="sampling"):
        choose_frames(3, 1, "odd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="generator"):
        choose_frames(30, 1, "random")


def test_16_bit_greys_are_scaled_and_not_clipped() -> None:
    """65535 is white, 0x8080 the middle grey; Pillow's own conversion would make both white."""
    deep = Image.fromarray(np.array([[0, 0x8080, 65535]], dtype=np.uint16))

    assert np.asarray(to_rgb(deep))[0, :, 0].tolist() == [0, 128, 255]


def test_transparent_pixels_take_the_colour_that_normalises_to_zero() -> None:
    image = Image.new("RGBA", (32, 64), (255, 0, 0, 0))

    frame = prepare_frame(image, SMALL)

    assert normalise(torch.from_numpy(frame[None].copy()), SMALL).abs().max() < 0.01


def test_an_exif_rotation_is_applied() -> None:
    upright = np.zeros((64, 32, 3), dtype=np.uint8)
    upright[:16] = (255, 0, 0)  # red on top
    lying = Image.fromarray(np.rot90(upright).copy())
    lying.getexif()[0x0112] = 6  # turn a quarter clockwise to see it upright

    assert np.array_equal(np.asarray(to_rgb(lying)), upright)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (20, 50), (255, 255, 255)).convert(mode)

    frame = prepare_frame(image, SMALL)

    assert frame.shape == (64, 32, 3)
    assert frame.dtype == np.uint8
    assert frame.min() >= 250


def street(width: int, height: int, seed: int = 0) -> Image.Image:
    """What cameras see: large shapes strong, fine ones weak (1/f), and hard edges; noise on top."""
    rng = np.random.default_rng(seed)
    cycles = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / np.maximum(cycles, 1)
    levels = np.fft.irfft2(spectrum, (height, width))
    levels = 128 + 50 * (levels - levels.mean()) / levels.std()
    for _ in range(12):
        top, left = rng.integers(height), rng.integers(width)
        levels[:, top : top + height // 4, left : left + width // 4] += rng.integers(-60, 60)
    levels += rng.normal(scale=3, size=levels.shape)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def opened(image: Image.Image, kind: str = "JPEG", **options: Any) -> Image.Image:
    """An image written to a file and opened again, not yet decoded."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def plainly(image: Image.Image, preprocessing: Preprocessing) -> Clip:
    """What `prepare_frame` is, without anything left out: decode all, turn, convert, resize."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    size = (preprocessing.width, preprocessing.height)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    return np.asarray(upright.resize(size, filters[preprocessing.interpolation]))


def error(image: Image.Image, expected: NDArray[np.uint8], preprocessing: Preprocessing) -> Any:
    """By how many levels each value of a prepared frame is off."""
    return np.abs(prepare_frame(image, preprocessing).astype(int) - expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((32, 64), {}),  # the network's own
        ((16, 40), {}),
        ((48, 128), {}),
        ((127, 256), {}),  # a pixel below four times as wide
        ((128, 255), {}),
        ((32, 64), {"progressive": True}),
        ((400, 800), {"kind": "PNG"}),
        ((400, 800), {"kind": "BMP"}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_frames_that_are_not_large_jpegs_are_prepared_to_the_bit(
    size: tuple[int, int], options: dict[str, Any], mode: str, interpolation: Any
) -> None:
    preprocessing = Preprocessing(height=64, width=32, interpolation=interpolation)
    image = street(*size).convert(mode)

    got = prepare_frame(opened(image, **options), preprocessing)

    assert np.array_equal(got, plainly(opened(image, **options), preprocessing))


def test_a_large_jpeg_that_exif_turns_is_prepared_to_the_bit() -> None:
    exif = Image.Exif()
    for orientation in range(2, 9):
        exif[0x0112] = orientation
        image = street(300, 300)

        got = prepare_frame(opened(image, exif=exif), SMALL)

        assert np.array_equal(got, plainly(opened(image, exif=exif), SMALL))


def test_a_decoded_image_is_prepared_to_the_bit() -> None:
    """A draft of what is decoded already would be garbage."""
    image = opened(street(300, 600))
    image.load()

    assert np.array_equal(prepare_frame(image, SMALL), plainly(image, SMALL))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "scaled_to"),
    [
        ((128, 256), (64, 128)),
        ((131, 261), (66, 131)),  # neither side divides
        ((256, 512), (64, 128)),
        ((1000, 700), (250, 175)),
        ((1024, 1024), (128, 128)),
    ],
)
@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {}), ("RGB", {"progressive": True}), ("RGB", {"subsampling": 0}), ("L", {}),
     ("CMYK", {}), ("RGB", {"kind": "MPO", "save_all": True})],
    ids=["plain", "progressive", "full colour", "grey", "cmyk", "mpo"],
)  # fmt: skip
def test_a_large_jpeg_is_decoded_smaller_within_the_stated_tolerance(
    size: tuple[int, int],
    scaled_to: tuple[int, int],
    mode: str,
    options: dict[str, Any],
    interpolation: Any,
) -> None:
    """By less than 2 levels in the mean and 16 at most, of 255; at least twice the size is left."""
    preprocessing = Preprocessing(height=64, width=32, interpolation=interpolation)
    image = street(*size).convert(mode)
    expected = plainly(opened(image, **options), preprocessing)
    large = opened(image, **options)

    wrong = error(large, expected, preprocessing)

    assert large.size == scaled_to
    assert wrong.mean() < 2
    assert wrong.max() <= 16


def test_a_large_jpeg_keeps_its_place_where_the_scale_divides_no_side() -> None:
    """The last column of the smaller decode stands for a part of one."""
    ramp = np.linspace(0, 255, 135).round().astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp, (257, 135)).copy())
    expected = plainly(opened(image, quality=100), SMALL)

    assert error(opened(image, quality=100), expected, SMALL).max() <= 1


def test_a_large_jpeg_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    street(256, 512).save(path)
    path.write_bytes(path.read_bytes()[:-1000])

    with pytest.raises(InvalidFramesError, match="could not decode"):
        read_clip([path], SMALL)


def test_an_image_outlives_its_file(tmp_path: Path) -> None:
    street(32, 64).save(tmp_path / "frame.bmp")
    with Image.open(tmp_path / "frame.bmp") as image:
        rgb = to_rgb(image)

    assert np.array_equal(np.asarray(rgb), np.asarray(street(32, 64)))


def test_shrinking_filters_against_aliasing() -> None:
    """A fine chequerboard becomes even grey; without a filter it would stay black or white."""
    fine = (np.indices((640, 320)).sum(axis=0) % 2 * 255).astype(np.uint8)

    frame = prepare_frame(Image.fromarray(fine), SMALL)

    assert abs(int(frame.min()) - 127) <= 4
    assert abs(int(frame.max()) - 128) <= 4


@pytest.mark.parametrize("sampling", ["random", "consecutive", "chunks"])
@pytest.mark.parametrize("received", [1, 4, 15, 16, 40])
def test_every_draw_returns_as_many_frames_as_asked(sampling: Sampling, received: int) -> None:
    rng = np.random.default_rng(0)

    for _ in range(50):
        chosen = choose_frames(received, 15, sampling, rng)
        assert len(chosen) == 15
        assert set(chosen) <= set(range(received))
        if received >= 15:
            assert chosen == sorted(set(chosen))


def test_a_consecutive_run_may_begin_anywhere_it_fits() -> None:
    """Public code never draws the last starts."""
    rng = np.random.default_rng(0)

    starts = set()
    for _ in range(300):
        chosen = choose_frames(20, 15, "consecutive", rng)
        assert chosen == list(range(chosen[0], chosen[0] + 15))
        starts.add(chosen[0])

    assert starts == set(range(6))


def test_chunks_take_one_frame_of_each_part() -> None:
    rng = np.random.default_rng(0)

    for _ in range(50):
        chosen = choose_frames(30, 15, "chunks", rng)
        assert [position // 2 for position in chosen] == list(range(15))


@pytest.mark.parametrize("sampling", ["random", "consecutive", "chunks"])
def test_a_draw_needs_a_seeded_generator(sampling: Sampling) -> None:
    with pytest.raises(ValueError, match=f"{sampling} sampling: expected a seeded generator"):
        choose_frames(20, 15, sampling)


def test_normalising_matches_its_formula_channel_by_channel() -> None:
    """Red, green and blue in this order: a swap would move the result by a tenth and more."""
    frame = torch.zeros(1, 64, 32, 3, dtype=torch.uint8)
    frame[..., 0], frame[..., 1], frame[..., 2] = 10, 100, 250

    pixels = normalise(frame, SMALL)

    expected = [
        (10 / 255 - 0.485) / 0.229,
        (100 / 255 - 0.456) / 0.224,
        (250 / 255 - 0.406) / 0.225,
    ]
    assert pixels.shape == (1, 3, 64, 32)
    assert pixels[0, :, 5, 5].tolist() == pytest.approx(expected, abs=1e-6)


def test_frames_of_another_shape_or_type_are_refused() -> None:
    with pytest.raises(InvalidFramesError, match="expected frames"):
        normalise(torch.zeros(1, 3, 64, 32, dtype=torch.uint8), SMALL)
    with pytest.raises(InvalidFramesError, match="expected frames"):
        normalise(torch.zeros(1, 64, 32, 3), SMALL)


def test_a_header_that_claims_a_huge_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.bmp"
    Image.new("RGB", (8, 8)).save(path)
    header = bytearray(path.read_bytes())
    header[18:26] = (60_000).to_bytes(4, "little") * 2
    path.write_bytes(header)

    with pytest.raises(InvalidFramesError, match="could not decode"):
        read_clip([path], SMALL)


def test_only_chosen_frames_are_decoded(tmp_path: Path) -> None:
    paths = []
    for number in range(9):
        paths.append(tmp_path / f"{number}.png")
        if number in (1, 4, 7):
            Image.new("RGB", (32, 64), (number, 0, 0)).save(paths[-1])
        else:
            paths[-1].write_bytes(b"not an image")

    clip = read_clip(paths, SMALL, used=3)

    assert clip.shape == (3, 64, 32, 3)
    assert clip[:, 0, 0, 0].tolist() == [1, 4, 7]
    with pytest.raises(InvalidFramesError, match="could not decode"):
        read_clip(paths, SMALL, used=4)


def test_preprocessing_refuses_what_makes_no_sense() -> None:
    for wrong in ({"height": 8}, {"interpolation": "nearest"}, {"std": (0.0, 1.0, 1.0)}):
        with pytest.raises(ValueError, match="expected"):
            Preprocessing(**wrong)
