"""PRID-2011: people crossing two outdoor cameras; the first 200 of each are the same people.

Hirzer et al., "Person Re-Identification by Descriptive and Discriminative Classification", SCIA
2011. Camera A holds 385 persons and camera B 749, with *the same names for different people* above
200, so those must never count as seen by both. The video protocol divides 178 of the 200 into ten
random halves (a file by the authors of iLIDS-VID), searches from cam_a in cam_b, and leaves the
others out of the gallery.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from model.datasets.findings import Finding, Survey, expect_count
from model.datasets.folder import survey_cameras
from model.datasets.splits import (
    TEST_SHARE,
    Names,
    absent_persons,
    check_division,
    divide_all,
    in_both,
    parse_names,
    random_halves,
    read_json,
    refuse_share,
    sort_tracklets,
)
from model.datasets.tracklets import Split, Tracklet
from model.errors import DatasetError

Subset = Literal["178", "all200"]
CAMERAS = ("cam_a", "cam_b")
PERSONS = {"cam_a": 385, "cam_b": 749}
SHARED = 200  # persons 1 to this are in both cameras
CHOSEN = 178  # of those are in the split file
SHORTEST = 21  # frames by either camera of who was chosen; the threshold is quoted as 21 and 27
LEAST_MEAN = 60  # frames of a tracklet of the shared persons; the published mean is about 100
JSON_FILE = "splits_prid2011.json"


def find_prid2011(root: Path) -> Path | None:
    """Return the folder that holds ``multi_shot``, which is ``root`` or in it; None without one."""
    candidates = (root, root / "prid_2011")
    return next((one for one in candidates if (one / "multi_shot").is_dir()), None)


def survey_prid2011(root: Path) -> Survey:
    """Find the tracklets of people in both cameras, and what is missing.

    Args:
        root: What holds ``multi_shot``, or ``prid_2011/multi_shot``.

    Raises:
        DatasetError: Neither is there.
    """
    base = find_prid2011(root)
    if base is None:
        raise DatasetError(
            f"expected multi_shot/ or prid_2011/multi_shot/ in {root}, got neither of them"
        )
    findings: list[Finding] = []
    found = survey_cameras(base / "multi_shot", CAMERAS, base, findings)
    for camera, persons in PERSONS.items():
        count = sum(one.camera == camera for one in found)
        expect_count(findings, f"multi_shot/{camera}", persons, count, "persons")
    named: frozenset[str] = frozenset()
    path = _split_file(base)
    if path is None:
        what = f"no {JSON_FILE}: random halves instead of the published splits of {CHOSEN} persons"
        findings.append(Finding("warning", ".", what))
    else:
        named = frozenset(name for one in _divisions(path) for name in (*one.train, *one.test))
    tracklets = [one for one in found if one.identity in named or _is_shared(one.identity)]
    twice = len(in_both(_shared(tracklets)))
    expect_count(findings, "multi_shot", SHARED, twice, "persons in both cameras")
    findings += _check_lengths(tracklets, named)
    left_out = len(found) - len(tracklets)
    if left_out:
        what = f"{left_out:,} tracklets of persons above {SHARED} left out: others in each camera"
        findings.append(Finding("note", "multi_shot", what))
    return Survey(base, sort_tracklets(tracklets), tuple(findings))


def _check_lengths(tracklets: Sequence[Tracklet], named: Collection[str]) -> Iterator[Finding]:
    """Warn of tracklets that broke off at their ends."""
    shared = _shared(tracklets)
    if len(shared) == len(CAMERAS) * SHARED:
        mean = sum(len(one.frames) for one in shared) / len(shared)
        if mean < LEAST_MEAN:
            what = f"expected about 100 frames a tracklet as published, got {mean:.0f}"
            yield Finding("warning", "multi_shot", f"{what}: half-copied?")
    for one in tracklets:
        chosen = len(named) == CHOSEN and one.identity in named
        if chosen and len(one.frames) < SHORTEST:
            where = f"multi_shot/{one.camera}/{one.identity} ({len(one.frames)} frames)"
            what = f"expected at least {SHORTEST} frames of who is in the published splits"
            yield Finding("warning", where, f"{what}: half-copied?")


def split_prid2011(
    survey: Survey,
    *,
    seed: int,
    splits: int,
    subset: Subset,
    test_share: float | None = None,
) -> tuple[Split, ...]:
    """Divide by the split file, or the 200 persons into seeded halves.

    Args:
        survey: Of `survey_prid2011`.
        seed: Of random halves.
        splits: How many random halves; the file says itself how many there are.
        subset: "178" follows the file, and takes random halves where it is absent. "all200" always
            takes random halves, because the file does not know the other 22 persons.
        test_share: How many identities random halves test; None for a half.

    Raises:
        DatasetError: The file does not fit the folder, cannot be read, or would test another share.
    """
    query, gallery = CAMERAS
    path = _split_file(survey.root)
    if path is None or subset == "all200":
        return random_halves(
            _shared(survey.tracklets),
            seed=seed,
            splits=splits,
            remark=" (all200)" if subset == "all200" else f" (no {JSON_FILE})",
            query_camera=query,
            gallery_camera=gallery,
            test_share=TEST_SHARE if test_share is None else test_share,
        )
    refuse_share(test_share, path.name)
    divisions = parse_names(read_json(path), path)
    check_division(divisions, in_both(survey.tracklets), file=path.name, root=survey.root)
    published = len(divisions) == 10 and all(
        len(names.train) == len(names.test) == CHOSEN // 2 for names in divisions
    )
    source = f"{'published' if published else 'split file'}: {path.name}"
    return divide_all(
        survey.tracklets, divisions, source=source, query_camera=query, gallery_camera=gallery
    )


def absent_prid2011(survey: Survey) -> list[str]:
    """Whom the split file names although a camera lacks them; nobody where it cannot be read."""
    path = _split_file(survey.root)
    return absent_persons(_divisions(path), in_both(survey.tracklets)) if path else []


def _split_file(base: Path) -> Path | None:
    around = (base, base.parent) if base.name == "prid_2011" else (base,)
    places = (folder / JSON_FILE for folder in around)
    return next((path for path in places if path.is_file()), None)


def _divisions(path: Path) -> tuple[Names, ...]:
    """What a split file says; nothing where it is damaged, which dividing will report."""
    try:
        return parse_names(read_json(path), path)
    except DatasetError:
        return ()


def _shared(tracklets: Iterable[Tracklet]) -> list[Tracklet]:
    return [one for one in tracklets if _is_shared(one.identity)]


def _is_shared(identity: str) -> bool:
    number = re.fullmatch(r"person_0*([0-9]{1,9})", identity)
    return number is not None and int(number[1]) <= SHARED
