"""How drawn tracklets lie on disk: the layouts of published data sets, with their split files."""

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.datasets.truth import TrackletTruth, mask_path, save_mask
from model.errors import DatasetError

DrawnLayout = Literal["folder", "ilids-vid", "prid-2011"]

SPLITS = 10
"""Repetitions of the protocol in a split file."""

JPEG_QUALITY = 92
_MAT_HEADER = 116  # bytes of free text at the start of a .mat file, which name the time


def needed_cameras(layout: DrawnLayout) -> int | None:
    """Return how many cameras a layout has; None where any number will do."""
    return None if layout == "folder" else 2


def identity_name(layout: DrawnLayout, identity: int) -> str:
    """Return the name of an identity, from its number."""
    if layout == "folder":
        return f"p{identity:04d}"
    return f"person{identity:03d}" if layout == "ilids-vid" else f"person_{identity:04d}"


def camera_name(layout: DrawnLayout, camera: int) -> str:
    """Return the name of a camera, from its number."""
    if layout == "folder":
        return f"c{camera}"
    return f"cam{camera}" if layout == "ilids-vid" else f"cam_{'ab'[camera - 1]}"


def tracklet_folder(layout: DrawnLayout, identity: int, camera: int) -> str:
    """Return the folder of a tracklet's frames within the set, with slashes."""
    who, where = identity_name(layout, identity), camera_name(layout, camera)
    if layout == "folder":
        return f"{who}/{where}"
    return f"{'i-LIDS-VID/sequences' if layout == 'ilids-vid' else 'multi_shot'}/{where}/{who}"


def frame_name(layout: DrawnLayout, identity: int, camera: int, number: int) -> str:
    """Return the name of a frame, from its number from 1."""
    if layout == "folder":
        return f"{number:04d}.jpg"
    if layout == "prid-2011":
        return f"{number:04d}.png"
    who, where = identity_name(layout, identity), camera_name(layout, camera)
    return f"{where}_{who}_{number:05d}.png"


def save_tracklet(
    frames: NDArray[np.uint8],
    masks: NDArray[np.uint8] | None,
    truth: TrackletTruth,
    root: Path,
    layout: DrawnLayout,
) -> TrackletTruth:
    """Write the frames of one tracklet, and its masks where there are any.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        masks: (T, H, W) uint8 labels, or None to write none.
        truth: What is true of it.
        root: Folder of the set.
        layout: How the set lies on disk.

    Returns:
        What is true of it, with its folder.
    """
    folder = tracklet_folder(layout, truth.identity, truth.camera)
    (root / folder).mkdir(parents=True)
    for number, frame in enumerate(frames):
        name = frame_name(layout, truth.identity, truth.camera, number + 1)
        path = root / folder / name
        if path.suffix == ".jpg":
            Image.fromarray(frame).save(path, quality=JPEG_QUALITY, subsampling=0)
        else:
            Image.fromarray(frame).save(path, compress_level=1)
        if masks is not None:
            save_mask(masks[number], mask_path(root, f"{folder}/{name}"))
    return replace(truth, folder=folder)


def write_splits(root: Path, layout: DrawnLayout, identities: int, seed: int) -> None:
    """Write the split file that the layout's loader reads: ten halves, one half of it tests.

    A plain folder has none. An iLIDS-VID split is a permutation of the sorted identities, counted
    from 1, whose first half tests (Wang et al., ECCV 2014); it is also written as the published
    .mat file where SciPy is there. A PRID-2011 split names the identities of both halves.
    """
    rng = np.random.default_rng(seed)
    rows = [(rng.permutation(identities) + 1).tolist() for _ in range(SPLITS)]
    if layout == "ilids-vid":
        _write_json(root / "splits_ilidsvid.json", rows)
        _write_mat(root / "train-test people splits" / "train_test_splits_ilidsvid.mat", rows)
    elif layout == "prid-2011":
        half = identities // 2
        names = [[identity_name(layout, number) for number in row] for row in rows]
        splits = [{"train": sorted(row[half:]), "test": sorted(row[:half])} for row in names]
        _write_json(root / "splits_prid2011.json", splits)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _write_mat(path: Path, rows: Sequence[Sequence[int]]) -> None:
    try:
        from scipy.io import savemat
    except ImportError:
        return  # the JSON says the same
    packed = io.BytesIO()
    savemat(packed, {"ls_set": np.array(rows, np.uint16)})
    content = bytearray(packed.getvalue())
    text = b"MATLAB 5.0 MAT-file, identities of ten splits; the first half tests"
    content[:_MAT_HEADER] = text.ljust(_MAT_HEADER)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@contextmanager
def written_aside(root: Path) -> Iterator[Path]:
    """Give a folder beside ``root`` to write into, which becomes ``root`` when all is written.

    What fails or is interrupted leaves nothing at ``root``. A killed process leaves the folder
    aside, which the next try removes.

    Raises:
        DatasetError: ``root`` is a file, holds something, or cannot be written.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DatasetError(f"expected a new or empty folder, got {root} with something in it")
    root = root.absolute()
    aside = root.parent / f".{root.name}.unfinished"
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        if root.exists():
            root.rmdir()  # now rather than at the end, if it cannot be replaced
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir()
        yield aside
        aside.rename(root)
    except OSError as error:
        raise DatasetError(f"expected to write {root}, got {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
