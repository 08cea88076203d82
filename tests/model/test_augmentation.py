"""Augmentation of whole clips."""

import numpy as np
import pytest

from model.augmentation import AugmentationConfig, augment
from model.frames import Clip

OFF = AugmentationConfig(flip=0.0)
FILL = (124, 116, 104)


@pytest.fixture
def clip() -> Clip:
    return np.random.default_rng(0).integers(0, 256, (5, 32, 16, 3), dtype=np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_nothing_switched_on_changes_nothing(clip: Clip) -> None:
    assert np.array_equal(augment(clip, OFF, rng()), clip)


def test_a_tracklet_flips_as_a_whole(clip: Clip) -> None:
    """Eq. 4 compares the cells of one frame with those of another."""
    config = AugmentationConfig(flip=0.5)
    mirrored = clip[:, :, ::-1]

    results = [augment(clip, config, rng(seed)) for seed in range(200)]

    flips = sum(np.array_equal(one, mirrored) for one in results)
    kept = sum(np.array_equal(one, clip) for one in results)
    assert flips + kept == 200
    assert 70 < flips < 130


def test_frames_flip_on_their_own_where_asked(clip: Clip) -> None:
    config = AugmentationConfig(flip=0.5, flip_per="frame")

    result = augment(clip, config, rng(1))

    flipped = [np.array_equal(one, old[:, ::-1]) for one, old in zip(result, clip, strict=True)]
    kept = [np.array_equal(one, old) for one, old in zip(result, clip, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 0 < sum(flipped) < 5


def test_a_crop_shifts_all_frames_alike_and_fills_with_the_mean_colour(clip: Clip) -> None:
    config = AugmentationConfig(flip=0.0, pad=4)

    result = augment(clip, config, rng(3))

    padded = np.empty((5, 40, 24, 3), np.uint8)
    padded[:] = FILL
    padded[:, 4:36, 4:20] = clip
    places = [
        (top, left)
        for top in range(9)
        for left in range(9)
        if np.array_equal(padded[:, top : top + 32, left : left + 16], result)
    ]
    assert len(places) == 1


def test_erasing_fills_one_rectangle(clip: Clip) -> None:
    clip[clip == FILL[0]] = 0  # no pixel has the colour by chance
    config = AugmentationConfig(flip=0.0, erase=1.0)

    result = augment(clip, config, rng(2))

    for old, new in zip(clip, result, strict=True):
        gone = (new == FILL).all(axis=2)
        rows, columns = np.flatnonzero(gone.any(axis=1)), np.flatnonzero(gone.any(axis=0))
        assert gone[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert 0.01 < gone.mean() < 0.45
        assert np.array_equal(new[~gone], old[~gone])


def test_erasing_a_tracklet_takes_the_same_rectangle_from_every_frame(clip: Clip) -> None:
    config = AugmentationConfig(flip=0.0, erase=1.0, erase_per="tracklet")

    gone = (augment(clip, config, rng(2)) == FILL).all(axis=3)

    assert gone[0].any()
    assert (gone == gone[0]).all()


def test_jitter_changes_colours_but_not_shapes(clip: Clip) -> None:
    config = AugmentationConfig(flip=0.0, jitter=0.2)

    result = augment(clip, config, rng(4))

    assert result.dtype == np.uint8
    assert not np.array_equal(result, clip)
    assert np.corrcoef(result.ravel(), clip.ravel())[0, 1] > 0.9


def test_the_clip_that_was_given_stays_as_it_was(clip: Clip) -> None:
    before = clip.copy()

    augment(clip, AugmentationConfig(flip=1, pad=3, erase=1, jitter=0.3), rng())

    assert np.array_equal(clip, before)


def test_equal_generators_augment_alike(clip: Clip) -> None:
    config = AugmentationConfig(flip=0.5, pad=3, erase=0.5, jitter=0.3)

    assert np.array_equal(augment(clip, config, rng(9)), augment(clip, config, rng(9)))


@pytest.mark.parametrize(
    "wrong", [{"flip": 1.5}, {"erase": -0.1}, {"pad": -1}, {"jitter": 1.0}, {"flip_per": "clip"}]
)
def test_what_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        AugmentationConfig(**wrong)  # type: ignore[arg-type]
