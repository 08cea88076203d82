"""The commands that move a gallery, or mend it: snapshot, restore, export, import, the ledger."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from index.archive import Manifest
from index.erasures import Erasures
from index.exchange import ExportManifest
from index.exporting import Format, export_gallery
from index.files import Progress as Advance
from index.importing import Imported, import_gallery
from index.ledger import read_ledger, write_ledger
from index.mending import Mended, erase_stored, mend
from index.restore import Restored, restore
from index.snapshot import check_snapshot, snapshot
from model.checkpoint import BUNDLED
from service.command_auditing import telling
from service.server import choose_checkpoint

app = typer.Typer()
_console = Console(stderr=True)

DataDir = Annotated[
    Path, typer.Option(help="Data directory of the gallery.", envvar="PASSERBY_DATA_DIR")
]
Ledgers = Annotated[
    list[Path] | None,
    typer.Option("--ledger", help="File of `passerby ledger`; what it says was erased stays so."),
]
_DATA = Path("data")
# What has to be done again, of what `passerby mend` drops.
_AGAIN = {"calibration": ": calibrate again"}


@app.command("snapshot")
def snapshot_command(
    target: Annotated[Path, typer.Argument(help="File to make, like gallery.passerby.")],
    data_dir: DataDir = _DATA,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file.")] = False,
) -> None:
    """Copy the gallery of a data directory into one checked file.

    The service may run meanwhile; what it writes after the beginning is not in the file.
    """
    with telling(data_dir, "snapshot") as deed:
        manifest = run_snapshot(data_dir, target, _console, overwrite=overwrite)
        deed.tell(count=manifest.tracklets)


@app.command("check-snapshot")
def check_command(snapshot: Annotated[Path, typer.Argument(help="File to read.")]) -> None:
    """Read a snapshot and compare it with its checksums; no data directory is looked at."""
    run_check(snapshot, _console)


@app.command("restore")
def restore_command(
    snapshot: Annotated[Path, typer.Argument(help="File of `passerby snapshot`.")],
    data_dir: DataDir = _DATA,
    weights: Annotated[
        str,
        typer.Option(
            help="Checkpoint that the service will run: a snapshot of another model is refused.",
            envvar="PASSERBY_WEIGHTS",
        ),
    ] = BUNDLED,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Restore whatever model it is of.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put the gallery that is there aside.")
    ] = False,
    ledger: Ledgers = None,
    lose_ledger: Annotated[
        bool,
        typer.Option(
            "--lose-ledger", help="Go on where nobody can read what the old gallery has erased."
        ),
    ] = False,
) -> None:
    """Make a data directory's gallery of a snapshot, without who was erased since.

    Stop the service first: while it runs, this is refused. A directory that is not there is made.
    """
    with telling(data_dir, "restore") as deed:
        done = run_restore(
            snapshot,
            data_dir,
            _console,
            expected_model=None if any_model else choose_checkpoint(weights).fingerprint,
            replace=replace,
            ledgers=ledger or (),
            lose_ledger=lose_ledger,
        )
        deed.tell(count=done.manifest.tracklets - done.erased, erased=done.erased)


@app.command("export-gallery")
def export_command(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    data_dir: DataDir = _DATA,
    file_format: Annotated[
        Format, typer.Option("--format", help="npy with JSON lines, or Parquet (needs pyarrow).")
    ] = "npy",
    strips: Annotated[bool, typer.Option("--strips", help="Film strips, too.")] = False,
) -> None:
    """Write a data directory's embeddings and records for other programs.

    The service may run meanwhile.
    """
    with telling(data_dir, "export-gallery", strips=strips) as deed:
        manifest = run_export(data_dir, folder, _console, file_format=file_format, strips=strips)
        deed.tell(count=manifest.tracklets)


@app.command("import-gallery")
def import_command(
    folder: Annotated[Path, typer.Argument(help="Folder of `passerby export-gallery`.")],
    data_dir: DataDir = _DATA,
    ledger: Ledgers = None,
) -> None:
    """Add what was exported to the gallery of a data directory.

    Stop the service first: while it runs, this is refused. A directory that is not there is made.
    """
    with telling(data_dir, "import-gallery") as deed:
        done = run_import(folder, data_dir, _console, ledgers=ledger or ())
        deed.tell(count=done.added, erased=done.erased)


@app.command("ledger")
def ledger_command(
    target: Annotated[Path, typer.Argument(help="File to write, like ledger.json.")],
    data_dir: DataDir = _DATA,
) -> None:
    """Write down what was ever erased from a data directory's gallery, to hold backups against.

    It does not say what that was. The service may run meanwhile.
    """
    with telling(data_dir, "ledger") as deed:
        deed.tell(count=len(run_ledger(data_dir, target, _console).entries))


@app.command("erase-tracklet")
def erase_command(
    tracklet_id: Annotated[str, typer.Argument(help="As the refusal to start names it.")],
    data_dir: DataDir = _DATA,
) -> None:
    """Erase a tracklet that was damaged on the disk from the gallery of a data directory.

    Stop the service first, if it started at all: while it runs, this is refused.
    """
    with telling(data_dir, "erase-tracklet", tracklet=tracklet_id) as deed:
        deed.tell(identity=run_erase(data_dir, tracklet_id, _console))


@app.command("mend")
def mend_command(
    data_dir: DataDir = _DATA,
    lose_log: Annotated[
        bool,
        typer.Option("--lose-log", help="Cut a damaged log: what was changed after it is lost."),
    ] = False,
) -> None:
    """Drop what was damaged on the disk and can be done without, and list what else was.

    For a data directory's gallery that refuses to start. What it drops (entries of the ledger of
    erasures, the calibration) it says. Stop the service first: while it runs, this is refused.
    """
    with telling(data_dir, "mend", lose_log=lose_log) as deed:
        done = run_mend(data_dir, _console, lose_log=lose_log)
        deed.tell(count=len(done.tracklets), erasures=done.erasures)


def run_snapshot(
    data_dir: Path, target: Path, console: Console, *, overwrite: bool = False
) -> Manifest:
    """Make a snapshot and say what is in it; see `index.snapshot.snapshot`.

    Raises:
        GalleryError: It cannot be made.
    """
    with _progress(console) as advance:
        manifest = snapshot(data_dir, target, overwrite=overwrite, progress=advance)
    _say(console, f"wrote {target}: {_described(manifest)}, {_size(target)}, read back and whole")
    return manifest


def run_check(path: Path, console: Console) -> Manifest:
    """Check a snapshot and say what is in it; see `index.snapshot.check_snapshot`.

    Raises:
        SnapshotError: It is not whole.
    """
    with _progress(console) as advance:
        manifest = check_snapshot(path, progress=advance)
    made = f"{manifest.created_at:%Y-%m-%d %H:%M:%S} UTC by Passerby {manifest.passerby_version}"
    _say(console, f"{path} is whole: {_described(manifest)}, made {made}")
    return manifest


def run_erase(data_dir: Path, tracklet_id: str, console: Console) -> str | None:
    """Erase a tracklet that keeps a gallery from starting; see `index.mending.erase_stored`.

    Returns:
        Whom it showed; None where that was not known.

    Raises:
        GalleryError: It is not there, or the gallery is open elsewhere; nothing has changed.
    """
    identity = erase_stored(data_dir, tracklet_id)
    whose = "of nobody" if identity is None else f"of {identity}"
    _say(console, f"erased {tracklet_id} {whose}; enrol it again if its frames are still there")
    return identity


def run_mend(data_dir: Path, console: Console, *, lose_log: bool = False) -> Mended:
    """Mend a gallery that does not start, and say what was done; see `index.mending.mend`.

    Raises:
        GalleryError: It cannot be mended so.
    """
    done = mend(data_dir, lose_log=lose_log)
    if done.left == "log":
        _say(console, f"cut {decimal(done.log_bytes)} off the log: changes in it are lost")
    if done.left == "file":
        _say(
            console,
            "removed the log: what it alone held is lost, what was copied into the file is there",
        )
    if done.orphans:
        _say(console, f"dropped {done.orphans} embeddings, strips and frames of no tracklet")
    if done.erasures:
        _say(
            console,
            f"dropped {done.erasures} damaged entries of the ledger of erasures: what they were "
            "for would come back with a snapshot from before",
        )
    for name in done.properties:
        _say(console, f"dropped the damaged {name}{_AGAIN.get(name, '')}")
    for tracklet_id in done.tracklets:
        _say(console, f"damaged: {tracklet_id}")
    if done.tracklets:
        _say(console, "restore a snapshot, or erase each with `passerby erase-tracklet`")
    else:
        _say(console, f"all that is now in {data_dir} is as it was stored")
    return done


def run_restore(
    path: Path,
    data_dir: Path,
    console: Console,
    *,
    expected_model: str | None,
    replace: bool = False,
    ledgers: Sequence[Path] = (),
    lose_ledger: bool = False,
) -> Restored:
    """Restore and say what was done; see `index.restore.restore`.

    Args:
        path: The snapshot.
        data_dir: Where the gallery is to be.
        console: For progress and the summary.
        expected_model: Fingerprint; None for any.
        replace: Whether a gallery may be there.
        ledgers: Files of what was erased.
        lose_ledger: See `index.restore.restore`.

    Raises:
        GalleryError: Nothing was restored, and nothing has changed.
    """
    read = [read_ledger(one) for one in ledgers]
    with _progress(console) as advance:
        done = restore(
            path,
            data_dir,
            expected_model=expected_model,
            replace=replace,
            ledgers=read,
            lose_ledger=lose_ledger,
            progress=advance,
        )
    erased = f"; {done.erased} of them had been erased since and are not there"
    _say(console, f"restored {data_dir}: {_described(done.manifest)}{erased * bool(done.erased)}")
    if done.replaced is not None:
        _say(console, f"the gallery that was there is in {done.replaced}: erase it when you can")
    if done.others:
        names = ", ".join(done.others)
        _say(console, f"earlier restores put galleries aside there, too, which stay: {names}")
    return done


def run_export(
    data_dir: Path,
    folder: Path,
    console: Console,
    *,
    file_format: Format = "npy",
    strips: bool = False,
) -> ExportManifest:
    """Export and say what was written; see `index.exporting.export_gallery`.

    Raises:
        GalleryError: Nothing was written.
    """
    with _progress(console) as advance:
        manifest = export_gallery(
            data_dir, folder, file_format=file_format, strips=strips, progress=advance
        )
    size = decimal(sum(one.bytes for one in manifest.files.values()))
    dimension = f" of {manifest.dimension} numbers" if manifest.dimension else ""
    _say(console, f"wrote {folder}: {manifest.tracklets} tracklets{dimension}, {size}")
    return manifest


def run_import(
    folder: Path, data_dir: Path, console: Console, *, ledgers: Sequence[Path] = ()
) -> Imported:
    """Import and say what was added; see `index.importing.import_gallery`.

    Raises:
        GalleryError: Nothing was imported.
    """
    read = [read_ledger(one) for one in ledgers]
    with _progress(console) as advance:
        done = import_gallery(folder, data_dir, ledgers=read, progress=advance)
    _say(
        console,
        f"imported into {data_dir}: {done.added} added, {done.already_there} already there, "
        f"{done.banned} left out because they were erased",
    )
    if done.expired:
        _say(console, f"{done.expired} tracklets were left out: they have expired meanwhile")
    if done.erased:
        _say(console, f"{done.erased} tracklets were erased: the folder's ledger says so")
    return done


def run_ledger(data_dir: Path, target: Path, console: Console) -> Erasures:
    """Write a gallery's ledger to a file; see `index.ledger.write_ledger`.

    Raises:
        GalleryError: It cannot be read or written.
    """
    ledger = write_ledger(data_dir, target)
    _say(console, f"wrote {target}: {len(ledger.entries)} erasures")
    return ledger


def _described(manifest: Manifest) -> str:
    if manifest.model is None:
        return "an empty gallery"
    return (
        f"{manifest.tracklets} tracklets of {manifest.identities} identities, "
        f"model {manifest.model}"
    )


def _size(path: Path) -> str:
    return decimal(path.stat().st_size)


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _progress(console: Console) -> Iterator[Advance]:
    """One bar for each thing that is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    bars: dict[str, TaskID] = {}
    is_seen = console.is_terminal  # else it would leave an empty line
    with Progress(*columns, console=console, transient=True, disable=not is_seen) as progress:

        def advance(doing: str, done: int, all_: int) -> None:
            if doing not in bars:
                bars[doing] = progress.add_task(doing, total=all_)
            progress.update(bars[doing], completed=done, total=all_)

        yield advance
