"""What is true of a drawn set: who hides whom, when, and which pixel is whose.

It lies beside the frames in a hidden folder, which no reader of tracklets looks into.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.datasets.tracklets import Tracklet
from model.errors import DatasetError

TRUTH = ".truth"
"""Folder of the truth within a written set."""

LEVELS = (0, 25, 50, 75)
"""Occlusion levels: the person is hidden in no frame, in up to 25 %, in up to 50 %, in more."""

WELL_HIDDEN = 0.1
"""Least share of the person that is hidden in a frame that counts as occluded."""

_RECORDS = "tracklets.jsonl"
_MADE_OF = "set.json"
_MASKS = "masks"
_PALETTE = (28, 30, 34, 86, 180, 110, 214, 84, 64)  # background, person, occluder


@dataclass(frozen=True, slots=True)
class TrackletTruth:
    """What is true of one drawn tracklet.

    Args:
        folder: Its frames' folder within the set, with slashes; "" before it is written.
        identity: Number of the person, from 1.
        camera: Number of the camera, from 1.
        frames: How many, T.
        occluder: What hides the person, one of ``occluders.OCCLUDER_KINDS``; None if nothing.
        occluded: First and last frame (from 0) in which it may be seen.
        passer: Number of the identity that passes, for a pedestrian.
        hidden: Share of the person, in [0, 1], that it hides in each frame.
        foreign: Frames (from 0) that show somebody else.
        foreigner: Number of the identity that they show.
        bad_crops: Frames (from 0) whose box is off by a fifth.
        degradations: What is wrong with the pictures -> how strong it is, as in
            ``degradations.Degradations``.
    """

    folder: str
    identity: int
    camera: int
    frames: int
    occluder: str | None = None
    occluded: tuple[int, int] | None = None
    passer: int | None = None
    hidden: tuple[float, ...] = ()
    foreign: tuple[int, ...] = ()
    foreigner: int | None = None
    bad_crops: tuple[int, ...] = ()
    degradations: Mapping[str, float] | None = None

    @property
    def occlusion(self) -> float:
        """Share of the tracklet, in [0, 1]: its own frames in which the person is well hidden.

        A frame counts when at least a tenth of the person is hidden: the legs behind a bench do,
        a hand behind the edge of a pillar does not. Foreign frames do not count at all.
        """
        own = [share for number, share in enumerate(self.hidden) if number not in self.foreign]
        return sum(share >= WELL_HIDDEN for share in own) / len(own) if own else 0.0

    @property
    def level(self) -> int:
        """Occlusion level, one of ``LEVELS``: ``occlusion`` in per cent, rounded up to a level."""
        return next((level for level in LEVELS if 100 * self.occlusion <= level), LEVELS[-1])


@dataclass(frozen=True, slots=True)
class Truth:
    """What is true of a written set.

    Args:
        root: The set's folder.
        tracklets: Folder of a tracklet's frames within ``root``, with slashes -> what is true.
    """

    root: Path
    tracklets: Mapping[str, TrackletTruth]

    def of(self, tracklet: Tracklet) -> TrackletTruth:
        """Return what is true of a tracklet of this set, found by the folder of its frames.

        Raises:
            DatasetError: It is none of this set.
        """
        folder = self._within(tracklet.frames[0].parent)
        if folder not in self.tracklets:
            raise DatasetError(f"expected a tracklet of {self.root}, got one in {folder}")
        return self.tracklets[folder]

    def load_mask(self, frame: Path) -> NDArray[np.uint8]:
        """Read whose pixels those of a frame are.

        Args:
            frame: Path of the frame, as in a tracklet of this set.

        Returns:
            (H, W) uint8: 0 background, 1 the person, 2 what hides or replaces them.

        Raises:
            DatasetError: There is no mask: the set was written without, or the frame is another's.
        """
        path = mask_path(self.root, self._within(frame))
        try:
            with Image.open(path) as picture:
                return np.array(picture, np.uint8)
        except OSError as error:
            raise DatasetError(f"expected a mask at {path}, got none that can be read") from error

    def _within(self, path: Path) -> str:
        # One of the two may go through a link or be relative.
        try:
            return path.relative_to(self.root).as_posix()
        except ValueError:
            pass
        try:
            return path.resolve().relative_to(self.root.resolve()).as_posix()
        except ValueError as error:
            raise DatasetError(f"expected a path within {self.root}, got {path}") from error


def mask_path(root: Path, frame: str) -> Path:
    """Return where the mask of a frame lies, from the frame's path within the set."""
    return root / TRUTH / _MASKS / Path(frame).with_suffix(".png")


def save_mask(mask: NDArray[np.uint8], path: Path) -> None:
    """Write one (H, W) mask as a picture that can be looked at."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask)
    picture.putpalette(_PALETTE)
    picture.save(path, compress_level=1)


def write_truth(
    root: Path, tracklets: Iterable[TrackletTruth], made_of: Mapping[str, object]
) -> None:
    """Write what is true of the tracklets of a set, one JSON object a line.

    Args:
        root: Folder of the set.
        tracklets: What is true of each.
        made_of: What the set was drawn from, for people who find it later.
    """
    (root / TRUTH).mkdir(parents=True, exist_ok=True)
    lines = [record_line(tracklet) for tracklet in tracklets]
    (root / TRUTH / _RECORDS).write_text("".join(lines), encoding="utf-8")
    (root / TRUTH / _MADE_OF).write_text(json.dumps(made_of, indent=1) + "\n", encoding="utf-8")


def has_truth(root: Path) -> bool:
    """Say whether a folder is, or lies in, a drawn set with its truth beside the frames."""
    return _root_of(root) is not None


def read_truth(root: Path) -> Truth:
    """Read what is true of a written set.

    Args:
        root: Its folder, or the one within it that its layout starts from (``Dataset.root``).

    Raises:
        DatasetError: There is no truth in this folder, or it cannot be read.
    """
    base = _root_of(root)
    if base is None:
        raise DatasetError(f"expected a drawn set with {TRUTH}/{_RECORDS} in {root}, got none")
    path = base / TRUTH / _RECORDS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"expected records in {path}, got {error}") from error
    records = [_parsed(line, path, number) for number, line in enumerate(lines, start=1)]
    return Truth(base, {record.folder: record for record in records})


def _root_of(root: Path) -> Path | None:
    around = (root, root.absolute().parent)
    return next((base for base in around if (base / TRUTH / _RECORDS).is_file()), None)


def record_line(tracklet: TrackletTruth) -> str:
    """Return what is true of a tracklet as a line of JSON."""
    record = {**asdict(tracklet), "occlusion": tracklet.occlusion, "level": tracklet.level}
    return json.dumps(record) + "\n"


def parse_record(line: str) -> TrackletTruth:
    """Return what a line of JSON says of a tracklet.

    Raises:
        ValueError: It is not JSON.
        TypeError: It is no object, or lacks a value.
    """
    names = {field.name for field in fields(TrackletTruth)}
    record = json.loads(line)
    if not isinstance(record, dict):
        raise TypeError(f"expected an object, got {record!r}")
    known: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in record.items()
        if name in names
    }
    return TrackletTruth(**known)


def _parsed(line: str, path: Path, number: int) -> TrackletTruth:
    try:
        return parse_record(line)
    except (ValueError, TypeError) as error:
        raise DatasetError(f"expected a record in line {number} of {path}, got {error}") from error
