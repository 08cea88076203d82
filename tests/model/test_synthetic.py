import hashlib
import os
import subprocess
import sys
from dataclasses import fields, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.datasets.figure import draw_figure
from model.datasets.filming import Conditions, Film, Frames, draw_tracklet
from model.datasets.folder import read_folder
from model.datasets.occluders import OCCLUDER_KINDS, PASSING, Occluder, draw_occluder
from model.datasets.people import Identity, draw_identities, draw_identity, draw_twin
from model.datasets.scene import FAMILIES
from model.datasets.synthetic import (
    SyntheticSet,
    draw_camera,
    draw_set,
    write_folder,
)
from model.datasets.tubes import Layer, View
from model.errors import DatasetError

SMALL = SyntheticSet(
    identities=3, cameras=2, frames_min=3, frames_max=5, height=64, width=32, seed=7
)
CAMERA = draw_camera(1, seed=0)
ANNA, BORIS = draw_identities(2, twin_share=0, seed=1)


def shot(identity: Identity = ANNA, *, seed: int = 5, occluder: Occluder | None = None) -> Frames:
    conditions = Conditions(occluder=occluder)
    film = draw_tracklet(
        identity, CAMERA, seed=seed, frames=6, height=64, width=32, conditions=conditions
    )
    return film.frames


def digest(config: SyntheticSet) -> str:
    total = hashlib.sha256()
    for drawn in draw_set(config):
        total.update(drawn.frames.tobytes())
    return total.hexdigest()


def top_corners(frames: Frames) -> NDArray[np.uint8]:
    """Return pixels that no walking person reaches."""
    height, width = frames.shape[1] // 6, frames.shape[2] // 8
    return np.concatenate([frames[:, :height, :width], frames[:, :height, -width:]])


def test_equal_seeds_give_equal_bytes() -> None:
    assert digest(SMALL) == digest(SMALL)


def test_another_seed_gives_other_bytes() -> None:
    assert digest(SMALL) != digest(replace(SMALL, seed=8))


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_draws_the_same(hash_seed: str) -> None:
    """Neither Python's salted hashes nor the order of a set decide anything."""
    code = f"""
import hashlib
from model.datasets.synthetic import SyntheticSet, draw_set
total = hashlib.sha256()
for drawn in draw_set({SMALL!r}):
    total.update(drawn.frames.tobytes())
print(total.hexdigest())
"""
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )

    assert answer.stdout.strip() == digest(SMALL)


def test_a_set_has_each_person_once_per_camera() -> None:
    drawn = list(draw_set(SMALL))

    assert [(one.identity, one.camera) for one in drawn] == list(product((1, 2, 3), (1, 2)))
    for one in drawn:
        assert one.frames.dtype == np.uint8
        assert one.frames.shape[1:] == (64, 32, 3)
        assert 3 <= len(one.frames) <= 5


def test_lengths_reach_both_ends() -> None:
    config = replace(SMALL, identities=12, frames_min=1, frames_max=3, height=32, width=16)

    assert {len(drawn.frames) for drawn in draw_set(config)} == {1, 2, 3}


def test_every_two_frames_of_a_tracklet_differ() -> None:
    frames = shot().astype(np.int16)

    for first, second in pairwise(frames):
        assert np.abs(first - second).mean() > 2  # levels; the noise alone makes less than this


def test_people_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame is a later moment of the walking cycle, and the moment moves the legs."""
    phases: list[float] = []

    def spy(identity: Identity, view: View, *, phase: float, **rest: Any) -> Layer:
        phases.append(phase)
        return draw_figure(identity, view, phase=phase, **rest)

    monkeypatch.setattr("model.datasets.filming.draw_figure", spy)
    shot()
    view = View(yaw=1.0, pitch=0.2, scale=32, feet=(16, 60))
    legs = [
        draw_figure(ANNA, view, phase=phase, height=64, width=32).alpha[35:]
        for phase in phases[-6:]  # bystanders come first
    ]

    assert all(0.3 < later - earlier < 0.8 for earlier, later in pairwise(phases[-6:]))
    assert all(np.abs(one - other).sum() > 20 for one, other in pairwise(legs))


def test_each_number_is_one_person(monkeypatch: pytest.MonkeyPatch) -> None:
    """One person goes to all cameras under one number, and no two numbers are the same person."""
    people: list[Identity] = []

    def spy(identity: Identity, *_: object, **__: object) -> Film:
        people.append(identity)
        masks = np.zeros((1, 64, 32), np.uint8)
        return Film(np.zeros((1, 64, 32, 3), np.uint8), masks, (0.0,))

    monkeypatch.setattr("model.datasets.synthetic.draw_tracklet", spy)
    list(draw_set(SMALL))

    assert people[::2] == people[1::2]
    assert len(set(people)) == 3


def test_the_person_says_nothing_about_the_scene() -> None:
    """With one seed, two people walk past the very same pixels."""
    anna, boris = shot(ANNA), shot(BORIS)

    np.testing.assert_array_equal(top_corners(anna), top_corners(boris))
    assert np.abs(anna.astype(int) - boris).mean() > 5


def test_the_scene_of_a_person_changes_from_track_to_track() -> None:
    one, other = top_corners(shot(seed=1)), top_corners(shot(seed=2))

    assert np.abs(one.astype(int) - other).mean() > 10


def test_the_people_say_nothing_about_lengths_and_occluders() -> None:
    """The same set with other people has the same lengths, and the same things pass."""

    def plan(config: SyntheticSet) -> list[tuple[int, object]]:
        return [
            (
                len(drawn.frames),
                drawn.occluder and replace(drawn.occluder, kind="pillar", person=None),
            )
            for drawn in draw_set(config)
        ]

    assert plan(replace(SMALL, twin_share=0.0)) == plan(replace(SMALL, twin_share=0.6))


def test_a_person_looks_more_like_themselves_than_like_others_across_cameras() -> None:
    """Colour histograms of the torso, which know nothing of the generator, tell people apart."""
    config = SyntheticSet(
        identities=16, frames_min=4, frames_max=4, height=64, width=32,
        twin_share=0, occluded_share=0, seed=2,
    )  # fmt: skip
    histograms: dict[int, list[NDArray[np.float64]]] = {1: [], 2: []}
    for drawn in draw_set(config):
        torso = drawn.frames[:, 16:32, 12:20].reshape(-1, 3)
        counts, _ = np.histogramdd(torso, bins=6, range=[(0, 256)] * 3)
        histograms[drawn.camera].append(np.sqrt(counts / counts.sum()).ravel())
    first, second = (np.array(rows) for rows in histograms.values())
    likeness = first @ second.T  # (16, 16) Bhattacharyya coefficients

    same = np.diag(likeness)
    different = likeness[~np.eye(16, dtype=bool)]

    assert same.mean() > different.mean() + 0.08  # 0.14 to 0.20 with the seeds 0 to 4


def test_twins_differ_in_one_or_two_visible_attributes() -> None:
    rng = np.random.default_rng(4)
    person = draw_identity(rng)

    for _ in range(20):
        twin = draw_twin(person, rng)
        changed = {
            field.name
            for field in fields(Identity)
            if getattr(twin, field.name) != getattr(person, field.name)
        }
        assert 1 <= len(changed) <= 6  # an attribute has up to three fields
        assert not changed & {"height_m", "girth", "skin", "hair", "stride"}


def test_twins_look_more_alike_than_strangers() -> None:
    rng = np.random.default_rng(6)
    strangers = [draw_identity(rng) for _ in range(8)]
    base = shot(ANNA).astype(int)

    to_twins = [np.abs(shot(draw_twin(ANNA, rng)) - base).mean() for _ in range(8)]
    to_strangers = [np.abs(shot(stranger) - base).mean() for stranger in strangers]

    assert np.mean(to_twins) < 0.6 * np.mean(to_strangers)


def test_half_of_the_people_are_twins_when_asked() -> None:
    """A twin shares its body height with one other person, and nobody else does."""
    people = draw_identities(20, twin_share=0.5, seed=3)

    assert len({person.height_m for person in people}) == 10


def test_neighbouring_cameras_see_other_places_in_other_colours() -> None:
    one, other = draw_camera(1, seed=0), draw_camera(2, seed=0)

    assert one.family != other.family
    assert np.abs(np.array(one.colours) - np.array(other.colours)).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_place_can_be_filmed(family: str) -> None:
    camera = replace(CAMERA, family=family)

    film = draw_tracklet(ANNA, camera, seed=1, frames=2, height=64, width=32)

    assert top_corners(film.frames).std() > 4


@pytest.mark.parametrize("kind", OCCLUDER_KINDS)
def test_an_occluder_covers_its_frames_and_no_other(kind: str) -> None:
    person = BORIS if kind == "pedestrian" else None
    free = shot()

    covered = shot(occluder=Occluder(kind, 2, 4, person, 1))

    changed = [number for number in range(6) if (free[number] != covered[number]).any()]
    assert changed == [2, 3, 4]


def test_occluders_take_30_to_70_percent_and_people_of_the_pool() -> None:
    rng = np.random.default_rng(9)
    drawn = [draw_occluder(rng, frames=20, pool=(ANNA, BORIS)) for _ in range(200)]

    shares = [(one.last - one.first + 1) / 20 for one in drawn]

    assert min(shares) >= 0.3
    assert max(shares) <= 0.7
    assert {one.kind for one in drawn} == set(PASSING)
    assert {one.person for one in drawn} == {ANNA, BORIS, None}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_occluded_share_is_kept(share: float) -> None:
    occluders = [drawn.occluder for drawn in draw_set(replace(SMALL, occluded_share=share))]

    assert all((occluder is not None) == (share == 1) for occluder in occluders)


def test_a_written_set_is_read_back_as_returned(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    written = write_folder(SMALL, tmp_path / "set", lambda done, total: seen.append((done, total)))

    assert read_folder(tmp_path / "set") == written
    assert written[0].frames[0] == tmp_path / "set" / "p0001" / "c1" / "0001.jpg"
    assert seen == [(number, 6) for number in range(1, 7)]


def test_written_frames_are_what_was_drawn(tmp_path: Path) -> None:
    [tracklet, *_] = write_folder(SMALL, tmp_path)
    [drawn, *_] = draw_set(SMALL)

    with Image.open(tracklet.frames[0]) as picture:
        difference = np.abs(np.asarray(picture, int) - drawn.frames[0])

    assert difference.mean() < 4  # levels that JPEG costs


def test_two_written_sets_have_equal_bytes(tmp_path: Path) -> None:
    one, other = (write_folder(SMALL, tmp_path / name) for name in ("one", "other"))

    for first, second in zip(one, other, strict=True):
        assert [path.read_bytes() for path in first.frames] == [
            path.read_bytes() for path in second.frames
        ]


@pytest.mark.parametrize("target", ["", "notes.txt"])
def test_a_folder_in_use_is_not_written_into(tmp_path: Path, target: str) -> None:
    (tmp_path / "notes.txt").touch()

    with pytest.raises(DatasetError, match="expected a new or empty folder, got"):
        write_folder(SMALL, tmp_path / target)

    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identities": 0}, "expected at least 1 identity, got 0"),
        ({"cameras": 0}, "expected at least 1 camera, got 0"),
        ({"frames_min": 0}, "expected 1 <= frames_min <= frames_max, got 0 and 28"),
        ({"frames_min": 9, "frames_max": 8}, "got 9 and 8"),
        ({"height": 31}, "expected frames of at least .*, got"),
        ({"width": 15}, "expected frames of at least .*, got"),
        ({"twin_share": 1.0}, r"expected a twin share in \[0, 1\), got 1.0"),
        ({"occluded_share": 1.1}, r"expected an occluded share in \[0, 1\], got 1.1"),
        ({"occluded_share": float("nan")}, "got nan"),
        ({"occluders": ()}, r"expected occluders of .*, got \(\)"),
        ({"occluders": ("cloud",)}, "expected occluders of .*, got .*cloud"),
        ({"bad_crop_share": -0.1}, r"expected a bad-crop share in \[0, 1\], got -0.1"),
        ({"foreign_share": 0.3}, r"expected a foreign share in \[0, 0.25\], got 0.3"),
        ({"degraded_share": 2}, r"expected a degraded share in \[0, 1\], got 2"),
        ({"lowest_resolution": 0}, r"expected a resolution in \(0, 1\], got 0"),
        ({"clutter": -1}, "expected clutter of at least 0, got -1"),
        ({"jitter": float("inf")}, "expected jitter of at least 0, got inf"),
        ({"seed": -1}, "expected a seed from 0, got -1"),
    ],
)
def test_a_set_refuses_what_cannot_be_drawn(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticSet(**change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cloud", 0, 1, None, 1), "expected an occluder of .*, got 'cloud'"),
        (("pillar", 2, 1, None, 1), "expected 0 <= first <= last, got 2 and 1"),
        (("pillar", -1, 1, None, 1), "expected 0 <= first <= last, got -1 and 1"),
        (("pillar", 0, 1, ANNA, 1), "expected a person for a pedestrian, and only there"),
        (("pedestrian", 0, 1, None, 1), "expected a person for a pedestrian, and only there"),
        (("pillar", 0, 1, None, 0), "expected direction 1 or -1, got 0"),
    ],
)
def test_an_impossible_occluder_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Occluder(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "expected at least 1 frame, got 0"),
        ({"seed": -1}, "expected a seed from 0, got -1"),
        ({"height": 8}, "expected frames of at least"),
        (
            {"conditions": Conditions(occluder=Occluder("pillar", 0, 4, None, 1))},
            "within 4 frames, got 4",
        ),
    ],
)
def test_a_tracklet_refuses_what_cannot_be_drawn(change: dict[str, Any], message: str) -> None:
    arguments = {"seed": 1, "frames": 4, **change}

    with pytest.raises(ValueError, match=message):
        draw_tracklet(ANNA, CAMERA, **arguments)


def test_camera_numbers_and_people_counts_start_at_one() -> None:
    with pytest.raises(ValueError, match="expected a camera number from 1, got 0"):
        draw_camera(0, seed=1)
    with pytest.raises(ValueError, match="expected at least 1 identity, got 0"):
        draw_identities(0, twin_share=0, seed=1)
    with pytest.raises(ValueError, match="expected a twin share"):
        draw_identities(2, twin_share=-0.1, seed=1)
