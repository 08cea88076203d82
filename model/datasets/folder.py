"""The plain layout: ``identity/camera/frames`` or ``identity/camera/tracklet/frames``.

Camera folders of both kinds may stand side by side, but one camera folder holds frames or
tracklet folders, not both. Folders, tracklets and frames come in natural order.
"""

from pathlib import Path

from model.datasets.tracklets import Tracklet, natural_key
from model.errors import DatasetError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


def read_folder(root: Path) -> list[Tracklet]:
    """Find the tracklets of a folder; no image is opened.

    Hidden files and files that are no images (a README, a licence) are ignored everywhere.

    Args:
        root: The folder that holds one folder per identity.

    Returns:
        At least one tracklet, by identity, then camera, then name. The name is "" where a camera
        folder holds the frames itself.

    Raises:
        DatasetError: A folder is missing, empty, or holds what does not belong on its level.
    """
    tracklets = [
        tracklet
        for identity in _only_folders(root, holding="identity")
        for camera in _only_folders(identity, holding="camera")
        for tracklet in _read_camera(camera, identity.name)
    ]
    return tracklets


def read_tracklet(folder: Path) -> tuple[Path, ...]:
    """List the frames of one tracklet folder in natural order.

    Raises:
        DatasetError: The folder is missing, holds no image, or holds further folders.
    """
    images, folders = _contents(folder)
    if folders:
        raise DatasetError(f"expected only frames in {folder}, got a folder {folders[0].name!r}")
    if not images:
        raise DatasetError(f"expected at least one image in {folder}, got none")
    return images


def _read_camera(folder: Path, identity: str) -> list[Tracklet]:
    images, folders = _contents(folder)
    if images and folders:
        raise DatasetError(
            f"expected either frames or tracklet folders in {folder}, "
            f"got both: {images[0].name!r} and {folders[0].name!r}"
        )
    if folders:
        return [Tracklet(identity, folder.name, one.name, read_tracklet(one)) for one in folders]
    return [Tracklet(identity, folder.name, "", read_tracklet(folder))]


def _only_folders(folder: Path, *, holding: str) -> tuple[Path, ...]:
    images, folders = _contents(folder)
    if images:
        raise DatasetError(
            f"expected only {holding} folders in {folder}, got an image {images[0].name!r}"
        )
    if not folders:
        raise DatasetError(f"expected {holding} folders in {folder}, got no tracklets there")
    return folders


def _contents(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return the images and the folders in a folder, each in natural order."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DatasetError(f"expected a folder at {folder}, got {found}")
    shown = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    entries = sorted(shown, key=lambda entry: natural_key(entry.name))
    folders = tuple(entry for entry in entries if entry.is_dir())
    images = tuple(
        entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.is_dir()
    )
    return images, folders
