"""The commands that move a gallery: what they say, and that they do what they say."""

import sqlite3
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from index.archive import SnapshotError
from index.embedded import EmbeddedGallery
from index.gallery import DamagedGalleryError, Filters, GalleryUnavailableError, NotFoundError
from index.ledger import LedgerError
from index.store import FILE_NAME
from model.checkpoint import untrained_checkpoint
from service import moving
from service.moving import (
    run_check,
    run_export,
    run_import,
    run_ledger,
    run_mend,
    run_restore,
    run_snapshot,
)
from tests.index.conftest import make_enrolment

runner = CliRunner()
ALL = ["a", "b", "c"]


@pytest.fixture(scope="module")
def model() -> str:
    """Fingerprint of the untrained model."""
    return untrained_checkpoint().fingerprint


@pytest.fixture
def data_dir(tmp_path: Path, model: str) -> Path:
    """Of a closed gallery of three tracklets of two people."""
    with EmbeddedGallery(tmp_path / "data") as gallery:
        gallery.add(
            [
                make_enrolment(name, [row, 1], identity=f"p{row // 2}", model=model)
                for row, name in enumerate(ALL)
            ]
        )
    return tmp_path / "data"


@pytest.fixture
def said() -> StringIO:
    """What is printed."""
    return StringIO()


@pytest.fixture
def console(said: StringIO) -> Console:
    """Of no terminal."""
    return Console(file=said, width=60)


def passerby(*words: str | Path) -> int:
    result = runner.invoke(moving.app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code


def ids(data_dir: Path) -> list[str]:
    with EmbeddedGallery(data_dir) as gallery:
        return [name for name in ALL if name in known(gallery)]


def known(gallery: EmbeddedGallery) -> set[str]:
    return {one.tracklet_id for one in gallery.list(Filters(), limit=100).records}


def test_a_snapshot_and_a_restore_say_what_they_did(
    data_dir: Path, tmp_path: Path, console: Console, said: StringIO
) -> None:
    run_snapshot(data_dir, tmp_path / "a.passerby", console)
    run_check(tmp_path / "a.passerby", console)
    with EmbeddedGallery(data_dir) as gallery:
        gallery.remove_identity("p0")
    run_restore(tmp_path / "a.passerby", data_dir, console, expected_model=None, replace=True)

    lines = said.getvalue().splitlines()
    assert "3 tracklets of 2 identities, model trsa-" in lines[0]
    assert lines[0].endswith("read back and whole")
    assert "is whole: 3 tracklets" in lines[1]
    assert lines[2].endswith("; 2 of them had been erased since and are not there")
    assert "passerby.replaced-" in lines[3]
    assert len(lines) == 4
    assert ids(data_dir) == ["c"]


def test_an_export_and_an_import_say_what_they_did(
    data_dir: Path, tmp_path: Path, console: Console, said: StringIO
) -> None:
    with EmbeddedGallery(data_dir) as gallery:  # exporting goes on beside a service
        run_export(data_dir, tmp_path / "people", console)
        gallery.remove_identity("p1")
        run_export(data_dir, tmp_path / "newer", console)
        run_ledger(data_dir, tmp_path / "ledger.json", console)
    run_import(tmp_path / "people", tmp_path / "other", console)
    run_import(tmp_path / "newer", tmp_path / "other", console)
    ledgers = [tmp_path / "ledger.json"]
    run_import(tmp_path / "people", tmp_path / "third", console, ledgers=ledgers)

    lines = said.getvalue().splitlines()
    assert "3 tracklets of 2 numbers" in lines[0]
    assert lines[2].endswith("ledger.json: 2 erasures")
    assert "3 added, 0 already there, 0 left out" in lines[3]
    assert "0 added, 2 already there, 0 left out" in lines[4]
    assert "1 tracklets were erased" in lines[5]
    assert "2 added, 0 already there, 1 left out" in lines[6]
    assert ids(tmp_path / "other") == ids(tmp_path / "third") == ["a", "b"]


def test_the_commands_do_the_same(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, to = tmp_path / "a.passerby", ("--data-dir", tmp_path / "new")
    monkeypatch.setenv("PASSERBY_DATA_DIR", str(data_dir))

    assert passerby("snapshot", saved) == 0
    assert passerby("snapshot", saved, "--overwrite") == 0
    assert passerby("check-snapshot", saved) == 0
    assert passerby("ledger", tmp_path / "ledger.json") == 0
    ledger = ("--ledger", tmp_path / "ledger.json")
    assert passerby("restore", saved, *to, "--weights", "untrained", *ledger) == 0
    assert passerby("export-gallery", tmp_path / "people", "--strips") == 0
    assert passerby("import-gallery", tmp_path / "people", *to, *ledger) == 0
    assert ids(tmp_path / "new") == ALL


def test_a_snapshot_of_another_model_than_the_service_runs_is_refused(
    data_dir: Path, tmp_path: Path
) -> None:
    saved, to = tmp_path / "a.passerby", ("--data-dir", tmp_path / "new")
    passerby("snapshot", saved, "--data-dir", data_dir)

    with pytest.raises(SnapshotError, match="expected a snapshot of the model trsa-"):
        passerby("restore", saved, *to)  # the bundled weights
    assert not (tmp_path / "new").exists()
    assert passerby("restore", saved, *to, "--any-model") == 0


def test_a_running_service_is_said_to_hold_the_directory(
    data_dir: Path, tmp_path: Path, console: Console
) -> None:
    run_snapshot(data_dir, tmp_path / "a", console)
    run_export(data_dir, tmp_path / "people", console)

    with EmbeddedGallery(data_dir):
        with pytest.raises(GalleryUnavailableError, match="got a gallery that is already open"):
            run_restore(tmp_path / "a", data_dir, console, expected_model=None, replace=True)
        with pytest.raises(GalleryUnavailableError, match="got a gallery that is already open"):
            run_import(tmp_path / "people", data_dir, console)


def test_a_damaged_tracklet_is_erased_so_that_the_gallery_starts_again(data_dir: Path) -> None:
    [damaged, *others] = ids(data_dir)
    with sqlite3.connect(data_dir / FILE_NAME) as connection:
        connection.execute(
            "UPDATE tracklets SET vector_checksum = vector_checksum + 1 WHERE tracklet_id = ?",
            (damaged,),
        )
    connection.close()
    with pytest.raises(DamagedGalleryError, match=f"{damaged}.*passerby erase-tracklet"):
        EmbeddedGallery(data_dir)

    with pytest.raises(NotFoundError):
        passerby("erase-tracklet", "no such", "--data-dir", data_dir)
    assert passerby("erase-tracklet", damaged, "--data-dir", data_dir) == 0

    assert ids(data_dir) == others


def test_mending_drops_what_can_be_done_without_and_names_the_rest(
    data_dir: Path, console: Console, said: StringIO
) -> None:
    with EmbeddedGallery(data_dir) as gallery:
        gallery.remove("c")
    with sqlite3.connect(data_dir / FILE_NAME) as connection:
        connection.execute("UPDATE erasures SET erased_at = 7")
        connection.execute("UPDATE tracklets SET camera = 'other' WHERE tracklet_id = 'b'")
    connection.close()
    with pytest.raises(DamagedGalleryError, match="passerby mend"):
        EmbeddedGallery(data_dir)

    run_mend(data_dir, console)

    assert "dropped 1 damaged entries of the ledger of erasures" in said.getvalue()
    assert "damaged: b\n" in said.getvalue()
    assert passerby("erase-tracklet", "b", "--data-dir", data_dir) == 0
    assert ids(data_dir) == ["a"]
    assert "as it was stored" not in said.getvalue()
    run_mend(data_dir, console)
    assert "is as it was stored" in said.getvalue()
    assert passerby("mend", "--data-dir", data_dir) == 0


def test_a_ledger_that_is_none_stops_a_restore_before_it_begins(
    data_dir: Path, tmp_path: Path, console: Console
) -> None:
    run_snapshot(data_dir, tmp_path / "a", console)
    (tmp_path / "ledger.json").write_text("nothing")

    with pytest.raises(LedgerError):
        run_restore(
            tmp_path / "a",
            tmp_path / "new",
            console,
            expected_model=None,
            ledgers=[tmp_path / "ledger.json"],
        )

    assert not (tmp_path / "new").exists()


def test_an_empty_gallery_is_called_empty(tmp_path: Path, console: Console, said: StringIO) -> None:
    EmbeddedGallery(tmp_path / "data").close()

    run_snapshot(tmp_path / "data", tmp_path / "a", console)

    assert "an empty gallery" in said.getvalue()


def test_a_terminal_sees_a_bar_for_each_step(data_dir: Path, tmp_path: Path) -> None:
    said = StringIO()

    run_snapshot(data_dir, tmp_path / "a", Console(file=said, force_terminal=True, width=80))

    for step in ("copying", "checking", "writing", "verifying"):
        assert step in said.getvalue()
