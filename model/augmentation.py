"""What training does to clips so that a network does not learn them by heart."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from model.frames import Clip

Per = Literal["tracklet", "frame"]
# Random erasing, Zhong et al., arXiv:1708.04896: share of the area, and height over width.
_ERASED_AREA = (0.02, 0.4)
_ERASED_ASPECT = (0.3, 1 / 0.3)
_TRIES = 20


@dataclass(frozen=True, slots=True)
class AugmentationConfig:
    """Which augmentations are drawn, and how often.

    Args:
        flip: Probability of a horizontal flip, in [0, 1].
        flip_per: "tracklet" flips all frames or none, which Eq. 4 needs to compare cells across
            frames; "frame" draws for each, as much public code does.
        pad: Pixels of padding before a random crop of the old size; 0 crops nothing.
        erase: Probability, in [0, 1], that a rectangle is replaced by the mean colour.
        erase_per: Whether the frames of a tracklet share the rectangle.
        jitter: Largest relative change, in [0, 1), of brightness, contrast and saturation; all
            frames of a tracklet share it.
    """

    flip: float = 0.5
    flip_per: Per = "tracklet"
    pad: int = 0
    erase: float = 0.0
    erase_per: Per = "frame"
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "erase"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")
        for name in ("flip_per", "erase_per"):
            if getattr(self, name) not in get_args(Per):
                raise ValueError(f"{name}: expected {get_args(Per)}, got {getattr(self, name)!r}")
        if self.pad < 0:
            raise ValueError(f"pad: expected pixels from 0, got {self.pad}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter: expected a share in [0, 1), got {self.jitter}")


def augment(
    clip: Clip,
    config: AugmentationConfig,
    rng: np.random.Generator,
    fill: tuple[int, int, int] = (124, 116, 104),
) -> Clip:
    """Augment one clip.

    Args:
        clip: (T, H, W, 3) uint8 RGB; it is not changed.
        config: What may happen.
        rng: Decides what does.
        fill: Colour of padding and of erased rectangles: what normalises to about zero.

    Returns:
        (T, H, W, 3) uint8 RGB.
    """
    colour = np.array(fill, np.uint8)
    clip = _jitter(clip, config.jitter, rng) if config.jitter else clip
    clip = _flip(clip, config, rng)
    clip = _crop(clip, config.pad, colour, rng) if config.pad else clip
    return _erase(clip, config, colour, rng) if config.erase else clip


def _flip(clip: Clip, config: AugmentationConfig, rng: np.random.Generator) -> Clip:
    if config.flip_per == "tracklet":
        return clip[:, :, ::-1] if rng.random() < config.flip else clip
    flipped = rng.random(len(clip)) < config.flip  # (T,)
    return np.where(flipped[:, None, None, None], clip[:, :, ::-1], clip)


def _crop(clip: Clip, pad: int, colour: Clip, rng: np.random.Generator) -> Clip:
    frames, height, width, _ = clip.shape
    padded = np.empty((frames, height + 2 * pad, width + 2 * pad, 3), np.uint8)
    padded[:] = colour
    padded[:, pad : pad + height, pad : pad + width] = clip
    top, left = rng.integers(2 * pad + 1, size=2)
    return padded[:, top : top + height, left : left + width]


def _erase(clip: Clip, config: AugmentationConfig, colour: Clip, rng: np.random.Generator) -> Clip:
    erased = clip.copy()
    if config.erase_per == "tracklet":
        if rng.random() < config.erase:
            rows, columns = _rectangle(clip.shape[1:3], rng)
            erased[:, rows, columns] = colour
        return erased
    for frame in erased:
        if rng.random() < config.erase:
            rows, columns = _rectangle(clip.shape[1:3], rng)
            frame[rows, columns] = colour
    return erased


def _rectangle(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[slice, slice]:
    height, width = shape
    for _ in range(_TRIES):
        area = rng.uniform(*_ERASED_AREA) * height * width
        aspect = np.exp(rng.uniform(*np.log(_ERASED_ASPECT)))
        rows, columns = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < rows < height and 0 < columns < width:
            top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
            return slice(top, top + rows), slice(left, left + columns)
    return slice(0), slice(0)  # no rectangle fitted: erase nothing


def _jitter(clip: Clip, strength: float, rng: np.random.Generator) -> Clip:
    brightness, contrast, saturation = 1 + rng.uniform(-strength, strength, 3)
    # Each is affine in the pixels and leaves greys grey, so one matrix and a number a frame do it.
    mix = saturation * np.eye(3) + (1 - saturation) / 3  # about the mean of the channels
    matrix = (brightness * contrast * mix).astype(np.float32)
    pixels = clip.reshape(len(clip), -1, 3).astype(np.float32)  # (T, H*W, 3)
    mean = pixels.reshape(len(clip), -1).mean(axis=1)  # (T,)
    changed = pixels @ matrix + (brightness * (1 - contrast) * mean)[:, None, None]
    return np.asarray(changed.round().clip(0, 255), np.uint8).reshape(clip.shape)
