"""Other looks of a crop, made for a teacher and its student alike.

A student that is told what a teacher makes of one look and shown another learns a compromise; shown
the very look that the teacher saw, it learns the teacher's function (Beyer et al.,
arXiv:2106.05237). Real crops are few, so views go further from them than augmentation may: other
colours, another person's legs, another camera's light. Whatever comes out, the teacher says what it
is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.frames import Clip

Planes = NDArray[np.float32]
# Distinguishes these draws from others with the same seed, see `model.samplers.STREAM`.
_STREAM = 5
_SPLICE = 0.5  # how often the lower part is another crop's
_SEAM = (0.35, 0.6)  # where it begins, share of the height
_RESTYLE = 0.6  # how often colours take the mean and deviation of another crop's
_STRENGTH = (0.5, 1.0)  # how far
_SPREAD = (0.5, 2.0)  # by what factor at most
_RECOLOUR = 0.4  # how often colours are turned by any angle, and not by a little
_LITTLE_TURN = np.pi / 12
_GAIN = (0.6, 1.4)  # of brightness
_CONTRAST = (0.7, 1.3)
_ZOOM = 0.7  # smallest share of the height and of the width that is kept


@dataclass(frozen=True, slots=True)
class Look:
    """How the pixels of one crop are changed.

    Args:
        turn: Angle about the grey axis of RGB, radians.
        gain: Factor of brightness.
        contrast: Factor about the mean.
    """

    turn: float
    gain: float
    contrast: float


@dataclass(frozen=True, slots=True)
class View:
    """One drawn view of one crop, whatever its size in pixels.

    Args:
        look: Of the crop.
        window: What is kept in the end: top, left, height, width, shares.
        partner: Number of the crop whose lower part it takes; None where it keeps its own.
        partner_look: Of that crop.
        seam: Where that part begins, share of the height.
        style: Number of the crop whose colours it takes; None where it keeps its own.
        strength: How far it takes them, in [0, 1].
    """

    look: Look
    window: tuple[float, float, float, float]
    partner: int | None = None
    partner_look: Look = Look(0.0, 1.0, 1.0)
    seam: float = 0.5
    style: int | None = None
    strength: float = 1.0


def plan_view(crop: int, number: int, cameras: Sequence[Sequence[int]]) -> View:
    """Draw a view.

    Args:
        crop: Number of the crop among all that a teacher sees.
        number: Of the view, from 1; view 0 is the crop itself and is not drawn.
        cameras: Numbers of the crops of each camera, all together those that the teacher sees.
            Partner and style are of any camera, each as often as every other: where one camera has
            few people, that makes new ones.

    Returns:
        The same for the same arguments.
    """
    rng = np.random.default_rng([_STREAM, crop, number])
    partner = style = None
    if rng.random() < _SPLICE:
        partner = _pick(cameras, rng)
    if rng.random() < _RESTYLE:
        style = _pick(cameras, rng)
    look, partner_look = _draw_look(rng), _draw_look(rng)
    height, width = rng.uniform(_ZOOM, 1, 2).tolist()
    top, left = (rng.random(2) * (1 - height, 1 - width)).tolist()
    return View(
        look,
        (top, left, height, width),
        partner,
        partner_look,
        rng.uniform(*_SEAM),
        style,
        rng.uniform(*_STRENGTH),
    )


def _pick(cameras: Sequence[Sequence[int]], rng: np.random.Generator) -> int:
    crops = cameras[int(rng.integers(len(cameras)))]
    return crops[int(rng.integers(len(crops)))]


def _draw_look(rng: np.random.Generator) -> Look:
    widest = np.pi if rng.random() < _RECOLOUR else _LITTLE_TURN
    return Look(rng.uniform(-widest, widest), rng.uniform(*_GAIN), rng.uniform(*_CONTRAST))


def render_view(view: View, crop: Clip, read: Callable[[int], Clip]) -> Clip:
    """Make a view of prepared crops.

    Args:
        view: Which.
        crop: (H, W, 3) uint8 RGB; it is not changed.
        read: Gives the crop of a number, of the same size: the partner's and the style's.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    height, width, _ = crop.shape
    shown = _change(crop, view.look)
    if view.partner is not None:
        row = round(view.seam * height)
        shown[:, row:] = _change(read(view.partner)[row:], view.partner_look)
    if view.style is not None:
        shown = _restyle(shown, read(view.style), view.strength)
    top, left, kept_height, kept_width = view.window
    box = (left * width, top * height, (left + kept_width) * width, (top + kept_height) * height)
    image = Image.fromarray(_to_bytes(shown))
    resized = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized, dtype=np.uint8)


def _planes(crop: Clip) -> Planes:
    """(H, W, 3) to (3, H, W), where what is done to a channel is done to one piece of memory."""
    return np.ascontiguousarray(crop.transpose(2, 0, 1), np.float32)


def _change(crop: Clip, look: Look) -> Planes:
    """Turn colours, then draw them towards their mean or away from it, then brighten."""
    planes, turn = _planes(crop), _turn(look.turn)
    # All three are affine in the pixels, so one matrix and one number do it.
    mean = float((turn @ planes.mean(axis=(1, 2))).mean())
    changed = (turn * np.float32(look.contrast * look.gain)) @ planes.reshape(3, -1)
    changed += np.float32((1 - look.contrast) * look.gain * mean)
    return np.asarray(changed.reshape(planes.shape), np.float32)


def _restyle(planes: Planes, style: Clip, strength: float) -> Planes:
    """Draw each channel's mean and deviation to those of another crop (Reinhard et al., 2001).

    They did it in a colour space without correlations; between cameras the channels will do.
    """
    other = _planes(style)
    mean, wanted = planes.mean(axis=(1, 2)), other.mean(axis=(1, 2))
    spread = np.maximum(planes.std(axis=(1, 2)), 1)
    scale = (other.std(axis=(1, 2)) / spread).clip(*_SPREAD)
    # p + strength * (wanted + (p - mean) * scale - p)
    factor = np.float32(1) + np.float32(strength) * (scale - np.float32(1))
    shift = np.float32(strength) * (wanted - mean * scale)
    restyled: Planes = planes * factor[:, None, None] + shift[:, None, None]
    return restyled


def _to_bytes(planes: Planes) -> Clip:
    """(3, H, W) to (H, W, 3)."""
    whole = planes.round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(whole.transpose(1, 2, 0))


def _turn(angle: float) -> NDArray[np.float32]:
    """Rotation of RGB about the grey axis (Rodrigues' formula), which keeps greys as they are."""
    axis = np.full(3, 1 / np.sqrt(3))
    cross = np.cross(np.eye(3), axis)
    turn = np.cos(angle) * np.eye(3) + np.sin(angle) * cross
    turn += (1 - np.cos(angle)) * np.outer(axis, axis)
    return np.asarray(turn, np.float32)
