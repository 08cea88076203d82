"""A stored embedding that is not what was stored is never loaded, answered with, or passed on."""

import json
import re
import shutil
import sqlite3
import traceback
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from bench.gallery_truth import CALIBRATION
from index.archive import SnapshotError
from index.calibration_source import read_labelled
from index.checksums import checksum_of, checksum_of_frames, checksum_of_values
from index.embedded import EmbeddedGallery
from index.exporting import export_gallery
from index.gallery import DamagedGalleryError, Filters, GalleryUnavailableError, NotFoundError
from index.ledger import LedgerError, read_ledger, stored_ledger, write_ledger
from index.mending import erase_stored, mend
from index.restore import restore
from index.saved import FILE_NAME as INDEX_NAME
from index.schema import APPLICATION_ID, MIGRATIONS
from index.snapshot import snapshot
from index.store import FILE_NAME, RESTORING_NAME, Store
from index.succession import NextEmbedding, keep, pending, take_over
from index.unnamed import read_unnamed
from index.vector_storage import Storage, to_blob
from tests.index.conftest import Enrol, make_enrolment

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
ROWS, DIMENSION = 60, 64
REFUSAL = "expected the embedding of the tracklet t7 as it was stored"


def filled(directory: Path, *, index: str = "Flat", storage: Storage = "float32") -> None:
    rng = np.random.default_rng(0)
    with EmbeddedGallery(directory, index=index, storage=storage) as gallery:
        gallery.add(
            [
                make_enrolment(
                    f"t{row}",
                    rng.integers(-99, 99, DIMENSION).tolist(),
                    identity=f"p{row % 9}",
                    created_at=NOON,
                )
                for row in range(ROWS)
            ]
        )


@pytest.fixture
def full(directory: Path) -> Path:
    """A gallery's directory; t0 to t59 are in it, and nobody has it open."""
    filled(directory)
    return directory


def run_sql(directory: Path, script: str, *values: object) -> None:
    with closing(sqlite3.connect(directory / FILE_NAME, isolation_level=None)) as connection:
        connection.execute(script, values)


def spoil(directory: Path, tracklet_id: str = "t7") -> None:
    """Change one number of a stored embedding, as a disk might."""
    with closing(sqlite3.connect(directory / FILE_NAME, isolation_level=None)) as connection:
        [key, vector] = connection.execute(
            "SELECT key, vector FROM tracklets JOIN embeddings USING (key) WHERE tracklet_id = ?",
            (tracklet_id,),
        ).fetchone()
        changed = vector[:5] + bytes([vector[5] ^ 1]) + vector[6:]
        connection.execute("UPDATE embeddings SET vector = ? WHERE key = ?", (changed, key))


def files(directory: Path) -> dict[str, bytes]:
    """All but what is made at each opening, and says nothing."""
    left_out = ("-shm", ".lock")
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if not path.name.endswith(left_out)
    }


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_a_byte_that_flips_anywhere_in_an_embedding_is_told_by_name_and_nothing_changes(
    directory: Path, storage: Storage
) -> None:
    filled(directory, storage=storage)
    path = directory / FILE_NAME
    with closing(sqlite3.connect(path)) as connection:
        [vector] = connection.execute("SELECT vector FROM embeddings WHERE key = 8").fetchone()
    sound = path.read_bytes()
    [place] = [at for at in range(len(sound)) if sound.startswith(vector, at)]

    for offset in range(0, len(vector), 9):
        at = place + offset
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 4]) + sound[at + 1 :])
        before = files(directory)

        with pytest.raises(DamagedGalleryError, match=REFUSAL):
            EmbeddedGallery(directory)

        assert files(directory) == before
    path.write_bytes(sound)
    EmbeddedGallery(directory).close()


def test_a_refusal_leaves_the_write_ahead_log_where_it_is(full: Path) -> None:
    """As a kill left it: it may hold what somebody wants who mends the rest."""
    spoil(full)
    killed = full.with_name("killed")
    store = Store(full)
    with store.transaction() as transaction:
        transaction.insert(make_enrolment("new", [1] * DIMENSION))
        transaction.commit()
    shutil.copytree(full, killed)
    store.close()
    before = files(killed)
    assert before[f"{FILE_NAME}-wal"]

    for _ in range(2):
        with pytest.raises(DamagedGalleryError, match=REFUSAL):
            EmbeddedGallery(killed)
        assert files(killed) == before

    erase_stored(killed, "t7")
    with EmbeddedGallery(killed) as gallery:
        assert gallery.counts().tracklets == ROWS
        assert gallery.embedding("new").tolist() == [1] * DIMENSION


@pytest.mark.parametrize(
    "script",
    [
        "UPDATE tracklets SET vector_checksum = vector_checksum + 1 WHERE tracklet_id = 't7'",
        "UPDATE tracklets SET vector_checksum = NULL WHERE tracklet_id = 't7'",
        "UPDATE embeddings SET vector = (SELECT max(vector) FROM embeddings) WHERE key = 8",
        "UPDATE embeddings SET vector = CAST(vector AS TEXT) WHERE key = 8",
    ],
)
def test_an_embedding_of_another_tracklet_and_one_without_a_checksum_are_damage(
    full: Path, script: str
) -> None:
    run_sql(full, script)

    with pytest.raises(DamagedGalleryError, match=r"t7 as it was stored|one model and size"):
        EmbeddedGallery(full)


def test_an_index_is_not_trained_with_a_damaged_embedding(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.factories._LEAST_TRAINING_ROWS", 40)
    filled(directory)
    spoil(directory)

    with pytest.raises(DamagedGalleryError, match=REFUSAL):
        EmbeddedGallery(directory, index="IVF1,Flat")


def test_a_damaged_embedding_is_in_no_answer_of_an_index_that_was_saved_before(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a start reads no embeddings; those of an answer are compared with their checksums."""
    monkeypatch.setattr("index.factories._LEAST_TRAINING_ROWS", 40)
    monkeypatch.setattr("index.derived._FEW_ROWS", 0)
    filled(directory, index="IVF1,Flat")
    with EmbeddedGallery(directory, index="IVF1,Flat") as gallery:
        near, far = gallery.embedding("t7"), gallery.embedding("t8")
    spoil(directory)

    with EmbeddedGallery(directory, index="IVF1,Flat") as gallery:
        found = gallery.search(far, model="trsa-test", top_k=1, group_by="tracklet")
        assert [match.record.tracklet_id for match in found.matches] == ["t8"]
        with pytest.raises(GalleryUnavailableError, match=REFUSAL):
            gallery.search(near, model="trsa-test", top_k=1, group_by="tracklet")
        gallery.remove("t7")
        found = gallery.search(near, model="trsa-test", top_k=500, group_by="tracklet")
        assert len(found.matches) == ROWS - 1


def test_a_damaged_embedding_is_not_given(full: Path) -> None:
    with EmbeddedGallery(full) as gallery:
        spoil(full)

        with pytest.raises(GalleryUnavailableError, match=REFUSAL):
            gallery.embedding("t7")
        with pytest.raises(NotFoundError):
            gallery.embedding("nobody")
        assert gallery.embedding("t8").shape == (DIMENSION,)


def outcome_of(check: Callable[[], None]) -> str | None:
    try:
        check()
    except GalleryUnavailableError as error:
        [told] = re.findall(r"\w+ as it was stored", str(error))
        return str(told)
    return None


def test_checks_find_each_damaged_embedding_in_time_and_are_content_once_it_is_erased(
    full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.store._CHECKED_AT_ONCE", 20)
    with EmbeddedGallery(full) as gallery:
        for _ in range(7):
            gallery.check()
        spoil(full, "t50")

        outcomes = [outcome_of(gallery.check) for _ in range(9)]
        assert outcomes[-5:] == ["t50 as it was stored"] * 5  # by then, and from then on

        gallery.remove("t50")
        for _ in range(7):
            gallery.check()


def test_neither_a_snapshot_nor_an_export_passes_a_damaged_embedding_on(full: Path) -> None:
    spoil(full)
    makers: list[Callable[[Path], object]] = [
        lambda target: snapshot(full, target),
        lambda target: export_gallery(full, target),
    ]

    for number, make in enumerate(makers):
        target = full.parent / f"made{number}"
        with pytest.raises(DamagedGalleryError, match=REFUSAL):
            make(target)
        assert not target.exists()


def test_whatever_changes_beside_an_embedding_leaves_its_checksum_right(full: Path) -> None:
    with EmbeddedGallery(full) as gallery:
        gallery.update("t7", {"identity": "p1", "metadata": {"a": [1]}})
        gallery.rename_identity("p1", "p99")
        gallery.assign(["t8", "t9"], "p99")
        gallery.remove("t3")
    snapshot(full, full.parent / "saved")
    restore(full.parent / "saved", full.parent / "restored")

    for directory in (full, full.parent / "restored"):
        with EmbeddedGallery(directory) as gallery:
            assert gallery.counts().tracklets == ROWS - 1
            gallery.check()


def test_a_gallery_passes_to_another_model_with_the_checksums_of_the_new_embeddings(
    full: Path,
) -> None:
    rng = np.random.default_rng(1)
    new = rng.normal(size=(ROWS, 16)).astype(np.float32)
    made = [NextEmbedding(row + 1, embedding, 0.1) for row, embedding in enumerate(new)]
    keep(full, "trsa-next", made)
    take_over(full, "trsa-next")

    with EmbeddedGallery(full) as gallery:
        assert gallery.model == "trsa-next"
        assert np.array_equal(gallery.embedding("t7"), new[7])


def test_an_embedding_that_is_damaged_while_it_is_put_aside_is_found_when_it_has_taken_over(
    full: Path,
) -> None:
    made = [NextEmbedding(row + 1, np.ones(16, np.float32), 0.1) for row in range(ROWS)]
    keep(full, "trsa-next", made)
    damaged = np.zeros(16, np.float32).tobytes()
    run_sql(full, "UPDATE succeeding_embeddings SET vector = ? WHERE key = 8", damaged)
    take_over(full, "trsa-next")

    with pytest.raises(DamagedGalleryError, match=REFUSAL):
        EmbeddedGallery(full)


def test_a_damaged_tracklet_can_be_erased_without_opening_the_gallery(full: Path) -> None:
    spoil(full)

    erased = erase_stored(full, "t7", clock=lambda: NOON)

    assert erased == "p7"
    with EmbeddedGallery(full) as gallery:
        assert len(gallery.list(Filters(), limit=100).records) == ROWS - 1
        assert len(gallery.erasures().entries) == 1
        with pytest.raises(GalleryUnavailableError, match="already open"):
            erase_stored(full, "t8")
    with pytest.raises(NotFoundError):
        erase_stored(full, "t7")
    with pytest.raises(GalleryUnavailableError, match="got no"):
        erase_stored(full.parent / "elsewhere", "t7")
    assert not (full.parent / "elsewhere").exists()


def make_gallery_of_version_3(directory: Path, storage: Storage) -> dict[str, bytes]:
    """As the version before checksums wrote it; returns the embeddings' bytes by id."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    vectors = {
        f"t{row}-\u00e9": to_blob(rng.integers(-9, 9, 32).astype(np.float32), storage)
        for row in range(1, 30)
    }
    with closing(sqlite3.connect(directory / FILE_NAME)) as connection:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.executescript("".join(MIGRATIONS[:3]))
        connection.executescript(
            f"PRAGMA user_version = 3; PRAGMA application_id = {APPLICATION_ID}"
        )
        connection.execute("INSERT INTO properties VALUES ('storage', ?)", (storage,))
        for key, (name, vector) in enumerate(vectors.items(), start=1):
            connection.execute(
                "INSERT INTO tracklets VALUES (?, ?, ?, 'c1', NULL, NULL, '{}', 40, 15, "
                "'trsa-test', 1795348800000000, 'content', NULL, NULL)",
                (key, name, f"p{key % 5}"),
            )
            connection.execute("INSERT INTO embeddings VALUES (?, ?)", (key, vector))
        connection.execute(
            "INSERT INTO succeeding_embeddings VALUES (3, 'trsa-next', ?, 0.5)", (b"\0\0\x80?" * 4,)
        )
        connection.commit()
    return vectors


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_a_gallery_of_version_3_gets_checksums_of_what_it_holds(
    directory: Path, storage: Storage
) -> None:
    vectors = make_gallery_of_version_3(directory, storage)

    with EmbeddedGallery(directory) as gallery:
        records = gallery.list(Filters(), limit=100).records
        found = {each.tracklet_id: gallery.embedding(each.tracklet_id) for each in records}

    assert [*found] == [*vectors]
    assert all(to_blob(found[name], storage) == vectors[name] for name in vectors)
    with closing(sqlite3.connect(directory / FILE_NAME)) as connection:
        rows = connection.execute("SELECT tracklet_id, vector_checksum FROM tracklets").fetchall()
        aside = connection.execute("SELECT key, checksum FROM succeeding_embeddings").fetchall()
    expected = {name: zlib.crc32(name.encode() + vector) for name, vector in vectors.items()}
    assert dict(rows) == expected
    assert aside == [(3, zlib.crc32("t3-\u00e9".encode() + b"\0\0\x80?" * 4))]
    spoil(directory, "t4-\u00e9")
    with pytest.raises(DamagedGalleryError, match="t4-\u00e9 as it was stored"):
        EmbeddedGallery(directory)


def test_a_snapshot_of_a_gallery_of_version_3_can_be_made_and_restored(directory: Path) -> None:
    make_gallery_of_version_3(directory, "float32")
    saved, restored = directory.parent / "saved", directory.parent / "restored"

    snapshot(directory, saved)
    restore(saved, restored)

    with EmbeddedGallery(restored) as gallery:
        assert gallery.counts().tracklets == 29


def test_the_checksum_is_that_of_id_and_bytes_together() -> None:
    assert checksum_of("123", b"456789") == 0xCBF43926  # the CRC-32 of "123456789", as published
    assert checksum_of("123", None) is None
    assert checksum_of(None, b"456789") is None


def test_what_a_killed_restore_left_is_gone_when_the_gallery_is_opened(
    full: Path, enrol: Enrol
) -> None:
    left = full / RESTORING_NAME
    left.mkdir()
    (left / FILE_NAME).write_bytes(b"embeddings of people")

    with EmbeddedGallery(full) as gallery:
        assert not left.exists()
        gallery.add([enrol("new", [1] * DIMENSION)])


CHANGES = [
    ("tracklet_id", "t8-"),
    ("identity", "p8"),
    ("identity", None),
    ("identity", b"p7"),
    ("camera", "c2"),
    ("start_time", 7),
    ("metadata", "{"),
    ("metadata", '{"n":1}'),
    ("frames_used", 14),
    ("model", "trsa-tesu"),
    ("created_at", 2**62),
    ("content", "another"),
    ("expires_at", 2**50),
    ("quality", "["),
    ("strip_checksum", 5),
    ("record_checksum", None),
]


@pytest.mark.parametrize(("column", "value"), CHANGES)
def test_a_record_that_is_not_what_was_stored_ends_the_start_by_name_and_can_be_erased(
    full: Path, column: str, value: object
) -> None:
    run_sql(full, f"UPDATE tracklets SET {column} = ? WHERE tracklet_id = 't7'", value)  # noqa: S608
    named = "t8-" if column == "tracklet_id" else "t7"
    before = files(full)

    with pytest.raises(DamagedGalleryError, match=f"{named} as it was stored|2 models"):
        EmbeddedGallery(full)
    assert files(full) == before

    erase_stored(full, named)
    with EmbeddedGallery(full) as gallery:
        assert gallery.counts().tracklets == ROWS - 1


@pytest.mark.parametrize(("column", "value"), CHANGES)
def test_a_record_that_changes_while_a_gallery_is_open_is_not_shown_and_not_answered_with(
    full: Path, column: str, value: object
) -> None:
    with EmbeddedGallery(full) as gallery:
        query = gallery.embedding("t7")
        run_sql(full, f"UPDATE tracklets SET {column} = ? WHERE tracklet_id = 't7'", value)  # noqa: S608

        for ask in (
            lambda: gallery.list(Filters(), limit=100),
            lambda: gallery.search(query, model="trsa-test", top_k=1, group_by="tracklet"),
            gallery.check,
        ):
            with pytest.raises(GalleryUnavailableError, match="as it was stored"):
                ask()
        assert gallery.get("t9").tracklet_id == "t9"


def test_renaming_does_not_make_a_damaged_record_sound(full: Path) -> None:
    with EmbeddedGallery(full) as gallery:
        run_sql(full, "UPDATE tracklets SET camera = 'c9' WHERE tracklet_id = 't7'")

        gallery.rename_identity("p7", "p99")

        with pytest.raises(GalleryUnavailableError, match="t7 as it was stored"):
            gallery.get("t7")
        assert gallery.get("t16").identity == "p99"
        with pytest.raises(GalleryUnavailableError, match="t7 as it was stored"):
            gallery.update("t7", {"camera": "c3"})


def test_passing_to_another_model_does_not_make_a_damaged_record_sound(full: Path) -> None:
    made = [NextEmbedding(row + 1, np.ones(16, np.float32), 0.1) for row in range(ROWS)]
    keep(full, "trsa-next", made)
    run_sql(full, "UPDATE tracklets SET camera = 'c9' WHERE tracklet_id = 't7'")

    with pytest.raises(DamagedGalleryError, match="t7 as it was stored"):
        take_over(full, "trsa-next")


@pytest.mark.parametrize("column", ["identity", "camera", "metadata", "content"])
def test_a_text_that_is_none_is_told_without_showing_it(full: Path, column: str) -> None:
    run_sql(
        full,
        f"UPDATE tracklets SET {column} = CAST(x'6A6F65FF' AS TEXT) WHERE tracklet_id = 't7'",  # noqa: S608
    )

    with pytest.raises((DamagedGalleryError, GalleryUnavailableError), match="damaged") as refusal:
        EmbeddedGallery(full)
    assert "joe" not in "".join(traceback.format_exception(refusal.value))

    assert mend(full).tracklets == ("t7",)
    erase_stored(full, "t7")
    with EmbeddedGallery(full) as gallery:
        assert gallery.counts().tracklets == ROWS - 1


@pytest.mark.parametrize("stored_id", ["CAST(x'7437FF' AS TEXT)", "x'7437FF'", "x'7437'", "7"])
def test_a_tracklet_whose_id_is_no_text_any_more_is_erased_by_what_mending_calls_it(
    full: Path, stored_id: str
) -> None:
    run_sql(full, f"UPDATE tracklets SET tracklet_id = {stored_id} WHERE key = 8")  # noqa: S608
    with pytest.raises(DamagedGalleryError):
        EmbeddedGallery(full)

    [named] = mend(full).tracklets
    assert erase_stored(full, named) == "p7"

    with EmbeddedGallery(full) as gallery:
        assert gallery.counts().tracklets == ROWS - 1
        assert len(gallery.erasures().entries) == 1


@pytest.fixture
def pictured(directory: Path) -> Path:
    """Three tracklets with a strip and two kept frames each."""
    with EmbeddedGallery(directory) as gallery:
        for row in range(3):
            enrolment = make_enrolment(
                f"t{row}", [row] * 8, strip=f"strip{row}".encode(), frames=(b"frame", b"other")
            )
            gallery.add([enrolment])
    return directory


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ("UPDATE strips SET jpeg = x'00' WHERE key = 2", "film strip"),
        ("DELETE FROM strips WHERE key = 2", "film strip"),
        ("UPDATE frames SET content = x'00' WHERE key = 2 AND position = 1", "kept frames"),
        ("UPDATE frames SET position = 5 WHERE key = 2 AND position = 0", "kept frames"),
        ("DELETE FROM frames WHERE key = 2", "kept frames"),
    ],
)
def test_a_picture_that_is_not_what_was_stored_is_told(
    pictured: Path, script: str, what: str
) -> None:
    run_sql(pictured, script)
    read = EmbeddedGallery.strip if what == "film strip" else EmbeddedGallery.frames

    with EmbeddedGallery(pictured) as gallery:
        assert gallery.strip("t0") == b"strip0"
        assert gallery.frames("t0") == (b"frame", b"other")
        with pytest.raises(GalleryUnavailableError, match=f"the {what} of the tracklet t1 as"):
            read(gallery, "t1")
    with pytest.raises(DamagedGalleryError, match=f"the {what} of the tracklet t1 as"):
        snapshot(pictured, pictured.parent / "saved")
    if what == "film strip":
        with pytest.raises(DamagedGalleryError, match=f"the {what} of the tracklet t1 as"):
            export_gallery(pictured, pictured.parent / "exported", strips=True)
    else:
        with pytest.raises(DamagedGalleryError, match=f"the {what} of the tracklet t1 as"):
            pending(pictured, "trsa-next", most=9)
    assert mend(pictured).tracklets == ("t1",)


def test_a_gallery_of_version_4_gets_checksums_of_its_pictures_and_its_ledger(
    pictured: Path,
) -> None:
    """As the version before left it: without the columns of version 5."""
    with EmbeddedGallery(pictured) as gallery:
        gallery.remove("t2")
        ledger = gallery.erasures()
    back_to_version_4(pictured)

    with EmbeddedGallery(pictured) as gallery:
        assert gallery.strip("t0") == b"strip0"
        assert gallery.frames("t1") == (b"frame", b"other")
        assert gallery.erasures() == ledger
        gallery.update("t0", {"identity": "p1"})
    with EmbeddedGallery(pictured) as gallery:
        gallery.check()


def back_to_version_4(directory: Path) -> None:
    run_script(
        directory,
        "ALTER TABLE tracklets DROP COLUMN strip_checksum;"
        "ALTER TABLE tracklets DROP COLUMN frames_checksum;"
        "ALTER TABLE tracklets DROP COLUMN record_checksum;"
        "ALTER TABLE erasures DROP COLUMN checksum;"
        "ALTER TABLE properties DROP COLUMN checksum;"
        "PRAGMA user_version = 4",
    )


def run_script(directory: Path, script: str) -> None:
    with closing(sqlite3.connect(directory / FILE_NAME)) as connection:
        connection.executescript(script)


def test_an_older_gallery_whose_records_differ_from_their_indexes_is_refused_as_it_is(
    full: Path,
) -> None:
    """Nobody can tell which is right: it has no checksums yet."""
    back_to_version_4(full)
    spoil_bytes(full, b"t7p7{}", b"t7q7{}")  # in the table
    before = files(full)

    with pytest.raises(DamagedGalleryError, match="missing from index"):
        EmbeddedGallery(full)

    assert files(full) == before


@pytest.mark.parametrize(
    "script",
    [
        "UPDATE embeddings SET vector = zeroblob(length(vector)) WHERE key = 8",
        "UPDATE tracklets SET metadata = '{' WHERE key = 8",
        "UPDATE tracklets SET quality = '[' WHERE key = 8",
    ],
)
def test_damage_in_an_older_gallery_is_told_before_it_gets_the_newest_form(
    full: Path, script: str
) -> None:
    back_to_version_4(full)
    run_sql(full, script)
    before = files(full)

    with pytest.raises(DamagedGalleryError, match="of the tracklet t7 as it was stored"):
        EmbeddedGallery(full)
    assert files(full) == before

    erase_stored(full, "t7")
    with EmbeddedGallery(full) as gallery:
        assert gallery.counts().tracklets == ROWS - 1


@pytest.mark.parametrize("key", [7000, -8])
def test_a_record_whose_key_is_another_one_is_told(full: Path, key: int) -> None:
    """The key is not in the checksum of the record, but leads to its embedding."""
    run_sql(full, "UPDATE tracklets SET key = ? WHERE key = 8", key)
    before = files(full)

    with pytest.raises(DamagedGalleryError, match="embedding of the tracklet t7 as it was stored"):
        EmbeddedGallery(full)
    assert files(full) == before


@pytest.mark.parametrize("key", [-8, -1])
def test_a_tracklet_with_a_key_that_no_enrolment_gives_is_told(full: Path, key: int) -> None:
    for table in ("tracklets", "embeddings"):
        run_sql(full, f"UPDATE {table} SET key = ? WHERE key = 8", key)  # noqa: S608

    with pytest.raises(DamagedGalleryError, match="tracklet t7"):
        EmbeddedGallery(full)


@pytest.mark.parametrize("table", ["strips", "frames", "embeddings"])
def test_what_belongs_to_no_tracklet_is_told_by_snapshots(pictured: Path, table: str) -> None:
    run_sql(pictured, "DELETE FROM tracklets WHERE key = 2")  # nobody asks for foreign keys here
    for other in {"strips", "frames", "embeddings"} - {table}:
        run_sql(pictured, f"DELETE FROM {other} WHERE key = 2")  # noqa: S608

    with pytest.raises(DamagedGalleryError, match=r"belong to none|for 2 tracklets, got 3"):
        snapshot(pictured, pictured.parent / "saved")
    assert mend(pictured).orphans == (2 if table == "frames" else 1)
    assert mend(pictured).orphans == 0
    snapshot(pictured, pictured.parent / "saved")


def test_mending_leaves_no_saved_index_with_vectors_of_nobody(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.factories._LEAST_TRAINING_ROWS", 40)
    filled(directory, index="IVF1,Flat")
    assert (directory / INDEX_NAME).exists()
    run_sql(directory, "DELETE FROM tracklets WHERE key = 8")

    assert mend(directory).orphans == 1

    assert not (directory / INDEX_NAME).exists()


def test_an_index_on_the_properties_that_is_damaged_hides_none_of_them(directory: Path) -> None:
    filled(directory, storage="float16")
    with EmbeddedGallery(directory) as gallery:
        gallery.set_calibration(replace(CALIBRATION, model="trsa-test"))
    content = (directory / FILE_NAME).read_bytes()
    # In the index the name is followed by the row's number alone, in the table by the JSON.
    places = [
        at
        for at in range(len(content))
        if content.startswith(b"calibration", at) and content[at + 11 : at + 12] != b"{"
    ]
    spoilt = 0
    for place in places:
        changed = content[:place] + b"b" + content[place + 1 :]
        (directory / FILE_NAME).write_bytes(changed)
        try:
            with EmbeddedGallery(directory) as gallery:
                assert gallery.calibration() is not None
            spoilt += 1
        except DamagedGalleryError:
            pass
    assert spoilt


def spoil_bytes(directory: Path, old: bytes, new: bytes) -> None:
    """Change what is in the file once."""
    path = directory / FILE_NAME
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def test_an_index_that_differs_from_sound_records_is_made_anew(
    full: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil_bytes(full, b"p7\x08", b"q7\x08")  # in the index on identities, which ends with the key
    with closing(sqlite3.connect(full / FILE_NAME)) as connection:
        [verdict] = connection.execute("PRAGMA integrity_check(1)").fetchone()
        assert "missing from index" in verdict

    with EmbeddedGallery(full) as gallery:
        assert gallery.identity("p7").tracklets == 6
        with pytest.raises(NotFoundError):
            gallery.identity("q7")

    assert "an index of the gallery's records was damaged" in caplog.text
    with closing(sqlite3.connect(full / FILE_NAME)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("column", ["digest", "kind", "erased_at", "salt", "checksum"])
def test_an_entry_of_the_ledger_that_is_not_what_was_entered_is_told_and_can_be_dropped(
    full: Path, column: str
) -> None:
    with EmbeddedGallery(full) as gallery:
        gallery.remove("t7")
        gallery.remove("t8")
        sound = gallery.erasures()
    wrong = {"kind": "'identity'", "erased_at": "1", "checksum": "NULL"}.get(column, "x'00'")
    run_sql(
        full,
        f"UPDATE erasures SET {column} = {wrong} "  # noqa: S608
        "WHERE digest = (SELECT min(digest) FROM erasures)",
    )
    before = files(full)

    readers: list[Callable[[], object]] = [
        lambda: EmbeddedGallery(full),
        lambda: stored_ledger(full),
        lambda: snapshot(full, full.parent / "saved"),
        lambda: export_gallery(full, full.parent / "exported"),
    ]
    for read in readers:
        with pytest.raises(DamagedGalleryError, match="1 of 2 entries are damaged"):
            read()
    assert files(full) == before

    assert mend(full).erasures == 1
    with EmbeddedGallery(full) as gallery:
        assert {*gallery.erasures().entries} < {*sound.entries}
        assert len(gallery.erasures().entries) == 1


def test_a_damaged_ledger_does_not_let_an_older_snapshot_bring_somebody_back(full: Path) -> None:
    saved = full.parent / "saved"
    snapshot(full, saved)
    with EmbeddedGallery(full) as gallery:
        gallery.remove("t7")
    run_sql(full, "UPDATE erasures SET erased_at = 5")

    with pytest.raises(SnapshotError, match="entries are damaged"):
        restore(saved, full, replace=True)

    restored = restore(saved, full, replace=True, lose_ledger=True)
    assert restored.erased == 0


def test_a_ledger_file_that_is_not_what_was_written_is_refused(full: Path) -> None:
    with EmbeddedGallery(full) as gallery:
        gallery.remove("t7")
    file = full.parent / "ledger.json"
    ledger = write_ledger(full, file)
    assert read_ledger(file) == ledger
    text = file.read_text()
    place = text.index('"digest": "') + 12

    for other in (
        text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :],
        text.replace('"kind": "tracklet"', '"kind": "identity"'),
        text.replace('"checksum": "', '"checksum": "0'),
    ):
        file.write_text(other)
        with pytest.raises(LedgerError, match="damaged"):
            read_ledger(file)

    older = json.loads(text)
    del older["checksum"]  # as versions before this one wrote it
    file.write_text(json.dumps(older))
    assert read_ledger(file) == ledger


@pytest.mark.parametrize("name", ["calibration", "erasure-salt", "saved-index", "storage"])
def test_a_property_that_is_not_what_was_stored_is_told_and_can_be_dropped(
    directory: Path, name: str
) -> None:
    filled(directory, storage="float16")
    with EmbeddedGallery(directory) as gallery:
        gallery.remove("t7")
        gallery.set_calibration(replace(CALIBRATION, model="trsa-test"))
        vector = gallery.embedding("t8")
    run_sql(directory, "INSERT OR IGNORE INTO properties VALUES ('saved-index', 'x', 1)")
    run_sql(directory, "UPDATE properties SET value = value || ' ' WHERE name = ?", name)
    if name != "saved-index":
        run_sql(directory, "DELETE FROM properties WHERE name = 'saved-index'")
    before = files(directory)

    with pytest.raises(DamagedGalleryError, match=f"the gallery's {name} as it was stored"):
        EmbeddedGallery(directory)
    assert files(directory) == before

    assert mend(directory).properties == (name,)
    with EmbeddedGallery(directory) as gallery:
        assert gallery.storage == "float16"
        assert gallery.embedding("t8").tolist() == vector.tolist()
        assert (gallery.calibration() is None) == (name == "calibration")
        gallery.remove("t8")
        assert len(gallery.erasures().entries) == 2


def test_calibrating_and_grouping_refuse_what_is_not_as_it_was_stored(full: Path) -> None:
    spoil(full)

    with pytest.raises(DamagedGalleryError, match=REFUSAL):
        read_labelled(full)
    run_sql(full, "UPDATE tracklets SET identity = NULL WHERE tracklet_id = 't8'")
    with pytest.raises(DamagedGalleryError, match="record of the tracklet t8"):
        read_unnamed(full, most=9)


def test_the_checksum_of_values_is_that_of_their_json() -> None:
    values = ("t1", None, 3, "\u00e9", b"\xff")

    assert checksum_of_values(values) == zlib.crc32(b'["t1",null,3,"\\u00e9","ff"]')
    assert checksum_of_frames("t", ()) is None
    assert checksum_of_frames("t", (b"a", b"b")) != checksum_of_frames("t", (b"b", b"a"))
