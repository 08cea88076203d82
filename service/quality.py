"""How good the frames of a tracklet are, as far as can be said without knowing who is in them.

It imports no network, so that decoders can use it.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from model.frames import Clip, choose_frames

# So many frames of a tracklet are looked at, evenly spread: all of 15 would take a decoder a tenth
# of its time.
LOOKED_AT = 3


@dataclass(frozen=True, slots=True)
class FrameQuality:
    """What the used frames of a tracklet look like, measured where they are decoded.

    Args:
        shortest_side: Of the smallest used frame as it was sent, pixels.
        sharpness: Variance of the Laplacian of brightness (0 to 255), mean over a few frames, at
            the size that the network sees: one that had to be enlarged is blurred there, too.
        brightness: Mean over the pixels of these, 0 (black) to 1 (white).
    """

    shortest_side: int
    sharpness: float
    brightness: float


def measure_quality(clip: Clip, shortest_side: int) -> FrameQuality:
    """Measure the frames of a tracklet.

    Args:
        clip: (T, height, width, 3) uint8 RGB.
        shortest_side: See `FrameQuality`.
    """
    chosen = clip[choose_frames(len(clip), LOOKED_AT)]
    frames, height, width, _ = chosen.shape
    # Pillow's grey is Rec. 601's, and several times as fast as numpy's arithmetic.
    grey = np.asarray(Image.fromarray(chosen.reshape(frames * height, width, 3)).convert("L"))
    grey = grey.reshape(frames, height, width)
    return FrameQuality(shortest_side, _sharpness(grey), float(grey.mean()) / 255)


def _sharpness(grey: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> float:
    """Mean over frames of the variance of the 4-neighbour Laplacian (Pech-Pacheco et al., 2000)."""
    signed = grey.astype(np.int16)
    inner = signed[:, 1:-1, 1:-1]
    if not inner.size:
        return 0.0
    laplacian = signed[:, :-2, 1:-1] + signed[:, 2:, 1:-1]
    laplacian += signed[:, 1:-1, :-2]
    laplacian += signed[:, 1:-1, 2:]
    laplacian -= 4 * inner
    return float(laplacian.reshape(len(grey), -1).var(axis=1, dtype=np.float32).mean())
