"""The plain layout: ``identity/camera/frames`` or ``identity/camera/tracklet/frames``.

Camera folders of both kinds may stand side by side, but one camera folder holds frames or
tracklet folders, not both. Folders, tracklets and frames come in natural order.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from model.datasets.findings import Finding, Survey, noting, place
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
        for identity in only_folders(root, holding="identity")
        for camera in only_folders(identity, holding="camera")
        for tracklet in _read_camera(camera, identity.name)
    ]
    return tracklets


def survey_folder(root: Path) -> Survey:
    """Find the tracklets of a folder and everything in it that does not belong.

    Args:
        root: The folder that holds one folder per identity.

    Returns:
        The same tracklets as `read_folder` where that would not refuse.

    Raises:
        DatasetError: ``root`` is no folder.
    """
    findings: list[Finding] = []
    tracklets = [
        tracklet
        for identity in _folders_of(root, root, findings, holding="identity")
        for camera in _folders_of(identity, root, findings, holding="camera")
        for tracklet in _survey_camera(camera, identity.name, root, findings)
    ]
    return Survey(root, tuple(tracklets), tuple(findings))


def survey_cameras(
    folder: Path, cameras: Sequence[str], root: Path, findings: list[Finding]
) -> list[Tracklet]:
    """Find the tracklets of ``camera/person/frames``, as two-camera sets are laid out.

    Args:
        folder: What holds the camera folders.
        cameras: Their names; others are not looked at.
        root: What findings are relative to.
        findings: Gets what is missing or odd.

    Returns:
        By camera, then person; each with the name "".
    """
    tracklets: list[Tracklet] = []
    for camera in cameras:
        if not (folder / camera).is_dir():
            findings.append(Finding("error", place(folder / camera, root), "missing folder"))
            continue
        for person in _folders_of(folder / camera, root, findings, holding="person"):
            with noting(findings, person, root):
                tracklets.append(Tracklet(person.name, camera, "", read_tracklet(person)))
    return tracklets


def read_tracklet(folder: Path) -> tuple[Path, ...]:
    """List the frames of one tracklet folder in natural order.

    Raises:
        DatasetError: The folder is missing, holds no image, or holds further folders.
    """
    images, folders = contents(folder)
    if folders:
        raise DatasetError(f"expected only frames in {folder}, got a folder {folders[0].name!r}")
    if not images:
        raise DatasetError(f"expected at least one image in {folder}, got none")
    return images


def _read_camera(folder: Path, identity: str) -> list[Tracklet]:
    images, folders = contents(folder)
    if images and folders:
        raise DatasetError(
            f"expected either frames or tracklet folders in {folder}, "
            f"got both: {images[0].name!r} and {folders[0].name!r}"
        )
    if folders:
        return [Tracklet(identity, folder.name, one.name, read_tracklet(one)) for one in folders]
    return [Tracklet(identity, folder.name, "", read_tracklet(folder))]


def _survey_camera(
    folder: Path, identity: str, root: Path, findings: list[Finding]
) -> list[Tracklet]:
    images, folders = contents(folder)
    tracklets: list[Tracklet] = []
    if folders and not images:
        for one in folders:
            with noting(findings, one, root):
                tracklets.append(Tracklet(identity, folder.name, one.name, read_tracklet(one)))
        return tracklets
    with noting(findings, folder, root):
        tracklets += _read_camera(folder, identity)
    return tracklets


def _folders_of(
    folder: Path, root: Path, findings: list[Finding], *, holding: str
) -> tuple[Path, ...]:
    with noting(findings, folder, root):
        only_folders(folder, holding=holding)
    return contents(folder)[1]


def only_folders(folder: Path, *, holding: str) -> tuple[Path, ...]:
    """List the folders in a folder that holds no image.

    Args:
        folder: Where to look.
        holding: What each of them is, for the error: "identity", "camera", ...

    Returns:
        At least one, in natural order.

    Raises:
        DatasetError: There is an image, or no folder.
    """
    images, folders = contents(folder)
    if images:
        raise DatasetError(
            f"expected only {holding} folders in {folder}, got an image {images[0].name!r}"
        )
    if not folders:
        raise DatasetError(f"expected {holding} folders in {folder}, got no tracklets there")
    return folders


def contents(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return the images and the folders in a folder, each in natural order.

    Raises:
        DatasetError: ``folder`` is no folder, or cannot be listed.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DatasetError(f"expected a folder at {folder}, got {found}")
    try:
        # Its entries know their kind, which saves a million calls on a set like MARS.
        with os.scandir(folder) as listed:
            entries = [entry for entry in listed if not entry.name.startswith(".")]
            kinds = {entry.name: entry.is_dir() for entry in entries}
    except OSError as error:
        raise DatasetError(
            f"expected a folder that can be listed at {folder}, got: {error.strerror}"
        ) from error
    names = sorted(kinds, key=natural_key)
    folders = tuple(folder / name for name in names if kinds[name])
    images = tuple(folder / name for name in names if not kinds[name] and is_image(name))
    return images, folders


def is_image(name: str) -> bool:
    """Whether a file counts as a frame by its name."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 a Path for each of a million names takes seconds
