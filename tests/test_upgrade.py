"""Upgrades: what the first release stored is found, and a newer version's data are left alone."""

import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from index.archive import SnapshotError
from index.embedded import EmbeddedGallery
from index.gallery import DamagedGalleryError, Filters, TrackletRecord
from index.schema import APPLICATION_ID, MIGRATIONS
from index.store import FILE_NAME
from service.app import create_app
from service.cli import app
from service.settings import Settings
from tests.service.conftest import FakeEmbedder, enrol
from tests.service.making import BLUE, GREEN, GREY, RED, clip_of

# Written by the code of 0.1.0 (version 1 of the file) and printed as SQL: four enrolments of drawn
# colours, of which one was corrected, beside a fifth that was erased.
FIRST_RELEASE = (Path(__file__).parent / "samples" / "first_release.sql").read_text("utf-8")
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
RED_VECTOR = np.tile(np.array([202, 30, 30], np.float32), 8)


def write_first_release(directory: Path, *, killed: bool = False) -> None:
    """The data directory that the first release left.

    Args:
        directory: Not yet there.
        killed: As a killed process leaves it: everything is in the write-ahead log.
    """
    scratch = directory.with_name(f"{directory.name}-written")
    for one in (scratch, directory):
        one.mkdir()
    header = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 1"
    with closing(sqlite3.connect(scratch / FILE_NAME, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.executescript(f"{header}; {FIRST_RELEASE}")
        if killed:
            for path in scratch.iterdir():
                shutil.copy(path, directory)
    if not killed:
        shutil.copy(scratch / FILE_NAME, directory)


@pytest.fixture(params=[False, True], ids=["stopped", "killed"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A data directory of the first release."""
    path = tmp_path / "data"
    write_first_release(path, killed=request.param)
    return path


def test_the_first_releases_records_are_all_there(directory: Path) -> None:
    with EmbeddedGallery(directory) as gallery:
        records = gallery.list(Filters(), limit=10).records

        assert [one.tracklet_id for one in records] == ["p1:c1", "p2:c1", "unnamed", "p1:c2"]
        assert records[0] == TrackletRecord(
            tracklet_id="p1:c1",
            identity="p1",
            camera="c1",
            start_time=NOON,
            end_time=NOON + timedelta(minutes=1, microseconds=1),
            metadata={"note": "été 東", "n": [1, None, 2.5]},
            frames_received=40,
            frames_used=15,
            model="trsa-fake",
            created_at=NOON + timedelta(seconds=1, microseconds=7),
            content=f"{1:064x}",
        )
        assert gallery.embedding("p1:c1").tolist() == RED_VECTOR.tolist()
        assert gallery.strip("p1:c1") == b"\xff\xd8 strip of p1:c1"  # noqa: B005 a film strip


def test_the_first_releases_gallery_gets_the_newest_form(directory: Path) -> None:
    EmbeddedGallery(directory).close()

    with closing(sqlite3.connect(directory / FILE_NAME)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_an_order_of_enrolment_that_the_first_release_began_goes_on(directory: Path) -> None:
    """Also where the newest tracklet has been erased: its key is not used again."""
    with closing(sqlite3.connect(directory / FILE_NAME)) as connection:
        connection.execute("DELETE FROM tracklets WHERE key = 5")
        connection.execute("DELETE FROM embeddings WHERE key = 5")
        connection.execute("DELETE FROM strips WHERE key = 5")
        connection.commit()

    with (
        EmbeddedGallery(directory) as gallery,
        TestClient(create_app(FakeEmbedder(), gallery, Settings())) as client,
    ):
        enrol(client, tracklet_id="new")

    with closing(sqlite3.connect(directory / FILE_NAME)) as connection:
        assert connection.execute("SELECT max(key) FROM tracklets").fetchone() == (6,)


def test_the_service_serves_what_the_first_release_stored(directory: Path) -> None:
    with (
        EmbeddedGallery(directory) as gallery,
        TestClient(create_app(FakeEmbedder(), gallery, Settings())) as client,
    ):
        found = client.post("/query", files=clip_of(RED, RED)).json()
        record = client.get("/gallery/p1:c2").json()
        identities = client.get("/identities").json()["items"]
        strip = client.get("/gallery/p2:c1/strip.jpg")

    nearest = found["matches"][0]
    assert (nearest["identity"], nearest["distance"], found["searched"]) == ("p1", 0, 4)
    assert (record["metadata"], record["quality"], record["expires_at"]) == (
        {"corrected": True},
        None,
        None,
    )
    assert [(one["identity"], one["cameras"]) for one in identities] == [
        ("p1", ["c1", "c2"]),
        ("p2", ["c1"]),
    ]
    assert strip.content == b"\xff\xd8 strip of p2:c1"


def test_what_the_first_release_stored_is_changed_and_erased_like_the_rest(directory: Path) -> None:
    with (
        EmbeddedGallery(directory) as gallery,
        TestClient(create_app(FakeEmbedder(), gallery, Settings())) as client,
    ):
        enrol(client, clip_of(GREY, GREY), tracklet_id="new", identity="p3")
        assert client.patch("/gallery/unnamed", json={"identity": "p2"}).status_code == 200
        assert client.delete("/identities/p1").status_code == 200

    with EmbeddedGallery(directory) as gallery:
        records = gallery.list(Filters(), limit=10).records
        assert {one.tracklet_id: one.identity for one in records} == {
            "p2:c1": "p2",
            "unnamed": "p2",
            "new": "p3",
        }


def become_newer(directory: Path) -> None:
    """Write the file as a version of the future would: it says so, and has what nobody knows."""
    with closing(sqlite3.connect(directory / FILE_NAME)) as connection:
        connection.executescript(
            f"CREATE TABLE of_the_future (x); PRAGMA user_version = {len(MIGRATIONS) + 1}"
        )


def passerby(*words: str) -> str:
    """Run a command; what it prints comes back."""
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_documented_way_back_works_and_brings_back_nobody_who_was_erased(
    tmp_path: Path,
) -> None:
    """A snapshot before; after, the ledger is written down, and the older version restores."""
    data, saved, ledger = (tmp_path / name for name in ("data", "before.passerby", "ledger.json"))
    where = ("--data-dir", str(data))
    with (
        EmbeddedGallery(data) as gallery,
        TestClient(create_app(FakeEmbedder(), gallery, Settings())) as client,
    ):
        enrol(client, clip_of(RED, RED), tracklet_id="a", identity="p1")
        enrol(client, clip_of(GREEN, GREEN), tracklet_id="b", identity="p2")
        passerby("snapshot", str(saved), *where)
        enrol(client, clip_of(BLUE, BLUE), tracklet_id="later")
        assert client.delete("/identities/p1").status_code == 200
        passerby("ledger", str(ledger), *where)
    become_newer(data)

    with pytest.raises(DamagedGalleryError, match="written by a newer Passerby"):
        EmbeddedGallery(data)
    passerby(
        "restore", str(saved), *where, "--replace", "--lose-ledger", "--ledger", str(ledger),
        "--any-model",
    )  # fmt: skip

    with EmbeddedGallery(data) as gallery:
        assert [one.tracklet_id for one in gallery.list(Filters(), limit=10).records] == ["b"]
    [aside] = data.glob("passerby.replaced-*")
    with closing(sqlite3.connect(aside / FILE_NAME)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)


def test_a_restore_does_not_pass_over_a_newer_versions_ledger_unasked(tmp_path: Path) -> None:
    """Who was erased under the newer version would come back."""
    data, saved = tmp_path / "data", tmp_path / "before.passerby"
    with EmbeddedGallery(data) as gallery:
        with TestClient(create_app(FakeEmbedder(), gallery, Settings())) as client:
            enrol(client, tracklet_id="a", identity="p1")
        passerby("snapshot", str(saved), "--data-dir", str(data))
    become_newer(data)
    before = (data / FILE_NAME).read_bytes()

    with pytest.raises(SnapshotError, match=r"told to do without, got: .*newer Passerby"):
        passerby("restore", str(saved), "--data-dir", str(data), "--replace", "--any-model")

    assert (data / FILE_NAME).read_bytes() == before
