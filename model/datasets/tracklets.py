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


@dataclass(frozen=True, slots=True)
class Split:
    """Who trains, who asks and who answers in one repetition of a protocol.

    Args:
        name: Which repetition: "0", "1", ... in the order of the split file.
        train: Tracklets of the training identities.
        query: Tracklets that are searched with; none of their identities is in ``train``.
        gallery: Tracklets that are searched in.
        source: Where the division comes from, for reports: "published: splits_prid2011.json" or
            "random half, seed 0".
    """

    name: str
    train: tuple[Tracklet, ...]
    query: tuple[Tracklet, ...]
    gallery: tuple[Tracklet, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """A folder of tracklets in a known layout, with its protocol.

    Args:
        layout: One of ``layouts.LAYOUTS``.
        root: Its folder.
        tracklets: All of them, sorted by identity, camera and name, by number.
        splits: The repetitions of its protocol, at least one.
    """

    layout: str
    root: Path
    tracklets: tuple[Tracklet, ...]
    splits: tuple[Split, ...]


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
