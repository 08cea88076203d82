"""MARS: 1,261 people in 20,478 tracklets by six cameras, found by a detector and a tracker.

Zheng et al., "MARS: A Video Benchmark for Large-Scale Person Re-identification", ECCV 2016. Frames
lie as ``bbox_test/0001/0001C1T0001F001.jpg``: identity, camera, tracklet, frame. ``info/`` lists
the names of all frames, the first and last of each tracklet with identity and camera (1-based,
inclusive), and which test tracklets ask. Identity 00-1 (-1 there) is junk and left out; 0000 are
false detections, in the gallery only.

The gallery is every test tracklet, *the queries included*, as in the authors' own evaluation:
without them 140 queries would have nothing to find. A query never meets itself, because an
evaluation leaves out the same identity by the same camera. Figures from a gallery without the
queries (9,330 tracklets instead of 11,310) are not comparable.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.datasets.findings import Finding, Survey, expect_count, noting
from model.datasets.folder import contents
from model.datasets.splits import (
    STREAM,
    cameras_of,
    check_parts,
    divide_parts,
    read_matrix,
    refuse_share,
    sort_tracklets,
)
from model.datasets.tracklets import Split, Tracklet
from model.errors import DatasetError

TRAIN, TEST = "bbox_train", "bbox_test"
NAMES = {TRAIN: "train_name.txt", TEST: "test_name.txt"}
TRACKS = {TRAIN: "tracks_train_info.mat", TEST: "tracks_test_info.mat"}
KEYS = {TRAIN: "track_train_info", TEST: "track_test_info"}
QUERY_FILE, QUERY_KEY = "query_IDX.mat", "query_IDX"
JUNK, DISTRACTOR = "00-1", "0000"
TRACKLETS = {TRAIN: 8_298, TEST: 12_180}
FRAMES = {TRAIN: 509_914, TEST: 681_089}
TRAIN_IDENTITIES = 625
QUERIES = 1_980
_NAME = re.compile(r"([0-9]{4}|00-1)C([0-9])T([0-9]+)F([0-9]+)\.jpe?g", re.IGNORECASE)

Files = Mapping[str, Path]


@dataclass(slots=True)
class _Reading:
    """What is known of a MARS folder while it is read."""

    base: Path
    findings: list[Finding]
    files: dict[str, dict[str, Path]]  # of bbox_train and bbox_test, by name, in natural order

    def find(self, where: str, what: str, *, warn: bool = False) -> None:
        self.findings.append(Finding("warning" if warn else "error", where, what))


def find_mars(root: Path) -> Path | None:
    """Return the folder that holds ``bbox_train`` or ``bbox_test``; None without one."""
    return root if any((root / name).is_dir() for name in (TRAIN, TEST)) else None


def survey_mars(root: Path, *, seed: int = 0) -> Survey:
    """Find the tracklets of MARS, and what is missing or odd.

    Args:
        root: What holds ``bbox_train``, ``bbox_test`` and ``info``.
        seed: Of the choice of queries where ``info`` is absent.

    Raises:
        DatasetError: ``root`` is no folder.
    """
    contents(root)
    reading = _Reading(root, [], {})
    for part in (TRAIN, TEST):
        reading.files[part] = _list_frames(part, reading)
    info = [*NAMES.values(), *TRACKS.values(), QUERY_FILE]
    absent = [name for name in info if not (root / "info" / name).is_file()]
    if not absent:
        with noting(reading.findings, root / "info", root):
            return _survey_with_info(reading)
    elif len(absent) < len(info):
        for name in absent:
            reading.find(f"info/{name}", "missing file")
    else:
        reading.find(
            "info", "missing: tracklets by file names, and queries chosen by a seed", warn=True
        )
    return _survey_by_name(reading, seed)


def split_mars(survey: Survey, *, test_share: float | None = None) -> tuple[Split, ...]:
    """Take the one division there is.

    Raises:
        DatasetError: Two cameras saw too few identities, there is no query, or another share of
            the identities was to be tested.
    """
    refuse_share(test_share, f"{TRAIN} and {TEST}")
    if survey.published is None:
        raise DatasetError(f"expected {TRAIN} and {TEST} in {survey.root}, got no division")
    check_parts(survey.published)
    return (survey.published,)


def _list_frames(part: str, reading: _Reading) -> dict[str, Path]:
    if not (reading.base / part).is_dir():
        reading.find(part, "missing folder")
        return {}
    frames: dict[str, Path] = {}
    for folder in contents(reading.base / part)[1]:
        images, _ = contents(folder)
        if not images:
            reading.find(f"{part}/{folder.name}", "no image in it")
        for image in images:
            name = _NAME.fullmatch(image.name)
            if name is None or name[1] != folder.name:
                where = f"{part}/{folder.name}/{image.name}"
                reading.find(where, "not the name of a frame of this identity: ignored", warn=True)
            else:
                frames[image.name] = image
    return frames


def _survey_with_info(reading: _Reading) -> Survey:
    tracklets: dict[str, dict[int, Tracklet]] = {}  # by row, from 0
    for part in (TRAIN, TEST):
        names = _read_names(reading.base / "info" / NAMES[part])
        rows = read_matrix(reading.base / "info" / TRACKS[part], KEYS[part])
        expect_count(reading.findings, f"info/{NAMES[part]}", FRAMES[part], len(names), "frames")
        expect_count(
            reading.findings, f"info/{TRACKS[part]}", TRACKLETS[part], len(rows), "tracklets"
        )
        _compare_names(part, names, reading)
        tracklets[part] = _read_rows(part, names, rows.tolist(), reading)
    queries = _read_queries(tracklets[TEST], reading)
    people = {one.identity for one in tracklets[TRAIN].values()}
    expect_count(reading.findings, TRAIN, TRAIN_IDENTITIES, len(people), "identities")
    source = f"published: info/{QUERY_FILE}, the gallery with the queries"
    return _finish(reading, tracklets[TRAIN].values(), queries, tracklets[TEST].values(), source)


def _survey_by_name(reading: _Reading, seed: int) -> Survey:
    train, test = (_group(reading.files[part]) for part in (TRAIN, TEST))
    by_camera: dict[tuple[str, str], list[Tracklet]] = defaultdict(list)
    cameras = cameras_of(test)
    for one in test:
        if one.identity != DISTRACTOR and len(cameras[one.identity]) > 1:
            by_camera[one.identity, one.camera].append(one)
    rng = np.random.default_rng([seed, STREAM])
    queries = [choices[int(rng.integers(len(choices)))] for choices in by_camera.values()]
    source = f"by folder; one query of each identity and camera, seed {seed} (no info/)"
    return _finish(reading, train, queries, test, source)


def _finish(
    reading: _Reading,
    train: Iterable[Tracklet],
    query: Iterable[Tracklet],
    test: Iterable[Tracklet],
    source: str,
) -> Survey:
    train, test = sort_tracklets(train), sort_tracklets(test)
    split = divide_parts(
        train,
        sort_tracklets(query),
        test,
        source=source,
        distractor=DISTRACTOR,
        findings=reading.findings,
    )
    every = sort_tracklets((*train, *test))
    return Survey(reading.base, every, tuple(reading.findings), frozenset({DISTRACTOR}), split)


def _group(files: Files) -> tuple[Tracklet, ...]:
    groups: dict[tuple[str, str, str], list[Path]] = defaultdict(list)
    for file, path in files.items():
        name = _NAME.fullmatch(file)
        if name is not None and name[1] != JUNK:
            groups[name[1], f"C{name[2]}", f"T{name[3]}"].append(path)
    return sort_tracklets(Tracklet(*key, tuple(frames)) for key, frames in groups.items())


def _read_names(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, ValueError) as error:
        raise DatasetError(f"expected a list of file names in {path}, got: {error}") from error


def _compare_names(part: str, names: Sequence[str], reading: _Reading) -> None:
    """Say, by identity, which frames are listed but absent, or there but not listed."""
    listed, there = set(names), reading.files[part].keys()
    for missing, warn, what in (
        (listed - there, False, f"frames of {NAMES[part]} that are not there"),
        (there - listed, True, f"frames that {NAMES[part]} does not name"),
    ):
        counts: dict[str, int] = defaultdict(int)
        for name in missing:
            counts[name[:4]] += 1
        for identity in sorted(counts):
            reading.find(f"{part}/{identity} ({counts[identity]:,})", what, warn=warn)


def _read_rows(
    part: str, names: Sequence[str], rows: Sequence[Sequence[int]], reading: _Reading
) -> dict[int, Tracklet]:
    tracklets = {}
    for row, values in enumerate(rows):
        where = f"info/{TRACKS[part]} row {row + 1}"
        if len(values) != 4 or not 1 <= values[0] <= values[1] <= len(names):
            reading.find(where, "expected first frame, last frame, identity and camera")
            continue
        first, last, identity, camera = values
        parts = [_NAME.fullmatch(name) for name in names[first - 1 : last]]
        said = {(one[1], one[2], one[3]) if one else None for one in parts}
        label = JUNK if identity == -1 else f"{identity:04d}"
        only = next(iter(said)) if len(said) == 1 else None
        if only is None or only[:2] != (label, str(camera)):
            reading.find(where, "the file names are not of one tracklet by that camera")
            continue
        files = reading.files[part]
        frames = tuple(files[name] for name in names[first - 1 : last] if name in files)
        if label != JUNK and frames:
            tracklets[row] = Tracklet(label, f"C{camera}", f"T{only[2]}", frames)
    return tracklets


def _read_queries(test: Mapping[int, Tracklet], reading: _Reading) -> list[Tracklet]:
    rows = read_matrix(reading.base / "info" / QUERY_FILE, QUERY_KEY).ravel().tolist()
    expect_count(reading.findings, f"info/{QUERY_FILE}", QUERIES, len(rows), "queries")
    queries = []
    for row in dict.fromkeys(rows):
        one = test.get(row - 1)
        if one is None or one.identity == DISTRACTOR:
            what = "a query that is no tracklet of a person in the test part"
            reading.find(f"info/{QUERY_FILE} value {row}", what)
        else:
            queries.append(one)
    if len(set(rows)) < len(rows):
        reading.find(f"info/{QUERY_FILE}", "a query appears twice")
    return queries
