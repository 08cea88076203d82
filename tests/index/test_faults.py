"""What a store does when its disk is full, refuses to be written, or is slow.

Full and refusing disks are real ones: a small memory disk of the test's own in a mount namespace,
and the kernel's limit of file sizes. Only what no test can have without a broken device, a file
system that turns read-only under an open file, is SQLite's and the system's word for it.
"""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from index import probe
from index.derived import Derived
from index.embedded import EmbeddedGallery
from index.gallery import GalleryUnavailableError, SearchResult, StorageFullError
from index.probe import PROBE_NAME, WriteProbe
from index.store import FILE_NAME, Transaction
from tests.index.conftest import Enrol

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0

PREAMBLE = """
import os, resource, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
sys.path.insert(0, sys.argv[2])
from index.embedded import EmbeddedGallery
from index.gallery import *
from tests.index.conftest import make_enrolment
directory = Path(sys.argv[1])

def found(gallery):
    query = np.ones(512, np.float32)
    result = gallery.search(query, model="trsa-test", top_k=5000)
    return {match.record.tracklet_id: match.record for match in result.matches}

def in_step(gallery, directory):
    '''What is searched, listed and counted now is what is there after opening again.'''
    now = found(gallery)
    assert gallery.counts().tracklets == len(now)
    assert {one.tracklet_id: one for one in gallery.list(Filters(), limit=5000).records} == now
    gallery.close()
    with EmbeddedGallery(directory) as again:
        assert found(again) == now
    return now
"""


def run_python(script: str, *arguments: str, within: tuple[str, ...] = ()) -> str:
    """Run a script after `PREAMBLE`, perhaps within a namespace; returns what it printed."""
    command = [*within, sys.executable, "-c", PREAMBLE + script, *arguments, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def own_mounts() -> tuple[str, ...]:
    """What a command begins with to have mounts of its own."""
    command = ("unshare", "--user", "--map-root-user", "--mount")
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if allowed.returncode:
        pytest.skip("needs the right to mount a memory disk in a namespace of its own")
    return command


FULL = """
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory], check=True)
store = directory / "gallery"
gallery = EmbeddedGallery(store)
gallery.add([make_enrolment(name, [n] * 512, strip=b"x" * 4000) for n, name in enumerate("abc")])
gallery.check()
# The write-ahead log is emptied, or what it holds already would be room enough.
gallery._store.forget()
before = found(gallery)

filler = directory / "filler"
def fill():
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
fill()

def refused(write):
    with pytest.raises(StorageFullError, match="the disk is full"):
        write()
    assert found(gallery) == before

refused(lambda: gallery.add([make_enrolment(f"n{n}", [n] * 512) for n in range(20)]))
refused(lambda: gallery.update("a", {"metadata": {"long": "x" * 9000}}))
refused(lambda: gallery.remove("b"))
gallery._store._probe._good_until = 0
refused(gallery.check)
refused(gallery.check)
with pytest.raises(StorageFullError):
    EmbeddedGallery(directory / "other")

filler.unlink()
gallery.check()
gallery.add([make_enrolment("d", [4] * 512)])
gallery.update("a", {"metadata": {"long": "x" * 9000}})
gallery.remove("b")
assert in_step(gallery, store).keys() == {"a", "c", "d"}
print("done")
"""


def test_a_full_disk_refuses_each_write_as_a_whole_and_all_goes_on_when_there_is_room(
    tmp_path: Path, own_mounts: tuple[str, ...]
) -> None:
    assert run_python(FULL, str(tmp_path), within=own_mounts) == "done\n"


NEARLY_FULL = """
from index.exporting import export_gallery
from index.snapshot import snapshot

subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", directory], check=True)
store = directory / "gallery"
with EmbeddedGallery(store) as gallery:
    gallery.add([make_enrolment(f"t{n}", [n] * 512, strip=b"x" * 4000) for n in range(100)])
taken = sum(path.stat().st_blocks * 512 for path in [directory, *directory.rglob("*")])
for pages in (4, 8, 12, 30):  # that are left; the file that connections share takes eight
    size = taken + pages * 4096
    subprocess.run(["mount", "-o", f"remount,size={size}", directory], check=True)
    for make, name in ((snapshot, "saved"), (export_gallery, "exported")):
        with pytest.raises(StorageFullError):
            make(store, directory / name)
    if pages == 4:
        with pytest.raises(StorageFullError):
            EmbeddedGallery(store)
assert sorted(path.name for path in directory.iterdir()) == ["gallery"]
subprocess.run(["mount", "-o", "remount,size=20m", directory], check=True)
with EmbeddedGallery(store) as gallery:
    assert len(found(gallery)) == 100
print("done")
"""


def test_a_disk_that_is_too_full_to_read_a_gallery_or_copy_it_is_told_as_full(
    tmp_path: Path, own_mounts: tuple[str, ...]
) -> None:
    assert run_python(NEARLY_FULL, str(tmp_path), within=own_mounts) == "done\n"


FILLING = """
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", directory], check=True)
store = directory / "gallery"
gallery = EmbeddedGallery(store)
added, full = [], 0
for number in range(2000):
    name = f"t{number}"
    try:
        gallery.add([make_enrolment(name, [number] * 512, strip=bytes(1 + number % 3000))])
        added.append(name)
        if number % 7 == 3:
            gallery.remove(name)
            added.remove(name)
        elif number % 5 == 1:
            gallery.update(name, {"metadata": {"n": "x" * (number % 900)}})
    except StorageFullError:
        full += 1
        if full == 5:
            break
assert full == 5
assert len(added) > 100
assert sorted(found(gallery)) == sorted(added)
removed = 0
for name in added[::2]:
    try:
        gallery.remove(name)
        removed += 1
    except StorageFullError:
        pass
print(len(in_step(gallery, store)) == len(added) - removed)
"""


def test_a_disk_that_fills_up_at_any_write_leaves_memory_and_store_in_step(
    tmp_path: Path, own_mounts: tuple[str, ...]
) -> None:
    assert run_python(FILLING, str(tmp_path), within=own_mounts) == "True\n"


READ_ONLY = """
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
store = directory / "gallery"
with EmbeddedGallery(store) as gallery:
    gallery.add([make_enrolment("a", [1] * 512)])
subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
with pytest.raises(GalleryUnavailableError, match="Read-only file system") as told:
    EmbeddedGallery(store)
assert str(directory) not in str(told.value)
subprocess.run(["mount", "-o", "remount,rw", directory], check=True)
with EmbeddedGallery(store) as gallery:
    gallery.check()
    assert found(gallery).keys() == {"a"}
print("done")
"""


def test_a_read_only_disk_is_told_at_opening(tmp_path: Path, own_mounts: tuple[str, ...]) -> None:
    assert run_python(READ_ONLY, str(tmp_path), within=own_mounts) == "done\n"


REFUSED = """
gallery = EmbeddedGallery(directory)
gallery.add([make_enrolment(name, [n] * 512) for n, name in enumerate("abc")])
gallery.check()
gallery._store.forget()
before = found(gallery)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))

def refused(write):
    with pytest.raises(GalleryUnavailableError) as told:
        write()
    assert str(directory) not in str(told.value)
    assert found(gallery) == before

refused(lambda: gallery.add([make_enrolment("d", [4] * 512)]))
refused(lambda: gallery.update("a", {"camera": "c1"}))
refused(lambda: gallery.remove("b"))
gallery._store._probe._good_until = 0
refused(gallery.check)

resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
gallery.check()
gallery.add([make_enrolment("d", [4] * 512)])
gallery.update("a", {"camera": "c1"})
gallery.remove("b")
assert in_step(gallery, directory).keys() == {"a", "c", "d"}
print("done")
"""


def test_a_disk_that_refuses_writes_loses_nothing_and_goes_on_when_it_does_not(
    directory: Path,
) -> None:
    """Really: the kernel fails every write to a file, as a broken disk would."""
    assert run_python(REFUSED, str(directory)) == "done\n"


def search(gallery: EmbeddedGallery) -> SearchResult:
    return gallery.search(np.array([1, 2], np.float32), model="trsa-test", top_k=10)


def ids(result: SearchResult) -> list[str]:
    return [match.record.tracklet_id for match in result.matches]


def test_a_disk_that_turns_read_only_is_told_by_each_write_and_by_check(
    gallery: EmbeddedGallery, enrol: Enrol, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    gallery.add([enrol("a", [1, 2])])
    gallery._store._writer.execute("PRAGMA query_only = ON")
    opened = os.open

    def read_only(path: Any, flags: int, *how: Any) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *how)

    writes: list[Callable[[], object]] = [
        lambda: gallery.add([enrol("b", [1, 2])]),
        lambda: gallery.update("a", {"camera": "c1"}),
        lambda: gallery.remove("a"),
        gallery.check,
    ]
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        for write in writes:
            with pytest.raises(GalleryUnavailableError, match=r"readonly|Read-only") as told:
                write()
            assert str(directory) not in str(told.value)
            assert ids(search(gallery)) == ["a"]

    gallery._store._writer.execute("PRAGMA query_only = OFF")
    for write in writes:
        write()
    assert ids(search(gallery)) == ["b"]


class Disk:
    """Commits as slowly as a test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.done = Event(), Event()
        commit = Transaction.commit

        def slow_commit(transaction: Transaction) -> None:
            self.asked.set()
            assert self.done.wait(PATIENCE_S)
            commit(transaction)

        monkeypatch.setattr(Transaction, "commit", slow_commit)


@pytest.mark.parametrize(
    ("write", "before", "after"),
    [
        (lambda gallery, enrol: gallery.add([enrol("c", [1, 4])]), ["a", "b"], ["a", "b", "c"]),
        (lambda gallery, _: gallery.update("a", {"identity": "p1"}), ["a", "b"], ["a"]),
        (lambda gallery, _: gallery.remove("a"), ["a", "b"], ["b"]),
    ],
    ids=["add", "update", "remove"],
)
def test_a_write_that_waits_for_the_disk_holds_up_no_search_and_no_check(
    gallery: EmbeddedGallery,
    enrol: Enrol,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[EmbeddedGallery, Enrol], object],
    before: list[str],
    after: list[str],
) -> None:
    gallery.add([enrol("a", [1, 2]), enrol("b", [1, 3], identity="p1")])
    disk = Disk(monkeypatch)
    writer = Thread(target=write, args=[gallery, enrol], daemon=True)
    writer.start()
    assert disk.asked.wait(PATIENCE_S)

    found = ids(search(gallery))
    gallery.check()
    gallery.counts()
    disk.done.set()
    writer.join(PATIENCE_S)

    assert found == before
    assert ids(search(gallery)) == after


def test_a_commit_that_is_refused_leaves_memory_as_it_was(
    gallery: EmbeddedGallery, enrol: Enrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.add([enrol("a", [1, 2])])
    before = gallery._derived

    def refuse(_: Transaction) -> None:
        raise StorageFullError("cannot write the gallery: the disk is full")

    monkeypatch.setattr(Transaction, "commit", refuse)
    with pytest.raises(StorageFullError):
        gallery.update("a", {"camera": "c1"})
    with pytest.raises(StorageFullError):
        gallery.remove("a")

    assert ids(search(gallery)) == ["a"]
    assert gallery._derived is before
    assert not gallery._committing


def test_an_upkeep_that_takes_long_holds_up_no_search_and_no_check(
    directory: Path, enrol: Enrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedGallery(directory, index="IVF4,Flat") as gallery:
        rng = np.random.default_rng(0)
        rows = [enrol(f"t{row}", rng.normal(size=2).tolist()) for row in range(1100)]
        gallery.add(rows[:900])
        training, trained = Event(), Event()
        load = Derived.load

        def slow_load(*how: Any, **options: Any) -> Derived | None:
            training.set()
            assert trained.wait(PATIENCE_S)
            return load(*how, **options)

        monkeypatch.setattr(Derived, "load", slow_load)
        writer = Thread(target=gallery.add, args=[rows[900:]], daemon=True)
        writer.start()
        assert training.wait(PATIENCE_S)

        gallery.check()
        assert search(gallery).searched == 1100
        trained.set()
        writer.join(PATIENCE_S)
        assert gallery._derived is not None
        assert gallery._derived.vectors.trained_on == 1100


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every time that something is brought to the disk."""
    times: list[int] = []
    fsync = os.fsync

    def counted(file: int) -> None:
        times.append(file)
        fsync(file)

    monkeypatch.setattr(os, "fsync", counted)
    return times


def test_a_disk_that_is_fine_is_written_once_in_a_while(tmp_path: Path, written: list[int]) -> None:
    one = WriteProbe(tmp_path)

    for _ in range(5):
        one.check()
    assert len(written) == 1

    one._good_until = 0  # some seconds later
    one.check()
    assert len(written) == 2


def test_a_disk_that_fails_is_asked_every_time(
    tmp_path: Path, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = WriteProbe(tmp_path)
    with monkeypatch.context() as patch:

        def full(file: int) -> None:
            written.append(file)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", full)
        for _ in range(3):
            with pytest.raises(StorageFullError, match="the disk is full"):
                one.check()

    one.check()

    assert len(written) == 4


@pytest.mark.parametrize("nameless", [True, False])
def test_a_probe_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool
) -> None:
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)

    WriteProbe(tmp_path).check()

    assert list(tmp_path.iterdir()) == []


def test_where_files_need_names_a_probe_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without nameless files says so, and is written all the same."""
    opened, names = os.open, []

    def without_nameless(path: Path, flags: int, mode: int) -> int:
        names.append(path.name)
        if path == tmp_path:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "O_TMPFILE", 0o20200000, raising=False)
    monkeypatch.setattr(os, "open", without_nameless)
    WriteProbe(tmp_path).check()

    assert names == [tmp_path.name, PROBE_NAME]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["deleted", "replaced", "moved"])
def test_nothing_is_written_to_a_file_that_is_not_where_it_was(
    directory: Path, enrol: Enrol, how: str
) -> None:
    """It would be acknowledged, and gone at the next start."""
    with EmbeddedGallery(directory) as gallery:
        gallery.add([enrol("a", [1, 2])])
        if how == "moved":
            directory.rename(directory.with_name("elsewhere"))
        else:
            (directory / FILE_NAME).unlink()
            if how == "replaced":
                (directory / FILE_NAME).write_bytes(b"")

        writes: list[Callable[[], object]] = [
            lambda: gallery.add([enrol("b", [1, 2])]),
            lambda: gallery.update("a", {"identity": "p1"}),
            lambda: gallery.remove("a"),
        ]
        for write in writes:
            with pytest.raises(GalleryUnavailableError, match=r"out of reach|another file"):
                write()
        assert gallery.get("a").identity is None


def test_a_write_that_fails_has_the_next_check_ask_the_disk_again(
    gallery: EmbeddedGallery, enrol: Enrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hears 507 must not be told in the same second that all is well."""
    gallery.check()

    def fail(*_: object) -> None:
        raise StorageFullError("cannot write the gallery: the disk is full")

    def full(_: WriteProbe) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Transaction, "commit", fail)
    monkeypatch.setattr(WriteProbe, "_write", full)
    gallery.check()  # it was good a moment ago
    with pytest.raises(StorageFullError):
        gallery.add([enrol("a", [1, 2])])

    with pytest.raises(StorageFullError):
        gallery.check()


def test_a_directory_that_is_gone_is_told_without_its_name(tmp_path: Path) -> None:
    one = WriteProbe(tmp_path / "gallery")

    with pytest.raises(GalleryUnavailableError, match="No such file") as told:
        one.check()

    assert str(tmp_path) not in str(told.value)


KILLED = """
import signal
if sys.argv[3] == "named":
    del os.O_TMPFILE
gallery = EmbeddedGallery(directory)
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
gallery.check()
"""


@pytest.mark.parametrize(("kind", "left"), [("nameless", False), ("named", True)])
def test_what_a_killed_probe_leaves_is_gone_after_the_next_opening(
    directory: Path, kind: str, left: bool
) -> None:
    command = [sys.executable, "-c", PREAMBLE + KILLED, str(directory), str(ROOT), kind]
    killed = subprocess.run(command, check=False, timeout=PATIENCE_S)
    assert killed.returncode == -signal.SIGKILL
    assert (directory / PROBE_NAME).exists() == left

    with EmbeddedGallery(directory) as gallery:
        assert not (directory / PROBE_NAME).exists()
        gallery.check()


def test_a_leftover_that_cannot_be_removed_does_not_keep_a_gallery_from_opening(
    directory: Path,
) -> None:
    (directory / PROBE_NAME).mkdir(parents=True)

    EmbeddedGallery(directory).close()


def test_a_disk_that_does_not_answer_is_told_by_those_who_ask_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not wait: first they hear what was last known, and after a while that it hangs."""
    one = WriteProbe(tmp_path)
    asked, answered = Event(), Event()

    def hang(_: int) -> None:
        asked.set()
        assert answered.wait(PATIENCE_S)

    monkeypatch.setattr(os, "fsync", hang)
    first = Thread(target=one.check, daemon=True)
    first.start()
    assert asked.wait(PATIENCE_S)

    one.check()
    monkeypatch.setattr(probe, "_PATIENCE_S", 0.0)
    with pytest.raises(GalleryUnavailableError, match="waiting for"):
        one.check()
    answered.set()
    first.join(PATIENCE_S)
    one.check()


def test_those_who_ask_while_a_full_disk_is_asked_again_hear_that_it_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = WriteProbe(tmp_path)
    asked, answered = Event(), Event()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def hang(_: int) -> None:
        asked.set()
        assert answered.wait(PATIENCE_S)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFullError):
            one.check()
    monkeypatch.setattr(os, "fsync", hang)
    first = Thread(target=one.check, daemon=True)
    first.start()
    assert asked.wait(PATIENCE_S)

    with pytest.raises(StorageFullError):
        one.check()
    answered.set()
    first.join(PATIENCE_S)
    one.check()
