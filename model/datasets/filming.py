"""How a tracklet is filmed: a person walks, a box follows, a camera records."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.datasets.figure import draw_figure
from model.datasets.people import Identity, draw_identity
from model.datasets.scene import FINENESS, MARGIN, draw_backdrop, draw_furniture, draw_pillar
from model.datasets.tubes import Floats, Layer, View

Frames = NDArray[np.uint8]
"""(T, H, W, 3) RGB."""

Matrix = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]

OCCLUDER_KINDS = ("pedestrian", "furniture", "pillar")
SMALLEST = (32, 16)
"""Fewest rows and columns of a frame: below, a person is a smear."""

_MEAN_HEIGHT_M = 1.73
_FEET_ROW = 0.945  # as a share of the frame
_BODY = 0.86  # height of a person of mean height, likewise

# Each decides its own: a stream that two shared would tie, say, the place to the occluder.
_WALK, _PLACE, _OCCLUDER, _NOISE = range(1, 5)


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


@dataclass(frozen=True, slots=True)
class Occluder:
    """What passes before the person, and when.

    Args:
        kind: One of ``OCCLUDER_KINDS``.
        first: First frame in which it may be seen.
        last: Last one.
        person: Who passes, for a pedestrian.
        direction: 1 if it passes to the right, -1 to the left.
    """

    kind: str
    first: int
    last: int
    person: Identity | None
    direction: int

    def __post_init__(self) -> None:
        if self.kind not in OCCLUDER_KINDS:
            raise ValueError(f"expected an occluder of {OCCLUDER_KINDS}, got {self.kind!r}")
        if not 0 <= self.first <= self.last:
            raise ValueError(f"expected 0 <= first <= last, got {self.first} and {self.last}")
        if (self.person is None) == (self.kind == "pedestrian"):
            raise ValueError("expected a person for a pedestrian, and only there")
        if self.direction not in (-1, 1):
            raise ValueError(f"expected direction 1 or -1, got {self.direction}")


def draw_tracklet(
    identity: Identity,
    camera: Camera,
    *,
    seed: int,
    frames: int,
    height: int = 192,
    width: int = 96,
    occluder: Occluder | None = None,
) -> Frames:
    """Draw one person walking past one camera.

    Args:
        identity: Who.
        camera: Where.
        seed: Decides the place's layout, the walk, the box and the noise: all but the person.
        frames: How many, T.
        height: Rows H of a frame.
        width: Columns W of a frame.
        occluder: What passes before the person, if anything.

    Returns:
        (T, H, W, 3) uint8 RGB.

    Raises:
        ValueError: A number is out of its range, or the occluder comes after the last frame.
    """
    check_size(height, width)
    check_seed(seed)
    if frames < 1:
        raise ValueError(f"expected at least 1 frame, got {frames}")
    if occluder is not None and occluder.last >= frames:
        raise ValueError(f"expected an occluder within {frames} frames, got {occluder.last}")
    walk = _Walk(camera, frames, np.random.default_rng([seed, _WALK]))
    stage = _Stage(identity, camera, walk, (height, width), seed)
    passer = _Passer(occluder, camera, (height, width), seed) if occluder else None
    noise = np.random.default_rng([seed, _NOISE])
    drawn = np.empty((frames, height, width, 3), np.uint8)
    for number in range(frames):
        picture = stage.frame(number)
        if passer is not None:
            picture = passer.over(picture, number)
        drawn[number] = _seen(picture, camera, noise)
    return drawn


class _Walk:
    """How the person moves and how well the box follows, frame by frame."""

    def __init__(self, camera: Camera, frames: int, rng: np.random.Generator) -> None:
        turned = math.pi if rng.random() < 0.15 else 0.0  # some walk the other way
        self.yaw = camera.yaw + turned + rng.normal(0, 0.22)
        moments = np.arange(frames)
        cadence = rng.uniform(0.42, 0.62)
        self.phase = rng.uniform(0, 2 * math.pi) + cadence * moments
        self.head_turn = rng.normal(0, 0.25) + 0.12 * np.sin(moments * 0.21 + rng.uniform(0, 6))
        drift = rng.normal(0, 0.035) * np.linspace(-1, 1, frames)
        self.zoom = 1 + drift + _wandering(rng, frames, 0.012)
        # Shares of the width and of the height.
        self.aside = rng.normal(0, 0.02) + _wandering(rng, frames, 0.022)
        self.sunk = rng.normal(0, 0.008) + _wandering(rng, frames, 0.008)
        # The place passes the box against the walking direction, in shares of the width.
        self.pace = 0.085 * math.sin(self.yaw)
        self.passed = self.pace * moments + _wandering(rng, frames, 0.012)
        self.sway = _wandering(rng, frames, 0.05)
        self.smear = float(rng.uniform(0.0, 0.5))


def _wandering(rng: np.random.Generator, frames: int, spread: float) -> NDArray[np.float64]:
    """Return smooth noise: each value leans on the one before."""
    values = np.empty(frames)
    value = rng.normal(0, spread)
    for number in range(frames):
        value = 0.75 * value + rng.normal(0, spread * 0.66)
        values[number] = value
    return values


class _Stage:
    """A person in a place, as the box of a tracker cuts it out."""

    def __init__(
        self, identity: Identity, camera: Camera, walk: _Walk, shape: tuple[int, int], seed: int
    ) -> None:
        self.identity, self.camera, self.walk, self.shape = identity, camera, walk, shape
        rng = np.random.default_rng([seed, _PLACE])
        height, width = shape
        travel = float(np.ptp(walk.passed)) * width
        columns = math.ceil(travel + 1.7 * width)
        self.place = draw_backdrop(camera.family, height=height, width=columns, rng=rng)
        self._add_bystanders(rng)
        self.origin = 0.35 * width - float(walk.passed.min()) * width

    def frame(self, number: int) -> Floats:
        """Return the (3, H, W) scene in [0, 1], before the camera sees it."""
        walk, (height, width) = self.walk, self.shape
        feet = (
            width * (0.5 + float(walk.aside[number])),
            height * (_FEET_ROW + float(walk.sunk[number])),
        )
        picture = _shadowed(self._window(number), feet, height, self.camera.light[0])
        view = View(
            yaw=float(walk.yaw + walk.sway[number]),
            pitch=self.camera.pitch,
            scale=_scale(self.identity, height) * float(walk.zoom[number]),
            feet=feet,
            light=self.camera.light,
        )
        layer = draw_figure(
            self.identity,
            view,
            phase=float(walk.phase[number]),
            height=height,
            width=width,
            head_turn=float(walk.head_turn[number]),
        )
        return _smeared(layer, walk.smear * (0.4 + abs(math.sin(view.yaw)))).over(picture)

    def _window(self, number: int) -> Floats:
        walk, (height, width) = self.walk, self.shape
        zoom = float(walk.zoom[number])
        # The ground under the feet keeps its row, whatever the zoom.
        left = self.origin + width * float(walk.passed[number] - walk.aside[number] / zoom)
        left += 0.5 * width * (1 - 1 / zoom)
        ground = height * (MARGIN + _FEET_ROW)
        top = ground - height * (_FEET_ROW + float(walk.sunk[number])) / zoom
        box = _inside((left, top, width / zoom, height / zoom), self.place)
        window = self.place.resize((width, height), Image.Resampling.BILINEAR, box)
        return _planes(window)

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
                scale=_scale(stranger, rows),
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
            sprite = _sprite(layer, FINENESS)
            self.place.paste(sprite, corner, sprite)


class _Passer:
    """What passes between the person and the camera."""

    def __init__(
        self, occluder: Occluder, camera: Camera, shape: tuple[int, int], seed: int
    ) -> None:
        self.occluder, self.camera, self.shape = occluder, camera, shape
        rng = np.random.default_rng([seed, _OCCLUDER])
        self.phase = float(rng.uniform(0, 2 * math.pi))
        self.closer = float(rng.uniform(1.03, 1.14))
        self.yaw = occluder.direction * math.pi / 2 + float(rng.normal(0, 0.15))
        height = shape[0]
        self.sprite: Image.Image | None = None
        if occluder.kind == "furniture":
            self.sprite = draw_furniture(height=height, rng=rng)
        elif occluder.kind == "pillar":
            self.sprite = draw_pillar(height=height, rng=rng)

    def over(self, picture: Floats, number: int) -> Floats:
        """Return the picture with the passer in front of it, if it is there by now."""
        occluder = self.occluder
        if not occluder.first <= number <= occluder.last:
            return picture
        height, width = self.shape
        # In the first and in the last frame it is half seen.
        half = 0.22 * height if self.sprite is None else self.sprite.width / FINENESS / 2
        share = (number - occluder.first + 0.5) / (occluder.last - occluder.first + 1)
        reach = width + 1.2 * half
        column = width / 2 + occluder.direction * (share - 0.5) * reach
        if self.sprite is None:
            return self._pedestrian(number, column).over(picture)
        return _laid(self.sprite, picture, column)

    def _pedestrian(self, number: int, column: float) -> Layer:
        height, width = self.shape
        person = self.occluder.person
        if person is None:
            raise ValueError("expected a person for a pedestrian, got None")
        view = View(
            yaw=self.yaw,
            pitch=self.camera.pitch,
            scale=_scale(person, height) * self.closer,
            feet=(column, height * (_FEET_ROW + 0.05)),
            light=self.camera.light,
        )
        layer = draw_figure(
            person, view, phase=self.phase + 0.55 * number, height=height, width=width
        )
        return _smeared(layer, 0.7)


def _scale(identity: Identity, height: int) -> float:
    # A detector's box follows the body height, but not fully.
    return _BODY * height / (0.6 * _MEAN_HEIGHT_M + 0.4 * identity.height_m)


def _shadowed(picture: Floats, feet: tuple[float, float], height: int, light_side: float) -> Floats:
    """Darken the ground around the feet, more on the side away from the light."""
    column, row = feet
    rows = (np.arange(picture.shape[1], dtype=np.float32)[:, None] - row) / (0.022 * height)
    columns = np.arange(picture.shape[2], dtype=np.float32)[None]
    contact = np.exp(-(rows**2) - ((columns - column) / (0.095 * height)) ** 2)
    cast_column = column - light_side * 0.22 * height
    cast = np.exp(-((rows + 0.6) ** 2) - ((columns - cast_column) / (0.17 * height)) ** 2)
    return np.asarray(picture * (1 - 0.45 * contact - 0.2 * cast), np.float32)


def _smeared(layer: Layer, amount: float) -> Layer:
    """Blur a layer sideways, as motion does during the exposure."""
    share = min(amount, 1.0) * 0.6

    def blurred(values: Floats) -> Floats:
        mixed = values * (1 - share)
        mixed[..., 1:] += values[..., :-1] * (share / 2)
        mixed[..., :-1] += values[..., 1:] * (share / 2)
        return mixed

    return Layer(blurred(layer.colour), blurred(layer.alpha))


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


def _sprite(layer: Layer, factor: int) -> Image.Image:
    """Turn a layer into an RGBA picture, larger and softer: it is far away."""
    planes = np.stack([*(layer.colour / layer.alpha.clip(1e-3)), layer.alpha], axis=2)
    picture = Image.fromarray((planes.clip(0, 1) * 255).astype(np.uint8))
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.BILINEAR)


def _laid(sprite: Image.Image, picture: Floats, column: float) -> Floats:
    """Return the picture with a sprite before it, on its lower edge, centred on a column."""
    _, height, width = picture.shape
    left = (sprite.width / FINENESS / 2 - column) * FINENESS
    top = sprite.height - height * FINENESS
    window = sprite.transform(
        (width, height),
        Image.Transform.AFFINE,
        (FINENESS, 0, left, 0, FINENESS, top),
        Image.Resampling.BILINEAR,
    )
    *colour, alpha = _planes(window)
    return Layer(np.stack(colour) * alpha, alpha).over(picture)


def _planes(picture: Image.Image) -> Floats:
    """Return the (channels, H, W) values in [0, 1] of a Pillow picture."""
    pixels = np.asarray(picture).transpose(2, 0, 1)
    return np.asarray(np.ascontiguousarray(pixels, np.float32) / 255, np.float32)


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
