"""Everything that is missing or odd in a data set, at once and by name.

`model.datasets.layouts.read_dataset` refuses a folder at its first error and opens no image; this
goes on to the end, and opens all of them if asked to.
"""

import hashlib
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image, UnidentifiedImageError

from model.datasets.findings import Finding, Severity, Survey, place, shorten
from model.datasets.ilids_vid import absent_ilids_vid
from model.datasets.layouts import Layout, divide_survey, fingerprint_dataset, survey_dataset
from model.datasets.mixed import MixedSurvey, prefix_findings
from model.datasets.prid2011 import absent_prid2011
from model.datasets.splits import cameras_of
from model.datasets.tracklets import Dataset, Split, Tracklet, natural_key
from model.errors import DatasetError

SMALLEST = 8  # pixels a side; below, a person is no longer a picture
# Numbers in the names of Market-1501 count frames of the film, so they jump.
_SPARSE = frozenset({"market-1501"})
_AT_A_TIME = 1024  # frames handed to the threads at once, of up to a million
# What Pillow's decoders raise on damaged files.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """How large a split is: identities and tracklets of each part."""

    name: str
    source: str
    train: tuple[int, int]
    query: tuple[int, int]
    gallery: tuple[int, int]

    @classmethod
    def of(cls, split: Split) -> "SplitCounts":
        """Count a split."""

        def count(tracklets: Sequence[Tracklet]) -> tuple[int, int]:
            return len({one.identity for one in tracklets}), len(tracklets)

        return cls(
            split.name, split.source, count(split.train), count(split.query), count(split.gallery)
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        parts = {"train": self.train, "query": self.query, "gallery": self.gallery}
        counted = {
            part: {"identities": identities, "tracklets": tracklets}
            for part, (identities, tracklets) in parts.items()
        }
        return {"name": self.name, "source": self.source, **counted}


@dataclass(frozen=True, slots=True)
class DataReport:
    """What a data set holds and what is wrong with it.

    Args:
        layout: Given or recognised.
        root: The folder of the set.
        identities: How many people; distractors do not count.
        cameras: Their names, in order.
        tracklets: How many, junk left out.
        frames: How many in all.
        frames_min: Fewest of a tracklet, 0 where there is none.
        frames_mean: Mean of a tracklet, 0 where there is none.
        frames_max: Most of a tracklet.
        splits: Empty where the set cannot be divided; a finding says why.
        findings: Errors first, then warnings, then notes.
        fingerprint: Of the set; None where it cannot be used.
        decoded: Whether every frame was opened.
    """

    layout: Layout
    root: Path
    identities: int
    cameras: tuple[str, ...]
    tracklets: int
    frames: int
    frames_min: int
    frames_mean: float
    frames_max: int
    splits: tuple[SplitCounts, ...]
    findings: tuple[Finding, ...]
    fingerprint: str | None
    decoded: bool

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            "layout": self.layout,
            "root": str(self.root),
            "ok": self.ok,
            "fingerprint": self.fingerprint,
            "identities": self.identities,
            "cameras": list(self.cameras),
            "tracklets": self.tracklets,
            "frames": self.frames,
            "frames_per_tracklet": {
                "min": self.frames_min,
                "mean": round(self.frames_mean, 2),
                "max": self.frames_max,
            },
            "decoded": self.decoded,
            "splits": [split.to_json() for split in self.splits],
            "findings": [finding.to_json() for finding in self.findings],
        }


def check_dataset(
    root: Path,
    layout: Layout | Literal["auto"] = "auto",
    *,
    decode: bool = True,
    progress: Progress | None = None,
) -> DataReport:
    """Look for everything that is missing or odd.

    Args:
        root: The folder of the data set.
        layout: How it is laid out; "auto" recognises it.
        decode: Whether to open every frame to its end; without, only sizes of files are looked at.
        progress: Called with frames done and frames in all, in this thread.

    Raises:
        DatasetError: ``root`` is no folder, or not like the layout at all.
        ValueError: ``layout`` is unknown.
    """
    survey, layout = survey_dataset(root, layout)
    findings = list(survey.findings)
    dataset: Dataset | None = None
    try:
        dataset = divide_survey(survey, layout, seed=0, splits=10, prid_subset="178", test_share={})
    except DatasetError as error:
        findings.append(Finding("error", ".", str(error)))
    findings += _check_names(survey, layout)
    findings += _check_frames(survey, decode=decode, progress=progress)
    order = {"error": 0, "warning": 1, "note": 2}
    findings.sort(key=lambda finding: order[finding.severity])  # stable: the rest as found
    usable = all(finding.severity != "error" for finding in findings)
    lengths = [len(one.frames) for one in survey.tracklets]
    return DataReport(
        layout=layout,
        root=survey.root,
        identities=len({one.identity for one in survey.tracklets} - survey.distractors),
        cameras=tuple(sorted({one.camera for one in survey.tracklets}, key=natural_key)),
        tracklets=len(lengths),
        frames=sum(lengths),
        frames_min=min(lengths, default=0),
        frames_mean=sum(lengths) / max(1, len(lengths)),
        frames_max=max(lengths, default=0),
        splits=tuple(SplitCounts.of(split) for split in dataset.splits) if dataset else (),
        findings=tuple(findings),
        fingerprint=fingerprint_dataset(dataset) if dataset and usable else None,
        decoded=decode,
    )


def _label(one: Tracklet) -> str:
    return "/".join(part for part in (one.identity, one.camera, one.name) if part)


def _check_names(survey: Survey, layout: str) -> Iterator[Finding]:
    """What shows without opening a frame; in a mix, part by part, as each would be alone."""
    if isinstance(survey, MixedSurvey):
        for name, part in survey.parts.items():
            yield from prefix_findings(name, _check_names(part.survey, part.layout))
        return
    yield from _check_named(survey, layout)
    yield from _check_identities(survey)
    yield from _check_cameras(survey)
    yield from _check_lengths(survey, layout)
    if layout not in _SPARSE:
        yield from _check_numbers(survey)


def _check_named(survey: Survey, layout: str) -> Iterator[Finding]:
    """Everybody whom a split file names in vain; the error of dividing names only a few."""
    absent = {"ilids-vid": absent_ilids_vid, "prid-2011": absent_prid2011}.get(layout)
    for identity in absent(survey) if absent else ():
        yield Finding("error", identity, "named by the split file, but not in both cameras")


def _check_identities(survey: Survey) -> Iterator[Finding]:
    """Who cannot be found by another camera, or not even be trained with."""
    # Published parts have such people on purpose.
    severity: Severity = "note" if survey.published else "warning"
    people = [one for one in survey.tracklets if one.identity not in survey.distractors]
    counts = Counter(one.identity for one in people)
    for identity, cameras in cameras_of(people).items():
        if counts[identity] == 1:
            what = "a single tracklet: neither trained with nor searched for"
            yield Finding(severity, f"{identity} ({cameras[0]})", what)
        elif len(cameras) == 1:
            what = "seen by one camera only: nothing to find by another"
            yield Finding(severity, f"{identity} ({cameras[0]})", what)


def _check_cameras(survey: Survey) -> Iterator[Finding]:
    """Cameras that hardly saw anybody, which a misspelt folder looks like."""
    severity: Severity = "note" if survey.published else "warning"
    people = [one for one in survey.tracklets if one.identity not in survey.distractors]
    counts = Counter(camera for cameras in cameras_of(people).values() for camera in cameras)
    busiest = max(counts.values(), default=0)
    for camera in sorted(counts, key=natural_key):
        if counts[camera] * 10 < busiest:
            where = f"{camera} ({counts[camera]:,} of {busiest:,})"
            what = "a camera that saw under a tenth of the busiest one's people: a misnamed folder?"
            yield Finding(severity, where, what)


def _check_lengths(survey: Survey, layout: str) -> Iterator[Finding]:
    severity: Severity = "note" if layout in _SPARSE else "warning"
    for one in survey.tracklets:
        if len(one.frames) == 1 and one.identity not in survey.distractors:
            yield Finding(severity, _label(one), "a tracklet of one frame")


def _check_numbers(survey: Survey) -> Iterator[Finding]:
    """Where the numbers of frames jump, which a copy that broke off looks like."""
    for one in survey.tracklets:
        numbers = [_number(frame) for frame in one.frames]
        steps = [after - before for before, after in pairwise(numbers)]
        if -1 in numbers or not any(steps):
            continue  # the last number of the names does not count frames
        usual = Counter(step for step in steps if step).most_common(1)[0][0]
        jumps = [one.frames[at].name for at, step in enumerate(steps) if step not in (0, usual)]
        if jumps:
            where = f"{_label(one)} (after {shorten(jumps, 2)})"
            yield Finding("warning", where, "frames missing in the numbering")
        if 0 in steps:
            where = f"{_label(one)} ({one.frames[steps.index(0) + 1].name})"
            yield Finding("warning", where, "two frames with the same number")


def _number(frame: Path) -> int:
    digits = re.search(r"([0-9]{1,18})[^0-9]*$", frame.stem)
    return int(digits[1]) if digits else -1


class _Look(NamedTuple):
    """What opening a frame showed: what is wrong with it, or "", and a digest of its bytes."""

    problem: str
    digest: bytes


def _check_frames(survey: Survey, *, decode: bool, progress: Progress | None) -> Iterator[Finding]:
    """Which frames cannot be read, are too small, or are there twice."""
    frames = [(one, frame) for one in survey.tracklets for frame in one.frames]
    looks = _in_threads(_decode if decode else _measure, [frame for _, frame in frames])
    first: dict[bytes, Tracklet] = {}
    repeats: Counter[tuple[str, str]] = Counter()
    for done, ((one, frame), look) in enumerate(zip(frames, looks, strict=True), start=1):
        if look.problem:
            small = look.problem.startswith("under")
            severity: Severity = "warning" if small else "error"
            yield Finding(severity, _place(frame, survey), look.problem)
        elif look.digest and (earlier := first.setdefault(look.digest, one)) is not one:
            repeats[_label(one), _label(earlier)] += 1
        if progress is not None:
            progress(done, len(frames))
    for (label, earlier_label), count in repeats.items():
        where = f"{label} ({count} of {earlier_label})"
        yield Finding("warning", where, "frames that another tracklet holds, too")


def _place(frame: Path, survey: Survey) -> str:
    """Name a frame; in a mix, whose parts may lie anywhere, by part."""
    if isinstance(survey, MixedSurvey):
        for name, part in survey.parts.items():
            if frame.is_relative_to(part.survey.root):
                return f"{name}/{place(frame, part.survey.root)}"
    return place(frame, survey.root)


def _in_threads(look: Callable[[Path], _Look], frames: Sequence[Path]) -> Iterator[_Look]:
    """Look at frames in their order, a limited number ahead."""
    remaining = iter(frames)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        while batch := list(islice(remaining, _AT_A_TIME)):
            yield from pool.map(look, batch)


def _measure(frame: Path) -> _Look:
    try:
        return _Look("" if frame.stat().st_size else "an empty file", b"")
    except OSError:
        return _Look("cannot be opened", b"")


def _decode(frame: Path) -> _Look:
    try:
        content = frame.read_bytes()
    except OSError:
        return _Look("cannot be opened", b"")
    if not content:
        return _Look("an empty file", b"")
    try:
        with Image.open(BytesIO(content)) as image:
            image.load()
            small = min(image.size) < SMALLEST
    except UnidentifiedImageError:
        return _Look("not an image", b"")
    except _UNREADABLE as error:
        problem = "a truncated image" if "truncated" in str(error) else "a damaged image"
        return _Look(problem, b"")
    digest = hashlib.blake2b(content, digest_size=16).digest()
    return _Look(f"under {SMALLEST} pixels a side" if small else "", digest)
