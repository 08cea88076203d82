"""How drawn things come together: layers, sprites and the box that shows a person."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.datasets.people import Identity
from model.datasets.scene import FINENESS
from model.datasets.tubes import Floats, Layer

FEET_ROW = 0.945
"""Where the feet of the person stand, as a share of the frame."""

_MEAN_HEIGHT_M = 1.73
_BODY = 0.86  # height of a person of mean height as a share of the frame


def pixels_per_metre(identity: Identity, height: int) -> float:
    """Return the scale at which a person is shown in a box of ``height`` rows."""
    # A detector's box follows the body height, but not fully.
    return _BODY * height / (0.6 * _MEAN_HEIGHT_M + 0.4 * identity.height_m)


def smeared(layer: Layer, amount: float) -> Layer:
    """Blur a layer sideways, as motion does during the exposure."""
    share = min(amount, 1.0) * 0.6

    def blurred(values: Floats) -> Floats:
        mixed = values * (1 - share)
        mixed[..., 1:] += values[..., :-1] * (share / 2)
        mixed[..., :-1] += values[..., 1:] * (share / 2)
        return mixed

    return Layer(blurred(layer.colour), blurred(layer.alpha))


def sprite_of(layer: Layer, factor: int) -> Image.Image:
    """Turn a layer into an RGBA picture, larger and softer: it is far away."""
    planes = np.stack([*(layer.colour / layer.alpha.clip(1e-3)), layer.alpha], axis=2)
    picture = Image.fromarray((planes.clip(0, 1) * 255).astype(np.uint8))
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.BILINEAR)


def layer_of(sprite: Image.Image, *, left: float, top: float, height: int, width: int) -> Layer:
    """Cut a layer of H rows and W columns out of an RGBA sprite.

    Args:
        sprite: ``FINENESS`` times finer than the layer.
        left: Column of the sprite, in its own pixels, at which the layer begins.
        top: Row of the sprite, likewise.
        height: Rows H of the layer.
        width: Columns W of the layer.
    """
    window = sprite.transform(
        (width, height),
        Image.Transform.AFFINE,
        (FINENESS, 0, left, 0, FINENESS, top),
        Image.Resampling.BILINEAR,
    )
    *colour, alpha = planes_of(window)
    return Layer(np.stack(colour) * alpha, alpha)


def planes_of(picture: Image.Image) -> Floats:
    """Return the (channels, H, W) values in [0, 1] of a Pillow picture."""
    pixels = np.asarray(picture).transpose(2, 0, 1)
    return np.asarray(np.ascontiguousarray(pixels, np.float32) / 255, np.float32)


def wandering(rng: np.random.Generator, frames: int, spread: float) -> NDArray[np.float64]:
    """Return (T,) smooth noise: each value leans on the one before."""
    values = np.empty(frames)
    value = rng.normal(0, spread)
    for number in range(frames):
        value = 0.75 * value + rng.normal(0, spread * 0.66)
        values[number] = value
    return values
