"""Any data set by its folder: which layout it has, its tracklets, its splits, its fingerprint."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from model.datasets.findings import Finding, Survey, noting
from model.datasets.folder import contents, only_folders, survey_folder
from model.datasets.ilids_vid import find_ilids_vid, split_ilids_vid, survey_ilids_vid
from model.datasets.market1501 import find_market1501, split_market1501, survey_market1501
from model.datasets.mars import find_mars, split_mars, survey_mars
from model.datasets.mixed import (
    MixedDataset,
    MixedSurvey,
    Part,
    check_shares,
    join_splits,
    join_surveys,
    naming,
)
from model.datasets.prid2011 import Subset, find_prid2011, split_prid2011, survey_prid2011
from model.datasets.splits import TEST_SHARE, random_halves
from model.datasets.tracklets import Dataset, Split, natural_key
from model.errors import DatasetError

Layout = Literal["folder", "ilids-vid", "prid-2011", "mars", "market-1501", "mixed"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_FINDERS: tuple[tuple[Layout, Callable[[Path], Path | None]], ...] = (
    ("ilids-vid", find_ilids_vid),
    ("prid-2011", find_prid2011),
    ("mars", find_mars),
    ("market-1501", find_market1501),
)


def detect_layout(root: Path) -> Layout:
    """Recognise a layout by the names of its folders.

    A mix is recognised where every folder in it is a data set and at least one of them is of a
    published layout: parts that are all plain folders look like one plain folder whose tracklets
    have names, and are taken for that.

    Raises:
        DatasetError: ``root`` is no folder, or like none of the layouts.
    """
    images, folders = contents(root)
    layout = _detect_single(root, folders)
    if layout in (None, "folder") and not images and _is_mixed(folders):
        return "mixed"
    if layout is not None:
        return layout
    raise DatasetError(
        f"expected one of the layouts {', '.join(LAYOUTS)} in {root}, got "
        + (f"folders without folders, such as {folders[0].name!r}" if folders else "no folders")
    )


def _detect_single(root: Path, folders: Sequence[Path]) -> Layout | None:
    """Recognise any layout but a mix."""
    for layout, find in _FINDERS:
        if find(root) is not None:
            return layout
    return "folder" if any(contents(folder)[1] for folder in folders) else None


def _is_mixed(folders: Sequence[Path]) -> bool:
    # First what is quick: a plain folder may hold thousands, and none of them is published.
    if not any(find(folder) is not None for folder in folders for _, find in _FINDERS):
        return False
    return all(_detect_single(folder, contents(folder)[1]) is not None for folder in folders)


def read_dataset(
    root: Path,
    layout: Layout | Literal["auto"] = "auto",
    *,
    seed: int = 0,
    splits: int = 10,
    prid_subset: Subset = "178",
    test_share: Mapping[str, float] | None = None,
) -> Dataset:
    """Read a data set: its tracklets and its splits; no image is opened.

    Args:
        root: Its folder.
        layout: How it is laid out; "auto" recognises it.
        seed: Of what is drawn where no split is published.
        splits: How many random halves are drawn there; published splits come as they are, but a
            mix has no more than this many.
        prid_subset: Of PRID-2011; see `split_prid2011`.
        test_share: How many of the identities of a part of a mix are tested, by its name; a half
            where nothing is said.

    Returns:
        The same for the same files and arguments, in whatever order the disk lists them. Its root
        is the folder of the set, whichever of two nested ones was named. A mix comes as a
        `MixedDataset`.

    Raises:
        DatasetError: The folder is not laid out so, is not whole, does not fit its split file, or
            has fewer than two identities that two cameras saw; or a test share is of no part.
        ValueError: Another argument is out of range.
    """
    survey, layout = survey_dataset(root, layout, seed=seed)
    shares = test_share or {}
    if isinstance(survey, MixedSurvey):
        check_shares(shares, survey.parts)
    elif shares:
        raise DatasetError(
            f"test_share: expected a mixed data set, got one of the layout {layout} in {root}"
        )
    errors = [finding for finding in survey.findings if finding.severity == "error"]
    if errors:
        others = len(errors) - 1
        more = f", and {others:,} more error{'' if others == 1 else 's'}" if others else ""
        raise DatasetError(
            f"{survey.root}: {errors[0].where}: {errors[0].what}{more}; "
            f"`passerby check-data {root}` lists them all"
        )
    try:
        return divide_survey(
            survey, layout, seed=seed, splits=splits, prid_subset=prid_subset, test_share=shares
        )
    except DatasetError as error:
        # Only here: the checker, which says the same, must not send people to itself.
        raise DatasetError(f"{error}; `passerby check-data {root}` lists what is amiss") from error


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
        case "mixed":
            return _survey_mixed(root, seed=seed), layout
        case _:
            raise ValueError(f"layout: expected auto or one of {LAYOUTS}, got {layout!r}")


def _survey_mixed(root: Path, *, seed: int) -> MixedSurvey:
    """Find what each folder in a folder holds, whatever is wrong with any of them."""
    _, folders = contents(root)
    findings = [Finding("error", name, "a link to nothing") for name in _broken_links(root)]
    parts: dict[str, Part] = {}
    taken: dict[Path, str] = {}
    with noting(findings, root, root):
        only_folders(root, holding="data set")
    for folder in folders:
        # Where a link leads to: what a set is called, and what lies beside it, may matter.
        place = folder.resolve()
        twin = next((one for one in taken if _overlap(place, one)), None)
        if twin is not None:
            what = "the same folder as another part, or within it: its people would be there twice"
            findings.append(Finding("error", f"{folder.name} ({taken[twin]})", what))
            continue
        taken[place] = folder.name
        with noting(findings, folder, root):
            layout = _detect_single(place, contents(place)[1])
            if layout is None:
                raise DatasetError(f"expected a data set of a known layout in {folder}, got none")
            parts[folder.name] = Part(layout, survey_dataset(place, layout, seed=seed)[0])
    return join_surveys(root, parts, findings)


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _broken_links(root: Path) -> list[str]:
    broken = (one.name for one in root.iterdir() if one.is_symlink() and not one.exists())
    return sorted((name for name in broken if not name.startswith(".")), key=natural_key)


def divide_survey(
    survey: Survey,
    layout: Layout,
    *,
    seed: int,
    splits: int,
    prid_subset: Subset,
    test_share: Mapping[str, float],
) -> Dataset:
    """Divide a survey as its layout does; arguments and errors as for `read_dataset`."""
    if not isinstance(survey, MixedSurvey):
        divisions = _split(survey, layout, seed=seed, splits=splits, prid_subset=prid_subset)
        return Dataset(layout, survey.root, survey.tracklets, divisions)
    of_parts: dict[str, tuple[Split, ...]] = {}
    for name, part in survey.parts.items():
        with naming(name):
            of_parts[name] = _split(
                part.survey,
                part.layout,
                seed=seed,
                splits=splits,
                prid_subset=prid_subset,
                test_share=test_share.get(name),
            )
    if not of_parts:
        raise DatasetError(f"expected data sets in {survey.root}, got none")
    return join_splits(survey, of_parts, most=splits)


def _split(
    survey: Survey,
    layout: str,
    *,
    seed: int,
    splits: int,
    prid_subset: Subset,
    test_share: float | None = None,
) -> tuple[Split, ...]:
    if seed < 0 or splits < 1:
        raise ValueError(f"expected seed >= 0 and splits >= 1, got {seed} and {splits}")
    if prid_subset not in get_args(Subset):
        raise ValueError(f"prid_subset: expected {get_args(Subset)}, got {prid_subset!r}")
    match layout:
        case "folder":
            share = TEST_SHARE if test_share is None else test_share
            return random_halves(survey.tracklets, seed=seed, splits=splits, test_share=share)
        case "ilids-vid":
            return split_ilids_vid(survey, seed=seed, splits=splits, test_share=test_share)
        case "prid-2011":
            return split_prid2011(
                survey, seed=seed, splits=splits, subset=prid_subset, test_share=test_share
            )
        case "mars":
            return split_mars(survey, test_share=test_share)
        case "market-1501":
            return split_market1501(survey, seed=seed, splits=splits, test_share=test_share)
        case _:
            raise ValueError(f"layout: expected one of {LAYOUTS} without parts, got {layout!r}")


def fingerprint_dataset(dataset: Dataset) -> str:
    """Name a data set after its layout and the names and sizes of its frames.

    A mix is named after the names and the fingerprints of its parts.

    The contents of the frames are *not* read, which would take longer than some trainings: a frame
    that was changed without changing its size goes unnoticed.

    Returns:
        ``data-`` and the first 12 hex digits of a SHA-256; the same wherever the folder lies.

    Raises:
        DatasetError: A frame has gone.
    """
    if isinstance(dataset, MixedDataset):
        lines = [f"{name}\0{one}\n" for name, one in fingerprint_parts(dataset).items()]
    else:
        lines = _list_frames(dataset)
    digest = hashlib.sha256(f"{dataset.layout}\n".encode())
    for line in lines:
        digest.update(line.encode(errors="surrogateescape"))
    return f"data-{digest.hexdigest()[:12]}"


def fingerprint_parts(dataset: MixedDataset) -> dict[str, str]:
    """Name each part of a mix as `fingerprint_dataset` names it where it is read alone.

    Raises:
        DatasetError: A frame has gone.
    """
    return {name: fingerprint_dataset(part) for name, part in dataset.parts.items()}


def _list_frames(dataset: Dataset) -> list[str]:
    try:
        return sorted(
            f"{frame.relative_to(dataset.root).as_posix()}\0{frame.stat().st_size}\n"
            for tracklet in dataset.tracklets
            for frame in tracklet.frames
        )
    except OSError as error:
        raise DatasetError(
            f"expected a frame at {error.filename}, got: {error.strerror}"
        ) from error
