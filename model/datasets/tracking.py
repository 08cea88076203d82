"""What a tracker does wrong: boxes off the person, frames of somebody else."""

from dataclasses import dataclass

import numpy as np

from model.datasets.people import Identity

BAD_CROP = 0.2
"""How far a bad box is off, as a share of the frame's height or width."""

LARGEST_FOREIGN_SHARE = 0.25

_SWITCHED = (0.1, 0.4)  # the share of a tracklet that a switch takes
_MEAN_SWITCHED = sum(_SWITCHED) / 2


@dataclass(frozen=True, slots=True)
class TrackerErrors:
    """Where a tracker lost its person.

    Args:
        shifts: Frame -> how far its box is off, right and down, in shares of width and height.
        foreign: Frames that show somebody else; contiguous, at one end of the tracklet.
        person: Who they show, if there are any.
    """

    shifts: tuple[tuple[int, float, float], ...] = ()
    foreign: tuple[int, ...] = ()
    person: Identity | None = None

    def __post_init__(self) -> None:
        if (self.person is None) == bool(self.foreign):
            raise ValueError("expected a person for foreign frames, and only there")

    def shift(self, number: int) -> tuple[float, float]:
        """Return how far the box of a frame is off, right and down, in shares of its size."""
        for frame, right, down in self.shifts:
            if frame == number:
                return right, down
        return 0.0, 0.0


def draw_errors(
    rng: np.random.Generator,
    *,
    frames: int,
    pool: tuple[Identity, ...],
    bad_crop_share: float,
    foreign_share: float,
) -> TrackerErrors:
    """Draw what a tracker does wrong in one tracklet.

    Args:
        rng: Decides.
        frames: Length of the tracklet, T.
        pool: Who may be taken for the person: the people of the data set.
        bad_crop_share: Share of the frames, in [0, 1], whose box is off by ``BAD_CROP``.
        foreign_share: Share of the frames, in [0, 0.25] and over many tracklets, that show
            somebody else. A tracker that switches does so for a while: few tracklets have many.
    """
    is_bad = rng.random(frames) < bad_crop_share
    sides = rng.integers(4, size=frames)
    steps = ((-BAD_CROP, 0.0), (BAD_CROP, 0.0), (0.0, -BAD_CROP), (0.0, BAD_CROP))
    shifts = tuple((int(number), *steps[sides[number]]) for number in np.flatnonzero(is_bad))

    switches = rng.random() < foreign_share / _MEAN_SWITCHED
    # Rounded up or down by chance, or short tracklets would have too few or too many.
    count = int(frames * rng.uniform(*_SWITCHED) + rng.random())
    at_end = rng.random() < 0.5
    person = pool[int(rng.integers(len(pool)))]
    if not switches or count == 0:
        return TrackerErrors(shifts)
    first = frames - count if at_end else 0
    return TrackerErrors(shifts, tuple(range(first, first + count)), person)
