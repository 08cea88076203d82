"""Other looks of a crop, made for a teacher and its student alike.

A student that is told what a teacher makes of one look and shown another learns a compromise; shown
the very look that the teacher saw, it learns the teacher's function (Beyer et al.,
arXiv:2106.05237). Real crops are few, so views go further from them than augmentation may: other
colours, another person's legs. Whatever comes out, the teacher says what it is.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.frames import Clip

# Distinguishes these draws from others with the same seed, see `model.samplers.STREAM`.
_STREAM = 5
_SPLICE = 0.5  # how often the lower part is another crop's
_SEAM = (0.35, 0.6)  # where it begins, share of the height
_RECOLOUR = 0.5  # how often colours are turned by any angle, and not by a little
_LITTLE_TURN = np.pi / 12
_GAIN = (0.6, 1.4)  # of brightness
_CONTRAST = (0.7, 1.3)
_ZOOM = 0.75  # smallest share of the height and of the width that is kept


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
        partner: Number of the crop whose lower part it takes; None where it keeps its own.
        partner_look: Of that crop.
        seam: Where that part begins, share of the height.
        window: What is kept of the result: top, left, height, width, shares.
    """

    look: Look
    partner: int | None
    partner_look: Look
    seam: float
    window: tuple[float, float, float, float]


def plan_view(crop: int, number: int, crops: int) -> View:
    """Draw a view.

    Args:
        crop: Number of the crop among all that a teacher sees.
        number: Of the view, from 1; view 0 is the crop itself and is not drawn.
        crops: How many crops the teacher sees: one of them may be the partner.

    Returns:
        The same for the same arguments.
    """
    rng = np.random.default_rng([_STREAM, crop, number])
    partner = int(rng.integers(crops)) if rng.random() < _SPLICE else None
    look, partner_look = _draw_look(rng), _draw_look(rng)
    height, width = rng.uniform(_ZOOM, 1, 2).tolist()
    top, left = (rng.random(2) * (1 - height, 1 - width)).tolist()
    return View(look, partner, partner_look, rng.uniform(*_SEAM), (top, left, height, width))


def _draw_look(rng: np.random.Generator) -> Look:
    widest = np.pi if rng.random() < _RECOLOUR else _LITTLE_TURN
    return Look(rng.uniform(-widest, widest), rng.uniform(*_GAIN), rng.uniform(*_CONTRAST))


def render_view(view: View, crop: Clip, partner: Clip | None) -> Clip:
    """Make a view of prepared crops.

    Args:
        view: Which.
        crop: (H, W, 3) uint8 RGB; it is not changed.
        partner: Likewise, of the same size; needed where the view has a partner.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: The partner is missing.
    """
    shown = _change(crop, view.look)
    if view.partner is not None:
        if partner is None:
            raise ValueError("partner: expected the crop that the view is spliced with, got None")
        row = round(view.seam * len(crop))
        shown[row:] = _change(partner[row:], view.partner_look)
    height, width, _ = shown.shape
    top, left, kept_height, kept_width = view.window
    box = (left * width, top * height, (left + kept_width) * width, (top + kept_height) * height)
    image = Image.fromarray(shown)
    resized = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized, dtype=np.uint8)


def _change(crop: Clip, look: Look) -> Clip:
    pixels = crop.astype(np.float32) @ _turn(look.turn).T
    mean = pixels.mean()
    pixels = (mean + (pixels - mean) * np.float32(look.contrast)) * np.float32(look.gain)
    return np.asarray(pixels.round().clip(0, 255), np.uint8)


def _turn(angle: float) -> NDArray[np.float32]:
    """Rotation of RGB about the grey axis (Rodrigues' formula), which keeps greys as they are."""
    axis = np.full(3, 1 / np.sqrt(3))
    cross = np.cross(np.eye(3), axis)
    turn = np.cos(angle) * np.eye(3) + np.sin(angle) * cross
    turn += (1 - np.cos(angle)) * np.outer(axis, axis)
    return np.asarray(turn, np.float32)
