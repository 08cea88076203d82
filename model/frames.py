"""Which frames are used, and how they become input: one path for training and serving.

Two steps, so that a service can do the first beside its decoding and the second beside its network:
`prepare_frame` makes any decoded image a uint8 crop of the network's size, `normalise` makes a
batch of
such crops float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from model.errors import InvalidFramesError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Clip = NDArray[np.uint8]
Sampling = Literal["even", "random", "all", "consecutive", "chunks"]
Interpolation = Literal["bilinear", "bicubic"]

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# What Pillow's decoders raise; the last two for headers that claim a huge picture.
_UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_MODES_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes network input; saved in the checkpoint.

    Args:
        height: Of the network's input, pixels.
        width: Of the network's input, pixels.
        mean: Per channel R, G, B, of values in 0-1; the default is ImageNet's.
        std: Likewise.
        interpolation: Of the resize, which always filters against aliasing.
    """

    height: int = 256
    width: int = 128
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if self.height < 32 or self.width < 32:
            raise ValueError(f"expected an input of at least 32x32, got {self.width}x{self.height}")
        if self.interpolation not in _RESAMPLING:
            raise ValueError(
                f"interpolation: expected {tuple(_RESAMPLING)}, got {self.interpolation!r}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"expected 3 means and 3 positive deviations, got {self.mean}, {self.std}"
            )


def choose_frames(
    received: int,
    used: int,
    sampling: Sampling = "even",
    generator: np.random.Generator | None = None,
) -> list[int]:
    """Choose which frames of a tracklet make its embedding.

    Args:
        received: How many frames the tracklet has, >= 1.
        used: How many to choose, >= 1; "all" ignores it.
        sampling: "even" takes the middle frame of each of ``used`` equal parts, or every frame
        once where
            there are fewer. "random" draws ``used`` without replacement, in temporal order, and
            always
            returns ``used``: a shorter tracklet starts again from its first frame. "all" takes all.
            "consecutive" draws a run of neighbours, "chunks" one frame of each of ``used`` equal
            parts; both return ``used`` frames as "random" does.
        generator: Source of draws; "random", "consecutive" and "chunks" need one.

    Returns:
        Indices into the tracklet, ascending but for the wrapped ones.

    Raises:
        InvalidFramesError: There is no frame to choose from.
        ValueError: Another argument is out of range.
    """
    if received < 1:
        raise InvalidFramesError("expected at least one frame, got none")
    if used < 1:
        raise ValueError(f"used: expected at least 1, got {used}")
    if sampling not in get_args(Sampling):
        raise ValueError(f"sampling: expected {get_args(Sampling)}, got {sampling!r}")
    if sampling in ("random", "consecutive", "chunks"):
        return _draw_frames(received, used, sampling, generator)
    if sampling == "all" or received <= used:
        return list(range(received))
    return [(2 * part + 1) * received // (2 * used) for part in range(used)]


def _draw_frames(
    received: int, used: int, sampling: Sampling, generator: np.random.Generator | None
) -> list[int]:
    if generator is None:
        raise ValueError(f"{sampling} sampling: expected a seeded generator, got None")
    if received < used:
        return [position % received for position in range(used)]
    if sampling == "random":
        return sorted(generator.choice(received, size=used, replace=False).tolist())
    if sampling == "consecutive":
        start = int(generator.integers(received - used + 1))  # the last start may be drawn, too
        return list(range(start, start + used))
    edges = [part * received // used for part in range(used + 1)]
    return [int(generator.integers(low, high)) for low, high in pairwise(edges)]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any decoded still image to 8-bit RGB, upright.

    EXIF rotation is applied. 16-bit greyscale keeps its high byte. Transparent parts take the
    colour that
    normalises to about zero (the ImageNet mean), because what a cut-out hides under them is
    arbitrary.

    Returns:
        An image of mode RGB, decoded; the one that came where nothing is to be done.
    """
    image.load()  # who gets the same image back may close its file
    if not _is_upright(image):
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow would clip 16-bit greys to 255 instead of scaling them.
        levels = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.clip(levels / 257, 0, 255).round().astype(np.uint8))
    elif image.mode in _MODES_WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (124, 116, 104, 255))
        image = Image.alpha_composite(background, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_upright(image: Image.Image) -> bool:
    return bool(image.getexif().get(ExifTags.Base.Orientation, 1) == 1)


def prepare_frame(image: Image.Image, preprocessing: Preprocessing) -> Clip:
    """Resize one image to the network's input.

    A JPEG file of at least four times that size is decoded at a half, a quarter or an eighth of its
    own, so that the resize, which filters against aliasing, still halves it at least. That moves
    levels by 0.3 to 1.4 of 255 in the mean and about 10 at most, and takes a half to a third of the
    time. All else, and what EXIF turns, is decoded as it is.

    Args:
        image: Any mode and size; better not decoded yet.
        preprocessing: Of the checkpoint that will embed it.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    size = (preprocessing.width, preprocessing.height)
    # None where the file is no JPEG, or is decoded already.
    draft = image.draft(None, (2 * size[0], 2 * size[1])) if _is_upright(image) else None
    rgb = to_rgb(image)
    # Of a width that the scale does not divide, the last column is there in part.
    box = (0, 0, *rgb.size) if draft is None else draft[1]
    if rgb.size != size or box != (0, 0, *size):  # else Pillow would make a copy
        # Pillow widens its filter with the scale, which is what antialiasing means.
        rgb = rgb.resize(size, _RESAMPLING[preprocessing.interpolation], box)
    return np.asarray(rgb, dtype=np.uint8)


def normalise(
    frames: "Tensor",
    preprocessing: Preprocessing,
    constants: "tuple[Tensor, Tensor] | None" = None,
) -> "Tensor":
    """Scale prepared frames to the network's value range.

    Args:
        frames: (N, height, width, 3) uint8 RGB, on any device.
        preprocessing: Of the checkpoint that will embed them.
        constants: Of `make_constants` for that device; made anew where None, which what a GPU
            records cannot hold.

    Returns:
        (N, 3, height, width) float32, in channels-last memory order.

    Raises:
        InvalidFramesError: ``frames`` has another shape or type.
    """
    import torch  # takes seconds, and who only decodes does without

    expected = (preprocessing.height, preprocessing.width, 3)
    if frames.ndim != 4 or tuple(frames.shape[1:]) != expected or frames.dtype != torch.uint8:
        raise InvalidFramesError(
            f"expected frames (N, {expected[0]}, {expected[1]}, 3) uint8, "
            f"got {tuple(frames.shape)} {frames.dtype}"
        )
    mean, std = constants or make_constants(preprocessing, frames.device)
    return ((frames.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def make_constants(preprocessing: Preprocessing, device: "torch.device") -> "tuple[Tensor, Tensor]":
    """Mean and deviation on a device, (3,) float32 each: what `normalise` needs there."""
    import torch  # see `normalise`

    mean = torch.tensor(preprocessing.mean, device=device)
    return mean, torch.tensor(preprocessing.std, device=device)


def read_clip(
    frames: Sequence[Path],
    preprocessing: Preprocessing,
    *,
    used: int = 15,
    sampling: Sampling = "even",
    generator: np.random.Generator | None = None,
) -> Clip:
    """Choose frames of a tracklet on disk, then decode and prepare only those.

    Args:
        frames: Image files in temporal order.
        preprocessing: Of the checkpoint that will embed them.
        used: See `choose_frames`, likewise the next two.
        sampling: How frames are chosen.
        generator: Source of random choices.

    Returns:
        (T, height, width, 3) uint8 RGB.

    Raises:
        InvalidFramesError: There is no frame, or one cannot be decoded.
    """
    positions = choose_frames(len(frames), used, sampling, generator)
    return np.stack([read_frame(frames[position], preprocessing) for position in positions])


def read_frame(path: Path, preprocessing: Preprocessing) -> Clip:
    """Decode and prepare one frame on disk.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        InvalidFramesError: It cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return prepare_frame(image, preprocessing)
    except _UNDECODABLE as error:
        raise InvalidFramesError(f"expected an image, could not decode {path}") from error
