"""Where people are drawn: backdrops of several families, and things that stand in the way."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Ink = tuple[int, int, int]

FINENESS = 2
"""Pixels of a backdrop or a sprite per pixel of a frame, in each direction."""

MARGIN = 0.2
"""What a backdrop has above and below the frame, in frame heights."""

_FACADES = ("a39686", "8c5f4c", "b8b3a6", "7e858c", "c2ab84", "6e5a50", "94a09a")
_PANELS = ("c9ccca", "b9c2c6", "d6d0c0", "a9b3ad", "c4b7a8", "9fb0bd")
_PAVING = ("8d8a85", "7b7c80", "9b948a", "a59e94", "6f7274")
_TILES = ("b3aea3", "c3beb2", "8f9698", "a3978a", "777d82")
_POSTERS = (
    "b33a3a",
    "d8a032",
    "2f6ea3",
    "3f8a5a",
    "7a4a8a",
    "e0dccf",
    "2b2f38",
    "d06a3a",
    "4aa0a6",
)
_LEAVES = ("3f5a34", "4c6b3a", "35502f", "5b7440", "45603f")


class Backdrop:
    """A picture of a place, being drawn.

    Args:
        width: Columns in frame pixels.
        height: Rows of the frame; the picture has ``MARGIN`` more at both ends.
        rng: Decides everything that is left open.
    """

    def __init__(self, width: int, height: int, rng: np.random.Generator) -> None:
        self.unit = height * FINENESS
        self.size = (width * FINENESS, round(height * (1 + 2 * MARGIN)) * FINENESS)
        self.rng = rng
        self.horizon = self.row(rng.uniform(0.3, 0.52))
        self.picture = Image.new("RGB", self.size)
        self.pen = ImageDraw.Draw(self.picture, "RGBA")

    def row(self, share: float) -> int:
        """Return the row at a share of the frame's height."""
        return round((share + MARGIN) * self.unit)

    def pick(self, palette: tuple[str, ...], spread: float = 9) -> Ink:
        """Pick a colour of the palette, a little off."""
        base = bytes.fromhex(palette[int(self.rng.integers(len(palette)))])
        offset = self.rng.normal(0, spread) + self.rng.normal(0, spread / 3, 3)
        red, green, blue = (int(value) for value in np.clip(np.array(list(base)) + offset, 8, 247))
        return red, green, blue

    def columns(self, low: float, high: float) -> list[tuple[int, int]]:
        """Split the width into spans of random widths, given in frame heights."""
        spans, left = [], -int(self.rng.uniform(0, low) * self.unit)
        while left < self.size[0]:
            right = left + int(self.rng.uniform(low, high) * self.unit)
            spans.append((left, right))
            left = right
        return spans

    def wall(self, ink: Ink) -> None:
        """Fill all above the horizon."""
        self.pen.rectangle((0, 0, self.size[0], self.horizon), fill=ink)

    def floor(self, ink: Ink, seams: Ink | None, pitch: float = 0.11) -> None:
        """Fill all below the horizon; seams run to a vanishing point and get denser far away."""
        width, bottom = self.size
        self.pen.rectangle((0, self.horizon, width, bottom), fill=ink)
        if seams is None:
            return
        row, step = float(self.horizon), pitch * self.unit * 0.28
        while row < bottom:
            self.pen.line((0, row, width, row), fill=(*seams, 110), width=FINENESS)
            row, step = row + step, step * 1.22
        gap = pitch * self.unit * 1.6
        vanishing = (width * self.rng.uniform(0.3, 0.7), self.horizon - 1.6 * self.unit)
        for foot in np.arange(-2.0 * width, 3.0 * width, gap):
            share = (self.horizon - vanishing[1]) / (bottom - vanishing[1])
            far = vanishing[0] + (foot - vanishing[0]) * share
            self.pen.line((far, self.horizon, foot, bottom), fill=(*seams, 110), width=FINENESS)

    def shade(self, top: float, bottom: float) -> None:
        """Darken or lighten the floor from the horizon to the lower edge."""
        rows = np.arange(self.size[1])
        share = ((rows - self.horizon) / (self.size[1] - self.horizon)).clip(0, 1)
        gain = np.where(rows < self.horizon, 1.0, top + (bottom - top) * share)
        pixels = np.asarray(self.picture, np.float32) * gain[:, None, None].astype(np.float32)
        self._replace(pixels)

    def grain(self, strength: float, size: int = 2) -> None:
        """Roughen everything, coarsely or finely."""
        width, height = self.size[0] // size + 1, self.size[1] // size + 1
        noise = self.rng.normal(0, strength, (height, width)).astype(np.float32)
        spread = Image.fromarray(noise).resize(
            (width * size, height * size), Image.Resampling.BILINEAR
        )
        rough = np.asarray(spread)[: self.size[1], : self.size[0], None]
        self._replace(np.asarray(self.picture, np.float32) + rough)

    def finished(self) -> Image.Image:
        """Return the picture, a little out of focus."""
        radius = 0.004 * self.unit
        return self.picture.filter(ImageFilter.GaussianBlur(radius))

    def _replace(self, pixels: NDArray[np.float32]) -> None:
        self.picture.paste(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))


def draw_backdrop(family: str, *, height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """Draw a place.

    Args:
        family: One of ``FAMILIES``.
        height: Rows of a frame.
        width: Columns of the place, in frame pixels: wide enough for the whole walk.
        rng: Decides the layout; places of one family share only their kind.

    Returns:
        RGB, ``FINENESS`` times finer than the frame and with ``MARGIN`` above and below it.
    """
    backdrop = Backdrop(width, height, rng)
    FAMILIES[family](backdrop)
    return backdrop.finished()


def _street(place: Backdrop) -> None:
    rng, unit = place.rng, place.unit
    place.floor(place.pick(_PAVING), place.pick(("5b5a58",)), pitch=rng.uniform(0.09, 0.15))
    place.shade(0.86, 1.08)
    for left, right in place.columns(0.45, 0.9):
        place.pen.rectangle((left, 0, right, place.horizon), fill=place.pick(_FACADES))
        _facade(place, left, right)
    place.pen.rectangle(
        (0, place.horizon, place.size[0], place.horizon + 0.012 * unit), fill=(60, 58, 56, 120)
    )
    place.grain(5)
    _scatter(place, (_bin, _bollard, _car, _planter, _post), per_unit=1.5)


def _facade(place: Backdrop, left: int, right: int) -> None:
    rng, unit, pen = place.rng, place.unit, place.pen
    base = place.horizon
    if rng.random() < 0.45:  # a shop front
        glass = place.pick(("3f4a52", "55636b", "2f363c"))
        top, low = base - 0.36 * unit, base - 0.04 * unit
        pen.rectangle((left, top - 0.08 * unit, right, top), fill=place.pick(_POSTERS))
        _pane(place, (left + 0.03 * unit, top, right - 0.03 * unit, low), glass)
        return
    for row in np.arange(base - 0.34 * unit, -unit, -0.36 * unit):
        for column in np.arange(left + 0.07 * unit, right - 0.16 * unit, 0.24 * unit):
            box = (column, row, column + 0.13 * unit, row + 0.2 * unit)
            pen.rectangle(_grown(box, 0.012 * unit), fill=(225, 222, 214, 190))
            _pane(place, box, place.pick(("39434b", "4f5d66", "6c7a82")))
    if rng.random() < 0.5:
        door = left + rng.uniform(0.05, 0.3) * unit
        pen.rectangle(
            (door, base - 0.42 * unit, door + 0.17 * unit, base),
            fill=place.pick(("4a3528", "2f4038", "5c2f2c", "333a48")),
        )


def _hall(place: Backdrop) -> None:
    rng, unit, pen = place.rng, place.unit, place.pen
    place.wall(place.pick(_PANELS))
    place.floor(place.pick(_TILES), place.pick(("6c6a66",)), pitch=rng.uniform(0.12, 0.19))
    place.shade(1.14, 0.9)
    for left, right in place.columns(0.22, 0.5):
        pen.line((left, 0, left, place.horizon), fill=(70, 74, 78, 120), width=FINENESS)
        kind = rng.random()
        middle = (left + right) / 2
        if kind < 0.3:
            _poster(place, middle, place.horizon - rng.uniform(0.14, 0.2) * unit)
        elif kind < 0.5:
            door = (left + 0.02 * unit, place.horizon - 0.46 * unit, right, place.horizon)
            pen.rectangle(door, fill=place.pick(("6f7d86", "8a7660", "59656e", "a35a3a")))
            pen.rectangle(_grown(door, -0.04 * unit), outline=(30, 34, 38, 90), width=FINENESS)
        elif kind < 0.65:
            _pane(place, (left, 0, right, place.horizon - 0.05 * unit), place.pick(("7f969f",)))
    skirting = (0, place.horizon - 0.022 * unit, place.size[0], place.horizon)
    pen.rectangle(skirting, fill=(70, 72, 74, 200))
    _gleam(place)
    place.grain(2.5)
    _scatter(place, (_bin, _bench, _machine, _planter, _barrier), per_unit=1.2)


def _park(place: Backdrop) -> None:
    rng, unit, pen = place.rng, place.unit, place.pen
    place.wall(place.pick(("5d6f55", "6c7c66", "4f6350")))
    place.floor(place.pick(("66803f", "71864a", "5c7440")), None)
    for _ in range(int(place.size[0] / unit * 170)):  # foliage, far to near
        x, y = rng.uniform(0, place.size[0]), rng.uniform(0, place.horizon + 0.01 * unit)
        radius = rng.uniform(0.02, 0.07) * unit
        pen.ellipse(
            (x - radius, y - radius * 0.8, x + radius, y + radius * 0.5),
            fill=(*place.pick(_LEAVES, 14), 190),
        )
    path = place.row(rng.uniform(0.66, 0.76))
    pen.rectangle((0, path, place.size[0], place.size[1]), fill=place.pick(("b3a283", "a69a84")))
    pen.rectangle((0, path - 0.012 * unit, place.size[0], path), fill=(84, 88, 60, 150))
    place.shade(0.85, 1.06)
    for left, right in place.columns(0.3, 0.9):
        if rng.random() < 0.6:
            _trunk(place, (left + right) / 2, rng.uniform(0.02, 0.05) * unit)
    place.grain(9, size=3)
    place.grain(5)
    _scatter(place, (_bench, _bin, _post, _bush), per_unit=1.2)


def _platform(place: Backdrop) -> None:
    rng, unit, pen = place.rng, place.unit, place.pen
    place.wall(place.pick(("d0cfc6", "9aa6ab", "b7b09e", "7d8a90")))
    place.floor(place.pick(("84837f", "74777a", "918a80")), place.pick(("55565a",)), 0.2)
    place.shade(0.9, 1.05)
    if rng.random() < 0.5:
        _train(place)
    else:
        for row in np.arange(0, place.horizon, 0.055 * unit):
            pen.line((0, row, place.size[0], row), fill=(60, 64, 66, 60), width=1)
        for left, right in place.columns(0.4, 0.8):
            _poster(place, (left + right) / 2, place.horizon - 0.2 * unit, size=1.5)
    line = place.horizon + rng.uniform(0.05, 0.1) * unit
    pen.rectangle((0, line, place.size[0], line + 0.028 * unit), fill=(206, 168, 52, 235))
    place.grain(6)
    _scatter(place, (_bin, _bench, _machine, _post), per_unit=1.1)


def _train(place: Backdrop) -> None:
    unit, pen, base = place.unit, place.pen, place.horizon
    body, band = place.pick(("c9cdd0", "b8bcc0", "dedbd0")), place.pick(_POSTERS)
    pen.rectangle((0, 0, place.size[0], base - 0.03 * unit), fill=body)
    pen.rectangle((0, base - 0.17 * unit, place.size[0], base - 0.1 * unit), fill=band)
    pen.rectangle((0, base - 0.03 * unit, place.size[0], base), fill=(28, 29, 31))
    for left, right in place.columns(0.3, 0.46):
        box = (left + 0.04 * unit, base - 0.47 * unit, right - 0.03 * unit, base - 0.22 * unit)
        _pane(place, box, place.pick(("2c3238", "3a444c")))
        pen.line((left, 0, left, base), fill=(60, 64, 68, 150), width=FINENESS)


FAMILIES: dict[str, Callable[[Backdrop], None]] = {
    "street": _street,
    "hall": _hall,
    "park": _park,
    "platform": _platform,
}


def _scatter(
    place: Backdrop, things: tuple[Callable[["_Spot"], None], ...], per_unit: float
) -> None:
    """Put things along the place, the far ones first."""
    count = int(place.rng.poisson(per_unit * place.size[0] / place.unit))
    grounds = np.sort(place.horizon + place.rng.uniform(0.01, 0.2, count) * place.unit)
    for ground in grounds:
        size = (0.62 + 0.9 * (ground - place.horizon) / place.unit) * place.unit
        column = place.rng.uniform(0, place.size[0])
        spot = _Spot(place.picture, place.pen, column, float(ground), float(size), place.rng)
        thing = things[int(place.rng.integers(len(things)))]
        thing(spot)


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where a thing stands: its middle on the ground, and the pixels of 1.9 metres there."""

    picture: Image.Image
    pen: ImageDraw.ImageDraw
    x: float
    y: float
    size: float
    rng: np.random.Generator

    def ink(self, palette: tuple[str, ...], spread: float = 9) -> Ink:
        base = bytes.fromhex(palette[int(self.rng.integers(len(palette)))])
        offset = self.rng.normal(0, spread)
        red, green, blue = (int(np.clip(value + offset, 8, 247)) for value in base)
        return red, green, blue

    def box(self, left: float, top: float, right: float, low: float = 0) -> tuple[float, ...]:
        """Return a box given in sizes: to the right of the spot and above the ground."""
        return (
            self.x + left * self.size,
            self.y - top * self.size,
            self.x + right * self.size,
            self.y - low * self.size,
        )

    def block(self, box: tuple[float, ...], ink: Ink, radius: float = 0.01) -> None:
        """Draw a box that the light from the left rounds."""
        left, top, right, low = box
        round_px = radius * self.size
        self.pen.rounded_rectangle((left, top, right, low), round_px, fill=ink)
        wide = min(right - left, 0.45 * self.size)  # long things are flat
        for share, alpha in ((0.45, 22), (0.3, 28), (0.14, 34)):
            edge = right - wide * share
            self.pen.rounded_rectangle((edge, top, right, low), round_px, fill=(0, 0, 0, alpha))
        lit = left + wide * 0.16
        self.pen.rounded_rectangle((left, top, lit, low), round_px, fill=(255, 255, 255, 34))

    def shadow(self, half: float) -> None:
        """Darken the ground where the thing stands."""
        for spread, alpha in ((1.25, 26), (1.1, 34), (0.95, 44)):
            reach = half * spread
            self.pen.ellipse(
                self.box(-reach, 0.035 * spread, reach + 0.03, -0.03 * spread),
                fill=(0, 0, 0, alpha),
            )


def _bin(spot: _Spot) -> None:
    ink = spot.ink(("3c4a42", "4a4f55", "2c4a6a", "5c5248"))
    spot.shadow(0.13)
    spot.block(spot.box(-0.12, 0.44, 0.12), ink, 0.03)
    spot.pen.rounded_rectangle(
        spot.box(-0.13, 0.47, 0.13, 0.42), 0.02 * spot.size, fill=(24, 26, 28, 210)
    )
    spot.pen.ellipse(spot.box(-0.06, 0.38, 0.06, 0.33), fill=(15, 15, 15, 200))


def _bollard(spot: _Spot) -> None:
    spot.shadow(0.05)
    spot.block(spot.box(-0.035, 0.5, 0.035), spot.ink(("2b2d30", "54585c", "8a2f2a")), 0.03)
    spot.pen.rectangle(spot.box(-0.035, 0.44, 0.035, 0.41), fill=(230, 228, 220, 200))


def _post(spot: _Spot) -> None:
    spot.shadow(0.05)
    spot.block(spot.box(-0.024, 2.2, 0.024), spot.ink(("6b6f73", "3d4144", "2f3a33")), 0.0)
    if spot.rng.random() < 0.5:
        spot.block(spot.box(-0.11, 1.05, 0.11, 0.78), spot.ink(_POSTERS), 0.02)


def _planter(spot: _Spot) -> None:
    spot.shadow(0.2)
    _leaves(spot, 0.19, 0.34, 0.66)
    spot.block(spot.box(-0.19, 0.34, 0.19), spot.ink(("8a8880", "7a5a48", "5d6064", "a59a86")))
    spot.pen.rectangle(spot.box(-0.2, 0.36, 0.2, 0.31), fill=(0, 0, 0, 40))


def _bush(spot: _Spot) -> None:
    spot.shadow(0.22)
    _leaves(spot, 0.24, 0.05, 0.5)


def _leaves(spot: _Spot, half: float, low: float, high: float) -> None:
    for _ in range(70):
        x, y = spot.rng.uniform(-half, half), spot.rng.uniform(low, high)
        radius = spot.rng.uniform(0.03, 0.065)
        light = 16 * (y - low) / (high - low) - 10 * x / half - 4
        red, green, blue = (int(np.clip(part + light, 0, 255)) for part in spot.ink(_LEAVES, 10))
        spot.pen.ellipse(
            spot.box(x - radius, y + radius * 0.8, x + radius, y - radius * 0.8),
            fill=(red, green, blue, 225),
        )


def _bench(spot: _Spot) -> None:
    wood = spot.ink(("7a5638", "5f6468", "8a7a62", "3f4f48"))
    spot.shadow(0.4)
    for leg in (-0.34, 0.3):
        spot.block(spot.box(leg, 0.27, leg + 0.045), (44, 46, 48), 0.0)
    for low in (0.34, 0.43, 0.52):
        spot.block(spot.box(-0.4, low + 0.065, 0.4, low), wood, 0.012)
    spot.block(spot.box(-0.42, 0.3, 0.42, 0.235), wood, 0.015)


def _barrier(spot: _Spot) -> None:
    steel = spot.ink(("8f9498", "6f7478", "b0b3b3"))
    spot.shadow(0.36)
    for bar in np.linspace(-0.34, 0.34, 9):
        spot.block(spot.box(bar - 0.009, 0.56, bar + 0.009, 0.1), steel, 0.0)
    for low in (0.08, 0.55):
        spot.block(spot.box(-0.37, low + 0.035, 0.37, low), steel, 0.015)
    for foot in (-0.35, 0.325):
        spot.block(spot.box(foot, 0.58, foot + 0.028), steel, 0.0)


def _machine(spot: _Spot) -> None:
    ink = spot.ink(_POSTERS)
    spot.shadow(0.24)
    spot.block(spot.box(-0.23, 1.0, 0.23), ink, 0.015)
    _glass(spot, spot.box(-0.18, 0.92, 0.1, 0.4), (34, 40, 46))
    for low in (0.5, 0.62, 0.74):
        for column in (-0.14, -0.07, 0.0):
            spot.pen.rectangle(
                spot.box(column, low + 0.08, column + 0.05, low), fill=(*spot.ink(_POSTERS), 200)
            )
    spot.pen.rectangle(spot.box(0.13, 0.75, 0.2, 0.55), fill=(20, 22, 24, 220))


def _car(spot: _Spot) -> None:
    ink = spot.ink(("2b3038", "8d9194", "b9bcbd", "7a2626", "29456b", "d8d8d4", "3f4a3f"))
    spot.shadow(0.95)
    cabin = [(-0.56, 0.4), (-0.34, 0.68), (0.3, 0.68), (0.56, 0.4)]
    points = [(spot.x + x * spot.size, spot.y - y * spot.size) for x, y in cabin]
    spot.pen.polygon(points, fill=ink)
    glass = [(-0.47, 0.42), (-0.31, 0.64), (0.27, 0.64), (0.46, 0.42)]
    points = [(spot.x + x * spot.size, spot.y - y * spot.size) for x, y in glass]
    spot.pen.polygon(points, fill=(38, 46, 54))
    spot.pen.rectangle(spot.box(-0.03, 0.66, 0.0, 0.42), fill=ink)
    body = spot.box(-0.98, 0.43, 0.98, 0.12)
    spot.pen.rounded_rectangle(body, 0.1 * spot.size, fill=ink)
    spot.pen.rounded_rectangle(
        spot.box(-0.95, 0.42, 0.95, 0.35), 0.04 * spot.size, fill=(255, 255, 255, 38)
    )
    spot.pen.rounded_rectangle(
        spot.box(-0.97, 0.22, 0.97, 0.12), 0.04 * spot.size, fill=(0, 0, 0, 70)
    )
    for wheel in (-0.6, 0.6):
        for radius, shade in ((0.155, 22), (0.085, 120), (0.04, 60)):
            spot.pen.ellipse(
                spot.box(wheel - radius, 0.155 + radius, wheel + radius, 0.155 - radius),
                fill=(shade, shade, shade),
            )


def _pane(place: Backdrop, box: tuple[float, ...], ink: Ink) -> None:
    spot = _Spot(place.picture, place.pen, 0, 0, place.unit, place.rng)
    _glass(spot, box, ink)


def _glass(spot: _Spot, box: tuple[float, ...], ink: Ink) -> None:
    left, top, right, low = box
    if right <= left or low <= top:
        return
    spot.pen.rectangle((left, top, right, low), fill=ink)
    start = left + (right - left) * spot.rng.uniform(0, 0.5)
    reach = (right - left) * 0.3
    spot.pen.polygon(
        [(start, top), (min(start + reach, right), top), (min(start + reach * 0.6, right), low),
         (max(start - reach * 0.4, left), low)],
        fill=(255, 255, 255, 26),
    )  # fmt: skip


def _poster(place: Backdrop, column: float, foot: float, size: float = 1.0) -> None:
    unit, pen = place.unit * size, place.pen
    half, tall = place.rng.uniform(0.06, 0.1) * unit, place.rng.uniform(0.17, 0.25) * unit
    box = (column - half, foot - tall, column + half, foot)
    pen.rectangle(_grown(box, 0.008 * unit), fill=(40, 42, 45, 200))
    pen.rectangle(box, fill=place.pick(_POSTERS, 14))
    radius = half * 0.5
    middle = foot - tall * 0.62
    pen.ellipse(
        (column - radius, middle - radius, column + radius, middle + radius),
        fill=place.pick(_POSTERS, 14),
    )
    for share in (0.1, 0.17, 0.24):
        line = foot - tall * share
        pen.rectangle(
            (column - half * 0.7, line - 0.006 * unit, column + half * 0.5, line),
            fill=(240, 238, 230, 190),
        )


def _trunk(place: Backdrop, column: float, half: float) -> None:
    bark = place.pick(("4a3b2e", "5c4c3c", "3c342c"))
    ground = place.horizon + place.rng.uniform(0.0, 0.1) * place.unit
    place.pen.rectangle((column - half, 0, column + half, ground), fill=bark)
    place.pen.rectangle((column, 0, column + half, ground), fill=(0, 0, 0, 50))
    place.pen.rectangle((column - half, 0, column - half * 0.6, ground), fill=(255, 255, 255, 24))


def _gleam(place: Backdrop) -> None:
    """Mirror the wall faintly in a polished floor."""
    depth = min(place.horizon, place.size[1] - place.horizon)
    wall = place.picture.crop((0, place.horizon - depth, place.size[0], place.horizon))
    mirrored = wall.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    mirrored = mirrored.filter(ImageFilter.GaussianBlur(0.02 * place.unit))
    fade = Image.linear_gradient("L").resize((place.size[0], depth))
    fade = ImageChops.invert(fade).point([value // 3 for value in range(256)])
    place.picture.paste(mirrored, (0, place.horizon), fade)


def _grown(box: tuple[float, ...], by: float) -> tuple[float, ...]:
    left, top, right, low = box
    return left - by, top - by, max(right + by, left - by), max(low + by, top - by)


def draw_furniture(*, height: int, rng: np.random.Generator) -> Image.Image:
    """Draw a waist-high thing that can stand before a person.

    Returns:
        RGBA, ``FINENESS`` times finer than a frame with ``height`` rows; it stands on its last row.
    """
    unit = height * FINENESS
    things = (_planter, _bench, _barrier, _bin)
    thing = things[int(rng.integers(len(things)))]
    size = unit * (0.66 if thing in (_bench, _barrier) else 0.9)
    seed = int(rng.integers(2**32))
    # Pillow blends onto opaque pictures only: what black and white show differently is transparent.
    pictures = []
    for paper in (0, 255):
        picture = Image.new("RGB", (round(unit * 0.64), round(unit * 0.66)), (paper,) * 3)
        pen = ImageDraw.Draw(picture, "RGBA")
        middle, ground = picture.width / 2, picture.height - 0.05 * unit
        thing(_Spot(picture, pen, middle, ground, size, np.random.default_rng(seed)))
        pictures.append(np.asarray(picture, np.float32))
    on_black, on_white = pictures
    alpha = 255 - (on_white - on_black).mean(axis=2, keepdims=True)
    colour = on_black * 255 / alpha.clip(1)
    pixels = np.concatenate([colour, alpha], axis=2).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def draw_pillar(*, height: int, rng: np.random.Generator) -> Image.Image:
    """Draw a round pillar, higher than the frame.

    Returns:
        RGBA, ``FINENESS`` times finer than a frame with ``height`` rows.
    """
    unit = height * FINENESS
    width = round(unit * rng.uniform(0.13, 0.24))
    tall = round(unit * (1 + 2 * MARGIN))
    base = np.array(list(bytes.fromhex(_PANELS[int(rng.integers(len(_PANELS)))])), np.float32)
    across = np.linspace(-1, 1, width, dtype=np.float32)
    lit = 0.42 + 0.62 * (-0.5 * across + 0.8 * np.sqrt(1 - across**2)).clip(0, 1)
    pixels = np.full((tall, width, 4), 255, np.float32)
    pixels[..., :3] = base * rng.uniform(0.7, 1.0) * lit[None, :, None]
    band = slice(round(tall * 0.42), round(tall * 0.46))
    pixels[band, :, :3] *= np.array(rng.uniform(0.5, 0.95, 3), np.float32)
    pixels[..., :3] += rng.normal(0, 3, (tall, width, 1)).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
