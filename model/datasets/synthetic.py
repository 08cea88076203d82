"""Drawn tracklets: people from seeded attributes, walking past cameras that never met a person.

A test bed, not a substitute for real data: who somebody is never says anything about the place, the
camera, the occluder, the length or the file name, so a network can only learn the person.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from model.datasets.filming import (
    OCCLUDER_KINDS,
    Camera,
    Frames,
    Occluder,
    check_seed,
    check_size,
    draw_tracklet,
)
from model.datasets.people import Identity, draw_identities
from model.datasets.tracklets import Tracklet
from model.errors import DatasetError

JPEG_QUALITY = 92

# Each decides its own: a stream that two shared would tie people to what they must not be tied to.
_PEOPLE, _CAMERAS, _TRACKS, _OCCLUDERS = range(1, 5)

# Kind of place, where people face, warmth of the picture, gamma, side of the light.
_SITES = (
    ("street", 0.55, 0.085, 1.1, -1),
    ("hall", math.pi - 0.6, -0.1, 0.8, 1),
    ("park", -1.15, 0.03, 1.08, 1),
    ("platform", -0.35, -0.03, 1.0, -1),
    ("hall", 1.35, 0.085, 1.05, -1),
    ("street", math.pi + 0.7, -0.05, 1.12, 1),
)


@dataclass(frozen=True, slots=True)
class SyntheticSet:
    """What a drawn data set is made of; equal values give equal bytes.

    Args:
        identities: How many people.
        cameras: How many cameras; each sees each person once.
        frames_min: Fewest frames of a tracklet; lengths are log-uniform.
        frames_max: Most frames.
        height: Rows of a frame.
        width: Columns of a frame.
        twin_share: Share of the people, in [0, 1), who differ from another one in 1-2 attributes.
        occluded_share: Share of the tracklets, in [0, 1], in which something passes.
        seed: Decides everything else.
    """

    identities: int = 24
    cameras: int = 2
    frames_min: int = 12
    frames_max: int = 28
    height: int = 192
    width: int = 96
    twin_share: float = 0.5
    occluded_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.identities < 1:
            raise ValueError(f"expected at least 1 identity, got {self.identities}")
        if self.cameras < 1:
            raise ValueError(f"expected at least 1 camera, got {self.cameras}")
        if not 1 <= self.frames_min <= self.frames_max:
            raise ValueError(
                "expected 1 <= frames_min <= frames_max, "
                f"got {self.frames_min} and {self.frames_max}"
            )
        if not 0 <= self.twin_share < 1:
            raise ValueError(f"expected a twin share in [0, 1), got {self.twin_share}")
        if not 0 <= self.occluded_share <= 1:
            raise ValueError(f"expected an occluded share in [0, 1], got {self.occluded_share}")
        check_size(self.height, self.width)
        check_seed(self.seed)


@dataclass(frozen=True, slots=True)
class DrawnTracklet:
    """A tracklet before it is written.

    Args:
        identity: Number of the person, from 1.
        camera: Number of the camera, from 1.
        occluder: What passes, if anything.
        frames: (T, H, W, 3) uint8 RGB.
    """

    identity: int
    camera: int
    occluder: Occluder | None
    frames: Frames


def draw_camera(number: int, *, seed: int) -> Camera:
    """Draw the camera with a number from 1; neighbours watch other kinds of places.

    Raises:
        ValueError: ``number`` is below 1 or ``seed`` is negative.
    """
    if number < 1:
        raise ValueError(f"expected a camera number from 1, got {number}")
    check_seed(seed)
    rng = np.random.default_rng([seed, _CAMERAS, number])
    family, yaw, warmth, gamma, side = _SITES[(number - 1) % len(_SITES)]
    gain = 1 + np.array([warmth, 0.0, -warmth]) + rng.normal(0, 0.015, 3)
    mixing = np.eye(3) * 0.94 + 0.02 + rng.normal(0, 0.008, (3, 3))
    first, second, third = (gain[:, None] * mixing).tolist()
    return Camera(
        name=f"c{number}",
        family=family,
        yaw=yaw + rng.normal(0, 0.1),
        pitch=float(rng.uniform(0.16, 0.27)),
        colours=(tuple(first), tuple(second), tuple(third)),
        gamma=gamma * float(rng.uniform(0.97, 1.03)),
        noise=float(rng.uniform(1.5, 3.5)),
        blur=float(rng.uniform(0.1, 0.3)),
        light=(side * 0.46, -0.56, 0.69),
    )


def draw_occluder(rng: np.random.Generator, *, frames: int, pool: tuple[Identity, ...]) -> Occluder:
    """Draw what passes before a person: for a contiguous 30-70 % of the frames.

    Args:
        rng: Decides.
        frames: Length of the tracklet.
        pool: Who may pass: the people of the data set, so that taking the wrong one is an error.
    """
    kind = OCCLUDER_KINDS[int(rng.integers(len(OCCLUDER_KINDS)))]
    count = max(1, round(frames * rng.uniform(0.3, 0.7)))
    first = int(rng.integers(frames - count + 1))
    passer = pool[int(rng.integers(len(pool)))]
    direction = 1 if rng.random() < 0.5 else -1
    person = passer if kind == "pedestrian" else None
    return Occluder(kind, first, first + count - 1, person, direction)


def draw_set(config: SyntheticSet) -> Iterator[DrawnTracklet]:
    """Draw a whole set, one tracklet at a time: by identity, then by camera."""
    people = draw_identities(
        config.identities, twin_share=config.twin_share, seed=_derived(config.seed, _PEOPLE)
    )
    cameras = [draw_camera(number + 1, seed=config.seed) for number in range(config.cameras)]
    for number, identity in enumerate(people):
        others = people[:number] + people[number + 1 :]
        for camera_number, camera in enumerate(cameras):
            place = (number, camera_number)
            rng = np.random.default_rng([config.seed, _OCCLUDERS, *place])
            length = _draw_length(config, rng)
            is_occluded = rng.random() < config.occluded_share
            passing = draw_occluder(rng, frames=length, pool=others or people)
            occluder = passing if is_occluded else None
            frames = draw_tracklet(
                identity,
                camera,
                seed=_derived(config.seed, _TRACKS, *place),
                frames=length,
                height=config.height,
                width=config.width,
                occluder=occluder,
            )
            yield DrawnTracklet(number + 1, camera_number + 1, occluder, frames)


def _draw_length(config: SyntheticSet, rng: np.random.Generator) -> int:
    shortest, longest = math.log(config.frames_min), math.log(config.frames_max + 1)
    length = int(math.exp(rng.uniform(shortest, longest)))
    return min(max(length, config.frames_min), config.frames_max)


def write_folder(
    config: SyntheticSet, root: Path, progress: Callable[[int, int], None] | None = None
) -> list[Tracklet]:
    """Write a drawn set as ``p0001/c1/0001.jpg``, which ``folder.read_folder`` reads.

    Args:
        config: What to draw.
        root: A new or empty folder; parents are made.
        progress: Called after each tracklet with how many are done and how many there are.

    Returns:
        The tracklets, as ``read_folder`` returns them.

    Raises:
        DatasetError: ``root`` holds something already.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DatasetError(f"expected a new or empty folder, got {root} with something in it")
    total = config.identities * config.cameras
    written = []
    for drawn in draw_set(config):
        identity, camera = f"p{drawn.identity:04d}", f"c{drawn.camera}"
        folder = root / identity / camera
        folder.mkdir(parents=True)
        paths = [folder / f"{number + 1:04d}.jpg" for number in range(len(drawn.frames))]
        for path, frame in zip(paths, drawn.frames, strict=True):
            Image.fromarray(frame).save(path, quality=JPEG_QUALITY, subsampling=0)
        written.append(Tracklet(identity, camera, "", tuple(paths)))
        if progress is not None:
            progress(len(written), total)
    return written


def _derived(seed: int, *path: int) -> int:
    """Return the seed of a part, independent of the seeds of all other parts."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1)[0])
