"""How a tracklet is filmed: a person walks, a box follows, a camera records."""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.datasets.clutter import Company
from model.datasets.degradations import Degradations, resized
from model.datasets.figure import draw_figure
from model.datasets.layers import (
    FEET_ROW,
    pixels_per_metre,
    planes_of,
    smeared,
    sprite_of,
    wandering,
)
from model.datasets.occluders import Occluder, Passer, PictureEdge
from model.datasets.people import Identity, draw_identity
from model.datasets.scene import FINENESS, MARGIN, draw_backdrop
from model.datasets.tracking import TrackerErrors
from model.datasets.tubes import Floats, Layer, View

Frames = NDArray[np.uint8]
"""(T, H, W, 3) RGB."""

Masks = NDArray[np.uint8]
"""(T, H, W) labels: ``BACKGROUND``, ``PERSON`` or ``OCCLUDER``."""

BACKGROUND, PERSON, OCCLUDER = range(3)

Matrix = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]

SMALLEST = (32, 16)
"""Fewest rows and columns of a frame: below, a person is a smear."""

_FEWEST_RECORDED = (12, 6)  # rows and columns that the worst camera records

# Each decides its own: a stream that two shared would tie, say, the place to the occluder.
_WALK, _PLACE, _OCCLUDER, _NOISE, _CLUTTER, _FOREIGN = range(1, 7)


@dataclass(frozen=True, slots=True)
class Camera:
    """Where a camera hangs and what it does to colours.

    Args:
        name: Its name in file names.
        family: The kind of place that it watches, a key of ``scene.FAMILIES``.
        yaw: Where people mostly face, in radians: 0 to the camera, pi / 2 to the right.
        pitch: How far it looks down, in radians.
        colours: Maps the RGB of the scene to the RGB of the picture.
        gamma: Exponent of the brightness in [0, 1].
        noise: Standard deviation of the pixel noise, in levels of 255.
        blur: Share of each pixel, in [0, 1), that comes from its neighbours.
        light: Unit vector towards the light: right, down, to the camera.
        resolution: Rows that it records, as a share of the frame's rows, in (0, 1].
    """

    name: str
    family: str
    yaw: float
    pitch: float
    colours: Matrix
    gamma: float
    noise: float
    blur: float
    light: tuple[float, float, float]
    resolution: float = 1.0


@dataclass(frozen=True, slots=True)
class Conditions:
    """How hard it is to see the person; by default, only an honest tracker's box trembles.

    Args:
        occluder: What hides the person, if anything.
        clutter: How much keeps beside and behind the person, from 0; 1 is a crowded street.
        jitter: Trembling of the box, as a multiple of the usual one.
        errors: What the tracker does wrong.
        degradations: What is wrong with the pictures.
    """

    occluder: Occluder | None = None
    clutter: float = 0.0
    jitter: float = 1.0
    errors: TrackerErrors = field(default_factory=TrackerErrors)
    degradations: Degradations = field(default_factory=Degradations)


@dataclass(frozen=True, slots=True, eq=False)
class Film:
    """The frames of a tracklet, and what they show.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        masks: (T, H, W) uint8 labels. Who walks in a foreign frame is labelled ``OCCLUDER``, for
            they are not the person; so is what lies beyond the edge of the picture.
        hidden: Share of the person, in [0, 1], that something hides in each of the T frames; 0 in
            foreign frames, where there is no person to hide.
    """

    frames: Frames
    masks: Masks
    hidden: tuple[float, ...]


def draw_tracklet(
    identity: Identity,
    camera: Camera,
    *,
    seed: int,
    frames: int,
    height: int = 192,
    width: int = 96,
    conditions: Conditions | None = None,
) -> Film:
    """Draw one person walking past one camera.

    Args:
        identity: Who.
        camera: Where.
        seed: Decides the place's layout, the walk, the box and the noise: all but the person.
        frames: How many, T.
        height: Rows H of a frame.
        width: Columns W of a frame.
        conditions: What makes it hard; ``Conditions()`` by default.

    Raises:
        ValueError: A number is out of its range, or the occluder comes after the last frame.
    """
    check_size(height, width)
    check_seed(seed)
    conditions = conditions or Conditions()
    if frames < 1:
        raise ValueError(f"expected at least 1 frame, got {frames}")
    occluder = conditions.occluder
    if occluder is not None and occluder.last >= frames:
        raise ValueError(f"expected an occluder within {frames} frames, got {occluder.last}")
    scene = _Scene(identity, camera, conditions, frames, (height, width), seed)
    recorder = _Recorder(camera, conditions.degradations, np.random.default_rng([seed, _NOISE]))
    drawn = np.empty((frames, height, width, 3), np.uint8)
    masks = np.empty((frames, height, width), np.uint8)
    hidden = []
    for number in range(frames):
        picture, masks[number], share = scene.frame(number)
        frame = recorder.record(picture, number, scene.motion(number))
        if scene.edge is not None and scene.edge.occluder.covers(number):
            scene.edge.fill(frame, number)
        drawn[number] = conditions.degradations.compressed(frame)
        hidden.append(share)
    return Film(drawn, masks, tuple(hidden))


class _Scene:
    """All that is before the camera, and which pixels are whose."""

    def __init__(
        self,
        identity: Identity,
        camera: Camera,
        conditions: Conditions,
        frames: int,
        shape: tuple[int, int],
        seed: int,
    ) -> None:
        self.shape, self.errors = shape, conditions.errors
        rng = np.random.default_rng([seed, _WALK])
        self.walk = _Walk(camera, frames, conditions.jitter, rng)
        self.stage = _Stage(camera, self.walk, shape, np.random.default_rng([seed, _PLACE]))
        self.identity = identity
        self.company: Company | None = None
        view = (camera.pitch, camera.light)
        if conditions.clutter:
            rng = np.random.default_rng([seed, _CLUTTER])
            self.company = Company(conditions.clutter, frames, shape, view, rng)
        self.passer: Passer | None = None
        self.edge: PictureEdge | None = None
        rng = np.random.default_rng([seed, _OCCLUDER])
        occluder = conditions.occluder
        if occluder is not None and occluder.kind == "truncation":
            self.edge = PictureEdge(occluder, shape, rng)
        elif occluder is not None:
            self.passer = Passer(occluder, view, shape, rng)
        rng = np.random.default_rng([seed, _FOREIGN])
        self.other_yaw = float(rng.normal(0, 0.6))
        self.other_phase = float(rng.uniform(0, 2 * math.pi))

    def motion(self, number: int) -> float:
        """Return the direction of the motion in a frame, in radians from the rows.

        Who walks across the picture moves along its rows; who comes closer, bobs.
        """
        yaw = float(self.walk.yaw + self.walk.sway[number])
        return math.atan2(0.35 * abs(math.cos(yaw)), abs(math.sin(yaw)))

    def frame(self, number: int) -> tuple[Floats, NDArray[np.uint8], float]:
        """Return the (3, H, W) scene in [0, 1], its (H, W) labels, and how much is hidden."""
        (height, width), stage = self.shape, self.stage
        right, down = self.errors.shift(number)
        shift = (right * width, down * height)
        picture = stage.window(number, shift)
        if self.company is not None:
            aside, sunk = stage.offset(number)
            beside = self.company.layer(number, (shift[0] - aside, shift[1] - sunk))
            picture = beside.over(picture)
        is_foreign = number in self.errors.foreign
        layer = self._person(number, shift, is_foreign=is_foreign)
        feet = stage.feet(number, shift)
        picture = layer.over(_shadowed(picture, feet, height, stage.camera.light[0]))
        person = layer.alpha > 0.5
        before = np.zeros((height, width), bool)
        if self.passer is not None and self.passer.occluder.covers(number):
            passing = self.passer.layer(number, shift)
            picture = passing.over(picture)
            before = passing.alpha > 0.5
        if self.edge is not None and self.edge.occluder.covers(number):
            before[self.edge.beyond(number)] = True
        labels = np.where(person, np.uint8(OCCLUDER if is_foreign else PERSON), np.uint8(0))
        labels[before] = OCCLUDER
        return picture, labels, 0.0 if is_foreign else _share_of(person, before)

    def _person(self, number: int, shift: tuple[float, float], *, is_foreign: bool) -> Layer:
        if not is_foreign or self.errors.person is None:
            return self.stage.person(self.identity, number, shift)
        turned = (self.other_yaw, self.other_phase)
        return self.stage.person(self.errors.person, number, shift, turned)


def _share_of(person: NDArray[np.bool_], before: NDArray[np.bool_]) -> float:
    """Return how much of the person, in [0, 1], something is before."""
    return float((person & before).sum() / max(int(person.sum()), 1))


class _Walk:
    """How the person moves and how well the box follows, frame by frame."""

    def __init__(
        self, camera: Camera, frames: int, jitter: float, rng: np.random.Generator
    ) -> None:
        turned = math.pi if rng.random() < 0.15 else 0.0  # some walk the other way
        self.yaw = camera.yaw + turned + rng.normal(0, 0.22)
        moments = np.arange(frames)
        cadence = rng.uniform(0.42, 0.62)
        self.phase = rng.uniform(0, 2 * math.pi) + cadence * moments
        self.head_turn = rng.normal(0, 0.25) + 0.12 * np.sin(moments * 0.21 + rng.uniform(0, 6))
        drift = rng.normal(0, 0.035) * np.linspace(-1, 1, frames)
        zoom = 1 + jitter * drift + jitter * wandering(rng, frames, 0.012)
        self.zoom = zoom.clip(0.75, 1.3)
        # Shares of the width and of the height.
        self.aside = rng.normal(0, 0.02) + jitter * wandering(rng, frames, 0.022)
        self.sunk = rng.normal(0, 0.008) + jitter * wandering(rng, frames, 0.008)
        # The place passes the box against the walking direction, in shares of the width.
        self.pace = 0.085 * math.sin(self.yaw)
        self.passed = self.pace * moments + wandering(rng, frames, 0.012)
        self.sway = wandering(rng, frames, 0.05)
        self.smear = float(rng.uniform(0.0, 0.5))


class _Stage:
    """A person in a place, as the box of a tracker cuts it out."""

    def __init__(
        self, camera: Camera, walk: _Walk, shape: tuple[int, int], rng: np.random.Generator
    ) -> None:
        self.camera, self.walk, self.shape = camera, walk, shape
        height, width = shape
        travel = float(np.ptp(walk.passed)) * width
        columns = math.ceil(travel + 1.7 * width)
        self.place = draw_backdrop(camera.family, height=height, width=columns, rng=rng)
        self._add_bystanders(rng)
        self.origin = 0.35 * width - float(walk.passed.min()) * width

    def offset(self, number: int) -> tuple[float, float]:
        """Return how far the person is from the usual place in the box: right and down, pixels."""
        height, width = self.shape
        return width * float(self.walk.aside[number]), height * float(self.walk.sunk[number])

    def feet(self, number: int, shift: tuple[float, float]) -> tuple[float, float]:
        """Return column and row of the feet in a frame whose box is off by ``shift`` pixels."""
        (height, width), walk = self.shape, self.walk
        return (
            width * (0.5 + float(walk.aside[number])) - shift[0],
            height * (FEET_ROW + float(walk.sunk[number])) - shift[1],
        )

    def person(
        self,
        identity: Identity,
        number: int,
        shift: tuple[float, float],
        turned: tuple[float, float] = (0.0, 0.0),
    ) -> Layer:
        """Draw somebody where the person is, ``turned`` by a yaw and a phase of the walk."""
        walk, (height, width) = self.walk, self.shape
        view = View(
            yaw=float(walk.yaw + walk.sway[number]) + turned[0],
            pitch=self.camera.pitch,
            scale=pixels_per_metre(identity, height) * float(walk.zoom[number]),
            feet=self.feet(number, shift),
            light=self.camera.light,
        )
        layer = draw_figure(
            identity,
            view,
            phase=float(walk.phase[number]) + turned[1],
            height=height,
            width=width,
            head_turn=float(walk.head_turn[number]),
        )
        return smeared(layer, walk.smear * (0.4 + abs(math.sin(view.yaw))))

    def window(self, number: int, shift: tuple[float, float]) -> Floats:
        """Return the (3, H, W) place in [0, 1] that the box of a frame shows."""
        walk, (height, width) = self.walk, self.shape
        zoom = float(walk.zoom[number])
        # The ground under the feet keeps its row, whatever the zoom.
        left = self.origin + width * float(walk.passed[number] - walk.aside[number] / zoom)
        left += 0.5 * width * (1 - 1 / zoom) + shift[0] / zoom
        ground = height * (MARGIN + FEET_ROW)
        top = ground - height * (FEET_ROW + float(walk.sunk[number])) / zoom + shift[1] / zoom
        box = _inside((left, top, width / zoom, height / zoom), self.place)
        window = self.place.resize((width, height), Image.Resampling.BILINEAR, box)
        return planes_of(window)

    def _add_bystanders(self, rng: np.random.Generator) -> None:
        """Let people walk far behind, who belong to no identity of the set."""
        height, _ = self.shape
        count = int(rng.poisson(0.55 * self.place.width / self.place.height))
        for _ in range(count):
            share = rng.uniform(0.55, 0.72)
            rows, columns = round(height * share), round(height * share * 0.5)
            stranger = draw_identity(rng)
            view = View(
                yaw=float(rng.uniform(0, 2 * math.pi)),
                pitch=self.camera.pitch,
                scale=pixels_per_metre(stranger, rows),
                feet=(columns / 2, rows * 0.95),
                light=self.camera.light,
            )
            layer = draw_figure(
                stranger, view, phase=float(rng.uniform(0, 6)), height=rows, width=columns
            )
            ground = height * (MARGIN + 0.62 + 0.3 * (share - 0.55))
            corner = (
                round(float(rng.uniform(0, 1)) * (self.place.width - columns * FINENESS)),
                round((ground - rows * 0.95) * FINENESS),
            )
            sprite = sprite_of(layer, FINENESS)
            self.place.paste(sprite, corner, sprite)


def _shadowed(picture: Floats, feet: tuple[float, float], height: int, light_side: float) -> Floats:
    """Darken the ground around the feet, more on the side away from the light."""
    column, row = feet
    rows = (np.arange(picture.shape[1], dtype=np.float32)[:, None] - row) / (0.022 * height)
    columns = np.arange(picture.shape[2], dtype=np.float32)[None]
    contact = np.exp(-(rows**2) - ((columns - column) / (0.095 * height)) ** 2)
    cast_column = column - light_side * 0.22 * height
    cast = np.exp(-((rows + 0.6) ** 2) - ((columns - cast_column) / (0.17 * height)) ** 2)
    return np.asarray(picture * (1 - 0.45 * contact - 0.2 * cast), np.float32)


def _inside(
    window: tuple[float, float, float, float], place: Image.Image
) -> tuple[float, float, float, float]:
    """Shift a window, left, top, width and height in frame pixels, into a place.

    Returns:
        Left, top, right and lower edge in pixels of the place.
    """
    left, top, width, height = (value * FINENESS for value in window)
    left = min(max(left, 0.0), place.width - width)
    top = min(max(top, 0.0), place.height - height)
    return left, top, left + width, top + height


class _Recorder:
    """A camera that records a scene, with what is wrong with it."""

    def __init__(
        self, camera: Camera, degradations: Degradations, noise: np.random.Generator
    ) -> None:
        self.camera, self.degradations, self.noise = camera, degradations, noise

    def record(self, picture: Floats, number: int, angle: float) -> Frames:
        """Return the (H, W, 3) uint8 frame of a (3, H, W) scene that moves along an angle."""
        picture = self.degradations.exposed(picture, number)
        picture = self.degradations.blurred(picture, number, angle)
        height, width = picture.shape[1:]
        share = min(self.camera.resolution, self.degradations.resolution)
        rows, columns = (
            min(size, max(round(size * share), fewest))
            for size, fewest in zip((height, width), _FEWEST_RECORDED, strict=True)
        )
        if rows == height:
            return _seen(picture, self.camera, self.noise)
        # The noise is the sensor's, so it is as coarse as the sensor.
        coarse = Image.fromarray(_seen(resized(picture, rows, columns), self.camera, self.noise))
        return np.array(coarse.resize((width, height), Image.Resampling.BILINEAR))


def _seen(picture: Floats, camera: Camera, rng: np.random.Generator) -> Frames:
    """Return what the camera makes of a scene: blur, colours, gamma, noise; (H, W, 3) uint8."""
    share = camera.blur / 4
    soft = picture * (1 - 4 * share)
    padded = np.pad(picture, ((0, 0), (1, 1), (1, 1)), mode="edge")
    soft += (padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1]) * share
    soft += (padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]) * share
    # Not `@`: a BLAS may sum in another order on another machine.
    rows = [
        sum(gain * plane for gain, plane in zip(row, soft, strict=True)) for row in camera.colours
    ]
    mixed = np.stack(rows).clip(0, 1)
    # A table of the curve: a power for each pixel is slow.
    curve = np.linspace(0, 1, 2048, dtype=np.float32) ** np.float32(camera.gamma) * 255
    levels = curve[(mixed * 2047).astype(np.intp)]
    levels += rng.standard_normal(levels.shape[1:], np.float32) * np.float32(camera.noise) + 0.5
    return np.ascontiguousarray(levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def check_size(height: int, width: int) -> None:
    """Refuse frames that are too small, with a ValueError."""
    if height < SMALLEST[0] or width < SMALLEST[1]:
        raise ValueError(f"expected frames of at least {SMALLEST}, got {(height, width)}")


def check_seed(seed: int) -> None:
    """Refuse a negative seed, with a ValueError."""
    if seed < 0:
        raise ValueError(f"expected a seed from 0, got {seed}")
