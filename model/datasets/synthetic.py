"""Drawn tracklets: people from seeded attributes, walking past cameras that never met a person.

A test bed, not a substitute for real data: who somebody is never says anything about the place, the
camera, the occluder, the length or the file name, so a network can only learn the person.
"""

import math
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

from model.datasets.degradations import Degradations, draw_degradations
from model.datasets.drawing import Share, written_by_processes
from model.datasets.filming import (
    Camera,
    Conditions,
    Frames,
    Masks,
    check_seed,
    check_size,
    draw_tracklet,
)
from model.datasets.occluders import OCCLUDER_KINDS, PASSING, Occluder, draw_occluder
from model.datasets.people import Identity, draw_identities
from model.datasets.tracking import LARGEST_FOREIGN_SHARE, draw_errors
from model.datasets.tracklets import Tracklet
from model.datasets.truth import TrackletTruth, write_truth
from model.datasets.writing import (
    DrawnLayout,
    camera_name,
    frame_name,
    identity_name,
    needed_cameras,
    save_tracklet,
    write_splits,
    written_aside,
)
from model.errors import DatasetError

# Each decides its own: a stream that two shared would tie people to what they must not be tied to.
_PEOPLE, _CAMERAS, _TRACKS, _OCCLUDERS, _TRACKER, _DEGRADATIONS, _SENSORS, _SPLITS = range(1, 9)

# Kind of place, where people face, warmth of the picture, gamma, side of the light.
_SITES = (
    ("street", 0.55, 0.085, 1.1, -1),
    ("hall", math.pi - 0.6, -0.1, 0.8, 1),
    ("park", -1.15, 0.03, 1.08, 1),
    ("platform", -0.35, -0.03, 1.0, -1),
    ("hall", 1.35, 0.085, 1.05, -1),
    ("street", math.pi + 0.7, -0.05, 1.12, 1),
)

_TRACKLETS_A_PROCESS = 16  # fewer are drawn before another process has started


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
        occluded_share: Share of the tracklets, in [0, 1], in which something hides the person.
        occluders: What may, of ``occluders.OCCLUDER_KINDS``.
        lingers: Whether what passes slows down before the person.
        clutter: How much keeps beside and behind each person, from 0; 1 is a crowded street.
        jitter: Trembling of the boxes, from 0, as a multiple of the usual one.
        bad_crop_share: Share of the frames, in [0, 1], whose box is off by a fifth.
        foreign_share: Share of the frames, in [0, 0.25], that show somebody else.
        degraded_share: Chance, in [0, 1], of each kind of degradation in a tracklet.
        lowest_resolution: Least share of the rows, in (0, 1], that the poorer cameras record;
            those are every second one.
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
    occluders: tuple[str, ...] = PASSING
    lingers: bool = False
    clutter: float = 0.0
    jitter: float = 1.0
    bad_crop_share: float = 0.0
    foreign_share: float = 0.0
    degraded_share: float = 0.0
    lowest_resolution: float = 1.0
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
        if not self.occluders or not set(self.occluders) <= set(OCCLUDER_KINDS):
            raise ValueError(f"expected occluders of {OCCLUDER_KINDS}, got {self.occluders}")
        if not 0 < self.lowest_resolution <= 1:
            raise ValueError(f"expected a resolution in (0, 1], got {self.lowest_resolution}")
        for name, share, most in (
            ("an occluded", self.occluded_share, 1),
            ("a bad-crop", self.bad_crop_share, 1),
            ("a foreign", self.foreign_share, LARGEST_FOREIGN_SHARE),
            ("a degraded", self.degraded_share, 1),
        ):
            if not 0 <= share <= most:
                raise ValueError(f"expected {name} share in [0, {most}], got {share}")
        for name, amount in (("clutter", self.clutter), ("jitter", self.jitter)):
            if not 0 <= amount < math.inf:
                raise ValueError(f"expected {name} of at least 0, got {amount}")
        check_size(self.height, self.width)
        check_seed(self.seed)


@dataclass(frozen=True, slots=True, eq=False)
class DrawnTracklet:
    """A tracklet before it is written.

    Args:
        identity: Number of the person, from 1.
        camera: Number of the camera, from 1.
        conditions: What made it hard to see them.
        frames: (T, H, W, 3) uint8 RGB.
        masks: (T, H, W) uint8 labels: 0 background, 1 the person, 2 what hides or replaces them.
        truth: What is true of it; its folder is "".
    """

    identity: int
    camera: int
    conditions: Conditions
    frames: Frames
    masks: Masks
    truth: TrackletTruth

    @property
    def occluder(self) -> Occluder | None:
        """What hides the person, if anything."""
        return self.conditions.occluder


def draw_camera(number: int, *, seed: int, lowest_resolution: float = 1.0) -> Camera:
    """Draw the camera with a number from 1; neighbours watch other kinds of places.

    Args:
        number: Which one; even ones are the poorer ones.
        seed: Of the set.
        lowest_resolution: Least share of the rows, in (0, 1], that a poorer one records.

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
    sensor = np.random.default_rng([seed, _SENSORS, number])
    poorer = float(sensor.uniform(lowest_resolution, (1 + lowest_resolution) / 2))
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
        resolution=1.0 if number % 2 else poorer,
    )


class Cast:
    """The people and the cameras of a set, from which any tracklet can be drawn by itself."""

    def __init__(self, config: SyntheticSet) -> None:
        self.config = config
        self.people = draw_identities(
            config.identities, twin_share=config.twin_share, seed=_derived(config.seed, _PEOPLE)
        )
        self.cameras = [
            draw_camera(number + 1, seed=config.seed, lowest_resolution=config.lowest_resolution)
            for number in range(config.cameras)
        ]

    def places(self) -> list[tuple[int, int]]:
        """Return the indices of person and camera of each tracklet, in the order of the set."""
        return list(product(range(self.config.identities), range(self.config.cameras)))

    def draw(self, number: int, camera: int) -> DrawnTracklet:
        """Draw the tracklet of a person in a camera, both counted from 0."""
        config, place = self.config, (number, camera)
        length, conditions = self._plan(number, camera)
        film = draw_tracklet(
            self.people[number],
            self.cameras[camera],
            seed=_derived(config.seed, _TRACKS, *place),
            frames=length,
            height=config.height,
            width=config.width,
            conditions=conditions,
        )
        truth = self._truth(number, camera, conditions, film.hidden)
        return DrawnTracklet(number + 1, camera + 1, conditions, film.frames, film.masks, truth)

    def _plan(self, number: int, camera: int) -> tuple[int, Conditions]:
        """Return how long a tracklet is and what happens in it: nothing of it asks who it is."""
        config, place = self.config, (number, camera)
        pool = self.people[:number] + self.people[number + 1 :] or self.people
        rng = np.random.default_rng([config.seed, _OCCLUDERS, *place])
        length = _draw_length(config, rng)
        is_occluded = rng.random() < config.occluded_share
        occluder = draw_occluder(
            rng, frames=length, pool=pool, kinds=config.occluders, lingers=config.lingers
        )
        errors = draw_errors(
            np.random.default_rng([config.seed, _TRACKER, *place]),
            frames=length,
            pool=pool,
            bad_crop_share=config.bad_crop_share,
            foreign_share=config.foreign_share,
        )
        degradations = draw_degradations(
            np.random.default_rng([config.seed, _DEGRADATIONS, *place]),
            frames=length,
            share=config.degraded_share,
        )
        return length, Conditions(
            occluder=occluder if is_occluded else None,
            clutter=config.clutter,
            jitter=config.jitter,
            errors=errors,
            degradations=degradations,
        )

    def _truth(
        self, number: int, camera: int, conditions: Conditions, hidden: tuple[float, ...]
    ) -> TrackletTruth:
        occluder, errors = conditions.occluder, conditions.errors
        return TrackletTruth(
            folder="",
            identity=number + 1,
            camera=camera + 1,
            frames=len(hidden),
            occluder=occluder.kind if occluder else None,
            occluded=(occluder.first, occluder.last) if occluder else None,
            passer=self._number(occluder.person if occluder else None),
            hidden=hidden,
            foreign=errors.foreign,
            foreigner=self._number(errors.person),
            bad_crops=tuple(frame for frame, *_ in errors.shifts),
            degradations=_strengths(conditions.degradations, self.cameras[camera]),
        )

    def _number(self, person: Identity | None) -> int | None:
        return None if person is None else self.people.index(person) + 1


def draw_set(config: SyntheticSet) -> Iterator[DrawnTracklet]:
    """Draw a whole set, one tracklet at a time: by identity, then by camera."""
    cast = Cast(config)
    for number, camera in cast.places():
        yield cast.draw(number, camera)


def _draw_length(config: SyntheticSet, rng: np.random.Generator) -> int:
    shortest, longest = math.log(config.frames_min), math.log(config.frames_max + 1)
    length = int(math.exp(rng.uniform(shortest, longest)))
    return min(max(length, config.frames_min), config.frames_max)


def _strengths(degradations: Degradations, camera: Camera) -> dict[str, float]:
    """Return what is wrong with the pictures of a tracklet, and how much."""
    resolution = min(degradations.resolution, camera.resolution)
    strengths = {
        "motion": degradations.motion,
        "defocus": degradations.defocus,
        "resolution": resolution if resolution < 1 else 0.0,
        "jpeg": float(degradations.jpeg_quality or 0),
        "exposure": max(degradations.gains) / min(degradations.gains) if degradations.gains else 0,
    }
    return {name: round(strength, 4) for name, strength in strengths.items() if strength}


def write_set(
    config: SyntheticSet,
    root: Path,
    *,
    layout: DrawnLayout = "folder",
    masks: bool = True,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tracklet]:
    """Write a drawn set in a layout, with its split file and, in ``.truth``, what is true of it.

    The bytes do not depend on ``jobs``. ``root`` appears when all is written.

    Args:
        config: What to draw.
        root: A new or empty folder; parents are made.
        layout: How the set lies on disk.
        masks: Whether to write which pixel is whose.
        jobs: How many processes draw; as many as pay by default.
        progress: Called after each tracklet with how many are done and how many there are.

    Returns:
        The tracklets, as ``folder.read_folder`` returns them where ``layout`` is "folder".

    Raises:
        DatasetError: ``root`` holds something already or cannot be written, or the layout has
            another number of cameras.
        ValueError: ``jobs`` is below 1.
    """
    needed = needed_cameras(layout)
    if needed is not None and config.cameras != needed:
        raise DatasetError(f"expected {needed} cameras for {layout}, got {config.cameras}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"expected at least 1 job, got {jobs}")
    total = config.identities * config.cameras
    records: list[TrackletTruth] = []
    # Closed first, so that no process still writes into a folder that is being given up.
    with (
        written_aside(root) as aside,
        closing(_written(config, aside, layout, masks, jobs or _paying_jobs(total))) as written,
    ):
        for record in written:
            records.append(record)
            if progress is not None:
                progress(len(records), total)
        write_truth(aside, records, {"layout": layout, "set": asdict(config)})
        write_splits(aside, layout, config.identities, _derived(config.seed, _SPLITS))
    return [_tracklet(record, root, layout) for record in records]


def write_folder(
    config: SyntheticSet, root: Path, progress: Callable[[int, int], None] | None = None
) -> list[Tracklet]:
    """Write a drawn set as ``p0001/c1/0001.jpg``, which ``folder.read_folder`` reads; no masks.

    Args:
        config: What to draw.
        root: A new or empty folder; parents are made.
        progress: Called after each tracklet with how many are done and how many there are.

    Returns:
        The tracklets, as ``read_folder`` returns them.

    Raises:
        DatasetError: ``root`` holds something already.
    """
    return write_set(config, root, masks=False, jobs=1, progress=progress)


def _paying_jobs(tracklets: int) -> int:
    return min(os.cpu_count() or 1, max(tracklets // _TRACKLETS_A_PROCESS, 1))


class Writer:
    """Draws and writes single tracklets of a set.

    Args:
        config: What to draw.
        root: Folder of the set.
        layout: How the set lies on disk.
        masks: Whether to write which pixel is whose.
    """

    def __init__(self, config: SyntheticSet, root: Path, layout: DrawnLayout, masks: bool) -> None:
        self.cast, self.root, self.layout, self.masks = Cast(config), root, layout, masks

    def write(self, place: tuple[int, int]) -> TrackletTruth:
        """Write the tracklet at one of the cast's places, and return what is true of it."""
        drawn = self.cast.draw(*place)
        masks = drawn.masks if self.masks else None
        return save_tracklet(drawn.frames, masks, drawn.truth, self.root, self.layout)


def _written(
    config: SyntheticSet, root: Path, layout: DrawnLayout, masks: bool, jobs: int
) -> Generator[TrackletTruth, None, None]:
    """Write all tracklets with so many processes; yield what is true of them, in their order."""
    if jobs == 1:
        writer = Writer(config, root, layout, masks)
        yield from map(writer.write, writer.cast.places())
        return
    shares = [
        Share(asdict(config), str(root), layout, masks, number, jobs) for number in range(jobs)
    ]
    yield from written_by_processes(shares, config.identities * config.cameras)


def _tracklet(record: TrackletTruth, root: Path, layout: DrawnLayout) -> Tracklet:
    folder, person, camera = root / record.folder, record.identity, record.camera
    names = [frame_name(layout, person, camera, number + 1) for number in range(record.frames)]
    return Tracklet(
        identity_name(layout, person),
        camera_name(layout, camera),
        "",
        tuple(folder / name for name in names),
    )


def _derived(seed: int, *path: int) -> int:
    """Return the seed of a part, independent of the seeds of all other parts."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1)[0])
