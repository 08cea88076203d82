"""Other looks of a crop: drawn by number, and made alike at every size."""

import numpy as np
import pytest
from PIL import Image

from model.frames import Clip
from model.views import Look, View, plan_view, render_view

PLAIN = Look(turn=0.0, gain=1.0, contrast=1.0)
WHOLE = (0.0, 0.0, 1.0, 1.0)
CAMERAS = [[0, 1, 2, 3, 4, 5, 6], [7, 8]]


def crop(seed: int = 0, height: int = 64, width: int = 32) -> Clip:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 4, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def test_a_view_that_changes_nothing_is_the_crop() -> None:
    assert np.array_equal(render_view(View(PLAIN, WHOLE), crop(), crop), crop())


def test_views_depend_on_their_numbers_alone_and_differ() -> None:
    assert plan_view(3, 1, CAMERAS) == plan_view(3, 1, CAMERAS)
    assert len({plan_view(crop, number, CAMERAS) for crop in range(5) for number in (1, 2)}) == 10


def test_partners_and_styles_are_of_every_camera_as_often() -> None:
    """Of nine crops two are of the second camera, but half of the partners and of the styles."""
    plans = [plan_view(crop, number, CAMERAS) for crop in range(9) for number in range(1, 400)]
    partners = [plan.partner for plan in plans if plan.partner is not None]
    styles = [plan.style for plan in plans if plan.style is not None]

    assert len(partners) / len(plans) == pytest.approx(0.5, abs=0.03)
    assert len(styles) / len(plans) == pytest.approx(0.6, abs=0.03)
    assert np.mean([one >= 7 for one in partners]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([one >= 7 for one in styles]) == pytest.approx(0.5, abs=0.03)


def test_a_turn_by_a_third_permutes_the_channels_and_leaves_grey() -> None:
    red = np.full((32, 32, 3), (200, 10, 10), np.uint8)
    grey = np.full((32, 32, 3), 90, np.uint8)
    third = View(Look(2 * np.pi / 3, 1.0, 1.0), WHOLE)

    turned = render_view(third, red, crop)[0, 0].tolist()

    assert turned[0] == 10
    assert sorted(turned) == [10, 10, 200]
    assert np.array_equal(render_view(third, grey, crop), grey)


def test_gain_and_contrast_are_about_black_and_the_mean() -> None:
    """(mean + (pixel - mean) c) g of a half at 50 and a half at 150: mean 100."""
    halves = np.full((32, 32, 3), 50, np.uint8)
    halves[16:] = 150

    shown = render_view(View(Look(0.0, 1.2, 0.5), WHOLE), halves, crop)

    assert (shown[0, 0, 0], shown[-1, 0, 0]) == (90, 150)


def test_the_lower_part_is_the_partners_from_the_seam_on() -> None:
    shown = render_view(View(PLAIN, WHOLE, partner=2, seam=0.5), crop(1), crop)

    assert np.array_equal(shown[:32], crop(1)[:32])
    assert np.array_equal(shown[32:], crop(2)[32:])


def test_a_style_gives_its_mean_and_deviation_to_each_channel() -> None:
    calm = (100 + (crop(1).astype(int) - 128) // 4).astype(np.uint8)  # nothing is cut off
    other = (80 + (crop(2).astype(int) - 128) // 3).astype(np.uint8)

    shown = render_view(View(PLAIN, WHOLE, style=2), calm, lambda _: other)

    assert shown.mean(axis=(0, 1)) == pytest.approx(other.mean(axis=(0, 1)), abs=0.5)
    assert shown.std(axis=(0, 1)) == pytest.approx(other.std(axis=(0, 1)), abs=0.5)
    half = render_view(View(PLAIN, WHOLE, style=2, strength=0.5), calm, lambda _: other)
    assert half == pytest.approx((calm.astype(float) + shown) / 2, abs=1)


def test_the_window_is_what_is_kept() -> None:
    """The lower right quarter of four flat quarters is flat."""
    quarters = np.zeros((64, 64, 3), np.uint8)
    quarters[32:, 32:] = 200

    assert (render_view(View(PLAIN, (0.5, 0.5, 0.5, 0.5)), quarters, crop)[2:, 2:] == 200).all()


def test_crops_are_not_changed() -> None:
    own, others = crop(1), {number: crop(number) for number in range(9)}
    for number in range(1, 20):
        render_view(plan_view(1, number, CAMERAS), own, others.__getitem__)

    assert np.array_equal(own, crop(1))
    assert all(np.array_equal(one, crop(number)) for number, one in others.items())


@pytest.mark.parametrize("number", range(1, 9))
def test_a_view_is_the_same_at_every_size(number: int) -> None:
    """A teacher and a student take other sizes; what they are shown must be one picture."""
    plan = plan_view(0, number, CAMERAS)

    small = render_view(plan, crop(1), crop)
    large = render_view(plan, crop(1, 256, 128), lambda seed: crop(seed, 256, 128))

    shrunk = np.asarray(Image.fromarray(large).resize((32, 64), Image.Resampling.BILINEAR))
    assert np.abs(shrunk.astype(int) - small).mean() < 6
