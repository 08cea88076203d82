"""Market-1501: crops of 1,501 people by six cameras, made into short tracklets.

Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015. A file name says
identity, camera, sequence, frame and box: ``0002_c1s1_000451_03.jpg``. The crops of one identity,
camera and sequence, by frame, are a tracklet: sparse, and often of one crop. Identity -1 is junk
and left out. 0000 are false detections, which stand in the gallery, each crop for itself because
nothing ties them together.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.datasets.findings import Finding, Survey, expect_count, place
from model.datasets.folder import contents
from model.datasets.splits import (
    TEST_SHARE,
    check_parts,
    divide_parts,
    random_halves,
    refuse_share,
    sort_tracklets,
)
from model.datasets.tracklets import Split, Tracklet

TRAIN, QUERY, TEST = "bounding_box_train", "query", "bounding_box_test"
FOLDERS = (TRAIN, QUERY, TEST)
CROPS = {TRAIN: 12_936, QUERY: 3_368, TEST: 19_732}
IDENTITIES = {TRAIN: 751, QUERY: 750}
JUNK, DISTRACTOR = "-1", "0000"
# Some copies have .jpg twice.
_NAME = re.compile(r"(-1|[0-9]{4})_c([0-9])s([0-9])_([0-9]+)_([0-9]+)(?:\.jpe?g)+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Crops:
    """The crops of one folder by tracklet.

    Args:
        tracklets: Without junk, in order.
        images: How many images there are, junk and misnamed ones included.
    """

    tracklets: tuple[Tracklet, ...]
    images: int


def find_market1501(root: Path) -> Path | None:
    """Return the folder of the published three, or of nothing but crops; None without one."""
    for candidate in (root, root / "Market-1501-v15.09.15"):
        if any((candidate / name).is_dir() for name in (TRAIN, TEST)):
            return candidate
    images = contents(root)[0] if root.is_dir() else ()
    return root if any(_NAME.fullmatch(image.name) for image in images) else None


def is_plain(base: Path) -> bool:
    """Whether a folder holds crops without the published three folders."""
    return not any((base / name).is_dir() for name in FOLDERS)


def survey_market1501(root: Path) -> Survey:
    """Make tracklets of the crops, and say what is missing.

    Args:
        root: What holds the three published folders, or the crops themselves.

    Raises:
        DatasetError: ``root`` is no folder.
    """
    base = find_market1501(root) or root
    findings: list[Finding] = []
    if is_plain(base):
        crops = _read_crops(base, base, findings)
        if not crops.tracklets:
            findings.append(Finding("error", ".", f"no crops, and no {TRAIN}, {QUERY} or {TEST}"))
        return Survey(
            base, sort_tracklets(crops.tracklets), tuple(findings), frozenset({DISTRACTOR})
        )
    parts: dict[str, _Crops] = {}
    for name in FOLDERS:
        if (base / name).is_dir():
            # A query and a gallery tracklet may be of the same identity, camera and sequence.
            prefix = "query-" if name == QUERY else ""
            parts[name] = _read_crops(base / name, base, findings, prefix)
        else:
            what = "missing folder (name a folder of crops itself to hold identities out of it)"
            findings.append(Finding("error", name, what))
            parts[name] = _Crops((), 0)
    _check_counts(parts, findings)
    published = divide_parts(
        *(parts[name].tracklets for name in FOLDERS),
        source=f"published: the folders {TRAIN}, {QUERY} and {TEST}",
        distractor=DISTRACTOR,
        findings=findings,
    )
    every = sort_tracklets(one for crops in parts.values() for one in crops.tracklets)
    return Survey(base, every, tuple(findings), frozenset({DISTRACTOR}), published)


def split_market1501(
    survey: Survey, *, seed: int, splits: int, test_share: float | None = None
) -> tuple[Split, ...]:
    """Take the published division, or seeded halves of a plain folder of crops.

    Args:
        survey: Of `survey_market1501`.
        seed: Of random halves.
        splits: How many random halves.
        test_share: How many identities they test; None for a half.

    Raises:
        DatasetError: Two cameras saw too few identities, there is no query, or a published
            division would test another share.
    """
    if survey.published is None:
        return random_halves(
            survey.tracklets,
            seed=seed,
            splits=splits,
            remark=f" (no {TRAIN}, {QUERY} and {TEST})",
            distractors=survey.distractors,
            test_share=TEST_SHARE if test_share is None else test_share,
        )
    refuse_share(test_share, f"{TRAIN}, {QUERY} and {TEST}")
    check_parts(survey.published)
    return (survey.published,)


def _read_crops(folder: Path, base: Path, findings: list[Finding], prefix: str = "") -> _Crops:
    images, _ = contents(folder)
    groups: dict[tuple[str, str, str], list[Path]] = defaultdict(list)
    junk = 0
    for image in images:  # in natural order, so by frame within a group
        name = _NAME.fullmatch(image.name)
        if name is None:
            what = "not the name of a Market-1501 crop: ignored"
            findings.append(Finding("warning", place(image, base), what))
        elif name[1] == JUNK:
            junk += 1
        else:
            alone = f"-{name[4]}-{name[5]}" if name[1] == DISTRACTOR else ""
            groups[name[1], f"c{name[2]}", f"{prefix}s{name[3]}{alone}"].append(image)
    if junk:
        what = f"{junk:,} junk crops (identity {JUNK}) left out"
        findings.append(Finding("note", place(folder, base), what))
    tracklets = sort_tracklets(Tracklet(*key, tuple(frames)) for key, frames in groups.items())
    return _Crops(tracklets, len(images))


def _check_counts(parts: dict[str, _Crops], findings: list[Finding]) -> None:
    for name, crops in parts.items():
        expect_count(findings, name, CROPS[name], crops.images, "crops")
        if name in IDENTITIES:
            found = len(_people(crops.tracklets))
            expect_count(findings, name, IDENTITIES[name], found, "identities")


def _people(tracklets: Sequence[Tracklet]) -> set[str]:
    return {one.identity for one in tracklets} - {DISTRACTOR}
