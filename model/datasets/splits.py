"""Who trains and who is searched for: published split files, and seeded halves without one.

A published split decides which figures may be compared, so a file is either followed to the letter
or refused; it is never repaired.
"""

import json
import math
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.datasets.findings import Finding, shorten
from model.datasets.tracklets import Split, Tracklet, natural_key
from model.errors import DatasetError

# Distinguishes these draws from others with the same seed.
STREAM = 11
# Name of the split of whomever a checkpoint was not trained on; others have numbers.
UNSEEN = "unseen"
# Of identities, where nothing else is asked for.
TEST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Names:
    """One division of identities by name.

    Args:
        train: Identities that are trained with.
        test: Identities that are searched for, none of them in ``train``.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]


def sort_tracklets(tracklets: Iterable[Tracklet]) -> tuple[Tracklet, ...]:
    """Sort by identity, camera and name, each by number."""
    return tuple(
        sorted(
            tracklets,
            key=lambda one: (
                natural_key(one.identity),
                natural_key(one.camera),
                natural_key(one.name),
            ),
        )
    )


def cameras_of(tracklets: Iterable[Tracklet]) -> dict[str, list[str]]:
    """Which cameras saw each identity; identities and cameras sorted by number."""
    seen: dict[str, set[str]] = defaultdict(set)
    for one in tracklets:
        seen[one.identity].add(one.camera)
    return {name: sorted(seen[name], key=natural_key) for name in sorted(seen, key=natural_key)}


def divide(
    tracklets: Sequence[Tracklet],
    names: Names,
    *,
    name: str,
    source: str,
    query_camera: str | None = None,
    gallery_camera: str | None = None,
    bystanders: Collection[str] = (),
) -> Split:
    """Divide tracklets by the names of their identities.

    Args:
        tracklets: All there are, in order.
        names: Which identities are on which side.
        name: Of the split.
        source: Of the split.
        query_camera: The only camera to search from; any where None.
        gallery_camera: The only camera to search in; any where None. Where both are None, the same
            tracklets ask and answer, and the evaluation leaves out what it must.
        bystanders: Identities that only stand in the gallery, where nobody looks for them.
    """
    train, test = frozenset(names.train), frozenset(names.test)
    present = test | frozenset(bystanders)
    return Split(
        name=name,
        train=tuple(one for one in tracklets if one.identity in train),
        query=tuple(
            one for one in tracklets if one.identity in test and query_camera in (None, one.camera)
        ),
        gallery=tuple(
            one
            for one in tracklets
            if one.identity in present and gallery_camera in (None, one.camera)
        ),
        source=source,
    )


def divide_all(
    tracklets: Sequence[Tracklet],
    divisions: Sequence[Names],
    *,
    source: str,
    query_camera: str,
    gallery_camera: str,
) -> tuple[Split, ...]:
    """Divide tracklets by every division of a split file; arguments and errors as for `divide`."""
    return tuple(
        divide(
            tracklets,
            names,
            name=str(number),
            source=source,
            query_camera=query_camera,
            gallery_camera=gallery_camera,
        )
        for number, names in enumerate(divisions)
    )


def random_halves(
    tracklets: Sequence[Tracklet],
    *,
    seed: int,
    splits: int,
    remark: str = "",
    query_camera: str | None = None,
    gallery_camera: str | None = None,
    distractors: Collection[str] = (),
    test_share: float = TEST_SHARE,
) -> tuple[Split, ...]:
    """Divide the identities that at least two cameras saw into halves, by a seed.

    The others are bystanders of every gallery: without a second camera there is nothing to find.
    Of an odd number the test side gets one more.

    Args:
        tracklets: All there are, sorted.
        seed: Decides the halves, with the number of the split; >= 0.
        splits: How many divisions, >= 1.
        remark: Ends the source: why it is not a published split.
        query_camera: See `divide`.
        gallery_camera: See `divide`.
        distractors: Identities that are no person.
        test_share: How many of the identities are tested instead of a half, in [0, 1), rounded.
            Where it is 0, nobody is, and the gallery is empty.

    Raises:
        DatasetError: Fewer than two identities were seen by two cameras, or of so few the share
            leaves nobody to test or to train with.
        ValueError: ``seed``, ``splits`` or ``test_share`` is out of range.
    """
    if seed < 0 or splits < 1:
        raise ValueError(f"expected seed >= 0 and splits >= 1, got {seed} and {splits}")
    cameras = cameras_of(one for one in tracklets if one.identity not in distractors)
    usable = [identity for identity, seen in cameras.items() if len(seen) > 1]
    check_usable(cameras)
    tested = _count_tested(len(usable), test_share)
    bystanders = {one.identity for one in tracklets} - set(usable) if tested else set()
    source = f"{_describe_draw(len(usable), tested, test_share, seed)}{remark}"
    drawn = []
    for number in range(splits):
        order = np.random.default_rng([seed, STREAM, number]).permutation(len(usable)).tolist()
        train = {usable[place] for place in order[: len(usable) - tested]}
        test = [identity for identity in usable if identity not in train]
        drawn.append(
            divide(
                tracklets,
                Names(tuple(train), tuple(test)),
                name=str(number),
                source=source,
                query_camera=query_camera,
                gallery_camera=gallery_camera,
                bystanders=bystanders,
            )
        )
    return tuple(drawn)


def divide_unseen(
    tracklets: Sequence[Tracklet],
    known: Collection[str],
    *,
    namesakes: Collection[str] = (),
    distractors: Collection[str] = (),
) -> Split:
    """Test everybody whom at least two cameras saw and nobody was trained on.

    As in `random_halves`, the others whom nobody was trained on are bystanders of the gallery.

    Args:
        tracklets: All there are, sorted.
        known: Identities that were trained on.
        namesakes: Identities that may be such: they are left out altogether.
        distractors: Identities that are no person.

    Raises:
        DatasetError: Fewer than two identities are left to test.
    """
    cameras = cameras_of(one for one in tracklets if one.identity not in distractors)
    out = set(known) | set(namesakes)
    unseen = {name: seen for name, seen in cameras.items() if name not in out}
    usable = [name for name, seen in unseen.items() if len(seen) > 1]
    if len(usable) < 2:
        raise DatasetError(
            "expected at least 2 identities that at least two cameras saw and that were not "
            f"trained on, got {len(usable)} of {len(cameras):,} identities"
        )
    left_out = f", without {len(set(namesakes))} who may be" if namesakes else ""
    return divide(
        tracklets,
        Names(tuple(name for name in cameras if name in known), tuple(usable)),
        name=UNSEEN,
        source=f"the {len(usable)} identities that the checkpoint was not trained on{left_out}",
        bystanders={one.identity for one in tracklets} - set(usable) - out,
    )


def refuse_share(test_share: float | None, file: str) -> None:
    """Refuse to change how many are tested where that is published.

    Args:
        test_share: What was asked for; None where nothing was.
        file: What states the division.

    Raises:
        DatasetError: Something was asked for.
    """
    if test_share is not None:
        raise DatasetError(
            f"expected the division of {file} as it is, got a test share of {test_share:g}"
        )


def _count_tested(usable: int, share: float) -> int:
    if not 0 <= share < 1:
        raise ValueError(f"test_share: expected a share in [0, 1), got {share}")
    tested = math.floor(share * usable + 0.5)
    if share and not 0 < tested < usable:
        raise DatasetError(
            f"expected a test share that leaves somebody to test and somebody to train with, got "
            f"{share:g} of {usable} identities, which is {tested}"
        )
    return tested


def _describe_draw(usable: int, tested: int, share: float, seed: int) -> str:
    if share == TEST_SHARE:
        return f"random half of {usable} identities, seed {seed}"
    if not tested:
        return f"all {usable} identities train (test share 0)"
    return f"random {tested} of {usable} identities tested (test share {share:g}), seed {seed}"


def check_usable(cameras: Mapping[str, Sequence[str]]) -> None:
    """Refuse what cannot be trained and evaluated across cameras.

    Args:
        cameras: Which cameras saw each identity, of `cameras_of`.

    Raises:
        DatasetError: Fewer than two identities were seen by at least two.
    """
    usable = sum(len(seen) > 1 for seen in cameras.values())
    if usable >= 2:
        return
    every = sorted({camera for seen in cameras.values() for camera in seen}, key=natural_key)
    raise DatasetError(
        "expected at least 2 identities that at least two cameras saw, to train and evaluate "
        f"across cameras; got {usable} of {len(cameras):,} identities, "
        f"{len(every)} camera(s): {shorten(every) or 'none'}"
    )


def divide_parts(
    train: Sequence[Tracklet],
    query: Sequence[Tracklet],
    gallery: Sequence[Tracklet],
    *,
    source: str,
    distractor: str,
    findings: list[Finding],
) -> Split:
    """Make the one division of a set that is published in parts.

    Distractors are neither trained with nor searched for, and training identities need two
    tracklets. An identity on both sides is a finding.
    """
    people = [one for one in train if one.identity != distractor]
    trained = {one.identity for one in people}
    tested = {one.identity for one in (*query, *gallery)}
    findings += [
        Finding("error", identity, "in the training part and in the test part")
        for identity in sorted(trained & tested, key=natural_key)
    ]
    asked = tuple(one for one in query if one.identity != distractor)
    return Split("0", drop_singles(people), asked, tuple(gallery), source)


def check_parts(split: Split) -> None:
    """Refuse published parts with nothing to train with or to search with.

    Raises:
        DatasetError: Two cameras saw fewer than two training identities, or there is no query.
    """
    check_usable(cameras_of(split.train))
    if not split.query:
        raise DatasetError("expected tracklets to search with in the test part, got none")


def drop_singles(tracklets: Sequence[Tracklet]) -> tuple[Tracklet, ...]:
    """Leave out identities with a single tracklet: they give no positive to train with."""
    counts: dict[str, int] = defaultdict(int)
    for one in tracklets:
        counts[one.identity] += 1
    return tuple(one for one in tracklets if counts[one.identity] > 1)


def check_division(
    divisions: Sequence[Names], present: Collection[str], *, file: str, root: Path
) -> None:
    """Hold a split file against the identities that are there in every camera it needs.

    Raises:
        DatasetError: An identity is on both sides, twice on one, or absent.
    """
    for number, names in enumerate(divisions):
        both = sorted(set(names.train) & set(names.test), key=natural_key)
        if both:
            raise DatasetError(
                f"{file}: expected nobody on both sides of split {number}, got {shorten(both)}"
            )
        for side in (names.train, names.test):
            if not side or len(set(side)) < len(side):
                raise DatasetError(
                    f"{file}: expected different names on each side of split {number}, "
                    f"got {len(side)} with {len(set(side))} different ones"
                )
    if absent := absent_persons(divisions, present):
        raise DatasetError(
            f"{file}: expected everybody that it names in both cameras, "
            f"got {len(absent):,} that are not: {shorten(absent)}; "
            f"the copy in {root} may not be whole"
        )


def absent_persons(divisions: Iterable[Names], present: Collection[str]) -> list[str]:
    """Whom a split file names although they are not there, by number."""
    named = {name for names in divisions for name in (*names.train, *names.test)}
    return sorted(named - set(present), key=natural_key)


def in_both(tracklets: Iterable[Tracklet]) -> list[str]:
    """Identities that at least two cameras saw, by number."""
    return [identity for identity, seen in cameras_of(tracklets).items() if len(seen) > 1]


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DatasetError: It cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"expected a JSON file at {path}, got: {error}") from error


def parse_names(content: Any, path: Path) -> tuple[Names, ...]:
    """Take apart a list of ``{"train": [names], "test": [names]}``.

    Raises:
        DatasetError: It is something else.
    """
    if not isinstance(content, list) or not content:
        raise DatasetError(f"{path.name}: expected a list of splits, got {_kind(content)}")
    divisions = []
    for number, one in enumerate(content):
        sides = [one.get(side) for side in ("train", "test")] if isinstance(one, dict) else [None]
        if not all(
            isinstance(side, list) and all(isinstance(name, str) for name in side) for side in sides
        ):
            raise DatasetError(
                f'{path.name}: expected {{"train": [names], "test": [names]}} as split {number}, '
                f"got {_kind(one)}"
            )
        divisions.append(Names(tuple(one["train"]), tuple(one["test"])))
    return tuple(divisions)


def read_matrix(path: Path, key: str) -> NDArray[np.int64]:
    """Read one matrix of whole numbers from a MATLAB file; nothing in it is executed.

    Args:
        path: A .mat file of version 4 to 7.
        key: Name of the matrix.

    Returns:
        (rows, columns) int64.

    Raises:
        DatasetError: scipy is not installed, the file cannot be read, or the matrix is absent or
            holds something else than whole numbers.
    """
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise DatasetError(
            f"reading {path.name} needs scipy: pip install 'passerby[train]'"
        ) from error
    try:
        found = loadmat(path, variable_names=[key], chars_as_strings=False).get(key)
    except (OSError, ValueError, TypeError, NotImplementedError, MatReadError, zlib.error) as error:
        raise DatasetError(f"expected a MATLAB file at {path}, got: {error}") from error
    if found is None:
        raise DatasetError(f"expected a matrix {key!r} in {path}, got none of that name")
    matrix = np.asarray(found)
    # Cells and structs come as arrays of objects; whole numbers often as float64.
    whole = matrix.dtype.kind in "iuf" and matrix.ndim == 2 and matrix.size > 0
    if not whole or not (matrix == np.floor(matrix)).all():
        raise DatasetError(
            f"expected a matrix of whole numbers as {key!r} in {path}, "
            f"got {matrix.dtype} {matrix.shape}"
        )
    return matrix.astype(np.int64)


def _kind(content: Any) -> str:
    if isinstance(content, dict):
        return f"an object with {shorten([repr(key) for key in content], 3) or 'nothing'}"
    return "an empty list" if content == [] else f"a {type(content).__name__}"
