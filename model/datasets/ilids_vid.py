"""iLIDS-VID: 300 people seen by two cameras of an airport, once each.

Wang et al., "Person Re-Identification by Video Ranking", ECCV 2014. Its archive brings ten
divisions of the people as a MATLAB file: rows of 1-based indices into the person folders *in
sorted order* (the names have gaps and go to 319). The first half of a row is the test side and the
second half trains; some published code has it the other way round. cam1 asks, cam2 answers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.datasets.findings import Finding, Survey, expect_count, place
from model.datasets.folder import survey_cameras
from model.datasets.splits import (
    TEST_SHARE,
    Names,
    absent_persons,
    cameras_of,
    check_division,
    divide_all,
    in_both,
    parse_names,
    random_halves,
    read_json,
    read_matrix,
    refuse_share,
    sort_tracklets,
)
from model.datasets.tracklets import Split, Tracklet, natural_key
from model.errors import DatasetError

INNER = "i-LIDS-VID"
CAMERAS = ("cam1", "cam2")
PERSONS = 300
SHORTEST, LONGEST = 23, 192  # frames of a published tracklet
LEAST_MEAN, MOST_MEAN = 66, 80  # around the published mean of 73
MATLAB_FILE = "train_test_splits_ilidsvid.mat"
MATLAB_KEY = "ls_set"
JSON_FILE = "splits_ilidsvid.json"


def find_ilids_vid(root: Path) -> Path | None:
    """Return the folder that holds ``sequences``, which is ``root`` or in it; None without one."""
    candidates = (root, root / INNER)
    return next((one for one in candidates if (one / "sequences").is_dir()), None)


def survey_ilids_vid(root: Path) -> Survey:
    """Find the tracklets of iLIDS-VID and what is missing of it.

    Args:
        root: What holds ``sequences``, or ``i-LIDS-VID/sequences``.

    Raises:
        DatasetError: Neither is there.
    """
    base = find_ilids_vid(root)
    if base is None:
        raise DatasetError(
            f"expected sequences/ or i-LIDS-VID/sequences/ in {root}, got neither of them"
        )
    # The split file lies beside i-LIDS-VID, so the set is what holds both.
    root = base.parent if base.name == INNER else base
    findings: list[Finding] = []
    tracklets = survey_cameras(base / "sequences", CAMERAS, root, findings)
    for camera in CAMERAS:
        found = sum(one.camera == camera for one in tracklets)
        where = place(base / "sequences" / camera, root)
        expect_count(findings, where, PERSONS, found, "persons")
    for one in tracklets:
        if not SHORTEST <= len(one.frames) <= LONGEST:
            where = f"{place(one.frames[0].parent, root)} ({len(one.frames)} frames)"
            what = f"expected {SHORTEST} to {LONGEST} frames as published"
            findings.append(Finding("warning", where, what))
    findings += _check_mean(tracklets)
    if _split_file(root) is None:
        what = f"no {MATLAB_FILE} or {JSON_FILE}: random halves instead of the published splits"
        findings.append(Finding("warning", ".", what))
    return Survey(root, sort_tracklets(tracklets), tuple(findings))


def _check_mean(tracklets: Sequence[Tracklet]) -> list[Finding]:
    """Warn of tracklets that broke off at their ends, where everybody is there."""
    frames = sum(len(one.frames) for one in tracklets)
    whole = len(tracklets) == len(CAMERAS) * PERSONS
    if not whole or LEAST_MEAN <= frames / len(tracklets) <= MOST_MEAN:
        return []
    what = f"expected about 73 frames a tracklet as published, got {frames / len(tracklets):.0f}"
    return [Finding("warning", ".", f"{what}: half-copied?")]


def split_ilids_vid(
    survey: Survey, *, seed: int, splits: int, test_share: float | None = None
) -> tuple[Split, ...]:
    """Divide by the split file where there is one, else into seeded halves.

    Args:
        survey: Of `survey_ilids_vid`.
        seed: Of random halves.
        splits: How many random halves; a file says itself how many there are.
        test_share: How many identities random halves test; None for a half.

    Raises:
        DatasetError: The file does not fit the folder, cannot be read, or would test another share.
    """
    query, gallery = CAMERAS
    path = _split_file(survey.root)
    if path is None:
        return random_halves(
            survey.tracklets,
            seed=seed,
            splits=splits,
            remark=f" (no {MATLAB_FILE} or {JSON_FILE})",
            query_camera=query,
            gallery_camera=gallery,
            test_share=TEST_SHARE if test_share is None else test_share,
        )
    refuse_share(test_share, path.name)
    cameras = cameras_of(survey.tracklets)
    divisions = _read_divisions(path, list(cameras), survey.root)
    check_division(divisions, in_both(survey.tracklets), file=path.name, root=survey.root)
    published = len(cameras) == PERSONS and len(divisions) == 10
    source = f"{'published' if published else 'split file'}: {path.name}"
    return divide_all(
        survey.tracklets, divisions, source=source, query_camera=query, gallery_camera=gallery
    )


def absent_ilids_vid(survey: Survey) -> list[str]:
    """Whom the split file names although a camera lacks them; nobody where it cannot be read."""
    path = _split_file(survey.root)
    if path is None:
        return []
    try:
        divisions = _read_divisions(path, list(cameras_of(survey.tracklets)), survey.root)
    except DatasetError:  # indices name nobody once somebody is missing; dividing reports it
        return []
    return absent_persons(divisions, in_both(survey.tracklets))


def _split_file(root: Path) -> Path | None:
    """Find the split file; JSON goes first, so that the result does not depend on scipy."""
    around = (root, root / INNER)
    places = [folder / JSON_FILE for folder in around]
    for folder in around:
        places += [folder / "train-test people splits" / MATLAB_FILE, folder / MATLAB_FILE]
    return next((path for path in places if path.is_file()), None)


def _read_divisions(path: Path, persons: Sequence[str], root: Path) -> tuple[Names, ...]:
    rows: Any
    if path.suffix == ".mat":
        rows = read_matrix(path, MATLAB_KEY).tolist()
    else:
        rows = read_json(path)
        if not (isinstance(rows, list) and rows and isinstance(rows[0], list)):
            return parse_names(rows, path)
    return tuple(
        _from_indices(row, persons, file=path.name, number=number, root=root)
        for number, row in enumerate(rows)
    )


def _from_indices(row: Any, persons: Sequence[str], *, file: str, number: int, root: Path) -> Names:
    expected = list(range(1, len(persons) + 1))
    whole = isinstance(row, list) and all(type(index) is int for index in row)
    if whole and len(row) != len(persons):
        # One person too few would move every later index to somebody else.
        raise DatasetError(
            f"expected the {len(row)} persons that {file} counts, got {len(persons)} in {root}; "
            "the copy may not be whole"
        )
    if not whole or sorted(row) != expected:
        raise DatasetError(
            f"{file}: expected each number from 1 to {len(persons)} once in split {number}, "
            "got something else"
        )
    half = len(row) // 2

    def names(indices: Sequence[int]) -> tuple[str, ...]:
        return tuple(sorted((persons[index - 1] for index in indices), key=natural_key))

    return Names(train=names(row[half:]), test=names(row[:half]))
