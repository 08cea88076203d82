"""Other looks of a crop: drawn by number, and made alike at every size."""

import numpy as np
import pytest
from PIL import Image

from model.frames import Clip
from model.views import Look, View, plan_view, render_view

SAME = Look(turn=0.0, gain=1.0, contrast=1.0)
WHOLE = (0.0, 0.0, 1.0, 1.0)


def crop(seed: int = 0, height: int = 64, width: int = 32) -> Clip:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 4, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def test_a_view_that_changes_nothing_is_the_crop() -> None:
    view = View(SAME, None, SAME, 0.5, WHOLE)

    assert np.array_equal(render_view(view, crop(), None), crop())


def test_views_depend_on_their_numbers_alone_and_differ() -> None:
    assert plan_view(3, 1, 50) == plan_view(3, 1, 50)
    assert len({plan_view(crop, number, 50) for crop in range(5) for number in (1, 2, 3)}) == 15


def test_a_turn_by_a_third_takes_red_to_green_and_leaves_grey() -> None:
    """About the grey axis, 120 degrees permute the channels."""
    red = np.full((32, 32, 3), (200, 10, 10), np.uint8)
    grey = np.full((32, 32, 3), 90, np.uint8)
    third = View(Look(2 * np.pi / 3, 1.0, 1.0), None, SAME, 0.5, WHOLE)

    assert sorted(render_view(third, red, None)[0, 0].tolist()) == [10, 10, 200]
    assert render_view(third, red, None)[0, 0, 0] == 10
    assert np.array_equal(render_view(third, grey, None), grey)


def test_gain_and_contrast_are_about_black_and_the_mean() -> None:
    """(mean + (pixel - mean) c) g of a half at 50 and a half at 150: mean 100."""
    halves = np.full((32, 32, 3), 50, np.uint8)
    halves[16:] = 150
    view = View(Look(0.0, 1.2, 0.5), None, SAME, 0.5, WHOLE)

    shown = render_view(view, halves, None)

    assert (shown[0, 0, 0], shown[-1, 0, 0]) == (90, 150)


def test_the_lower_part_is_the_partners_from_the_seam_on() -> None:
    view = View(SAME, 7, SAME, 0.5, WHOLE)

    shown = render_view(view, crop(1), crop(2))

    assert np.array_equal(shown[:32], crop(1)[:32])
    assert np.array_equal(shown[32:], crop(2)[32:])


def test_the_window_is_what_is_kept() -> None:
    """The lower right quarter of four flat quarters is flat."""
    quarters = np.zeros((64, 64, 3), np.uint8)
    quarters[32:, 32:] = 200
    view = View(SAME, None, SAME, 0.5, (0.5, 0.5, 0.5, 0.5))

    assert (render_view(view, quarters, None)[2:, 2:] == 200).all()


def test_crops_are_not_changed_and_a_partner_must_be_given() -> None:
    plan = next(plan for n in range(1, 99) if (plan := plan_view(0, n, 9)).partner is not None)
    own, partner = crop(1), crop(2)
    render_view(plan, own, partner)

    assert np.array_equal(own, crop(1))
    assert np.array_equal(partner, crop(2))
    with pytest.raises(ValueError, match="partner"):
        render_view(plan, own, None)


@pytest.mark.parametrize("number", range(1, 9))
def test_a_view_is_the_same_at_every_size(number: int) -> None:
    """A teacher and a student take other sizes; what they are shown must be one picture."""
    plan = plan_view(0, number, 9)

    small = render_view(plan, crop(1), crop(2))
    large = render_view(plan, crop(1, 256, 128), crop(2, 256, 128))

    shrunk = np.asarray(Image.fromarray(large).resize((32, 64), Image.Resampling.BILINEAR))
    assert np.abs(shrunk.astype(int) - small).mean() < 6
