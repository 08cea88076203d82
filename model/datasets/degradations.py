"""What makes a picture bad: motion, focus, exposure, resolution and compression."""

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.datasets.tubes import Floats

DEGRADATIONS = ("motion", "defocus", "exposure", "resolution", "jpeg")


@dataclass(frozen=True, slots=True)
class Degradations:
    """What is wrong with the pictures of one tracklet; nothing by default.

    Args:
        motion: Length of the streak that a moving point leaves, as a share of the frame's width.
        defocus: Radius of the blot that a point becomes, as a share of the frame's height.
        strengths: How much of both each frame has, (T,) in [0, 1]; empty where both are 0.
        gains: Exposure of each frame, (T,) factors of the brightness; empty where it is steady.
        resolution: Rows that are recorded, as a share of the frame's rows, in (0, 1].
        jpeg_quality: Of a recompression, in [1, 100]; None where there is none.
    """

    motion: float = 0.0
    defocus: float = 0.0
    strengths: tuple[float, ...] = ()
    gains: tuple[float, ...] = ()
    resolution: float = 1.0
    jpeg_quality: int | None = None

    def exposed(self, picture: Floats, number: int) -> Floats:
        """Return the (3, H, W) picture in the exposure of a frame."""
        return picture * np.float32(self.gains[number]) if self.gains else picture

    def blurred(self, picture: Floats, number: int, angle: float) -> Floats:
        """Return the (3, H, W) picture with the blur of a frame.

        Args:
            picture: In [0, 1].
            number: Of the frame.
            angle: Of the motion, in radians from the rows.
        """
        if not self.strengths:
            return picture
        strength, (height, width) = self.strengths[number], picture.shape[1:]
        if length := self.motion * strength * width:
            picture = streaked(picture, length, angle)
        if radius := self.defocus * strength * height:
            picture = boxed(boxed(picture, radius, axis=1), radius, axis=2)
        return picture

    def compressed(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the (H, W, 3) frame as its recompression leaves it."""
        if self.jpeg_quality is None:
            return frame
        packed = io.BytesIO()
        Image.fromarray(frame).save(packed, "JPEG", quality=self.jpeg_quality)
        with Image.open(packed) as picture:
            return np.asarray(picture)


def draw_degradations(rng: np.random.Generator, *, frames: int, share: float) -> Degradations:
    """Draw what is wrong with the pictures of one tracklet.

    Args:
        rng: Decides; as often whatever the share is.
        frames: Length of the tracklet, T.
        share: Chance, in [0, 1], of each of ``DEGRADATIONS``, independently.
    """
    motion, defocus, exposure, resolution, jpeg = (rng.random(len(DEGRADATIONS)) < share).tolist()
    streak, radius = float(rng.uniform(0.08, 0.25)), float(rng.uniform(0.012, 0.03))
    # Blur swells and ebbs: a hand shakes, a lens hunts.
    waves = np.sin(np.arange(frames) * rng.uniform(0.15, 0.5) + rng.uniform(0, 2 * math.pi))
    strengths = (0.6 + 0.4 * waves).tolist()
    gains = _draw_gains(rng, frames)
    rows, quality = float(rng.uniform(0.35, 0.7)), int(rng.integers(8, 36))
    return Degradations(
        motion=streak if motion else 0.0,
        defocus=radius if defocus else 0.0,
        strengths=tuple(strengths) if motion or defocus else (),
        gains=gains if exposure else (),
        resolution=rows if resolution else 1.0,
        jpeg_quality=quality if jpeg else None,
    )


def _draw_gains(rng: np.random.Generator, frames: int) -> tuple[float, ...]:
    """Return exposures that jump about every sixth frame: a camera that hunts for the light."""
    jumps = rng.random(frames) < 1 / 6
    levels = np.exp(rng.uniform(-0.6, 0.5, frames))
    gains, gain = [], float(levels[0])
    for jump, level in zip(jumps.tolist(), levels.tolist(), strict=True):
        gain = level if jump else gain
        gains.append(gain)
    return tuple(gains)


def streaked(picture: Floats, length: float, angle: float) -> Floats:
    """Blur a (3, H, W) picture along a line of ``length`` pixels through each of its points."""
    count = math.ceil(length) + 1
    places = np.linspace(-length / 2, length / 2, count)
    rows = np.rint(places * math.sin(angle)).astype(int)
    columns = np.rint(places * math.cos(angle)).astype(int)
    margin = math.ceil(length / 2)
    padded = np.pad(picture, ((0, 0), (margin, margin), (margin, margin)), mode="edge")
    total = np.zeros_like(picture)
    height, width = picture.shape[1:]
    for down, right in zip((rows + margin).tolist(), (columns + margin).tolist(), strict=True):
        total += padded[:, down : down + height, right : right + width]
    return np.asarray(total / np.float32(count), np.float32)


def boxed(picture: Floats, radius: float, axis: int) -> Floats:
    """Average each value of an array with its neighbours up to ``radius`` away along an axis."""
    whole = math.floor(radius)
    part = np.float32(radius - whole)
    padding = [(0, 0)] * picture.ndim
    padding[axis] = (whole + 1, whole + 1)
    padded = np.moveaxis(np.pad(picture, padding, mode="edge"), axis, 0)
    size = picture.shape[axis]
    total = part * (padded[:size] + padded[2 * whole + 2 : 2 * whole + 2 + size])
    for start in range(1, 2 * whole + 2):
        total += padded[start : start + size]
    return np.asarray(np.moveaxis(total / np.float32(2 * radius + 1), 0, axis), np.float32)


def resized(picture: Floats, height: int, width: int) -> Floats:
    """Return a (3, H, W) picture at another size; each new pixel is a mean where it shrinks."""
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))
        for plane in picture
    ]
    return np.stack(planes)
