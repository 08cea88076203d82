"""Any data set by its folder: which layout it has, its tracklets, its splits, its fingerprint."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from model.datasets.findings import Survey
from model.datasets.folder import contents, survey_folder
from model.datasets.ilids_vid import find_ilids_vid, split_ilids_vid, survey_ilids_vid
from model.datasets.market1501 import find_market1501, split_market1501, survey_market1501
from model.datasets.mars import find_mars, split_mars, survey_mars
from model.datasets.prid2011 import Subset, find_prid2011, split_prid2011, survey_prid2011
from model.datasets.splits import random_halves
from model.datasets.tracklets import Dataset, Split
from model.errors import DatasetError

Layout = Literal["folder", "ilids-vid", "prid-2011", "mars", "market-1501"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_FINDERS: tuple[tuple[Layout, Callable[[Path], Path | None]], ...] = (
    ("ilids-vid", find_ilids_vid),
    ("prid-2011", find_prid2011),
    ("mars", find_mars),
    ("market-1501", find_market1501),
)


def detect_layout(root: Path) -> Layout:
    """Recognise a layout by the names of its folders.

    Raises:
        DatasetError: ``root`` is no folder, or like none of the layouts.
    """
    _, folders = contents(root)
    for layout, find in _FINDERS:
        if find(root) is not None:
            return layout
    if any(contents(folder)[1] for folder in folders):
        return "folder"
    raise DatasetError(
        f"expected one of the layouts {', '.join(LAYOUTS)} in {root}, got "
        + (f"folders without folders, such as {folders[0].name!r}" if folders else "no folders")
    )


def read_dataset(
    root: Path,
    layout: Layout | Literal["auto"] = "auto",
    *,
    seed: int = 0,
    splits: int = 10,
    prid_subset: Subset = "178",
) -> Dataset:
    """Read a data set: its tracklets and its splits; no image is opened.

    Args:
        root: Its folder.
        layout: How it is laid out; "auto" recognises it.
        seed: Of what is drawn where no split is published.
        splits: How many random halves are drawn there; published splits come as they are.
        prid_subset: Of PRID-2011; see `split_prid2011`.

    Returns:
        The same for the same files and arguments, in whatever order the disk lists them. Its root
        is the folder of the set, whichever of two nested ones was named.

    Raises:
        DatasetError: The folder is not laid out so, is not whole, does not fit its split file, or
            has fewer than two identities that two cameras saw.
        ValueError: Another argument is out of range.
    """
    survey, layout = survey_dataset(root, layout, seed=seed)
    errors = [finding for finding in survey.findings if finding.severity == "error"]
    if errors:
        others = len(errors) - 1
        more = f", and {others:,} more error{'' if others == 1 else 's'}" if others else ""
        raise DatasetError(
            f"{survey.root}: {errors[0].where}: {errors[0].what}{more}; "
            f"`passerby check-data {root}` lists them all"
        )
    try:
        divisions = split_survey(survey, layout, seed=seed, splits=splits, prid_subset=prid_subset)
    except DatasetError as error:
        # Only here: the checker, which says the same, must not send people to itself.
        raise DatasetError(f"{error}; `passerby check-data {root}` lists what is amiss") from error
    return Dataset(layout, survey.root, survey.tracklets, divisions)


def survey_dataset(
    root: Path, layout: Layout | Literal["auto"] = "auto", *, seed: int = 0
) -> tuple[Survey, Layout]:
    """Find what a folder holds, whatever is wrong with it.

    Returns:
        The survey and the layout, recognised where it was "auto".

    Raises:
        DatasetError: ``root`` is no folder, or nothing in it is of the layout.
        ValueError: ``layout`` is none of `LAYOUTS`.
    """
    if layout == "auto":
        layout = detect_layout(root)
    root = root.absolute()  # a split file may lie beside what is only called "."
    match layout:
        case "folder":
            return survey_folder(root), layout
        case "ilids-vid":
            return survey_ilids_vid(root), layout
        case "prid-2011":
            return survey_prid2011(root), layout
        case "mars":
            return survey_mars(root, seed=seed), layout
        case "market-1501":
            return survey_market1501(root), layout
        case _:
            raise ValueError(f"layout: expected auto or one of {LAYOUTS}, got {layout!r}")


def split_survey(
    survey: Survey, layout: Layout, *, seed: int, splits: int, prid_subset: Subset
) -> tuple[Split, ...]:
    """Divide a survey as its layout does; arguments and errors as for `read_dataset`."""
    if seed < 0 or splits < 1:
        raise ValueError(f"expected seed >= 0 and splits >= 1, got {seed} and {splits}")
    if prid_subset not in get_args(Subset):
        raise ValueError(f"prid_subset: expected {get_args(Subset)}, got {prid_subset!r}")
    match layout:
        case "folder":
            return random_halves(survey.tracklets, seed=seed, splits=splits)
        case "ilids-vid":
            return split_ilids_vid(survey, seed=seed, splits=splits)
        case "prid-2011":
            return split_prid2011(survey, seed=seed, splits=splits, subset=prid_subset)
        case "mars":
            return split_mars(survey)
        case "market-1501":
            return split_market1501(survey, seed=seed, splits=splits)


def fingerprint_dataset(dataset: Dataset) -> str:
    """Name a data set after its layout and the names and sizes of its frames.

    The contents of the frames are *not* read, which would take longer than some trainings: a frame
    that was changed without changing its size goes unnoticed.

    Returns:
        ``data-`` and the first 12 hex digits of a SHA-256; the same wherever the folder lies.

    Raises:
        DatasetError: A frame has gone.
    """
    try:
        lines = sorted(
            f"{frame.relative_to(dataset.root).as_posix()}\0{frame.stat().st_size}\n"
            for tracklet in dataset.tracklets
            for frame in tracklet.frames
        )
    except OSError as error:
        raise DatasetError(
            f"expected a frame at {error.filename}, got: {error.strerror}"
        ) from error
    digest = hashlib.sha256(f"{dataset.layout}\n".encode())
    for line in lines:
        digest.update(line.encode(errors="surrogateescape"))
    return f"data-{digest.hexdigest()[:12]}"
