"""Snapshots and restores: whole or refused, and nobody comes back who was erased."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from bench.gallery_truth import CALIBRATION as BENCH_CALIBRATION
from index import archive
from index import snapshot as snapshots
from index.archive import Manifest, SnapshotError
from index.embedded import EmbeddedGallery
from index.erasures import Erasures
from index.files import create, workshop
from index.gallery import (
    DamagedGalleryError,
    Filters,
    GalleryUnavailableError,
    StorageFullError,
)
from index.ledger import LedgerError, read_ledger, stored_ledger, write_ledger
from index.restore import REPLACED_NAME, WORK_NAME, restore
from index.schema import MIGRATIONS
from index.snapshot import check_snapshot, snapshot
from index.store import FILE_NAME, LOCK_NAME, Store
from tests.index.conftest import make_enrolment
from tests.index.test_erasures import history, live_through, make_old_gallery, secrets_of
from tests.index.test_faults import own_mounts, run_python

__all__ = ["own_mounts"]

ROOT = Path(__file__).parents[2]
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
LATER = NOON + timedelta(hours=1)
PATIENCE_S = 60.0
CALIBRATION = replace(
    BENCH_CALIBRATION,
    threshold=1.5,
    identities=20,
    gallery_identities=20,
    model="trsa-test",
    created_at=NOON,
)


def fill(gallery: EmbeddedGallery) -> None:
    """Six tracklets with all that can be known of one, of p0, p1 and nobody, and a calibration."""
    gallery.add(
        [
            make_enrolment(
                f"t{row}",
                [row, 0.1, -3e-7],
                identity=f"person-{row % 3}" if row % 3 < 2 else None,
                camera="c1",
                start_time=NOON + timedelta(microseconds=row),
                end_time=LATER,
                metadata={"note": "ü", "n": [row, 0.1]},
                created_at=NOON + timedelta(minutes=row),
                content=sha256(f"t{row}".encode()).hexdigest(),
                expires_at=datetime(2030, 1, 1, tzinfo=UTC) if row % 2 else None,
                quality={"sharpness": 0.1 * row},
                strip=b"\xff\xd8\xff" + bytes([row]) * 5000 if row != 4 else None,
                frames=[b"frame", bytes([row])],
            )
            for row in range(6)
        ]
    )
    gallery.set_calibration(CALIBRATION)


def everything(directory: Path) -> dict[str, Any]:
    """All that a gallery holds, but for its ledger."""
    with EmbeddedGallery(directory) as gallery:
        records = gallery.list(Filters(), limit=1000).records
        strips = {one.tracklet_id for one in records} - {"t4"}
        return {
            "records": records,
            "vectors": [gallery.embedding(one.tracklet_id).tolist() for one in records],
            "strips": [gallery.strip(one) for one in sorted(strips)],
            "frames": [gallery.frames(one.tracklet_id) for one in records],
            "identities": gallery.identities(limit=100).items,
            "calibration": gallery.calibration(),
        }


def ids(directory: Path) -> list[str]:
    store = Store(directory)
    try:
        return [one.record.tracklet_id for one in store.page(Filters(), after=0, limit=1000)]
    finally:
        store.close()


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def full(directory: Path) -> Path:
    """The directory of a closed gallery with what `fill` puts into it."""
    with EmbeddedGallery(directory) as gallery:
        fill(gallery)
    return directory


@pytest.fixture
def saved(full: Path) -> Path:
    """A snapshot of it."""
    snapshot(full, full.parent / "saved.passerby")
    return full.parent / "saved.passerby"


def erase(directory: Path, *, identity: str | None = None, tracklet: str | None = None) -> None:
    with EmbeddedGallery(directory, clock=lambda: LATER) as gallery:
        if identity is not None:
            gallery.remove_identity(identity)
        if tracklet is not None:
            gallery.remove(tracklet)


# A snapshot


def test_all_that_a_gallery_holds_comes_back(full: Path, saved: Path) -> None:
    restore(saved, full.parent / "other")

    assert everything(full.parent / "other") == everything(full)


def test_the_manifest_says_what_is_in_it(full: Path) -> None:
    target = full.parent / "a"

    made = snapshot(full, target, clock=lambda: LATER)

    assert made == check_snapshot(target)
    assert (made.created_at, made.model, made.dimension) == (LATER, "trsa-test", 3)
    assert (made.tracklets, made.identities, made.schema_version) == (6, 2, len(MIGRATIONS))


def test_any_tar_unpacks_it_and_the_manifest_comes_first(full: Path, saved: Path) -> None:
    with tarfile.open(saved, "r:") as unpacked:
        manifest, database = unpacked.getmembers()
        unpacked.extractall(full.parent / "unpacked", filter="data")

    assert (manifest.name, database.name) == ("manifest.json", FILE_NAME)
    values = json.loads((full.parent / "unpacked" / "manifest.json").read_text())
    content = (full.parent / "unpacked" / FILE_NAME).read_bytes()
    assert values["database_sha256"] == sha256(content).hexdigest()
    assert ids(full.parent / "unpacked") == ids(full)


@pytest.mark.parametrize("size", [0, 1, 8**11 - 1, 8**11, 2**40])
def test_a_header_is_what_tar_expects_at_any_size(size: int) -> None:
    found = tarfile.TarInfo.frombuf(archive._header(FILE_NAME, size, 1_700_000_000), "utf-8", "")

    assert (found.name, found.size, found.mtime) == (FILE_NAME, size, 1_700_000_000)
    assert found.isreg()
    assert found.mode == 0o600


def test_an_empty_gallery_can_be_moved_and_goes_with_any_model(directory: Path) -> None:
    EmbeddedGallery(directory).close()
    made = snapshot(directory, directory.parent / "a")

    restore(directory.parent / "a", directory.parent / "other", expected_model="trsa-any")

    assert (made.tracklets, made.model, made.dimension) == (0, None, None)
    assert ids(directory.parent / "other") == []


def test_only_its_owner_can_read_a_snapshot_and_nothing_else_is_left(saved: Path) -> None:
    assert saved.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in saved.parent.iterdir()) == ["gallery", saved.name]


def test_a_snapshot_is_one_moment_while_somebody_writes(directory: Path) -> None:
    """Each write adds two tracklets that belong together: no snapshot has one without the other."""
    with EmbeddedGallery(directory) as gallery:
        gallery.add([make_enrolment(f"{n}{half}", [n] * 512) for n in range(300) for half in "ab"])
        started, stop, copying = Event(), Event(), Event()

        def write() -> None:
            number = 300
            while not stop.is_set():
                gallery.add([make_enrolment(f"{number}{half}", [1] * 512) for half in "ab"])
                gallery.remove(f"{number - 300}a")
                gallery.remove(f"{number - 300}b")
                number += 1
                if copying.is_set():
                    started.set()

        def progress(doing: str, _done: int, _all: int) -> None:
            if doing == "copying" and not copying.is_set():
                copying.set()
                assert started.wait(PATIENCE_S)  # something is written before the second step

        writer = Thread(target=write, daemon=True)
        writer.start()
        try:
            made = snapshot(directory, directory.parent / "a", progress=progress)
        finally:
            stop.set()
            writer.join(PATIENCE_S)

    restore(directory.parent / "a", directory.parent / "other")
    found = ids(directory.parent / "other")
    added = {int(one[:-1]) for one in found if int(one[:-1]) >= 300}
    assert made.tracklets == len(found)
    assert {f"{n}{half}" for n in added for half in "ab"} <= set(found)


def test_a_write_between_two_steps_does_not_make_it_begin_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "_PAGES_AT_ONCE", 20)
    with EmbeddedGallery(directory) as gallery:
        gallery.add([make_enrolment(f"t{n}", [n] * 512) for n in range(200)])
        left = []

        def progress(doing: str, done: int, all_: int) -> None:
            if doing == "copying":
                left.append(all_ - done)
                assert len(left) < 100  # or it goes on for ever
                gallery.add([make_enrolment(f"new{len(left)}", [1] * 512)])

        made = snapshot(directory, directory.parent / "a", progress=progress)

        assert made.tracklets == 200
        assert len(left) > 5
        assert left == sorted(left, reverse=True)
        assert gallery.counts().tracklets == 200 + len(left)


def test_what_was_erased_before_leaves_no_trace_in_a_snapshot(
    full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the gallery has not yet removed the traces from its own file."""
    directory = full.parent / "busy"
    enrolments = history(1, rows=300)
    with EmbeddedGallery(directory, clock=lambda: NOON) as gallery:
        live_through(gallery, enrolments, seed=1)
        monkeypatch.setattr(gallery._store, "forget", lambda **_: None)
        gallery.remove_identity("who-anna-it-is")
        snapshot(directory, full.parent / "a")

    content = (full.parent / "a").read_bytes()
    assert not [one for one in secrets_of(enrolments) if one in content]


def test_an_older_gallery_is_saved_as_it_is_and_restored_in_the_newest_form(
    directory: Path,
) -> None:
    make_old_gallery(directory, rows=5)

    made = snapshot(directory, directory.parent / "a")
    restore(directory.parent / "a", directory.parent / "other")

    assert made.schema_version == 1
    assert ids(directory.parent / "other") == [f"t{row}" for row in range(1, 6)]


def test_a_file_that_exists_is_replaced_only_when_told(full: Path) -> None:
    target = full.parent / "a"
    target.write_bytes(b"dear to somebody")
    with pytest.raises(SnapshotError, match="expected a new file, got one that exists"):
        snapshot(full, target)
    assert target.read_bytes() == b"dear to somebody"

    snapshot(full, target, overwrite=True)

    assert check_snapshot(target).tracklets == 6


def test_a_file_that_appears_meanwhile_is_not_replaced(full: Path) -> None:
    target = full.parent / "a"

    def progress(doing: str, _done: int, _all: int) -> None:
        if doing == "verifying":
            target.write_bytes(b"first")

    with pytest.raises(SnapshotError, match="got one that exists"):
        snapshot(full, target, progress=progress)

    assert target.read_bytes() == b"first"


def test_no_link_is_followed(full: Path) -> None:
    victim = full.parent / "victim"
    (full.parent / "a").symlink_to(victim)
    (full.parent / ".b.passerby-making").symlink_to(full)
    before = contents(full)

    with pytest.raises(SnapshotError):
        snapshot(full, full.parent / "a")
    with pytest.raises(SnapshotError):
        snapshot(full, full.parent / "b")
    with pytest.raises(FileExistsError):
        create(full.parent / "a")

    assert not victim.exists()
    assert contents(full) == before


def test_two_snapshots_to_one_name_do_not_meet_and_what_a_killed_one_left_is_removed(
    full: Path,
) -> None:
    target, work = full.parent / "a", full.parent / ".a.passerby-making"
    with (
        workshop(work, SnapshotError),
        pytest.raises(SnapshotError, match="got another process"),
    ):
        snapshot(full, target)
    work.mkdir()
    (work / FILE_NAME).write_bytes(b"left over")
    (work / "more").mkdir()

    snapshot(full, target)

    assert not work.exists()


def test_where_there_is_no_gallery_there_is_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(GalleryUnavailableError, match="expected a gallery"):
        snapshot(tmp_path, tmp_path / "a")

    assert [*tmp_path.iterdir()] == []


def test_a_damaged_gallery_is_not_saved(full: Path) -> None:
    content = bytearray((full / FILE_NAME).read_bytes())
    content[4096 + 100 : 4096 * 3] = os.urandom(4096 * 2 - 100)
    (full / FILE_NAME).write_bytes(content)

    with pytest.raises(DamagedGalleryError):
        snapshot(full, full.parent / "a")

    assert not (full.parent / "a").exists()


# What is refused


def refuse(saved: Path, match: str, **how: Any) -> None:
    """A restore of it changes nothing, neither a gallery that is there nor an empty place."""
    directory = saved.parent / "gallery"
    before = contents(directory)
    with pytest.raises(SnapshotError, match=match):
        restore(saved, directory, replace=True, **how)
    assert contents(directory) == before
    with pytest.raises(SnapshotError, match=match):
        restore(saved, saved.parent / "new", **how)
    assert not (saved.parent / "new").exists()


@pytest.mark.parametrize("length", [0, 1, 511, 512, 3000, 3584, 4095, 4096, 4097, 9000, -1025, -1])
def test_a_truncated_snapshot_is_refused(saved: Path, length: int) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[:length])

    refuse(saved, "expected")


def test_a_longer_snapshot_is_refused(saved: Path) -> None:
    with saved.open("ab") as file:
        file.write(b"\0")

    refuse(saved, "expected a snapshot of")


def test_a_flipped_bit_is_seen_wherever_it_is(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    places = [*range(0, 4200, 7), *range(4200, len(content), 997), *range(len(content) - 9, 0, -99)]
    for place in places[:900]:
        content[place] ^= 1
        saved.write_bytes(content)
        with pytest.raises(SnapshotError):
            check_snapshot(saved)
        content[place] ^= 1

    saved.write_bytes(content)
    check_snapshot(saved)


def test_a_flipped_byte_of_the_database_changes_nothing(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[20_000] ^= 0xFF
    saved.write_bytes(content)

    refuse(saved, "the snapshot is damaged")


def test_another_model_is_refused_unless_any_will_do(saved: Path) -> None:
    refuse(
        saved,
        "expected a snapshot of the model trsa-other, got one of trsa-test",
        expected_model="trsa-other",
    )

    restore(saved, saved.parent / "new", expected_model=None)
    restore(saved, saved.parent / "newer", expected_model="trsa-test")


@pytest.mark.parametrize("kind", ["text", "database", "tar", "directory", "pipe"])
def test_something_else_is_no_snapshot(saved: Path, kind: str) -> None:
    saved.unlink()
    if kind == "text":
        saved.write_text("hello " * 10_000)
    elif kind == "database":
        shutil.copy(saved.parent / "gallery" / FILE_NAME, saved)
    elif kind == "directory":
        saved.mkdir()
    elif kind == "pipe":
        os.mkfifo(saved)
    else:
        with tarfile.open(saved, "w") as other:
            other.add(saved.parent / "gallery" / FILE_NAME, "manifest.json")

    refuse(saved, "snapshot|JSON")


def rewrite(saved: Path, **values: Any) -> None:
    """Forge a manifest whose own checksum is right."""
    manifest = check_snapshot(saved)
    fields = {name: getattr(manifest, name) for name in Manifest.__slots__}
    content = saved.read_bytes()
    saved.write_bytes(archive._head(Manifest(**(fields | values))) + content[4096:])


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"schema_version": len(MIGRATIONS) + 1}, "a newer Passerby made it"),
        ({"tracklets": 7}, r"expected Facts\(.*tracklets=7"),
        ({"model": "trsa-lie"}, "trsa-lie"),
        ({"database_sha256": "0" * 64}, "the snapshot is damaged"),
        ({"database_bytes": 2**60}, "expected a snapshot of"),
    ],
)
def test_a_manifest_that_lies_is_refused(saved: Path, values: dict[str, Any], match: str) -> None:
    rewrite(saved, **values)

    refuse(saved, match)


def test_a_snapshot_of_a_newer_form_says_so(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(archive, "VERSION", 2)
        content = saved.read_bytes()
        manifest = archive._to_manifest(json.loads(content[512:3584]))
        saved.write_bytes(archive._head(manifest) + content[4096:])

    refuse(saved, "expected a snapshot of version 1, got 2: a newer Passerby made it")


def test_names_in_the_archive_have_no_effect(saved: Path) -> None:
    """A header that names a path elsewhere is a damaged one, though its checksum is right."""
    content = bytearray(saved.read_bytes())
    size = check_snapshot(saved).database_bytes
    time = int(check_snapshot(saved).created_at.timestamp())
    content[3584:4096] = archive._header("../../stolen", size, time)
    saved.write_bytes(content)

    refuse(saved, "expected a manifest as it was written")


def test_a_database_that_is_not_sound_is_refused_though_its_checksum_is_right(
    saved: Path,
) -> None:
    content = bytearray(saved.read_bytes())
    size = check_snapshot(saved).database_bytes
    content[4096 + 4096 + 100 : 4096 + 4096 * 3] = os.urandom(4096 * 2 - 100)
    saved.write_bytes(content)
    database = bytes(content[4096 : 4096 + size])
    manifest = archive._to_manifest(json.loads(content[512:3584]))
    fields = {name: getattr(manifest, name) for name in Manifest.__slots__}
    forged = Manifest(**(fields | {"database_sha256": sha256(database).hexdigest()}))
    saved.write_bytes(archive._head(forged) + content[4096:])

    refuse(saved, "the snapshot holds no sound gallery")


def test_a_gallery_that_is_there_is_replaced_only_when_told(full: Path, saved: Path) -> None:
    before = contents(full)

    with pytest.raises(SnapshotError, match="expected a directory without a gallery"):
        restore(saved, full)

    assert contents(full) == before


def test_a_directory_that_somebody_has_open_is_refused(saved: Path) -> None:
    directory = saved.parent / "gallery"
    with EmbeddedGallery(directory) as gallery:
        with pytest.raises(GalleryUnavailableError, match="already open"):
            restore(saved, directory, replace=True)
        assert gallery.counts().tracklets == 6


def test_a_gallery_that_somebody_reads_is_not_replaced(full: Path, saved: Path) -> None:
    reader = sqlite3.connect(full / FILE_NAME)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM tracklets").fetchone()

    with pytest.raises(SnapshotError, match="expected nobody to read"):
        restore(saved, full, replace=True)

    reader.close()
    restore(saved, full, replace=True)
    assert len(ids(full)) == 6


# What a restore does


def test_a_replaced_gallery_is_put_aside_whole_and_its_log_is_gone(saved: Path) -> None:
    directory, live = saved.parent / "live", EmbeddedGallery(saved.parent / "origin")
    live.add([make_enrolment("old", [1, 2, 3])])
    shutil.copytree(saved.parent / "origin", directory)  # as a service that was killed leaves it
    live.close()
    assert (directory / f"{FILE_NAME}-wal").stat().st_size

    done = restore(saved, directory, replace=True)

    assert done.replaced is not None
    assert [one.name for one in done.replaced.iterdir()] == [FILE_NAME]
    kept = {FILE_NAME, LOCK_NAME, done.replaced.name}
    assert {one.name for one in directory.iterdir()} == kept
    assert ids(done.replaced) == ["old"]
    assert len(ids(directory)) == 6


def test_whoever_was_erased_after_the_snapshot_does_not_come_back(full: Path, saved: Path) -> None:
    erase(full, identity="person-1", tracklet="t5")

    done = restore(saved, full, replace=True)

    assert done.erased == 3
    assert ids(full) == ["t0", "t2", "t3"]
    content = (full / FILE_NAME).read_bytes()
    assert b"person-1" not in content
    with EmbeddedGallery(full) as gallery:
        assert not [one for one in gallery.identities(limit=9).items if one.identity == "person-1"]


def test_ledgers_of_both_galleries_are_joined(full: Path, saved: Path) -> None:
    erase(full, tracklet="t1")
    snapshot(full, saved, overwrite=True)
    with EmbeddedGallery(full.parent / "other", clock=lambda: LATER) as other:
        fill(other)
        other.remove("t0")

    restore(saved, full.parent / "other", replace=True)

    assert ids(full.parent / "other") == ["t2", "t3", "t4", "t5"]
    mine, theirs = stored_ledger(full), stored_ledger(full.parent / "other")
    assert set(mine.entries) < set(theirs.entries)
    restore(saved, full.parent / "other", replace=True)
    assert ids(full.parent / "other") == ["t2", "t3", "t4", "t5"]


def test_a_ledger_that_was_kept_elsewhere_is_applied(full: Path, saved: Path) -> None:
    erase(full, identity="person-0")
    write_ledger(full, full.parent / "ledger.json")

    done = restore(saved, full.parent / "new", ledgers=[read_ledger(full.parent / "ledger.json")])

    assert done.erased == 2
    assert ids(full.parent / "new") == ["t1", "t2", "t4", "t5"]


def test_what_was_enrolled_again_before_the_snapshot_stays(full: Path) -> None:
    erase(full, tracklet="t0")
    with EmbeddedGallery(full) as gallery:
        again = make_enrolment("t0", [9, 9, 9], created_at=LATER + timedelta(seconds=1))
        gallery.add([again])
    snapshot(full, full.parent / "a")

    restore(full.parent / "a", full, replace=True)

    assert "t0" in ids(full)


def test_a_ledger_that_cannot_be_read_is_lost_only_when_told(full: Path, saved: Path) -> None:
    damaged = os.urandom(20_000)
    (full / FILE_NAME).write_bytes(damaged)

    with pytest.raises(SnapshotError, match="who was erased from it"):
        restore(saved, full, replace=True)
    assert (full / FILE_NAME).read_bytes() == damaged

    done = restore(saved, full, replace=True, lose_ledger=True)
    assert done.replaced is not None
    assert (done.replaced / FILE_NAME).read_bytes() == damaged
    assert len(ids(full)) == 6


def test_a_log_without_its_gallery_is_not_taken_for_one_of_the_new(
    saved: Path,
) -> None:
    directory = saved.parent / "new"
    directory.mkdir()
    (directory / f"{FILE_NAME}-wal").write_bytes(b"old log")

    with pytest.raises(SnapshotError, match="without a gallery"):
        restore(saved, directory)
    restore(saved, directory, replace=True, lose_ledger=True)

    assert not (directory / f"{FILE_NAME}-wal").exists()
    assert len(ids(directory)) == 6


def test_a_file_system_without_links_gets_copies(
    full: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_link(*_: Any, **__: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse_link)
    snapshot(full, full.parent / "a")
    done = restore(saved, full, replace=True)

    assert done.replaced is not None
    assert len(ids(done.replaced)) == len(ids(full)) == 6


KILLED = """
import shutil, signal, sqlite3
from index.gallery import Filters
from index.restore import restore
from index.store import Store

directory = directory / "kills"
shutil.copytree(sys.argv[1], directory)
saved, origin, target = directory / "saved.passerby", directory / "live", directory / "target"
point, last = 0, None

def die():
    global point
    point += 1
    if point == last:
        os.kill(os.getpid(), signal.SIGKILL)

def deadly(call):
    def called(*given, **more):
        die()
        result = call(*given, **more)
        die()
        return result
    return called

def attempt(at):
    '''Restore in a child that dies at a point; says whether it did.'''
    global last
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    last = at
    for name in ("link", "rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
        setattr(os, name, deadly(getattr(os, name)))
    sqlite3.connect = deadly(sqlite3.connect)
    restore(saved, target, replace=True, progress=lambda *_: die())
    os._exit(0)

def state():
    store = Store(target)
    try:
        records = store.page(Filters(), after=0, limit=1000)
        return [each.record.tracklet_id for each in records], len(store.erasures().entries)
    finally:
        store.close()

OLD, NEW = (["old"], 3), (["t0", "t2", "t3", "t5"], 5)
after = []
for at in range(1, 1000):
    shutil.rmtree(target, ignore_errors=True)
    if origin.exists():
        shutil.copytree(origin, target)
    if not attempt(at):
        break
    if origin.exists() or (target / "passerby.sqlite3").exists():
        after.append(state())
        assert after[-1] in (OLD, NEW, NEW_WITHOUT), (at, after[-1])
        if after[-1] == OLD:  # and what was left over is in nobody's way
            assert not attempt(None)
            assert state() == NEW, (at, state())
            if origin.exists():
                assert len([*target.glob("passerby.replaced-*")]) == 1, at
assert not (target / "passerby.restoring").exists()
assert after == sorted(after, key=lambda one: one != OLD)  # no way back
print(at, after.count(OLD) if origin.exists() else 0)
"""


def test_a_restore_killed_at_any_point_leaves_the_old_gallery_or_the_new_one(
    saved: Path,
) -> None:
    """The old one with a write-ahead log that holds all of it, and a ledger that bans p1."""
    live = EmbeddedGallery(saved.parent / "origin", clock=lambda: LATER)
    live.add(
        [make_enrolment("old", [1, 2, 3]), make_enrolment("x", [1, 2, 3], identity="person-1")]
    )
    live.add([make_enrolment("t4", [1, 2, 3])])
    live.remove_identity("person-1")
    live.remove("t4")
    copied = saved.parent / "copied"
    copied.mkdir()
    shutil.copy(saved, copied)
    shutil.copytree(saved.parent / "origin", copied / "live")
    live.close()

    said = run_python("NEW_WITHOUT = None" + KILLED, str(copied))

    points, old = map(int, said.split())
    assert points > 40
    assert 0 < old < points


def test_a_gallery_put_aside_by_a_killed_restore_goes_and_one_that_was_replaced_stays(
    full: Path, saved: Path
) -> None:
    """The first is the gallery that is still there; the second one nobody else has."""
    replaced = restore(saved, full, replace=True, clock=lambda: NOON).replaced
    killed = full / f"{REPLACED_NAME}20260101T000000000000Z"
    killed.mkdir()
    os.link(full / FILE_NAME, killed / FILE_NAME)
    unsound = full / f"{REPLACED_NAME}20260102T000000000000Z"
    unsound.mkdir()
    os.link(full / FILE_NAME, unsound / FILE_NAME)
    (unsound / f"{FILE_NAME}-wal").write_bytes(b"the only one")

    done = restore(saved, full, replace=True)

    assert replaced is not None
    assert done.others == (unsound.name, replaced.name)
    assert not killed.exists()
    assert len(ids(replaced)) == 6


def test_what_a_killed_command_left_is_removed_by_the_next_one_of_any_name(
    full: Path, saved: Path
) -> None:
    """Backups are named by their day; a copy of everybody would stay where nobody looks."""
    killed, works = full.parent / ".monday.passerby-making", full.parent / ".b.passerby-making"
    foreign = full.parent / ".mine.making"
    for one in (killed, foreign):
        one.mkdir()
        (one / FILE_NAME).write_bytes(saved.read_bytes())

    with workshop(works, SnapshotError):
        snapshot(full, full.parent / "tuesday")
        left = {one.name for one in full.parent.iterdir()}

    assert left == {"gallery", "tuesday", saved.name, works.name, foreign.name}


def test_what_a_killed_command_left_in_the_data_directory_is_removed_by_a_restore(
    full: Path, saved: Path
) -> None:
    killed = full / ".monday.passerby-making"
    killed.mkdir()
    (killed / FILE_NAME).write_bytes(saved.read_bytes())

    restore(saved, full, replace=True)

    assert not killed.exists()


def test_a_restore_to_an_empty_place_killed_at_any_point_leaves_nothing_or_all(
    saved: Path,
) -> None:
    copied = saved.parent / "copied"
    copied.mkdir()
    shutil.copy(saved, copied)

    said = run_python("NEW_WITHOUT = ([f't{n}' for n in range(6)], 0)" + KILLED, str(copied))

    assert int(said.split()[0]) > 20


def test_a_snapshot_killed_at_any_point_leaves_none_or_a_whole_one(full: Path) -> None:
    script = KILLED.partition("directory = directory")[0] + (
        """
from index.snapshot import check_snapshot, snapshot
target = directory.parent / "killed.passerby"
point, last = 0, None
"""
        + KILLED[KILLED.index("def die") : KILLED.index("def state")].replace(
            "restore(saved, target, replace=True,",
            "snapshot(directory, target,",
        )
        + """
whole = 0
for at in range(1, 1000):
    target.unlink(missing_ok=True)
    if not attempt(at):
        break
    if target.exists():
        assert check_snapshot(target).tracklets == 6
        whole += 1
assert sorted(path.name for path in directory.parent.glob(".*")) == []
print(at, whole)
"""
    )
    said = run_python(script, str(full))

    points, whole = map(int, said.split())
    assert points > 15
    assert 0 < whole < points


def test_a_full_disk_refuses_a_snapshot_and_a_restore_and_leaves_nothing(
    full: Path, saved: Path, tmp_path: Path, own_mounts: tuple[str, ...]
) -> None:
    script = f"""
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], check=True)
from index.restore import restore
from index.snapshot import snapshot
full, saved = Path({str(full)!r}), Path({str(saved)!r})
for room in range(0, 1_000_000, 20_000):
    (directory / "filler").write_bytes(bytes(1_000_000 - room))
    try:
        snapshot(full, directory / "a", overwrite=True)
        restore(saved, directory / "new")
        break
    except (StorageFullError, GalleryUnavailableError) as error:
        # The last pages of shared memory that SQLite cannot have, it calls an I/O error.
        assert "disk" in str(error), error
    left = sorted(path.name for path in directory.iterdir())
    assert left in (["filler"], ["a", "filler"]), left
else:
    raise AssertionError("never enough")
print(room > 100_000)
"""
    assert run_python(script, str(tmp_path), within=own_mounts) == "True\n"


def test_a_restore_that_fails_at_its_end_leaves_the_old_gallery(
    full: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    erase(full, tracklet="t0")
    replace = Path.replace

    def refuse_file(path: Path, target: Path) -> Path:
        if path.parent.name == WORK_NAME:
            raise OSError(28, os.strerror(28))
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse_file)
        with pytest.raises(StorageFullError):
            restore(saved, full, replace=True)

    assert ids(full) == ["t1", "t2", "t3", "t4", "t5"]
    assert {one.name for one in full.iterdir()} == {FILE_NAME, LOCK_NAME}


# The ledger alone


def test_a_ledger_comes_back_from_its_file_and_replaces_the_last_one(full: Path) -> None:
    target = full.parent / "ledger.json"
    with EmbeddedGallery(full) as gallery:  # also while somebody has it open
        assert write_ledger(full, target) == Erasures()
        gallery.remove_identity("person-1")
        write_ledger(full, target)
        expected = gallery.erasures()

    assert set(read_ledger(target).entries) == set(expected.entries)
    assert target.stat().st_mode & 0o777 == 0o600
    assert b"person-1" not in target.read_bytes()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("{}"),
        lambda path: path.write_bytes(b"\xff"),
        lambda path: path.mkdir(),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.with_name("other").touch(),
    ],
    ids=["empty", "bytes", "directory", "deep", "missing"],
)
def test_what_is_no_ledger_is_refused(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "ledger.json")

    with pytest.raises(LedgerError, match=r"ledger\.json"):
        read_ledger(tmp_path / "ledger.json")


def test_half_precision_and_a_saved_index_go_and_come_as_they_should(directory: Path) -> None:
    """The embeddings stay as they are kept; the index of what was replaced does not survive."""
    with EmbeddedGallery(directory, storage="float16", index="HNSW8") as gallery:
        gallery.add([make_enrolment(f"t{row}", [row, 0.1, 3]) for row in range(50)])
        expected = gallery.embedding("t7").tolist()
    saved, index = directory.parent / "saved", directory / "passerby.index"
    made = snapshot(directory, saved)
    assert index.exists()

    restore(saved, directory, replace=True)

    assert made.dimension == 3
    assert not index.exists()
    with EmbeddedGallery(directory, storage="float16", index="HNSW8") as gallery:
        assert gallery.embedding("t7").tolist() == expected


def test_the_name_of_what_was_replaced_says_when(full: Path, saved: Path) -> None:
    done = restore(saved, full, replace=True, clock=lambda: LATER)

    assert done.replaced == full / f"{REPLACED_NAME}20261122T130000000000Z"


def test_python_that_snapshots_needs_no_faiss() -> None:
    """A command that only copies files should not wait for what it does not use."""
    script = "import sys, index.snapshot, index.restore; print('faiss' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout == "False\n"
