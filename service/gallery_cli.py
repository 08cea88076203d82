"""Commands that work on a gallery's own directory, mounted by `service.cli`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from index.bootstrap import Plan
from index.calibration import Calibration, CalibrationCurves, Per
from index.calibration_source import read_calibration
from index.guest import write_calibration
from index.succession import abandon, standing
from index.unnamed import read_unnamed
from model.checkpoint import BUNDLED
from model.embedder import Embedder
from service.calibration import (
    CalibrationRequest,
    calibrate_folder,
    calibrate_gallery,
    report,
    warn_of_taught,
)
from service.client import DEFAULT_SERVER, Client, read_key
from service.clusters import (
    MOST,
    ClusterError,
    Method,
    propose_groups,
    read_proposals,
    write_page,
    write_proposals,
)
from service.command_auditing import Deed, telling
from service.reembedding import reembed
from service.server import choose_checkpoint

app = typer.Typer()
_console = Console(stderr=True)
_out = Console()
DataDir = Annotated[
    Path, typer.Option(help="Data directory of the gallery.", envvar="PASSERBY_DATA_DIR")
]
NOT_YET = 3  # status of a command that has done its part, and has to be given once more
DEFAULT_DATA = Path("data")


@app.command()
def calibrate(
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Data directory of the gallery whose threshold is set; data, where no folder is "
            "given.",
            envvar="PASSERBY_DATA_DIR",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Labelled tracklets, identity/camera/frames, instead of the gallery's."),
    ] = None,
    false_match_rate: Annotated[float, typer.Option(help="What is wanted, up to 0.2.")] = 0.001,
    rate: Annotated[
        Per, typer.Option(help="Of what: of pairs, or of queries by strangers.")
    ] = "pair",
    across_cameras: Annotated[
        bool, typer.Option(help="Compare only tracklets of different cameras.")
    ] = True,
    weights: Annotated[str, typer.Option(help="Checkpoint that embeds the folder.")] = BUNDLED,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    picture: Annotated[
        Path | None, typer.Option(help="Draw distributions, threshold and errors to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    store: Annotated[bool, typer.Option(help="Set the gallery's threshold.")] = True,
) -> None:
    """Find the threshold for a false-match rate, and set it in the gallery of a data directory.

    The service may run, and takes the threshold over.
    """
    request = CalibrationRequest(
        false_match_rate=false_match_rate,
        rate=rate,
        across_cameras=across_cameras,
        plan=Plan(seed=seed),
    )
    if folder is None:
        data_dir = data_dir or DEFAULT_DATA
    with telling(data_dir, "calibrate") as deed:
        if folder is None:
            calibration, curves = calibrate_gallery(data_dir or DEFAULT_DATA, request, _console)
        else:
            calibration, curves = _calibrate_folder(folder, weights, request)
        report(calibration, curves, _out, picture=picture, as_json=as_json)
        deed.tell(count=calibration.tracklets)
        if store and data_dir is not None:
            write_calibration(data_dir, calibration)
            deed.tell(threshold=calibration.threshold)
            _console.print(f"the gallery in {data_dir} has this threshold from now on")
        else:
            _console.print("no gallery was changed: none was named, or --no-store was said")


def _calibrate_folder(
    folder: Path, weights: str, request: CalibrationRequest
) -> tuple[Calibration, CalibrationCurves]:
    checkpoint = choose_checkpoint(weights)
    warn_of_taught(folder, checkpoint.provenance, _console)
    return calibrate_folder(folder, Embedder(checkpoint), request, _console)


@app.command()
def cluster(
    data_dir: DataDir = DEFAULT_DATA,
    output: Annotated[Path, typer.Option(help="Proposals, JSON.")] = Path("clusters.json"),
    page: Annotated[
        Path | None, typer.Option(help="Show the film strips of each group on this page.")
    ] = None,
    distance: Annotated[
        float | None,
        typer.Option(help="Up to which two are one person; the calibrated threshold by default."),
    ] = None,
    method: Annotated[Method, typer.Option(help="How groups are found.")] = "agglomerative",
    smallest: Annotated[int, typer.Option(min=2, help="Tracklets in a group at least.")] = 2,
    camera: Annotated[list[str] | None, typer.Option(help="Only these cameras.")] = None,
) -> None:
    """Propose groups among the unnamed tracklets of a data directory's gallery.

    Nothing is named until a group is accepted (`passerby accept`). The service may run meanwhile.
    """
    with telling(data_dir, "cluster", strips=page is not None) as deed:
        tracklets = read_unnamed(
            data_dir, most=MOST, cameras=frozenset(camera or ()), with_strips=page is not None
        )
        if distance is None:
            distance = _calibrated(data_dir)
        with _console.status(f"comparing {len(tracklets.tracklet_ids)} unnamed tracklets"):
            groups = propose_groups(tracklets, distance=distance, method=method, smallest=smallest)
        write_proposals(groups, output, distance=distance, method=method)
        if page is not None:
            write_page(groups, tracklets.strips, page, proposals=output)
        deed.tell(count=len(tracklets.tracklet_ids), groups=len(groups))
    grouped = sum(len(one.tracklet_ids) for one in groups)
    _console.print(
        f"{len(groups)} groups of {grouped} tracklets; {len(tracklets.tracklet_ids) - grouped} are "
        f"left alone. Proposals: {output}{f', to look at: {page}' if page else ''}"
    )


def _calibrated(data_dir: Path) -> float:
    calibration = read_calibration(data_dir)
    if calibration is None:
        raise ClusterError("expected --distance, or a calibrated gallery (passerby calibrate)")
    return calibration.threshold


@app.command()
def accept(
    proposals: Annotated[Path, typer.Argument(help="What passerby cluster wrote.")],
    group: Annotated[int, typer.Option(min=1, help="Its number.")],
    identity: Annotated[str, typer.Option(help="Whom its tracklets show.")],
    without: Annotated[
        list[str] | None, typer.Option(help="Tracklets that do not belong there; repeatable.")
    ] = None,
    server: Annotated[str, typer.Option(help="Address of the service.")] = DEFAULT_SERVER,
    key_file: Annotated[
        Path | None, typer.Option(help="File with the key, where the service asks for one.")
    ] = None,
) -> None:
    """Name the tracklets of a proposed group, all of them or none; the service does it."""
    groups = read_proposals(proposals)
    if group not in groups:
        raise ClusterError(f"expected a group from 1 to {len(groups)}, got {group}")
    chosen = [name for name in groups[group] if name not in frozenset(without or ())]
    with Client(server, read_key(key_file)) as client:
        changed = client.assign(identity, chosen)
    _console.print(f"{len(chosen)} tracklets show {identity}; {changed} of them did not before")


@app.command(name="reembed")
def reembed_command(
    weights: Annotated[str, typer.Option(help="Checkpoint of the next model.")],
    data_dir: DataDir = DEFAULT_DATA,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    abandoned: Annotated[
        bool, typer.Option("--abandon", help="Forget what was embedded, and stay as it is.")
    ] = False,
) -> None:
    """Embed the gallery of a data directory anew by another model, from kept frames.

    They are kept with PASSERBY_KEEP_FRAMES. The service may run meanwhile, and goes on with the old
    embeddings; all change in one step, when this is given once more after the service has stopped.
    """
    if abandoned:
        with telling(data_dir, "abandon-reembedding"):
            abandon(data_dir)
        _console.print("what was embedded by another model is forgotten")
        return
    with telling(data_dir, "reembed") as deed:
        embedder = Embedder(choose_checkpoint(weights), device=device)
        deed.tell(model=embedder.model)
        has_changed = reembed(data_dir, embedder, _console)
        _tell_reembedded(deed, data_dir, embedder.model, has_changed=has_changed)
    if not has_changed:
        raise typer.Exit(NOT_YET)


def _tell_reembedded(deed: Deed, data_dir: Path, model: str, *, has_changed: bool) -> None:
    count = standing(data_dir, model).tracklets
    deed.tell(outcome="done" if has_changed else "waiting", count=count)
