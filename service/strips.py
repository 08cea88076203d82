"""Film strips: a few frames of a tracklet side by side, small enough to keep for years."""

import io

import numpy as np
from PIL import Image

from model.frames import Clip, choose_frames

FRAMES = 8
HEIGHT = 128
QUALITY = 85


def film_strip(clip: Clip) -> bytes:
    """Draw a tracklet as a strip of at most 8 frames, 128 pixels high.

    Args:
        clip: (T, height, width, 3) uint8 RGB.

    Returns:
        A JPEG.
    """
    chosen = clip[choose_frames(len(clip), FRAMES)]
    width = round(HEIGHT * clip.shape[2] / clip.shape[1])
    small = [np.asarray(Image.fromarray(frame).resize((width, HEIGHT))) for frame in chosen]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(small, axis=1)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
