"""What a gallery withstands: long lives, kills, damaged files, full disks.

The long runs are commands: `python -m bench.gallery durability`, `python -m bench.gallery kills`.
"""

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from bench.gallery_truth import MODEL, MismatchError
from bench.gallery_walk import small_limits, walk
from index.derived import Derived
from index.embedded import EmbeddedGallery
from index.gallery import (
    DamagedGalleryError,
    Filters,
    GalleryError,
    GalleryUnavailableError,
    NotFoundError,
    TrackletRecord,
)
from index.saved import FILE_NAME as SAVED_NAME
from index.store import FILE_NAME, LOCK_NAME
from index.vector_storage import Storage
from tests.index.conftest import make_enrolment
from tests.index.test_faults import own_mounts, run_python

__all__ = ["own_mounts"]

ROOT = Path(__file__).parents[2]
LOG_NAME, SHARED_NAME = f"{FILE_NAME}-wal", f"{FILE_NAME}-shm"
FACTORY = "IVF2,Flat"  # a kind that is saved
DIMENSION = 256
PAGE_BYTES = 4096
Stored = dict[str, tuple[TrackletRecord, list[float], bytes | None]]


@pytest.mark.parametrize(
    ("index", "storage"), [("Flat", "float32"), (FACTORY, "float32"), ("Flat", "float16")]
)
def test_a_random_walk_leaves_what_a_dictionary_says(
    index: str, storage: Storage, fast_disk: Path | None
) -> None:
    """An error names the seed."""
    counts = walk(400, seed=0, index=index, storage=storage, folder=fast_disk)

    assert counts["restart"] > 0


def test_the_walk_notices_a_row_that_stays_in_memory(
    fast_disk: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Derived, "remove", lambda *_: None)

    with pytest.raises(MismatchError, match="seed 0, after"):
        walk(400, seed=0, folder=fast_disk)


def test_the_walk_notices_a_change_that_is_not_committed(
    fast_disk: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.store.Transaction.name", lambda *_: None)

    with pytest.raises(MismatchError, match="seed 0, after"):
        walk(400, seed=0, folder=fast_disk)


def test_kills_at_random_and_at_named_points_lose_nothing_and_bring_nobody_back() -> None:
    """A thousand are a command."""
    command = [sys.executable, "-m", "bench.gallery", "kills", "--kills", "21", "--seed", "0"]

    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was lost, nothing came back: 21 kills" in done.stdout


class Life(NamedTuple):
    """A gallery's directory, and what it held after each of its last operations."""

    directory: Path
    states: list[Stored]

    @property
    def truth(self) -> Stored:
        """What it holds."""
        return self.states[-1]


class Outcome(NamedTuple):
    """What came of opening: what was there, or why it was refused, and which files changed then."""

    stored: Stored | None
    refusal: str = ""
    changed: frozenset[str] = frozenset()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A saved index that is of no use is logged, each time."""
    log = logging.getLogger("index")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


@pytest.fixture
def small() -> Iterator[None]:
    with small_limits():
        yield


@pytest.fixture
def closed(directory: Path, small: None) -> Life:  # noqa: ARG001
    """Closed as it should be: the store, the saved index, the lock."""
    gallery, states = lived(directory)
    gallery.close()
    return Life(directory, states)


@pytest.fixture
def killed(directory: Path, small: None) -> Life:  # noqa: ARG001
    """As a kill leaves it: with a write-ahead log that holds the last operations."""
    gallery, states = lived(directory)
    copy = directory.with_name("killed")
    shutil.copytree(directory, copy)
    gallery.close()
    assert (copy / LOG_NAME).stat().st_size
    return Life(copy, states)


def lived(directory: Path) -> tuple[EmbeddedGallery, list[Stored]]:
    rng = np.random.default_rng(0)
    gallery = EmbeddedGallery(directory, index=FACTORY)

    def enrol(numbers: range) -> None:
        gallery.add(
            [
                make_enrolment(
                    f"t{number}",
                    rng.integers(-99, 99, DIMENSION).tolist(),
                    identity=f"p{number % 7}",
                    model=MODEL,
                    strip=rng.bytes(3000),
                )
                for number in numbers
            ]
        )

    for start in range(0, 100, 20):
        enrol(range(start, start + 20))
    gallery.remove_identity("p5")
    gallery._save()
    states = [stored_in(gallery)]
    for start in (100, 103, 106):
        enrol(range(start, start + 3))
        states.append(stored_in(gallery))
    return gallery, states


def stored_in(gallery: EmbeddedGallery) -> Stored:
    records = gallery.list(Filters(), limit=1000).records
    return {each.tracklet_id: one_of(gallery, each) for each in records}


def one_of(
    gallery: EmbeddedGallery, record: TrackletRecord
) -> tuple[TrackletRecord, list[float], bytes | None]:
    name = record.tracklet_id
    try:
        strip = gallery.strip(name)
    except NotFoundError:
        strip = None
    return record, gallery.embedding(name).tolist(), strip


def damages(content: bytes, *, flips: int = 12) -> Iterator[tuple[str, bytes | None]]:
    """What may happen to a file; None stands for its end."""
    size, rng = len(content), np.random.default_rng(0)
    for place in sorted({0, 18, 60, 100, *rng.integers(0, max(1, size), flips).tolist()}):
        if place < size:
            flipped = bytes([content[place] ^ 0xFF])
            yield f"flipped at {place}", content[:place] + flipped + content[place + 1 :]
    for length in (2, 50, 512, PAGE_BYTES, size // 2, size - PAGE_BYTES, size - 32, size - 1):
        if 0 < length < size:
            yield f"cut to {length}", content[:length]
    yield "garbage", rng.bytes(max(size, 5000))
    yield "empty", b""
    yield "deleted", None


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def after(life: Life, name: str, content: bytes | None) -> Outcome:
    """Open a copy in which a file is another."""
    copy = life.directory.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(life.directory, copy)
    (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
    before = files(copy)
    try:
        gallery = EmbeddedGallery(copy, index=FACTORY)
    except (DamagedGalleryError, GalleryUnavailableError) as error:
        left = files(copy)
        # How far the log was read, for all that have it open; it is made anew from the log.
        names = (before.keys() | left.keys()) - {SHARED_NAME, LOCK_NAME}
        changed = frozenset(each for each in names if before.get(each) != left.get(each))
        return Outcome(None, str(error), changed)
    try:
        found = stored_in(gallery)
        check_search(gallery, found)
        return Outcome(found)
    except GalleryError as error:
        return Outcome(None, f"when read: {error}")
    finally:
        gallery.close()


def check_search(gallery: EmbeddedGallery, stored: Mapping[str, object]) -> None:
    """Every vector is found by itself."""
    for name in stored:
        query = gallery.embedding(name)
        [match] = gallery.search(query, model=MODEL, top_k=1, group_by="tracklet").matches
        assert (match.record.tracklet_id, match.distance) == (name, 0.0)


@pytest.mark.parametrize("name", [SAVED_NAME, LOCK_NAME])
def test_whatever_happens_to_what_can_be_made_again_does_not_matter(
    closed: Life, name: str
) -> None:
    for what, content in damages((closed.directory / name).read_bytes()):
        assert after(closed, name, content).stored == closed.truth, what


def test_whatever_happens_to_what_sqlite_shares_between_processes_does_not_matter(
    killed: Life,
) -> None:
    for what, content in damages((killed.directory / SHARED_NAME).read_bytes()):
        assert after(killed, SHARED_NAME, content).stored == killed.truth, what


@pytest.mark.parametrize("how", ["cut to 2", "cut to 50", "cut to 512", "half", "page", "garbage"])
def test_a_store_that_was_cut_or_overwritten_is_refused_and_left_as_it_is(
    closed: Life, how: str
) -> None:
    content = (closed.directory / FILE_NAME).read_bytes()
    lengths = {"half": len(content) // 2, "page": len(content) - PAGE_BYTES}
    if how == "garbage":
        other = np.random.default_rng(0).bytes(len(content))
    else:
        other = content[: lengths.get(how) or int(how.removeprefix("cut to "))]

    outcome = after(closed, FILE_NAME, other)

    assert outcome.refusal
    assert not outcome.changed


@pytest.mark.parametrize("missing", [1, 32, 2000])
def test_a_store_that_lacks_a_part_of_its_last_page_is_refused(closed: Life, missing: int) -> None:
    """SQLite would read what is missing as zeros."""
    content = (closed.directory / FILE_NAME).read_bytes()

    outcome = after(closed, FILE_NAME, content[:-missing])

    assert outcome.refusal
    assert not outcome.changed


@pytest.mark.parametrize("left", [b"", b"S", None], ids=["empty", "a byte", "deleted"])
@pytest.mark.parametrize("state", ["closed", "killed"])
def test_a_store_that_is_gone_while_its_other_files_are_there_is_no_new_gallery(
    request: pytest.FixtureRequest, state: str, left: bytes | None
) -> None:
    """A saved index, or a log, is of a gallery that was not empty."""
    life: Life = request.getfixturevalue(state)

    outcome = after(life, FILE_NAME, left)

    assert outcome.refusal
    assert not outcome.changed


def test_a_flipped_byte_of_the_store_is_told_or_harms_nothing(closed: Life) -> None:
    """At the start, or when what it is in is read."""
    content = (closed.directory / FILE_NAME).read_bytes()
    told = 0
    for what, other in damages(content, flips=60):
        if not what.startswith("flipped"):
            continue
        outcome = after(closed, FILE_NAME, other)
        if outcome.stored is None:
            told += 1
            assert outcome.refusal, what
            assert not outcome.changed, what
        else:
            assert outcome.stored == closed.truth, what
    assert told > 30


def test_a_damaged_log_ends_where_the_damage_is_and_never_within_an_operation(
    killed: Life,
) -> None:
    """SQLite takes a wrong checksum for the end of the log, as a power failure leaves it."""
    for what, content in damages((killed.directory / LOG_NAME).read_bytes()):
        outcome = after(killed, LOG_NAME, content)
        assert outcome.stored in killed.states or "is damaged, before others" in outcome.refusal, (
            what
        )
        assert not outcome.changed, what


def test_a_flipped_byte_of_the_log_loses_the_last_operation_at_most_or_is_told(
    killed: Life,
) -> None:
    """It may be what a loss of power left, if no other operation began after it."""
    told = 0
    for what, content in damages((killed.directory / LOG_NAME).read_bytes(), flips=60):
        if what.startswith("flipped"):
            outcome = after(killed, LOG_NAME, content)
            told += bool(outcome.refusal)
            assert outcome.refusal or outcome.stored in killed.states[-2:], what
    assert told > 30


def test_a_refused_store_keeps_its_log(killed: Life) -> None:
    """What it holds is the first thing that somebody who mends the store will want."""
    content = (killed.directory / FILE_NAME).read_bytes()
    for length in (50, 512, PAGE_BYTES, len(content) // 2):
        outcome = after(killed, FILE_NAME, content[:length])

        assert outcome.refusal, length
        assert not outcome.changed, length


def test_a_store_overwritten_by_something_else_keeps_its_log(killed: Life) -> None:
    """SQLite would take the log in when it closes the file. Also after the first page."""
    content = (killed.directory / FILE_NAME).read_bytes()
    for kept in (0, 100, PAGE_BYTES, len(content) // 2):
        other = content[:kept] + np.random.default_rng(0).bytes(len(content) - kept)

        outcome = after(killed, FILE_NAME, other)

        assert outcome.refusal, kept
        assert not outcome.changed, kept


FULL = """
from datetime import UTC, datetime, timedelta
from bench.gallery_truth import CALIBRATION
from bench.gallery_walk import small_limits
from dataclasses import replace
from index.erasures import Erasure, Erasures, digest

subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", directory], check=True)
store, filler = directory / "gallery", directory / "filler"
limits = small_limits()
limits.__enter__()
FACTORY, NOON = "IVF2,Flat", datetime(2026, 11, 22, 12, tzinfo=UTC)
calibration = replace(CALIBRATION, model="trsa-test")
"""

FULL_OPENED = """
gallery = EmbeddedGallery(store, index=FACTORY)
gallery._saves_from = float("inf")  # only when told
rng = np.random.default_rng(0)
gallery.add([
    make_enrolment(
        f"t{n}",
        rng.normal(size=512),
        identity=f"p{n % 5}",
        expires_at=NOON if n < 4 else None,
        created_at=NOON - timedelta(hours=1),
    )
    for n in range(100)
])
gallery._store.forget()

def held(gallery):
    return {each.tracklet_id: each for each in gallery.list(Filters(), limit=500).records}

def found_all(gallery):
    query = np.ones(512, np.float32)
    result = gallery.search(query, model="trsa-test", top_k=500, group_by="tracklet")
    return {match.record.tracklet_id: match.record for match in result.matches}

def fill():
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
"""

REFUSED = """
salt = b"another"
ledger = Erasures((Erasure(digest(salt, "tracklet", "t9"), "tracklet", NOON, salt),))
writes = [
    lambda: gallery.rename_identity("p0", "p9"),
    lambda: gallery.merge_identity("p1", "p2"),
    lambda: gallery.assign(["t5", "t6"], None),
    lambda: gallery.remove_identity("p3"),
    lambda: gallery.expire(NOON),
    lambda: gallery.apply_erasures(ledger),
    lambda: gallery.set_calibration(calibration),
]

def state():
    return (
        held(gallery), found_all(gallery), gallery.counts(), gallery.identities(limit=99),
        gallery.calibration(), len(gallery.erasures().entries),
    )

before = state()
fill()
for write in writes:
    with pytest.raises(StorageFullError, match="the disk is full"):
        write()
    assert state() == before
    assert gallery._derived.vectors.rows == 100
filler.unlink()
for write in writes:
    write()
after = state()
gallery.close()
gallery = EmbeddedGallery(store, index=FACTORY)
assert state() == after
left = held(gallery)
assert left == found_all(gallery)
assert {"t0", "t1", "t2", "t3", "t9"}.isdisjoint(left)
assert {each.identity for each in left.values()} == {None, "p2", "p4", "p9"}
print("done")
"""


def test_a_full_disk_refuses_each_change_of_many_as_a_whole_and_all_goes_on_afterwards(
    tmp_path: Path, own_mounts: tuple[str, ...]
) -> None:
    script = FULL + FULL_OPENED + REFUSED
    assert run_python(script, str(tmp_path), within=own_mounts) == "done\n"


NOT_SAVED = """
before, saved = found_all(gallery), store / "passerby.index"
assert not saved.exists()
fill()
gallery.close()
assert not list(store.glob("*.index*"))
filler.unlink()
with EmbeddedGallery(store, index=FACTORY) as gallery:
    assert found_all(gallery) == before
    old = saved.read_bytes()  # written at opening, where there was none
    gallery._saves_from = float("inf")
    gallery.add([make_enrolment(f"n{n}", rng.normal(size=512)) for n in range(40)])
    gallery._store.forget()
    before = found_all(gallery)
    fill()
    gallery._save()
    assert saved.read_bytes() == old and len(list(store.glob("*.index*"))) == 1
    assert found_all(gallery) == before
    filler.unlink()
with EmbeddedGallery(store, index=FACTORY) as gallery:
    assert found_all(gallery) == before
    assert saved.read_bytes() != old
print("done")
"""


def test_a_full_disk_leaves_no_half_of_a_saved_index_and_the_last_one_as_it_was(
    tmp_path: Path, own_mounts: tuple[str, ...]
) -> None:
    script = FULL + FULL_OPENED + NOT_SAVED
    assert run_python(script, str(tmp_path), within=own_mounts) == "done\n"
