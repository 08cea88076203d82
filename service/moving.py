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
from index.exporting import Format, export_gallery
from index.files import Progress as Advance
from index.importing import import_gallery
from index.ledger import read_ledger, write_ledger
from index.mending import erase_stored
from index.restore import restore
from index.snapshot import check_snapshot, snapshot
from model.checkpoint import BUNDLED
from service.server import choose_checkpoint

app = typer.Typer()
_console = Console(stderr=True)

DataDir = Annotated[Path, typer.Option(help="Where the gallery lives.", envvar="PASSERBY_DATA_DIR")]
Ledgers = Annotated[
    list[Path] | None,
    typer.Option("--ledger", help="File of `passerby ledger`; what it says was erased stays so."),
]
_DATA = Path("data")


@app.command("snapshot")
def snapshot_command(
    target: Annotated[Path, typer.Argument(help="File to make, like gallery.passerby.")],
    data_dir: DataDir = _DATA,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file.")] = False,
) -> None:
    """Copy the gallery into one checked file; a service may go on meanwhile."""
    run_snapshot(data_dir, target, _console, overwrite=overwrite)


@app.command("check-snapshot")
def check_command(snapshot: Annotated[Path, typer.Argument(help="File to read.")]) -> None:
    """Read a snapshot and compare it with its checksums."""
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
    """Make the gallery of a snapshot, without who was erased since; stop the service first."""
    expected = None if any_model else choose_checkpoint(weights).fingerprint
    run_restore(
        snapshot,
        data_dir,
        _console,
        expected_model=expected,
        replace=replace,
        ledgers=ledger or (),
        lose_ledger=lose_ledger,
    )


@app.command("export-gallery")
def export_command(
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    data_dir: DataDir = _DATA,
    file_format: Annotated[
        Format, typer.Option("--format", help="npy with JSON lines, or Parquet (needs pyarrow).")
    ] = "npy",
    strips: Annotated[bool, typer.Option("--strips", help="Film strips, too.")] = False,
) -> None:
    """Write embeddings and records for other programs; a service may go on meanwhile."""
    run_export(data_dir, folder, _console, file_format=file_format, strips=strips)


@app.command("import-gallery")
def import_command(
    folder: Annotated[Path, typer.Argument(help="Folder of `passerby export-gallery`.")],
    data_dir: DataDir = _DATA,
    ledger: Ledgers = None,
) -> None:
    """Add what was exported to the gallery; stop the service first."""
    run_import(folder, data_dir, _console, ledgers=ledger or ())


@app.command("ledger")
def ledger_command(
    target: Annotated[Path, typer.Argument(help="File to write, like ledger.json.")],
    data_dir: DataDir = _DATA,
) -> None:
    """Write down what was ever erased, without saying what it was, to hold backups against."""
    run_ledger(data_dir, target, _console)


@app.command("erase-tracklet")
def erase_command(
    tracklet_id: Annotated[str, typer.Argument(help="As the refusal to start names it.")],
    data_dir: DataDir = _DATA,
) -> None:
    """Erase a tracklet that was damaged on the disk, so that the gallery starts or shows it."""
    run_erase(data_dir, tracklet_id, _console)


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


def run_erase(data_dir: Path, tracklet_id: str, console: Console) -> None:
    """Erase a tracklet that keeps a gallery from starting; see `index.mending.erase_stored`.

    Raises:
        GalleryError: It is not there, or the gallery is open elsewhere; nothing has changed.
    """
    identity = erase_stored(data_dir, tracklet_id)
    whose = "of nobody" if identity is None else f"of {identity}"
    _say(console, f"erased {tracklet_id} {whose}; enrol it again if its frames are still there")


def run_restore(
    path: Path,
    data_dir: Path,
    console: Console,
    *,
    expected_model: str | None,
    replace: bool = False,
    ledgers: Sequence[Path] = (),
    lose_ledger: bool = False,
) -> None:
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


def run_export(
    data_dir: Path,
    folder: Path,
    console: Console,
    *,
    file_format: Format = "npy",
    strips: bool = False,
) -> None:
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


def run_import(
    folder: Path, data_dir: Path, console: Console, *, ledgers: Sequence[Path] = ()
) -> None:
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
    if done.erased:
        _say(console, f"{done.erased} tracklets were erased: the folder's ledger says so")


def run_ledger(data_dir: Path, target: Path, console: Console) -> None:
    """Write a gallery's ledger to a file; see `index.ledger.write_ledger`.

    Raises:
        GalleryError: It cannot be read or written.
    """
    ledger = write_ledger(data_dir, target)
    _say(console, f"wrote {target}: {len(ledger.entries)} erasures")


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
