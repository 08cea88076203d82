"""What comes between a person and the camera, and how much of the person it hides."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.datasets.figure import draw_figure
from model.datasets.layers import FEET_ROW, layer_of, pixels_per_metre, smeared
from model.datasets.people import Identity
from model.datasets.scene import FINENESS, draw_furniture, draw_pillar
from model.datasets.tubes import Layer, Point, View

PASSING = ("pedestrian", "furniture", "pillar")
"""Occluders that pass before the person."""

OCCLUDER_KINDS = (*PASSING, "truncation")
"""Those, and the edge of the camera's picture, which cuts the person off."""


@dataclass(frozen=True, slots=True)
class Occluder:
    """What hides the person, and when.

    Args:
        kind: One of ``OCCLUDER_KINDS``.
        first: First frame in which it may be seen.
        last: Last one.
        person: Who passes, for a pedestrian.
        direction: 1 if it passes to the right, -1 to the left. A truncation of direction -1 is
            deepest in its first frame (the person comes into the picture), of 1 in its last one.
        lingers: Whether what passes slows down before the person, and so hides them for most of
            its frames; else it crosses at an even pace.
    """

    kind: str
    first: int
    last: int
    person: Identity | None
    direction: int
    lingers: bool = False

    def __post_init__(self) -> None:
        if self.kind not in OCCLUDER_KINDS:
            raise ValueError(f"expected an occluder of {OCCLUDER_KINDS}, got {self.kind!r}")
        if not 0 <= self.first <= self.last:
            raise ValueError(f"expected 0 <= first <= last, got {self.first} and {self.last}")
        if (self.person is None) == (self.kind == "pedestrian"):
            raise ValueError("expected a person for a pedestrian, and only there")
        if self.direction not in (-1, 1):
            raise ValueError(f"expected direction 1 or -1, got {self.direction}")

    def covers(self, number: int) -> bool:
        """Say whether it may be seen in a frame."""
        return self.first <= number <= self.last

    def progress(self, number: int) -> float:
        """Return how far it has come in a frame, in (0, 1)."""
        return (number - self.first + 0.5) / (self.last - self.first + 1)


def draw_occluder(
    rng: np.random.Generator,
    *,
    frames: int,
    pool: tuple[Identity, ...],
    kinds: tuple[str, ...] = PASSING,
    lingers: bool = False,
) -> Occluder:
    """Draw what hides a person: for a contiguous 30-70 % of the frames, rounded.

    Args:
        rng: Decides.
        frames: Length of the tracklet.
        pool: Who may pass: the people of the data set, so that taking the wrong one is an error.
        kinds: What may come, of ``OCCLUDER_KINDS``; at least one.
        lingers: Whether it slows down before the person.
    """
    kind = kinds[int(rng.integers(len(kinds)))]
    count = max(1, round(frames * rng.uniform(0.3, 0.7)))
    first = int(rng.integers(frames - count + 1))
    passer = pool[int(rng.integers(len(pool)))]
    direction = 1 if rng.random() < 0.5 else -1
    if kind == "truncation":  # people are cut off where they come into the picture or leave it
        first = frames - count if direction > 0 else 0
    person = passer if kind == "pedestrian" else None
    return Occluder(kind, first, first + count - 1, person, direction, lingers)


class Passer:
    """What passes between the person and the camera, drawn frame by frame.

    Args:
        occluder: What and when; its kind is one of ``PASSING``.
        view: Pitch and light of the camera.
        shape: Rows and columns of a frame.
        rng: Decides what the occluder leaves open.
    """

    def __init__(
        self,
        occluder: Occluder,
        view: tuple[float, Point],
        shape: tuple[int, int],
        rng: np.random.Generator,
    ) -> None:
        self.occluder, self.shape = occluder, shape
        self.pitch, self.light = view
        self.phase = float(rng.uniform(0, 2 * math.pi))
        self.closer = float(rng.uniform(1.03, 1.14))
        self.yaw = occluder.direction * math.pi / 2 + float(rng.normal(0, 0.15))
        height = shape[0]
        self.sprite: Image.Image | None = None
        if occluder.kind == "furniture":
            self.sprite = draw_furniture(height=height, rng=rng)
        elif occluder.kind == "pillar":
            self.sprite = draw_pillar(height=height, rng=rng)
        # Nothing stops exactly in the middle of the person.
        self.beside = float(rng.uniform(-0.12, 0.12)) if occluder.lingers else 0.0

    def layer(self, number: int, shift: tuple[float, float]) -> Layer:
        """Return the passer in a frame whose box is off by ``shift`` pixels, right and down."""
        height, width = self.shape
        # In the first and in the last frame it is half seen.
        half = 0.22 * height if self.sprite is None else self.sprite.width / FINENESS / 2
        way = self.occluder.progress(number) - 0.5
        if self.occluder.lingers:  # the cube stays near 0 for most of the way
            way = 4 * way**3
        column = width / 2 + self.occluder.direction * way * (width + 1.2 * half)
        column += width * self.beside * (1 - 2 * abs(way)) - shift[0]
        if self.sprite is None:
            return self._pedestrian(number, column, shift[1])
        left = (self.sprite.width / FINENESS / 2 - column) * FINENESS
        top = self.sprite.height - (height - shift[1]) * FINENESS
        return layer_of(self.sprite, left=left, top=top, height=height, width=width)

    def _pedestrian(self, number: int, column: float, down: float) -> Layer:
        height, width = self.shape
        person = self.occluder.person
        if person is None:
            raise ValueError("expected a person for a pedestrian, got None")
        view = View(
            yaw=self.yaw,
            pitch=self.pitch,
            scale=pixels_per_metre(person, height) * self.closer,
            feet=(column, height * (FEET_ROW + 0.05) - down),
            light=self.light,
        )
        layer = draw_figure(
            person, view, phase=self.phase + 0.55 * number, height=height, width=width
        )
        return smeared(layer, 0.7)


class PictureEdge:
    """The edge of the camera's picture: what a box has beyond it is filled in.

    Args:
        occluder: When; its kind is "truncation".
        shape: Rows and columns of a frame.
        rng: Decides the side (left, right or below), how deep it cuts, and the filling.
    """

    def __init__(
        self, occluder: Occluder, shape: tuple[int, int], rng: np.random.Generator
    ) -> None:
        self.occluder, self.shape = occluder, shape
        self.side = ("left", "right", "below")[int(rng.integers(3))]
        self.depth = float(rng.uniform(0.4, 0.65))
        self.repeats = bool(rng.random() < 0.5)

    def beyond(self, number: int) -> tuple[slice, slice]:
        """Return the rows and columns of a frame that lie beyond the picture."""
        height, width = self.shape
        share = self.occluder.progress(number)
        if self.occluder.direction < 0:
            share = 1 - share
        size = height if self.side == "below" else width
        # It comes in fast and then stays: half of the frames have the full depth.
        cut = max(round(size * self.depth * min(1.0, 2 * share)), 1)
        if self.side == "below":
            return slice(height - cut, height), slice(0, width)
        return slice(0, height), slice(0, cut) if self.side == "left" else slice(width - cut, width)

    def fill(self, frame: NDArray[np.uint8], number: int) -> None:
        """Fill in, in place, what a (H, W, 3) uint8 frame has beyond the picture.

        Trackers fill with black or with the last pixels before the edge.
        """
        rows, columns = self.beyond(number)
        if not self.repeats:
            frame[rows, columns] = 0
        elif self.side == "below":
            frame[rows] = frame[rows.start - 1]
        elif self.side == "left":
            frame[:, columns] = frame[:, columns.stop, None]
        else:
            frame[:, columns] = frame[:, columns.start - 1, None]
