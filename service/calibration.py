"""The command that calibrates: labelled tracklets in, a threshold and what it does out."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from index.bootstrap import Plan
from index.calibration import Calibration, CalibrationCurves, CalibrationError, Per, calibrate
from index.calibration_source import LabelledTracklets, read_labelled
from model.checkpoint import trained_identities, trainings
from model.datasets.folder import read_folder
from model.frames import read_clip
from service.calibration_picture import draw_calibration
from service.progress import counting
from service.worker import Embedder

_TRACKLETS_AT_ONCE = 8
Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRequest:
    """What to calibrate for.

    Args:
        false_match_rate: In (0, 0.2].
        rate: See `index.calibration.calibrate`.
        across_cameras: Likewise.
        plan: Likewise.
    """

    false_match_rate: float
    rate: Per = "pair"
    across_cameras: bool = True
    plan: Plan = field(default_factory=Plan)


def calibrate_gallery(
    data_dir: Path, request: CalibrationRequest, console: Console
) -> tuple[Calibration, CalibrationCurves]:
    """Calibrate on the tracklets of a stored gallery that have an identity.

    Nothing is written, and a service may have the gallery open.

    Args:
        data_dir: Of the gallery.
        request: What for.
        console: For progress.

    Raises:
        GalleryUnavailableError: There is no gallery, or it cannot be read.
        DamagedGalleryError: The file is not a gallery that this version can read.
        CalibrationError: The tracklets do not support the rate.
    """
    return _calibrate(read_labelled(data_dir), request, console)


def calibrate_folder(
    folder: Path,
    embedder: Embedder,
    request: CalibrationRequest,
    console: Console,
    *,
    frames_per_tracklet: int = 15,
) -> tuple[Calibration, CalibrationCurves]:
    """Calibrate on a folder ``identity/camera/frames`` or ``identity/camera/tracklet/frames``.

    Args:
        folder: Of people whom the embedder was not taught with: it tells those apart too well.
        embedder: Of the gallery's model.
        request: What for.
        console: For progress.
        frames_per_tracklet: As the service uses.

    Raises:
        DatasetError: The folder is not laid out like that.
        InvalidFramesError: A frame cannot be decoded.
        CalibrationError: The tracklets do not support the rate.
    """
    labelled = embed_folder(folder, embedder, console, frames_per_tracklet=frames_per_tracklet)
    return _calibrate(labelled, request, console)


def embed_folder(
    folder: Path, embedder: Embedder, console: Console, *, frames_per_tracklet: int = 15
) -> LabelledTracklets:
    """Embed a labelled folder; see `calibrate_folder`."""
    tracklets = read_folder(folder)
    embeddings = np.empty((len(tracklets), embedder.dim), np.float32)
    with _progress(console, "embedding") as advance:
        for begin in range(0, len(tracklets), _TRACKLETS_AT_ONCE):
            some = tracklets[begin : begin + _TRACKLETS_AT_ONCE]
            clips = [
                read_clip(one.frames, embedder.preprocessing, used=frames_per_tracklet)
                for one in some
            ]
            made = embedder.embed(clips)
            embeddings[begin : begin + len(made)] = [one.embedding for one in made]
            advance(begin + len(made), len(tracklets))
    identities = [one.identity for one in tracklets]
    return LabelledTracklets(
        embeddings, identities, [one.camera for one in tracklets], embedder.model
    )


def warn_of_taught(folder: Path, provenance: Mapping[str, Any], console: Console) -> None:
    """Say how many people of a folder have names of people whom the weights were taught.

    Args:
        folder: See `calibrate_folder`.
        provenance: Of the checkpoint.
        console: Where to.

    Raises:
        DatasetError: The folder is not laid out like that.
    """
    taught = set().union(*map(trained_identities, trainings(provenance)))
    people = {one.identity for one in read_folder(folder)}
    if known := len(people & taught):
        console.print(
            f"warning: {known} of {len(people)} people have names that the weights were trained "
            "with. If they are the same people, the threshold promises too much: calibrate on "
            "others."
        )


def report(
    calibration: Calibration,
    curves: CalibrationCurves,
    console: Console,
    *,
    picture: Path | None = None,
    as_json: bool = False,
) -> None:
    """Say what was measured, and draw it.

    Args:
        calibration: What was measured.
        curves: To draw.
        console: For the table or the JSON object; the latter is all that is printed then.
        picture: Where to, if at all.
        as_json: Print `Calibration.to_dict` instead of a table.

    Raises:
        ClientError: The picture cannot be written.
    """
    if as_json:
        console.print(json.dumps(calibration.to_dict()), soft_wrap=True, highlight=False)
    else:
        _print_table(calibration, console)
    if picture is not None:
        draw_calibration(calibration, curves, picture)
        if not as_json:
            console.print(f"picture: {picture}", highlight=False, soft_wrap=True)


def _calibrate(
    labelled: LabelledTracklets, request: CalibrationRequest, console: Console
) -> tuple[Calibration, CalibrationCurves]:
    if labelled.model is None:
        raise CalibrationError("expected tracklets with an identity, got an empty gallery")
    with _progress(console, "comparing") as advance:
        return calibrate(
            labelled.embeddings,
            labelled.identities,
            labelled.cameras,
            model=labelled.model,
            false_match_rate=request.false_match_rate,
            rate=request.rate,
            across_cameras=request.across_cameras,
            plan=request.plan,
            progress=advance,
        )


@contextmanager
def _progress(console: Console, doing: str) -> Iterator[Advance]:
    with counting(console, transient=True) as progress:
        bar = progress.add_task(f"{doing} tracklets", total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def _print_table(calibration: Calibration, console: Console) -> None:
    table = Table(title=f"threshold {calibration.threshold:.5g}")
    table.add_column("at this threshold")
    table.add_column("share", justify="right")
    table.add_column(f"{calibration.confidence:.0%} interval", justify="right")
    table.add_column("of")
    for row in _rows(calibration):
        table.add_row(*row)
    console.print(table)
    pairs = "pairs of two people" if calibration.rate == "pair" else "queries of strangers"
    cameras = f", {calibration.cameras} cameras" if calibration.across_cameras else ""
    console.print(
        f"asked for: false matches in {_percent(calibration.false_match_rate)} of {pairs}; "
        f"{calibration.tracklets} tracklets, {calibration.identities} identities{cameras}, "
        f"model {calibration.model}",
        highlight=False,
        soft_wrap=True,
    )


def _rows(calibration: Calibration) -> list[Sequence[str]]:
    gallery = f"with {calibration.gallery_identities:,} identities enrolled"
    return [
        (what, _percent(value), f"{_percent(low)} to {_percent(high)}", of)
        for what, value, (low, high), of in (
            (
                "two people match (FMR)",
                calibration.measured_false_match_rate,
                calibration.interval,
                f"{calibration.impostor_pairs:,} impostor pairs",
            ),
            (
                "one person does not (FNMR)",
                calibration.false_non_match_rate,
                calibration.false_non_match_interval,
                f"{calibration.genuine_pairs:,} genuine pairs",
            ),
            (
                "a stranger is found (FPIR)",
                calibration.false_positive_identification_rate,
                calibration.false_positive_identification_interval,
                f"queries of strangers, {gallery}",
            ),
            (
                "a known person is not (FNIR)",
                calibration.false_negative_identification_rate,
                calibration.false_negative_identification_interval,
                f"queries of known people, {gallery}",
            ),
        )
    ]


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g} %"
