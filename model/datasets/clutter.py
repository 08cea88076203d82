"""What keeps beside and behind a person for a whole tracklet and says nothing about who they are.

A place scrolls away while somebody walks through it. Clutter drifts with the box instead: in one
tracklet it is as steady as the person is, and in the next one it is something else.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.datasets.figure import draw_figure
from model.datasets.layers import FEET_ROW, layer_of, pixels_per_metre, sprite_of, wandering
from model.datasets.people import CLOTHES, draw_identity
from model.datasets.scene import FINENESS
from model.datasets.tubes import Layer, Point, View

THINGS = 10
"""Blocks that a clutter of 1 has beside one person."""

_STRANGERS = 1.6  # expected, likewise
_STRIP = 2.0  # columns that are furnished, in frame widths
_WALL = 0.16  # what is hung up hangs this deep at least, as a share of the frame's height


class Company:
    """Blocks in the colours of clothes, and strangers, who belong to no identity of the set.

    Args:
        amount: How much; 1 is a crowded street.
        frames: Length of the tracklet, T.
        shape: Rows and columns of a frame.
        view: Pitch and light of the camera.
        rng: Decides everything else.
    """

    def __init__(
        self,
        amount: float,
        frames: int,
        shape: tuple[int, int],
        view: tuple[float, Point],
        rng: np.random.Generator,
    ) -> None:
        self.shape, self.view = shape, view
        height, width = shape
        size = (math.ceil(_STRIP * width) * FINENESS, height * FINENESS)
        self.strip = Image.new("RGBA", size)
        blocks, strangers = round(THINGS * amount), int(rng.poisson(_STRANGERS * amount))
        # Far things first: what stands nearer to the camera stands lower in the picture.
        for ground in np.sort(rng.uniform(0.62, 0.93, blocks)):
            self._add_block(float(ground), rng)
        for _ in range(strangers):
            self._add_stranger(rng)
        drift = rng.normal(0, 0.18) * np.linspace(-1, 1, frames)
        self.passed = drift + wandering(rng, frames, 0.03)

    def layer(self, number: int, shift: tuple[float, float]) -> Layer:
        """Return what is seen in a frame whose box is off by ``shift`` pixels, right and down."""
        height, width = self.shape
        middle = (_STRIP - 1) / 2 + float(self.passed[number])
        left = min(max(middle, 0.0), _STRIP - 1) * width + shift[0]
        return layer_of(
            self.strip,
            left=left * FINENESS,
            top=shift[1] * FINENESS,
            height=height,
            width=width,
        )

    def _add_block(self, ground: float, rng: np.random.Generator) -> None:
        unit = self.strip.height
        tall, wide = float(rng.uniform(0.1, 0.4)), float(rng.uniform(0.06, 0.2))
        if rng.random() < 0.5:  # hung up, not standing
            ground = float(rng.uniform(_WALL, 0.5))
        block = draw_block(round(tall * unit), round(wide * unit), rng)
        left = rng.uniform(-wide / 2, self.strip.width / unit - wide / 2)
        self.strip.paste(block, (round(left * unit), round((ground - tall) * unit)))

    def _add_stranger(self, rng: np.random.Generator) -> None:
        height, width = self.shape
        share = float(rng.uniform(0.7, 0.92))
        rows, columns = round(height * share), round(height * share * 0.55)
        stranger = draw_identity(rng)
        pitch, light = self.view
        view = View(
            yaw=float(rng.uniform(0, 2 * math.pi)),
            pitch=pitch,
            scale=pixels_per_metre(stranger, rows),
            feet=(columns / 2, rows * FEET_ROW),
            light=light,
        )
        layer = draw_figure(
            stranger, view, phase=float(rng.uniform(0, 6)), height=rows, width=columns
        )
        sprite = sprite_of(layer, FINENESS)
        ground = height * (0.66 + 0.27 * (share - 0.7) / 0.22)
        column = float(rng.uniform(0, _STRIP)) * width - columns / 2
        corner = (round(column * FINENESS), round((ground - rows * FEET_ROW) * FINENESS))
        self.strip.alpha_composite(*_cut(sprite, corner))


def draw_block(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """Draw a thing in the colours and patterns of clothes, so that colour alone tells nothing.

    Returns:
        RGBA, opaque, of at least one row and column.
    """
    height, width = max(height, 1), max(width, 1)
    base, accent = (_ink(rng) for _ in range(2))
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    pitch = max(round(height * rng.uniform(0.12, 0.3)), 2)
    pattern = rng.integers(4)
    striped = (rows // pitch) % 2 == 0
    if pattern == 1:
        second = np.broadcast_to(striped, (height, width))
    elif pattern == 2:
        second = striped ^ ((columns // pitch) % 2 == 0)
    elif pattern == 3:
        second = np.broadcast_to(rows < height * 0.45, (height, width))
    else:
        second = np.zeros((height, width), bool)
    pixels = np.where(second[..., None], accent, base)
    lit = np.linspace(1.08, 0.74, width)[None, :, None]
    edge = np.ones((height, width, 1))
    edge[[0, -1]] = edge[:, [0, -1]] = 0.72
    shaded = (pixels * lit * edge).clip(0, 255)
    opaque = np.full((height, width, 1), 255.0)
    return Image.fromarray(np.concatenate([shaded, opaque], axis=2).astype(np.uint8))


def _ink(rng: np.random.Generator) -> NDArray[np.float64]:
    base = bytes.fromhex(CLOTHES[int(rng.integers(len(CLOTHES)))])
    return np.array(list(base)) + rng.normal(0, 9, 3)


def _cut(sprite: Image.Image, corner: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """Cut off what a sprite has left of or above the picture that it is laid on."""
    left, top = (max(-place, 0) for place in corner)
    cut = sprite.crop((left, top, sprite.width, sprite.height))
    return cut, (max(corner[0], 0), max(corner[1], 0))
