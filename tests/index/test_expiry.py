"""Retention and expiry: what is erased when its time has come."""

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest

from index import embedded
from index.embedded import EmbeddedGallery
from index.gallery import Filters, GalleryUnavailableError, StorageFullError
from index.store import Transaction
from tests.index.conftest import Enrol

PATIENCE_S = 20.0
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def test_what_expires_is_erased_at_its_time_and_not_before(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    gallery.add([enrol("a", [1], expires_at=NOON), enrol("b", [2], expires_at=NOON + MINUTE)])
    gallery.add([enrol("c", [3])])

    assert gallery.expire(NOON - timedelta(microseconds=1)) == ()
    assert gallery.expire(NOON) == ("a",)
    assert gallery.expire(NOON) == ()

    assert [each.tracklet_id for each in gallery.list(Filters(), limit=9).records] == ["b", "c"]


def test_retention_erases_what_was_enrolled_so_long_ago(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    day = timedelta(days=1)
    gallery.add([enrol(f"t{days}", [days], created_at=NOON - days * day) for days in range(5)])

    assert gallery.expire(NOON) == ()
    assert gallery.expire(NOON, timedelta.max) == ()
    assert sorted(gallery.expire(NOON, 3 * day)) == ["t3", "t4"]
    assert gallery.expire(NOON + 2 * day, 5 * day) == ()
    assert gallery.expire(NOON + 2 * day, 4 * day + timedelta(microseconds=1)) == ()
    assert gallery.expire(NOON + 2 * day, 4 * day) == ("t2",)


def test_expiry_survives_a_restart(directory: Path, enrol: Enrol) -> None:
    elsewhere = NOON.astimezone(timezone(timedelta(hours=5, minutes=45)))
    with EmbeddedGallery(directory) as gallery:
        gallery.add([enrol("a", [1], expires_at=elsewhere), enrol("b", [2])])
        gallery.update("b", {"expires_at": elsewhere + MINUTE})

    with EmbeddedGallery(directory) as gallery:
        assert gallery.get("a").expires_at == NOON
        assert gallery.expire(NOON + MINUTE) == ("a", "b")


def test_an_expiry_can_be_put_off_and_taken_back(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    gallery.add([enrol("a", [1], expires_at=NOON), enrol("b", [2], expires_at=NOON)])

    gallery.update("a", {"expires_at": None})
    gallery.update("b", {"expires_at": NOON + MINUTE})

    assert gallery.expire(NOON) == ()
    assert gallery.expire(NOON + MINUTE) == ("b",)


def test_what_is_due_is_there_until_it_is_erased(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    gallery.add([enrol("a", [1], expires_at=NOON - timedelta(days=999))])

    found = gallery.search(np.array([1], np.float32), model="trsa-test", top_k=1)

    assert found.searched == 1
    assert gallery.get("a").tracklet_id == "a"


def test_the_indexes_find_what_is_due(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    """A sweep that finds nothing reads no rows, however many there are."""
    gallery.add([enrol("a", [1])])
    connection = gallery._store._writer
    query = "SELECT key, tracklet_id FROM tracklets WHERE expires_at <= 1 OR created_at <= NULL"

    plan = [step[3] for step in connection.execute(f"EXPLAIN QUERY PLAN {query} LIMIT 5")]

    assert plan[0] == "MULTI-INDEX OR"
    assert not [step for step in plan if "SCAN" in step]


def test_many_expire_little_by_little_and_others_get_their_turn(
    gallery: EmbeddedGallery, enrol: Enrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits to write when the first of many has gone does not wait for the last."""
    monkeypatch.setattr(embedded, "_EXPIRED_AT_ONCE", 10)
    gallery.add([enrol(f"t{row}", [row], expires_at=NOON) for row in range(1000)])
    waiting, left = Event(), list[int]()
    forget = gallery._store.forget

    def add() -> None:
        waiting.set()
        gallery.add([enrol("new", [1])])
        left.append(gallery.counts().tracklets)

    writer = Thread(target=add, daemon=True)

    def first_batch_is_gone(**how: bool) -> None:
        if not waiting.is_set():
            writer.start()
            assert waiting.wait(PATIENCE_S)
        forget(**how)

    monkeypatch.setattr(gallery._store, "forget", first_batch_is_gone)
    erased = gallery.expire(NOON)
    writer.join(PATIENCE_S)

    assert len(erased) == 1000
    assert len(set(erased)) == 1000
    assert left[0] > 1
    assert gallery.counts().tracklets == 1


def test_what_fails_halfway_is_done_by_the_next_call(
    gallery: EmbeddedGallery, enrol: Enrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_EXPIRED_AT_ONCE", 10)
    gallery.add([enrol(f"t{row}", [row], expires_at=NOON) for row in range(30)])
    commit, commits = Transaction.commit, list[int]()

    def refuse_the_second(transaction: Transaction) -> None:
        commits.append(1)
        if len(commits) == 2:
            raise StorageFullError("cannot write the gallery: the disk is full")
        commit(transaction)

    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "commit", refuse_the_second)
        assert gallery.expire(NOON) == tuple(f"t{row}" for row in range(10))  # those are gone
    assert gallery.counts().tracklets == 20
    with monkeypatch.context() as patch:
        commits.clear()
        commits.append(1)
        patch.setattr(Transaction, "commit", refuse_the_second)
        with pytest.raises(StorageFullError):
            gallery.expire(NOON)
    assert len(gallery.expire(NOON)) == 20
    assert len(gallery.erasures().entries) == 30


KILLED = """
import os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from index.embedded import EmbeddedGallery
from index.store import Store, Transaction
from tests.index.conftest import make_enrolment
noon = datetime(2026, 11, 22, 12, tzinfo=UTC)
gallery = EmbeddedGallery(Path(sys.argv[1]))
anna = {"identity": "anna", "expires_at": noon}
gallery.add([make_enrolment(f"t{n}", [n] * 512, **anna) for n in range(9)])
gallery.add([make_enrolment("kept", [1] * 512, identity="bert")])
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
before, work = sys.argv[3:5]
if before == "commit":
    Transaction.commit = kill
else:
    Store.forget = kill
gallery.remove_identity("anna") if work == "remove" else gallery.expire(noon)
"""


@pytest.mark.parametrize("work", ["remove", "expire"])
@pytest.mark.parametrize(("before", "left"), [("commit", 10), ("forget", 1)])
def test_a_kill_in_the_middle_of_an_erasure_leaves_all_or_nothing(
    directory: Path, before: str, left: int, work: str
) -> None:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", KILLED, str(directory), root, before, work]
    subprocess.run(command, check=False, timeout=PATIENCE_S)

    with EmbeddedGallery(directory) as gallery:
        assert gallery.counts().tracklets == left
        entries = 0 if left == 10 else 9 + (work == "remove")
        assert len(gallery.erasures().entries) == entries


def run_and_collect(work: Callable[[], object], errors: list[BaseException]) -> None:
    try:
        work()
    except GalleryUnavailableError as error:
        errors.append(error)


def test_closing_ends_a_long_expiry(
    gallery: EmbeddedGallery, enrol: Enrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the rows that are under way; the rest waits for the next start."""
    monkeypatch.setattr(embedded, "_EXPIRED_AT_ONCE", 1)
    gallery.add([enrol(f"t{row}", [row], expires_at=NOON) for row in range(300)])
    begun, errors = Event(), list[BaseException]()
    forget = gallery._store.forget

    def told(**how: bool) -> None:
        begun.set()
        forget(**how)

    monkeypatch.setattr(gallery._store, "forget", told)
    sweeper = Thread(
        target=run_and_collect, args=[lambda: gallery.expire(NOON), errors], daemon=True
    )
    sweeper.start()
    assert begun.wait(PATIENCE_S)
    gallery.close()
    sweeper.join(PATIENCE_S)

    assert not sweeper.is_alive()
    assert [str(each) for each in errors] in ([], ["the gallery is closed"])
