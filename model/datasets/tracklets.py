"""What a data set is made of, whatever its layout on disk."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Tracklet:
    """The frame sequence of one person seen by one camera.

    Args:
        identity: Who.
        camera: Where.
        name: Which of that person's tracklets in that camera; "" where there is only one.
        frames: Image files in temporal order, at least one.
    """

    identity: str
    camera: str
    name: str
    frames: tuple[Path, ...]


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key that counts as people do: ``2.jpg`` before ``10.jpg``.

    Runs of digits compare as numbers, the rest without regard to case. Names that differ only in
    case or in leading zeros (``1.jpg``, ``01.jpg``) have a fixed order, too.
    """
    key: list[tuple[int, str]] = []
    for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name):
        # Not int(): names come from strangers' archives, and int() refuses 4,301 digits.
        number = digits.lstrip("0")
        key += [(0, text.casefold()), (len(number) if digits else -1, number)]
    return (*key, (0, name))
