"""What makes a drawn tracklet hard, and whether the truth about it is true."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from model.datasets.clutter import draw_block
from model.datasets.degradations import Degradations, boxed, draw_degradations, resized, streaked
from model.datasets.filming import BACKGROUND, OCCLUDER, PERSON, Conditions, Film, draw_tracklet
from model.datasets.occluders import OCCLUDER_KINDS, Occluder, draw_occluder
from model.datasets.people import draw_identities
from model.datasets.presets import PRESETS, SIZES, Preset, preset_set
from model.datasets.synthetic import Cast, DrawnTracklet, draw_camera, draw_set
from model.datasets.tracking import BAD_CROP, TrackerErrors, draw_errors

# Neither noise nor blur, so that pixels can be compared.
CAMERA = replace(draw_camera(1, seed=0), noise=0.0, blur=0.0)
ANNA, BORIS, CARLA = draw_identities(3, twin_share=0, seed=1)


def film(conditions: Conditions | None = None, *, frames: int = 8, seed: int = 5) -> Film:
    return draw_tracklet(
        ANNA, CAMERA, seed=seed, frames=frames, height=64, width=32, conditions=conditions
    )


def occluder(kind: str, first: int = 1, last: int = 6, direction: int = 1) -> Occluder:
    person = BORIS if kind == "pedestrian" else None
    return Occluder(kind, first, last, person, direction, lingers=True)


def difference(one: Film, other: Film) -> NDArray[np.int64]:
    """Return (T, H, W): by how many levels the channels differ, the most of the three."""
    return np.asarray(np.abs(one.frames.astype(int) - other.frames).max(axis=3))


def tiny(preset: Preset, identities: int = 8) -> Iterator[DrawnTracklet]:
    return draw_set(preset_set(preset, "tiny", identities=identities, seed=2))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_draws_what_its_masks_and_records_say(preset: Preset) -> None:
    for drawn in tiny(preset, identities=3):
        frames = len(drawn.frames)

        assert 5 <= frames <= 12
        assert drawn.masks.shape == drawn.frames.shape[:3] == (frames, 64, 32)
        assert set(np.unique(drawn.masks)) <= {BACKGROUND, PERSON, OCCLUDER}
        assert drawn.truth.frames == len(drawn.truth.hidden) == frames


@pytest.mark.parametrize("size", SIZES)
def test_a_size_goes_over_a_preset_and_a_value_over_both(size: str) -> None:
    config = preset_set("full", size, width=48, seed=None)  # type: ignore[arg-type]

    assert config.clutter > 0
    assert config.width == 48
    assert config.seed == 0
    assert config.height == {"tiny": 64, "small": 64, "gpu": 256}[size]


def test_the_full_preset_has_tracklets_of_5_to_200_frames() -> None:
    config = preset_set("full")

    assert (config.frames_min, config.frames_max) == (5, 200)


def test_lengths_are_log_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tracklets are between 5 and 32 frames as between 32 and 200."""

    def spy(*_: object, frames: int, **__: object) -> Film:
        blank = np.zeros((1, 1, 1, 3), np.uint8)
        return Film(blank, blank[..., 0], (0.0,) * frames)

    monkeypatch.setattr("model.datasets.synthetic.draw_tracklet", spy)
    lengths = [drawn.truth.frames for drawn in draw_set(preset_set("full", identities=200))]

    assert min(lengths) >= 5
    assert max(lengths) <= 200
    assert np.mean(np.array(lengths) < 32) == pytest.approx(0.5, abs=0.08)


def test_the_person_mask_is_where_another_person_would_change_the_picture() -> None:
    """All that two people change is in their masks, but for the blended pixels at the edge."""
    anna = film()
    boris = draw_tracklet(BORIS, CAMERA, seed=5, frames=8, height=64, width=32)
    person = (anna.masks == PERSON) | (boris.masks == PERSON)
    person[:, :, 1:] |= person[:, :, :-1]
    person[:, :, :-1] |= person[:, :, 1:]

    changed = difference(anna, boris) > 12

    assert (changed & person).sum() > 0.97 * changed.sum()
    assert (changed & person).sum() > 0.6 * person.sum()
    assert 0.1 < (anna.masks == PERSON).mean() < 0.4


@pytest.mark.parametrize("kind", OCCLUDER_KINDS)
def test_the_occluder_mask_is_where_the_occluder_changes_the_picture(kind: str) -> None:
    free, covered = film(), film(Conditions(occluder(kind)))
    before = covered.masks == OCCLUDER

    changed = difference(free, covered) > 40

    assert (changed & before).sum() > 0.9 * changed.sum()  # the rest is blended at the edges
    assert (free.masks[~before] == covered.masks[~before]).all()


@pytest.mark.parametrize("kind", OCCLUDER_KINDS)
def test_the_hidden_share_is_what_the_masks_lose(kind: str) -> None:
    free, covered = film(), film(Conditions(occluder(kind)))

    for whole, rest, hidden in zip(free.masks, covered.masks, covered.hidden, strict=True):
        lost = 1 - (rest == PERSON).sum() / (whole == PERSON).sum()
        assert hidden == pytest.approx(lost)
    assert max(covered.hidden) > 0.1
    assert covered.hidden[0] == covered.hidden[-1] == 0


def test_what_lingers_hides_the_person_for_longer() -> None:
    def total(lingers: bool) -> float:
        passing = Occluder("pedestrian", 0, 19, BORIS, 1, lingers)
        return sum(film(Conditions(passing), frames=20).hidden)

    assert total(True) > 1.2 * total(False)


def test_the_edge_of_the_picture_cuts_deepest_where_a_track_begins_or_ends() -> None:
    coming = film(Conditions(occluder("truncation", 0, 4, -1)))
    leaving = film(Conditions(occluder("truncation", 3, 7, 1)))

    assert coming.hidden[0] >= coming.hidden[4]
    assert leaving.hidden[7] >= leaving.hidden[3]
    assert coming.hidden[5:] == leaving.hidden[:3] == (0, 0, 0)


def test_people_are_cut_off_only_at_the_ends_of_a_tracklet() -> None:
    rng = np.random.default_rng(3)

    for _ in range(50):
        cut = draw_occluder(rng, frames=20, pool=(BORIS,), kinds=("truncation",))
        assert (cut.first == 0) if cut.direction < 0 else (cut.last == 19)
        assert 6 <= cut.last - cut.first + 1 <= 14


def test_occluded_frames_are_contiguous_and_30_to_70_percent() -> None:
    kinds = set()
    for drawn in draw_set(
        preset_set("occluded", "tiny", frames_min=10, height=32, width=16, seed=2)
    ):
        truth = drawn.truth
        hidden = np.flatnonzero(truth.hidden)
        kinds.add(truth.occluder)
        if truth.occluded is None:
            assert len(hidden) == 0
            assert truth.level == 0
        else:
            first, last = truth.occluded
            assert 0.3 - 0.5 / truth.frames <= (last - first + 1) / truth.frames
            assert (last - first + 1) / truth.frames <= 0.7 + 0.5 / truth.frames
            assert len(hidden) == 0 or first <= hidden[0] <= hidden[-1] <= last

    assert kinds == {None, *OCCLUDER_KINDS}


def test_who_passes_is_another_identity_of_the_set() -> None:
    cast = Cast(preset_set("occluded", "tiny", height=32, width=16, frames_max=5, seed=2))
    passers = [cast.draw(*place).truth for place in cast.places()]

    for truth in passers:
        assert (truth.passer is None) == (truth.occluder != "pedestrian")
        assert truth.passer != truth.identity
        assert truth.passer is None or 1 <= truth.passer <= 8
    assert any(truth.passer for truth in passers)


def test_a_bad_crop_shifts_the_person_and_the_place_by_a_fifth() -> None:
    free = film()
    errors = TrackerErrors(shifts=((2, BAD_CROP, 0.0), (4, 0.0, -BAD_CROP)))
    shifted = film(Conditions(errors=errors))

    right, up = round(32 * BAD_CROP), round(64 * BAD_CROP)
    beside = shifted.masks[2][:, :-right] == free.masks[2][:, right:]
    below = shifted.masks[4][up:] == free.masks[4][:-up]

    assert beside.mean() > 0.97
    assert below.mean() > 0.97
    assert (free.masks[2] == shifted.masks[2]).mean() < 0.9
    np.testing.assert_array_equal(free.frames[3], shifted.frames[3])


def test_an_occluder_moves_with_a_bad_crop() -> None:
    pillar = occluder("pillar")
    free = film(Conditions(pillar))
    errors = TrackerErrors(shifts=((3, -BAD_CROP, 0.0),))
    shifted = film(Conditions(pillar, errors=errors))

    columns = [np.flatnonzero((one.masks[3] == OCCLUDER).any(axis=0)) for one in (free, shifted)]

    assert columns[1].mean() - columns[0].mean() == pytest.approx(32 * BAD_CROP, abs=1.0)


def test_a_foreign_frame_shows_somebody_else_in_the_same_place() -> None:
    free = film()
    switched = film(Conditions(errors=TrackerErrors(foreign=(6, 7), person=BORIS)))

    np.testing.assert_array_equal(free.frames[:6], switched.frames[:6])
    assert (switched.masks[6:] != PERSON).all()
    assert (switched.masks[6:] == OCCLUDER).mean() > 0.1
    background = (free.masks[6:] == BACKGROUND) & (switched.masks[6:] == BACKGROUND)
    assert (difference(free, switched)[6:][background] > 12).mean() < 0.05
    assert switched.hidden[6:] == (0, 0)


def test_about_5_percent_of_the_frames_are_foreign_and_none_of_the_person_themselves() -> None:
    foreign = total = 0
    rng = np.random.default_rng(0)
    for frames in rng.integers(5, 100, 2000).tolist():
        errors = draw_errors(
            rng, frames=frames, pool=(BORIS, CARLA), bad_crop_share=0, foreign_share=0.05
        )
        foreign, total = foreign + len(errors.foreign), total + frames
        assert len(errors.foreign) <= 0.4 * frames + 1
        assert errors.foreign in ((), (0, *errors.foreign[1:]), (*errors.foreign[:-1], frames - 1))

    assert foreign / total == pytest.approx(0.05, abs=0.008)


def test_short_tracklets_have_as_many_foreign_frames() -> None:
    rng = np.random.default_rng(1)
    drawn = [
        draw_errors(rng, frames=5, pool=(BORIS,), bad_crop_share=0.1, foreign_share=0.1)
        for _ in range(3000)
    ]

    assert np.mean([len(one.foreign) for one in drawn]) / 5 == pytest.approx(0.1, abs=0.012)
    assert np.mean([len(one.shifts) for one in drawn]) / 5 == pytest.approx(0.1, abs=0.01)


def test_foreign_frames_need_a_person() -> None:
    with pytest.raises(ValueError, match="expected a person for foreign frames, and only there"):
        TrackerErrors(foreign=(1,))
    with pytest.raises(ValueError, match="expected a person for foreign frames, and only there"):
        TrackerErrors(person=BORIS)


def test_clutter_changes_the_background_and_not_the_person() -> None:
    free, cluttered = film(), film(Conditions(clutter=1.0))

    np.testing.assert_array_equal(free.masks, cluttered.masks)
    changed = difference(free, cluttered) > 20
    assert changed[free.masks == BACKGROUND].mean() > 0.25
    assert changed[free.masks == PERSON].mean() < 0.05  # the rim of the figure


def test_more_clutter_changes_more() -> None:
    free = film()
    changed = [
        (difference(free, film(Conditions(clutter=amount))) > 20).mean()
        for amount in (0.2, 0.6, 2.0)
    ]

    assert changed == sorted(changed)


def test_clutter_keeps_beside_the_person_within_a_tracklet_only() -> None:
    """A column profile of what clutter adds is alike in the first and last frame of a tracklet."""

    def profile(seed: int) -> NDArray[np.float64]:
        added = film(Conditions(clutter=1.0), seed=seed).frames.astype(float)
        coarse = added[:, :, :8].reshape(8, 8, 8, 8, 3).mean(axis=(2, 3))  # (T, 8, 3)
        centred = coarse - coarse.mean(axis=1, keepdims=True)
        return np.asarray(centred / np.linalg.norm(centred, axis=(1, 2), keepdims=True))

    profiles = [profile(seed) for seed in range(8)]
    within = [float((one[0] * one[-1]).sum()) for one in profiles]
    across = [float((one[0] * other[0]).sum()) for one, other in pairwise(profiles)]

    assert np.mean(within) > np.mean(across) + 0.2


def test_a_block_has_at_least_one_pixel() -> None:
    assert draw_block(0, 0, np.random.default_rng(0)).size == (1, 1)


def test_degradations_leave_the_masks_alone() -> None:
    bad = Degradations(
        motion=0.2, defocus=0.02, strengths=(1.0,) * 8, gains=(1.0, 0.5) * 4,
        resolution=0.5, jpeg_quality=10,
    )  # fmt: skip
    free, degraded = film(), film(Conditions(degradations=bad))

    np.testing.assert_array_equal(free.masks, degraded.masks)
    assert difference(free, degraded).mean() > 8


@pytest.mark.parametrize(
    "bad",
    [
        Degradations(motion=0.2, strengths=(1.0,) * 8),
        Degradations(defocus=0.03, strengths=(1.0,) * 8),
        Degradations(resolution=0.5),
    ],
)
def test_blur_takes_detail(bad: Degradations) -> None:
    def detail(shot: Film) -> float:
        return float(np.abs(np.diff(shot.frames.astype(int), axis=2)).mean())

    assert detail(film(Conditions(degradations=bad))) < 0.8 * detail(film())


def test_exposure_follows_its_gains() -> None:
    bad = Degradations(gains=(1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.4))
    free, jumping = film(), film(Conditions(degradations=bad))

    brighter = jumping.frames.mean(axis=(1, 2, 3)) / free.frames.mean(axis=(1, 2, 3))

    assert brighter[1] < 0.65
    assert brighter[7] > 1.15
    np.testing.assert_array_equal(free.frames[2:7], jumping.frames[2:7])


def test_a_poor_camera_records_fewer_rows_and_the_others_do_not() -> None:
    cameras = [draw_camera(number, seed=3, lowest_resolution=0.4) for number in range(1, 7)]

    assert [camera.resolution for camera in cameras[::2]] == [1, 1, 1]
    assert all(0.4 <= camera.resolution <= 0.7 for camera in cameras[1::2])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_degradations_come_as_often_as_asked(share: float) -> None:
    bad = draw_degradations(np.random.default_rng(1), frames=6, share=share)
    happens = [bad.motion, bad.defocus, bad.gains, bad.resolution < 1, bad.jpeg_quality]

    assert [bool(one) for one in happens] == [share == 1] * 5


def test_streak_and_box_are_means_over_their_length() -> None:
    """A single point becomes a bar of its own total brightness."""
    point = np.zeros((3, 11, 11), np.float32)
    point[:, 5, 5] = 1

    bar = streaked(point, 4.0, 0.0)
    spread = boxed(point, 1.5, axis=1)

    np.testing.assert_allclose(bar[0, 5, 3:8], 0.2)
    np.testing.assert_allclose(spread[0, 3:8, 5], [0.125, 0.25, 0.25, 0.25, 0.125])
    assert bar[0].sum() == pytest.approx(1)
    assert spread[0].sum() == pytest.approx(1)


def test_shrinking_keeps_the_mean() -> None:
    picture = np.random.default_rng(0).random((3, 64, 32), dtype=np.float32)

    assert resized(picture, 32, 16).shape == (3, 32, 16)
    assert resized(picture, 32, 16).mean() == pytest.approx(picture.mean(), abs=0.01)


def test_nothing_that_happens_asks_who_it_happens_to() -> None:
    """With other people, the plan of every tracklet is the same but for who is in it."""

    def plan(twin_share: float) -> list[object]:
        config = preset_set("full", "tiny", height=32, width=16, twin_share=twin_share)
        return [
            (
                one.truth.frames, one.truth.occluder, one.truth.occluded, one.truth.foreign,
                one.truth.bad_crops, one.truth.degradations, one.conditions.degradations,
            )
            for one in draw_set(config)
        ]  # fmt: skip

    assert plan(0.0) == plan(0.6)


@pytest.mark.parametrize("preset", ["clutter", "full"])
def test_the_background_does_not_tell_who_somebody_is(preset: Preset) -> None:
    """Colours of background pixels find a person in the other camera no better than chance."""
    histograms: dict[int, list[NDArray[np.float64]]] = {1: [], 2: []}
    for drawn in draw_set(preset_set(preset, "tiny", identities=20, frames_max=5, seed=4)):
        place = drawn.frames[drawn.masks == BACKGROUND]
        counts, _ = np.histogramdd(place, bins=5, range=[(0, 256)] * 3)
        histograms[drawn.camera].append(np.sqrt(counts / counts.sum()).ravel())
    first, second = (np.array(rows) for rows in histograms.values())
    likeness = first @ second.T  # (20, 20) Bhattacharyya coefficients

    rank_1 = (likeness.argmax(axis=1) == np.arange(20)).mean()
    gap = np.diag(likeness).mean() - likeness[~np.eye(20, dtype=bool)].mean()

    assert rank_1 <= 0.2  # 1 of 20 by chance
    assert abs(gap) < 0.04
