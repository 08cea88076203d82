"""How tubes become pixels: projection, hidden surfaces, shading."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Places = NDArray[np.intp]

Point = tuple[float, float, float]
"""Metres in the frame of the body: x to its left, y up from the ground, z ahead."""

Profile = Sequence[tuple[float, float, float]]
"""Sections as (position along the axis in [0, 1], half width, half depth), widths in metres."""

Texture = Callable[[Floats, Floats], Floats]
"""Maps (n,) positions along a tube in [0, 1] and (n,) angles around it to (3, n) colours.

Angle 0 is the front of the body and pi / 2 its left side."""

_SUPERSAMPLING = 2
_SAMPLES = 128  # sections per tube
_HALO = 1.35  # how far a contact shadow reaches, in half widths
_AMBIENT = 0.42
_BRIGHTEST = 1.06
_FOLD_DEPTH = 0.11


@dataclass(frozen=True, slots=True)
class View:
    """How a camera sees a body: an orthographic projection.

    Args:
        yaw: Where the body faces, in radians: 0 to the camera, pi / 2 to the right of the picture.
        pitch: How far the camera looks down, in radians.
        scale: Pixels per metre.
        feet: Column and row of the ground point below the body, in pixels.
        light: Unit vector towards the light: right, down, to the camera.
    """

    yaw: float
    pitch: float
    scale: float
    feet: tuple[float, float]
    light: Point = (-0.46, -0.56, 0.69)

    def project(self, point: Point) -> Point:
        """Return column, row and nearness of a point, all in pixels."""
        x, y, z = point
        right = x * math.cos(self.yaw) + z * math.sin(self.yaw)
        near = z * math.cos(self.yaw) - x * math.sin(self.yaw)
        up = y * math.cos(self.pitch) - near * math.sin(self.pitch)
        nearness = near * math.cos(self.pitch) + y * math.sin(self.pitch)
        column, row = self.feet
        return column + right * self.scale, row - up * self.scale, nearness * self.scale

    def finer(self, factor: int) -> "View":
        """Return the same view in a picture with ``factor`` times the rows and columns."""
        column, row = self.feet
        feet = (column * factor, row * factor)
        return View(self.yaw, self.pitch, self.scale * factor, feet, self.light)


@dataclass(frozen=True, slots=True)
class Tube:
    """A part of the body: elliptic sections along a straight axis.

    Args:
        start: One end of the axis.
        end: The other end.
        profile: Its sections.
        texture: Colour of its surface.
        is_capped: Whether it ends in round caps; else it is cut flat.
        turn: Rotation about the vertical relative to the body, in radians.
        sink: Metres that it is moved away from the camera, so that clothes lie over limbs.
        halo: Darkness, in [0, 1], of the shadow that it casts on what is close behind it.
    """

    start: Point
    end: Point
    profile: Profile
    texture: Texture
    is_capped: bool = True
    turn: float = 0.0
    sink: float = 0.0
    halo: float = 0.0


@dataclass(frozen=True, slots=True)
class Layer:
    """A drawn thing that can be laid over a picture.

    Args:
        colour: (3, H, W) float32 in [0, 1], premultiplied with ``alpha``.
        alpha: (H, W) float32 in [0, 1].
    """

    colour: Floats
    alpha: Floats

    def over(self, picture: Floats) -> Floats:
        """Return the (3, H, W) picture with this layer in front of it."""
        return self.colour + picture * (1 - self.alpha)


def draw_tubes(tubes: Iterable[Tube], view: View, *, height: int, width: int) -> Layer:
    """Draw tubes on nothing; what is outside of the layer is cut off.

    Args:
        tubes: What to draw, in any order.
        view: From where.
        height: Rows H of the layer.
        width: Columns W of the layer.
    """
    canvas = _Canvas(height * _SUPERSAMPLING, width * _SUPERSAMPLING)
    fine = view.finer(_SUPERSAMPLING)
    # Far parts first: each contact shadow then falls on what is already there.
    for tube in sorted(tubes, key=lambda tube: fine.project(_middle(tube))[2]):
        canvas.paint(tube, fine)
    return canvas.layer()


class _Canvas:
    """A picture with a depth for each pixel."""

    def __init__(self, height: int, width: int) -> None:
        self._shape = (height, width)
        self._colour = np.zeros((3, height * width), np.float32)
        self._near = np.full(height * width, -np.inf, np.float32)

    def paint(self, tube: Tube, view: View) -> None:
        """Draw the part of the tube that nothing nearer hides."""
        surface = _Surface(tube, view, self._shape)
        if tube.halo:
            self._shadow(surface, tube.halo)
        places, position, near = surface.front()
        visible = np.flatnonzero(near > self._near[surface.pixels[places]])
        places, position = places[visible], position[visible]
        angle, shade = surface.look(places, position)
        pixels = surface.pixels[places]
        for plane, paint in zip(self._colour, tube.texture(position, angle), strict=True):
            plane[pixels] = paint * shade
        self._near[pixels] = near[visible]

    def _shadow(self, surface: "_Surface", darkness: float) -> None:
        ring = np.flatnonzero((surface.distance < _HALO) & (surface.distance > 0.9))
        pixels, distance = surface.pixels[ring], surface.distance[ring]
        fade = ((_HALO - distance) * (darkness / (_HALO - 1))).clip(0, darkness)
        fade *= self._near[pixels] < surface.axis_near[ring]
        for plane in self._colour:
            plane[pixels] *= 1 - fade

    def layer(self) -> Layer:
        """Return the picture at its final size."""
        alpha = np.isfinite(self._near).astype(np.float32).reshape(self._shape)
        return Layer(_shrunk(self._colour.reshape(3, *self._shape)), _shrunk(alpha))


class _Surface:
    """A tube as the camera sees it: all (n,) arrays are over the pixels on and around it.

    A place is an index into them; ``pixels`` are indices into the flattened picture.
    """

    def __init__(self, tube: Tube, view: View, shape: tuple[int, int]) -> None:
        start, end = view.project(tube.start), view.project(tube.end)
        self._axis = (end[0] - start[0], end[1] - start[1], end[2] - start[2])
        self._length = max(math.hypot(*self._axis[:2]), 0.5)
        self._tube, self._view = tube, view
        self._widths, self._depths, self._lags = _sections(tube, view)
        reach = (_HALO if tube.halo else 1) * float(self._widths.max())
        rows, columns = _window(start, end, reach, shape)
        dx = np.arange(columns.start, columns.stop, dtype=np.float32) + (0.5 - start[0])
        dy = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + (0.5 - start[1])
        unit_x, unit_y = self._axis[0] / self._length, self._axis[1] / self._length

        along = (dx * (unit_x / self._length)) + (dy * (unit_y / self._length))  # (h, w)
        side = (dx * unit_y) - (dy * unit_x)
        beyond = (along - along.clip(0, 1)) * self._length if tube.is_capped else 0
        near_axis = np.flatnonzero(side**2 + beyond**2 < reach**2)
        self.pixels = _numbered(shape)[rows, columns].ravel()[near_axis]
        self._along, self._side = along.ravel()[near_axis], side.ravel()[near_axis]
        clipped = self._along.clip(0, 1)
        self._section = (clipped * (_SAMPLES - 1)).astype(np.intp)
        widths = self._widths[self._section]
        past = self._along - clipped if tube.is_capped else np.zeros_like(clipped)
        self._along = clipped if tube.is_capped else self._along
        self._across, self._beyond = self._side / widths, past * (self._length / widths)
        # 0 on the axis, 1 on the outline
        self.distance = np.sqrt(self._across**2 + self._beyond**2)
        self.axis_near = clipped * self._axis[2] + (start[2] - tube.sink * view.scale)

    def front(self) -> tuple[Places, Floats, Floats]:
        """Return the n covered places, and position and nearness of the surface there."""
        places = np.flatnonzero(self.distance < 1)
        bulge = self._depths[self._section[places]] * np.sqrt(1 - self.distance[places] ** 2)
        # A camera that looks down sees the front of a section lower than its axis: hems curve.
        tilt = self._axis[2] / math.hypot(self._length, self._axis[2])
        position = self._along[places] + bulge * (tilt / self._length)
        near = self.axis_near[places] + bulge
        if self._tube.is_capped:
            return places, position.clip(0, 1), near
        kept = np.flatnonzero((position >= 0) & (position <= 1))
        return places[kept], position[kept], near[kept]

    def look(self, places: Places, position: Floats) -> tuple[Floats, Floats]:
        """Return the angle around the tube and the shade of n covered places."""
        section, distance = self._section[places], self.distance[places]
        angle = np.arcsin(np.copysign(distance, self._side[places])) - self._lags[section]
        angle[angle < -np.pi] += 2 * np.pi
        angle[angle > np.pi] -= 2 * np.pi
        shade = self._lit(places, section, np.sqrt(1 - distance**2))
        return angle, shade * (1 + _folds(position, angle, self._tube.start))

    def _lit(self, places: Places, section: Places, facing: Floats) -> Floats:
        # Where the tube widens downwards, its surface faces up: shoulders catch the light.
        slope = np.diff(self._widths, append=self._widths[-1:]) * ((_SAMPLES - 1) / self._length)
        lengthwise = self._beyond[places] - slope.clip(-1.5, 1.5)[section]
        sideways = self._across[places]
        right, down, front = self._view.light
        axis_x, axis_y = self._axis[0] / self._length, self._axis[1] / self._length
        lit = sideways * (axis_y * right - axis_x * down)
        lit += lengthwise * (axis_x * right + axis_y * down)
        lit += facing * front
        lit /= np.sqrt(sideways**2 + lengthwise**2 + facing**2)
        return np.asarray(_AMBIENT + (_BRIGHTEST - _AMBIENT) * lit.clip(0, 1), np.float32)


@functools.lru_cache(maxsize=8)
def _numbered(shape: tuple[int, int]) -> Places:
    """Number the pixels of a picture as in its flattened form."""
    return np.arange(shape[0] * shape[1]).reshape(shape)


def _window(start: Point, end: Point, reach: float, shape: tuple[int, int]) -> tuple[slice, slice]:
    spans = []
    for axis, size in ((1, shape[0]), (0, shape[1])):
        low, high = sorted((start[axis], end[axis]))
        first = min(max(math.floor(low - reach), 0), size)
        spans.append(slice(first, max(min(math.ceil(high + reach), size), first)))
    return spans[0], spans[1]


def _sections(tube: Tube, view: View) -> tuple[Floats, Floats, Floats]:
    """Return half width and half depth in pixels, and the angle of the outline, per section."""
    wide, deep = _smoothed(tuple(tube.profile)) * view.scale
    cos, sin = math.cos(view.yaw + tube.turn), math.sin(view.yaw + tube.turn)
    widths = np.hypot(wide * cos, deep * sin).clip(0.5)
    depths = np.hypot(wide * sin, deep * cos)
    return widths, depths, np.arctan2(deep * sin, wide * cos)


@functools.lru_cache(maxsize=4096)
def _smoothed(profile: tuple[tuple[float, float, float], ...]) -> Floats:
    """Sample a profile, its corners rounded: they would show as bands of light."""
    reach = 5
    knots, *halves = np.array(profile, np.float64).T
    samples = np.linspace(0, 1, _SAMPLES)
    kernel = np.ones(2 * reach + 1) / (2 * reach + 1)
    rows = []
    for half in halves:
        row = np.interp(samples, knots, half)
        for _ in range(2):
            row = np.convolve(np.pad(row, reach, mode="edge"), kernel, mode="valid")
        rows.append(row)
    return np.array(rows, np.float32)


def _shrunk(picture: Floats) -> Floats:
    """Halve the rows and columns, the last two axes."""
    rows = picture[..., 0::2, :] + picture[..., 1::2, :]
    return np.asarray((rows[..., 0::2] + rows[..., 1::2]) / 4, np.float32)


def _middle(tube: Tube) -> Point:
    x, y, z = ((a + b) / 2 for a, b in zip(tube.start, tube.end, strict=True))
    return x, y, z


@functools.cache
def _fold_tile() -> Floats:
    """Draw the folds of all cloth once: smooth noise that repeats, (64, 64) in [-1, 1]."""
    noise = np.random.default_rng(2021).normal(size=(64, 64))
    rows, columns = np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64), indexing="ij")
    keep = np.exp(-((rows * 11) ** 2 + (columns * 20) ** 2))
    smooth = np.fft.ifft2(np.fft.fft2(noise) * keep).real
    return np.asarray((smooth / (2.2 * smooth.std())).clip(-1, 1), np.float32)


def _folds(position: Floats, angle: Floats, start: Point) -> Floats:
    # The start of the tube, which hardly moves, decides which part of the tile it wears.
    row = (position * 40).astype(np.intp) + (17 if start[0] > 0 else 41)
    column = (angle * (64 / (2 * np.pi))).astype(np.intp)
    return _FOLD_DEPTH * _fold_tile()[row % 64, column % 64]
