"""The index kept on the disk: it saves time, and never changes an answer or keeps a trace."""

import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from index.embedded import EmbeddedGallery
from index.gallery import Embeddings, Filters, InvalidIndexError, StorageFullError
from index.saved import FILE_NAME, NEW_NAME, SavedIndex, Write
from index.store import FILE_NAME as STORE_NAME
from index.store import Store, Transaction
from index.vectors import IndexPlan
from tests.index.conftest import Enrol, make_enrolment

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
ROWS = 1040
DIMENSION = 8
FACTORY = "IVF4,Flat"


@pytest.fixture(scope="module")
def vectors() -> Embeddings:
    return np.random.default_rng(0).normal(size=(2 * ROWS, DIMENSION)).astype(np.float32)


@pytest.fixture(scope="module")
def original(fast_disk: Path | None, vectors: Embeddings) -> Iterator[Path]:
    """A gallery with a trained index, closed: row i is tracklet i of identity i % 100."""
    with tempfile.TemporaryDirectory(dir=fast_disk) as directory:
        with EmbeddedGallery(Path(directory), index=FACTORY) as gallery:
            gallery.add(
                [
                    make_enrolment(f"t{row}", vectors[row].tolist(), identity=f"p{row % 100}")
                    for row in range(ROWS)
                ]
            )
        yield Path(directory)


@pytest.fixture
def closed(original: Path, directory: Path) -> Path:
    """A copy of it."""
    shutil.copytree(original, directory)
    return directory


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that is made anew fails the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("expected the saved index to be used, got a new one")

    monkeypatch.setattr(IndexPlan, "build", refuse)


def nearest(gallery: EmbeddedGallery, vector: Embeddings) -> str:
    result = gallery.search(vector, model="trsa-test", top_k=1, group_by="tracklet")
    return result.matches[0].record.tracklet_id


def assert_whole(gallery: EmbeddedGallery, vectors: Embeddings, ids: set[str]) -> None:
    """What is searched is what is listed, and each row is found by its own vector."""
    assert {each.tracklet_id for each in gallery.list(Filters(), limit=5000).records} == ids
    result = gallery.search(vectors[0], model="trsa-test", top_k=5000, group_by="tracklet")
    assert {match.record.tracklet_id for match in result.matches} == ids
    for tracklet_id in sorted(ids)[::50]:
        assert nearest(gallery, vectors[int(tracklet_id[1:])]) == tracklet_id


ALL = {f"t{row}" for row in range(ROWS)}


@pytest.mark.usefixtures("no_training")
def test_a_saved_index_is_used_at_the_next_opening(closed: Path, vectors: Embeddings) -> None:
    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert gallery._derived is not None
        assert gallery._derived.vectors.trained_on == ROWS
        assert not gallery._derived.unsaved
        assert_whole(gallery, vectors, ALL)


@pytest.mark.usefixtures("no_training")
def test_how_far_to_look_may_change_without_a_new_index(closed: Path, vectors: Embeddings) -> None:
    with EmbeddedGallery(closed, index=f"{FACTORY};nprobe=2") as gallery:
        assert gallery._derived is not None
        assert gallery._derived.vectors._inner.nprobe == 2
        assert nearest(gallery, vectors[3]) == "t3"


@pytest.mark.parametrize(
    "factory",
    ["HNSW8", "HNSW8,SQfp16", "IVF4,SQ8", "IVF4,RaBitQ", "PCA4,IVF4,Flat", "PCA4,IVF4,SQ8"],
)
def test_every_slow_kind_comes_back_with_the_same_answers(
    directory: Path,
    vectors: Embeddings,
    factory: str,
    enrol: Enrol,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with EmbeddedGallery(directory, index=factory) as gallery:
        gallery.add([enrol(f"t{row}", vectors[row].tolist()) for row in range(ROWS)])
        before = [gallery.search(each, model="trsa-test", top_k=9) for each in vectors[:20]]

    monkeypatch.setattr(IndexPlan, "build", None)
    with EmbeddedGallery(directory, index=factory) as gallery:
        after = [gallery.search(each, model="trsa-test", top_k=9) for each in vectors[:20]]

    assert after == before


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "SQ8", "IVF400,Flat"])
def test_what_is_quick_to_make_is_not_saved(
    directory: Path, vectors: Embeddings, factory: str, enrol: Enrol
) -> None:
    """The last one is flat while there are few rows."""
    with EmbeddedGallery(directory, index=factory) as gallery:
        gallery.add([enrol(f"t{row}", vectors[row].tolist()) for row in range(1100)])

    assert {path.name for path in directory.iterdir()} == {STORE_NAME, "passerby.lock"}


def test_only_the_owner_may_read_it(closed: Path) -> None:
    assert (closed / FILE_NAME).stat().st_mode & 0o777 == 0o600


def die(gallery: EmbeddedGallery) -> None:
    """Close without a chance to save, as a process that is killed."""
    gallery._derived = None
    gallery.close()


@pytest.mark.usefixtures("no_training")
def test_what_changed_since_is_read_from_the_store(
    closed: Path, vectors: Embeddings, enrol: Enrol
) -> None:
    gallery = EmbeddedGallery(closed, index=FACTORY)
    gallery.add([enrol(f"t{row}", vectors[row].tolist()) for row in range(ROWS, ROWS + 30)])
    gallery.update("t3", {"identity": "anna", "camera": "c1"})
    gallery.rename_identity("p5", "bert")
    die(gallery)

    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert gallery._derived is not None
        assert gallery._derived.unsaved == 30
        assert_whole(gallery, vectors, ALL | {f"t{row}" for row in range(ROWS, ROWS + 30)})
        at_c1 = gallery.search(
            vectors[9], model="trsa-test", top_k=5, filters=Filters(cameras=frozenset({"c1"}))
        )
        assert [match.record.identity for match in at_c1.matches] == ["anna"]
        assert gallery.identity("bert").tracklets == len(range(5, ROWS, 100))
        assert gallery.counts().identities == 101


@pytest.mark.usefixtures("no_training")
def test_what_a_killed_process_erased_is_gone_from_file_and_answers_at_the_next_opening(
    closed: Path, vectors: Embeddings
) -> None:
    store = Store(closed)
    with store.transaction() as transaction:
        gone = transaction.of_identity("p7")
        transaction.erase(gone, at=NOON)
        transaction.commit()
    store.close()
    secrets = [vectors[row].tobytes() for row in range(7, ROWS, 100)]
    assert traces(closed / FILE_NAME, secrets) == secrets

    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert not (closed / FILE_NAME).exists() or not traces(closed / FILE_NAME, secrets)
        assert_whole(gallery, vectors, ALL - set(gone.values()))

    assert traces(closed / FILE_NAME, secrets) == []


def traces(path: Path, of: list[bytes]) -> list[bytes]:
    content = path.read_bytes()
    return [one for one in of if one in content]


@pytest.mark.parametrize("how", ["remove", "identity", "expire"])
@pytest.mark.parametrize("factory", [FACTORY, "HNSW8", "IVF4,SQfp16"])
def test_an_erased_vector_is_in_no_file(
    directory: Path, vectors: Embeddings, how: str, factory: str, enrol: Enrol
) -> None:
    """At once, after closing, and after the next opening."""
    rows = [
        enrol(f"t{row}", vectors[row].tolist(), identity=f"p{row % 100}") for row in range(ROWS)
    ]
    with EmbeddedGallery(directory, index=factory) as gallery:
        gallery.add(rows)
    kept_as = np.float16 if "fp16" in factory else np.float32
    secrets = [vectors[row].astype(kept_as).tobytes() for row in range(7, ROWS, 100)]
    if factory != "IVF4,SQfp16":  # it keeps differences from its centroids
        assert traces(directory / FILE_NAME, secrets) == secrets

    def found() -> list[bytes]:
        return [one for path in directory.iterdir() for one in traces(path, secrets)]

    with EmbeddedGallery(directory, index=factory) as gallery:
        if how == "identity":
            gallery.remove_identity("p7")
        for row in range(7, ROWS, 100):
            if how == "remove":
                gallery.remove(f"t{row}")
            elif how == "expire":
                gallery.update(f"t{row}", {"expires_at": NOON})
        gallery.expire(NOON)
        assert found() == []
    assert found() == []
    with EmbeddedGallery(directory, index=factory) as gallery:
        assert_whole(gallery, vectors, {f"t{row}" for row in range(ROWS) if row % 100 != 7})
    assert found() == []


@pytest.mark.usefixtures("no_training")
def test_the_first_expiry_after_opening_leaves_a_clean_file_in_place(closed: Path) -> None:
    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert gallery._store.has_traces
        gallery.expire(NOON - timedelta(days=9))

        assert (closed / FILE_NAME).exists()


def test_a_file_that_cannot_be_removed_is_tried_again(
    closed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        with monkeypatch.context() as patch:

            def refuse(_: SavedIndex) -> None:
                raise OSError(5, "Input/output error", str(closed))

            patch.setattr(SavedIndex, "destroy", refuse)
            gallery.remove_identity("p7")
        assert gallery._store.has_traces
        assert "could not be removed" in caplog.text
        assert str(closed) not in caplog.text

        gallery._store._scrubs_from = 0.0  # later
        gallery.expire(NOON - timedelta(days=9))

        assert not (closed / FILE_NAME).exists()
        assert not gallery._store.has_traces


PLACES = [0, 1, 40, 200, 400, 1000, 4000, 9000, 20_000, -60, -33, -32, -1]


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_is_noticed_and_the_index_made_anew(
    closed: Path, vectors: Embeddings, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = closed / FILE_NAME
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)

    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert_whole(gallery, vectors, ALL)

    assert "checksum" in caplog.text


@pytest.mark.parametrize("left", [0, 1, 31, 32, 33, 500, 9000, -1])
def test_a_file_that_is_cut_short_is_noticed(
    closed: Path, vectors: Embeddings, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = closed / FILE_NAME
    content = path.read_bytes()
    path.write_bytes(content[:left])

    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert_whole(gallery, vectors, ALL)

    assert "the index is made anew" in caplog.text
    assert path.stat().st_size > len(content) / 2


def write_nonsense(write: Write) -> None:
    write(b"nonsense" * 99)


def test_a_well_summed_file_of_nonsense_is_refused(
    closed: Path, vectors: Embeddings, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where its header is that of the real one."""
    saved = SavedIndex(closed)
    with saved.reading() as (header, keys, _):
        pass
    saved.write(header, keys, write_nonsense)

    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert_whole(gallery, vectors, ALL)

    assert "cannot read the index" in caplog.text


def test_a_directory_in_its_place_does_not_keep_a_gallery_from_opening(
    closed: Path, vectors: Embeddings
) -> None:
    (closed / FILE_NAME).unlink()
    (closed / FILE_NAME).mkdir()

    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert_whole(gallery, vectors, ALL)


def test_the_file_of_a_later_life_does_not_serve_a_restored_backup(
    closed: Path, vectors: Embeddings, enrol: Enrol, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys are the same there, and stand for others."""
    backup = (closed / STORE_NAME).read_bytes()
    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        gallery.add([enrol(f"t{row}", vectors[row].tolist()) for row in range(ROWS, ROWS + 50)])
    (closed / STORE_NAME).write_bytes(backup)
    store = Store(closed)
    others = range(2 * ROWS - 50, 2 * ROWS)
    with store.transaction() as transaction:
        for row in others:
            transaction.insert(enrol(f"t{row}", vectors[row].tolist()))
        transaction.commit()
    store.close()

    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert_whole(gallery, vectors, ALL | {f"t{row}" for row in others})

    assert "expected one of" in caplog.text


@pytest.mark.usefixtures("no_training")
def test_the_file_of_a_common_past_serves_a_restored_backup(
    closed: Path, vectors: Embeddings, enrol: Enrol
) -> None:
    backup = (closed / STORE_NAME).read_bytes()
    gallery = EmbeddedGallery(closed, index=FACTORY)
    gallery.add([enrol(f"t{row}", vectors[row].tolist()) for row in range(ROWS, ROWS + 50)])
    die(gallery)
    (closed / STORE_NAME).write_bytes(backup)

    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert_whole(gallery, vectors, ALL)


@pytest.mark.parametrize("factory", ["Flat", "IVF5,Flat", "HNSW8"])
def test_another_plan_does_not_use_it_and_removes_it(
    closed: Path, vectors: Embeddings, factory: str
) -> None:
    before = (closed / FILE_NAME).read_bytes()

    with EmbeddedGallery(closed, index=factory) as gallery:
        assert_whole(gallery, vectors, ALL)

    assert (closed / FILE_NAME).exists() == (factory != "Flat")
    assert factory == "Flat" or (closed / FILE_NAME).read_bytes() != before


def test_a_factory_string_that_is_refused_leaves_it(closed: Path) -> None:
    with pytest.raises(InvalidIndexError):
        EmbeddedGallery(closed, index="LSH")

    assert (closed / FILE_NAME).exists()


def test_a_gallery_that_was_emptied_leaves_no_file(closed: Path) -> None:
    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        gallery.expire(NOON + timedelta(days=1), timedelta(0))
        assert gallery.counts().tracklets == 0

    assert not (closed / FILE_NAME).exists()


@pytest.mark.parametrize("at", ["fsync", "replace", "commit"])
def test_a_save_that_fails_leaves_the_old_file_or_none_and_fails_nothing(
    closed: Path,
    vectors: Embeddings,
    enrol: Enrol,
    at: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(closed))

    def refuse(_: Transaction) -> None:
        raise StorageFullError("cannot write the gallery: the disk is full")

    gallery = EmbeddedGallery(closed, index=FACTORY)
    gallery.add([enrol(f"t{row}", vectors[row].tolist()) for row in range(ROWS, ROWS + 9)])
    with monkeypatch.context() as patch:
        if at == "commit":
            patch.setattr(Transaction, "commit", refuse)
        else:
            patch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[at], full)
        gallery.close()

    assert "could not be saved" in caplog.text
    assert str(closed) not in caplog.text
    assert not (closed / NEW_NAME).exists()
    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert_whole(gallery, vectors, ALL | {f"t{row}" for row in range(ROWS, ROWS + 9)})


def test_a_disk_that_fills_up_while_it_is_written_is_told(
    closed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """FAISS hands the error on in words of its own."""
    script = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from index.embedded import EmbeddedGallery
from tests.index.conftest import make_enrolment
gallery = EmbeddedGallery(Path(sys.argv[1]), index="IVF4,Flat")
gallery.add([make_enrolment("more", [1] * 8)])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
gallery._save()
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
gallery._derived = None
gallery.close()
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(closed), str(ROOT)],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip

    assert done.stdout == "done\n", done.stderr
    assert "could not be saved" in done.stderr
    assert not (closed / NEW_NAME).exists()
    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert gallery._derived is not None
        assert gallery._derived.unsaved == 1  # the old file served
        assert nearest(gallery, np.ones(8, np.float32)) == "more"
    assert "made anew" not in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from index import saved
from index.embedded import EmbeddedGallery
from index.store import Transaction
from tests.index.conftest import make_enrolment
gallery = EmbeddedGallery(Path(sys.argv[1]), index="IVF4,Flat")
gallery.add([make_enrolment("more", [1] * 8)])
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
at = sys.argv[3]
if at == "written":
    os.fsync = kill
elif at == "half-written":
    read = saved.sha256
    class Digest:
        def __init__(self): self.digest_, self.parts = read(), 0
        def update(self, part):
            self.parts += 1
            if self.parts == 4: kill()
            self.digest_.update(part)
    saved.sha256 = Digest
elif at == "renamed":
    saved.sync = kill
elif at == "before-commit":
    Transaction.replace_property = kill
elif at == "after-commit":
    commit = Transaction.commit
    def commit_and_die(transaction):
        commit(transaction)
        kill()
    Transaction.commit = commit_and_die
gallery.close()
"""


@pytest.mark.parametrize(
    "at", ["half-written", "written", "renamed", "before-commit", "after-commit"]
)
def test_a_process_killed_while_saving_leaves_right_answers(
    closed: Path, vectors: Embeddings, at: str
) -> None:
    command = [sys.executable, "-c", KILLED, str(closed), str(ROOT), at]
    killed = subprocess.run(command, check=False, timeout=PATIENCE_S)
    assert killed.returncode == -signal.SIGKILL
    assert (closed / NEW_NAME).exists() == (at in {"half-written", "written"})

    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert nearest(gallery, np.ones(8, np.float32)) == "more"
        gallery.remove("more")
        assert_whole(gallery, vectors, ALL)

    assert not (closed / NEW_NAME).exists()
    connection = sqlite3.connect(closed / STORE_NAME)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def test_it_is_saved_when_enough_has_changed_but_not_all_the_time(
    closed: Path, vectors: Embeddings, enrol: Enrol
) -> None:
    path = closed / FILE_NAME
    with EmbeddedGallery(closed, index=FACTORY) as gallery:

        def is_saved(start: int, end: int) -> bool:
            before = path.stat().st_mtime_ns
            gallery.add([enrol(f"t{row}", vectors[row].tolist()) for row in range(start, end)])
            return path.stat().st_mtime_ns > before

        gallery._saves_from = 0.0  # later
        saved = [
            is_saved(ROWS, ROWS + 50),  # a few
            is_saved(ROWS + 50, ROWS + 150),  # more than a tenth
            is_saved(ROWS + 150, ROWS + 400),  # so soon again
        ]
        gallery._saves_from = 0.0
        saved.append(is_saved(ROWS + 400, ROWS + 401))

    assert saved == [False, True, False, True]


def test_an_index_that_was_made_at_opening_is_saved_at_once(
    closed: Path, vectors: Embeddings, caplog: pytest.LogCaptureFixture
) -> None:
    """It took long enough: a crash must not make it take as long again."""
    caplog.set_level(logging.INFO)
    (closed / FILE_NAME).unlink()

    die(EmbeddedGallery(closed, index=FACTORY))

    assert (closed / FILE_NAME).exists()
    with EmbeddedGallery(closed, index=FACTORY) as gallery:
        assert_whole(gallery, vectors, ALL)
    assert "anew" not in caplog.text


def test_making_an_index_is_told(
    closed: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that trains takes minutes where there are many; somebody may be waiting."""
    monkeypatch.setattr("index.derived._TELLING_PAUSE_S", -1.0)
    caplog.set_level(logging.INFO, "index.derived")
    (closed / FILE_NAME).unlink()

    EmbeddedGallery(closed, index=FACTORY).close()

    began, trained, indexed = [record.getMessage() for record in caplog.records]
    assert began == f"training the index with {ROWS} of {ROWS} tracklets"
    assert trained.startswith("trained the index in ")
    assert indexed == f"indexed {ROWS} of {ROWS} tracklets"


@pytest.mark.parametrize("seed", range(3))
def test_a_life_of_changes_closings_and_deaths_leaves_right_answers(
    closed: Path, vectors: Embeddings, enrol: Enrol, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(seed)
    there, fresh = set(ALL), iter(range(ROWS, 2 * ROWS))
    gallery = EmbeddedGallery(closed, index=FACTORY)
    for _ in range(40):
        kind = rng.choice(["add", "remove", "rename", "close", "die"], p=[0.4, 0.2, 0.1, 0.1, 0.2])
        if kind == "add":
            new = [next(fresh) for _ in range(int(rng.integers(1, 40)))]
            gallery.add([enrol(f"t{row}", vectors[row].tolist()) for row in new])
            there |= {f"t{row}" for row in new}
        elif kind == "remove":
            gallery.remove(gone := str(rng.choice(sorted(there))))
            there.remove(gone)
        elif kind == "rename":
            gallery.assign([str(rng.choice(sorted(there)))], f"p{rng.integers(99)}")
        else:
            if kind == "die":
                gallery._derived = None
            gallery.close()
            gallery = EmbeddedGallery(closed, index=FACTORY)
            assert_whole(gallery, vectors, there)
    gallery.close()

    assert "of no use" not in caplog.text
