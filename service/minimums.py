"""Refuses tracklets that are too poor to be of use, where minimums are set."""

from collections.abc import Callable

from service.errors import ValidationError
from service.settings import QualitySettings
from service.uploads import Decoded

_Rule = tuple[str, float, float | None, Callable[[float, float], bool]]


def check_frames(decoded: Decoded, minimums: QualitySettings) -> None:
    """Return where the frames are good enough to be embedded.

    Raises:
        ValidationError: They are not; the message says in what.
    """
    seen = decoded.quality
    _check(
        ("used frames", len(decoded.tracklet.positions), minimums.min_frames, _reaches),
        ("pixels on the shortest side", seen.shortest_side, minimums.min_side_pixels, _reaches),
        ("sharpness", seen.sharpness, minimums.min_sharpness, _reaches),
        ("brightness", seen.brightness, minimums.min_brightness, _reaches),
        ("brightness", seen.brightness, minimums.max_brightness, _stays_below),
    )


def check_agreement(frame_distance: float, minimums: QualitySettings) -> None:
    """Return where the frames agree with one another.

    Args:
        frame_distance: See `model.embedder.TrackletEmbedding`.
        minimums: Among which is a maximum of it.

    Raises:
        ValidationError: They do not: perhaps they show more than one person.
    """
    limit = minimums.max_frame_distance
    _check(("distance of the frames to their tracklet", frame_distance, limit, _stays_below))


def _reaches(value: float, limit: float) -> bool:
    return value >= limit


def _stays_below(value: float, limit: float) -> bool:
    return value <= limit


def _check(*rules: _Rule) -> None:
    for what, value, limit, holds in rules:
        if limit is not None and not holds(value, limit):
            bound = "at least" if holds is _reaches else "at most"
            raise ValidationError(
                f"expected a tracklet of better quality, {bound} {limit:g} {what}, got {value:.4g}",
                "/frames",
            )
