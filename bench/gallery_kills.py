"""Galleries whose process is killed, at random and at named points of every write path.

A process forks before it opens a gallery; its child plays random operations, and says of each when
it begins and when it is acknowledged. After SIGKILL a copy of the files is opened: all that was
acknowledged has to be in it, and nothing else, but for the one operation that was under way. The
next child goes on with the files as they were left.

Files are on a memory disk where there is one: what SIGKILL leaves does not depend on the disk. It
says nothing of a power failure.
"""

import faulthandler
import logging
import os
import select
import shutil
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

import faiss as _faiss
import numpy as np

from bench.gallery_truth import (
    MODEL,
    NEVER,
    MismatchError,
    Operation,
    Shape,
    Truth,
    check_content,
    check_vectors,
)
from bench.gallery_walk import Player, check_file, small_limits
from index.columns import Columns
from index.derived import Derived
from index.embedded import EmbeddedGallery
from index.gallery import GalleryError
from index.saved import SavedIndex
from index.store import Store, Transaction
from index.vector_storage import Storage
from index.vectors import IndexPlan, VectorIndex

faiss: Any = _faiss  # its type stubs know C++'s signatures, not those of its Python layer

DIMENSION = 64
PATIENCE = 60  # looks of a second each
_LIVES_OF_A_GALLERY = 25
_TELLING = 12  # numbers of a vector, by which it is found in files
_MOST_OPERATIONS = 300
_KINDS: tuple[tuple[str, Storage], ...] = (("Flat", "float32"), ("Flat", "float16"))
_TRAINED = "IVF2,Flat"
_OFTEN: Mapping[str, float] = {"query": 0.5, "snapshot": 0, "restore": 0, "restart": 0.1}
Progress = Callable[[int, "Toll"], None]


class Fuse:
    """Kills its process when it has been passed so often."""

    def __init__(self, passes: int) -> None:
        self._left = passes

    def burn(self) -> None:
        """Pass."""
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Point:
    """Where to die.

    Args:
        name: In words.
        lay: Lays the fuse there; in a child, for good.
        often: Which operations lead there, as in `bench.gallery_truth.Shape`.
        index: A factory string without which one never comes there; None for any.
        passes: Die by then.
    """

    name: str
    lay: Callable[[Fuse], None]
    often: Mapping[str, float] = field(default_factory=dict)
    index: str | None = None
    passes: int = 30


def before(owner: Any, name: str) -> Callable[[Fuse], None]:
    """Lay a fuse before each call of a function."""

    def lay(fuse: Fuse) -> None:
        call = getattr(owner, name)

        def burning(*given: Any, **more: Any) -> Any:
            fuse.burn()
            return call(*given, **more)

        setattr(owner, name, burning)

    return lay


def after(owner: Any, name: str) -> Callable[[Fuse], None]:
    """Lay a fuse after each call of a function."""

    def lay(fuse: Fuse) -> None:
        call = getattr(owner, name)

        def burning(*given: Any, **more: Any) -> Any:
            answer = call(*given, **more)
            fuse.burn()
            return answer

        setattr(owner, name, burning)

    return lay


def sql(beginning: str, *, is_before: bool) -> Callable[[Fuse], None]:
    """Lay a fuse before or after each statement of the writing connection that begins so."""

    def lay(fuse: Fuse) -> None:
        class Burning(sqlite3.Connection):
            def execute(self, statement: str, *given: Any) -> sqlite3.Cursor:
                return self._burned(super().execute, statement, *given)

            def executescript(self, statement: str) -> sqlite3.Cursor:
                return self._burned(super().executescript, statement)

            def executemany(self, statement: str, *given: Any) -> sqlite3.Cursor:
                return self._burned(super().executemany, statement, *given)

            def _burned(self, run: Any, statement: str, *given: Any) -> sqlite3.Cursor:
                counts = statement.lstrip().startswith(beginning)
                if counts and is_before:
                    fuse.burn()
                cursor: sqlite3.Cursor = run(statement, *given)
                if counts and not is_before:
                    fuse.burn()
                return cursor

        _connect_with(Burning)

    return lay


def closing(*, is_before: bool) -> Callable[[Fuse], None]:
    """Lay a fuse where connections are closed; the last one takes in the write-ahead log."""

    def lay(fuse: Fuse) -> None:
        class Burning(sqlite3.Connection):
            def close(self) -> None:
                if is_before:
                    fuse.burn()
                super().close()
                if not is_before:
                    fuse.burn()

        _connect_with(Burning)

    return lay


def _connect_with(kind: type[sqlite3.Connection]) -> None:
    connect: Any = sqlite3.connect

    def burning(*given: Any, **more: Any) -> Any:
        return connect(*given, **more, factory=kind)

    vars(sqlite3)["connect"] = burning


def half_written(fuse: Fuse) -> None:
    """Lay a fuse in the middle of writing an index."""
    write = VectorIndex.write

    def write_half(vectors: VectorIndex, sink: Callable[[bytes], int]) -> None:
        def half(part: bytes) -> int:
            sink(part[: len(part) // 2])
            fuse.burn()
            sink(part[len(part) // 2 :])
            return len(part)

        write(vectors, half)

    setattr(VectorIndex, "write", write_half)  # noqa: B010 - for good, in a child


_REMOVING = {"remove": 30.0, "remove_identity": 2.0, "expire": 2.0, "enrol": 20.0}
_CHECKPOINT = "PRAGMA wal_checkpoint(TRUNCATE)"
_VACUUM = "PRAGMA incremental_vacuum"
_SAVING: dict[str, Any] = {"index": _TRAINED, "often": {"restart": 8.0}, "passes": 4}
_OPENING: dict[str, Any] = {"often": {"restart": 8.0}, "passes": 8}
POINTS: tuple[Point, ...] = (
    Point("before a commit", sql("COMMIT", is_before=True)),
    Point("after a commit, before memory follows", sql("COMMIT", is_before=False)),
    Point("after a tracklet's row, before its vector",
          sql("INSERT INTO embeddings", is_before=True)),
    Point("after a change of a row", sql("UPDATE tracklets", is_before=False)),
    Point("after a calibration is deleted", sql("DELETE FROM properties", is_before=False),
          {"calibrate": 10.0}),
    Point("after the ledger, before the rows go", sql("DELETE FROM tracklets", is_before=True),
          _REMOVING),
    Point("after the rows went, before the commit", sql("DELETE FROM tracklets", is_before=False),
          _REMOVING),
    Point("before a checkpoint", sql(_CHECKPOINT, is_before=True), _REMOVING),
    Point("after a checkpoint", sql(_CHECKPOINT, is_before=False), _REMOVING),
    Point("before pages are given back", sql(_VACUUM, is_before=True), _REMOVING, passes=10),
    Point("after pages were given back", sql(_VACUUM, is_before=False), _REMOVING, passes=10),
    Point("before traces are overwritten", before(os, "pwrite"), _REMOVING, passes=10),
    Point("after one trace was overwritten", after(os, "pwrite"), _REMOVING, passes=10),
    Point("before something is brought to the disk", before(os, "fsync"), _REMOVING, passes=8),
    Point("before memory gets rows", before(Derived, "add")),
    Point("after memory lost rows", after(VectorIndex, "remove"), _REMOVING),
    Point("between vectors and records in closing gaps", before(Columns, "compact"), _REMOVING,
          passes=5),
    Point("while an index is trained", before(IndexPlan, "build"), index=_TRAINED, passes=2),
    Point("after it was trained", after(IndexPlan, "build"), index=_TRAINED, passes=2),
    Point("in the middle of writing a saved index", half_written, **_SAVING),
    Point("before a saved index takes its name", before(Path, "replace"), **_SAVING),
    Point("after a saved index took its name", after(Path, "replace"), **_SAVING),
    Point("before the store knows a saved index", before(Transaction, "replace_property"),
          **_SAVING),
    Point("before a saved index is removed", before(SavedIndex, "destroy"),
          {"restart": 4.0, **_REMOVING}, _TRAINED, 4),
    Point("after a saved index was removed", after(SavedIndex, "destroy"),
          {"restart": 4.0, **_REMOVING}, _TRAINED, 4),
    Point("while it is opened, before a count", before(Store, "content"), **_OPENING),
    Point("while it is opened, after memory was made", after(EmbeddedGallery, "_save_if_due"),
          **_OPENING),
    Point("before it is closed", before(Store, "close"), **_OPENING),
    Point("before SQLite closes a connection", closing(is_before=True), **_OPENING),
    Point("after SQLite closed a connection", closing(is_before=False), **_OPENING),
)  # fmt: skip


@dataclass
class Toll:
    """What became of the killed.

    Args:
        kills: How many, by where.
        missed: Lives that never came to their point; they were killed all the same.
        under_way: Kills with an operation under way.
        happened: How many of these had happened.
        warnings: What reopening had to mend, by message.
        operations: How many were acknowledged.
    """

    kills: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    under_way: int = 0
    happened: int = 0
    warnings: Counter[str] = field(default_factory=Counter)
    operations: int = 0

    def report(self) -> str:
        """As lines of text."""
        head = (
            f"{sum(self.kills.values())} kills, {self.operations} operations acknowledged; "
            f"{self.under_way} kills had one under way, {self.happened} of them had happened"
        )
        rows = [f"{count:6}  {name}" for name, count in sorted(self.kills.items())]
        rows += [f"{count:6}  did not come there: {name}" for name, count in self.missed.items()]
        rows += [f"{count:6}  warning: {text}" for text, count in self.warnings.most_common()]
        return "\n".join([head, *rows])


class Killing:
    """Forks players, kills them, and looks at what they leave.

    Args:
        seed: Of what is played, and where and when they die.
        folder: Where the galleries are for a while.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self._rng = np.random.default_rng(seed)
        self._folder = folder
        self._truth = Truth()
        self._kind = _KINDS[0]
        self.toll = Toll()

    def run(self, kills: int, progress: Progress) -> None:
        """Kill so often.

        Raises:
            MismatchError: Something was lost, came back, or is out of step.
        """
        for number in range(kills):
            if number % _LIVES_OF_A_GALLERY == 0:
                self._begin_anew(number // _LIVES_OF_A_GALLERY)
            # Every third at random, the others at each point in turn.
            point = POINTS[(number - number // 3) % len(POINTS)] if number % 3 else None
            self._kill_once(point)
            progress(number + 1, self.toll)

    def _begin_anew(self, number: int) -> None:
        shutil.rmtree(self._folder / "gallery", ignore_errors=True)
        self._kind = _KINDS[number % len(_KINDS)]
        self._truth = Truth(Shape(DIMENSION, 120))

    def _kill_once(self, point: Point | None) -> None:
        seed = int(self._rng.integers(2**32))
        index = (point and point.index) or str(self._rng.choice([self._kind[0], _TRAINED]))
        where = "at random" if point is None else point.name
        shape = Shape(DIMENSION, 120, {**_OFTEN, **(point.often if point else {})})
        self._truth.shape = shape
        life = _Life(self._folder / "gallery", index, self._kind[1], self._truth.copy(), seed)
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            life.play(write, point)
        os.close(write)
        try:
            lines = self._wait(child, read, point)
        finally:
            os.close(read)
        begun = self._follow(lines)
        try:
            self._look(index, begun)
        except (MismatchError, GalleryError) as error:
            kept = Path(tempfile.mkdtemp(prefix="killed-")) / "gallery"
            shutil.copytree(self._folder / "gallery", kept)
            raise MismatchError(
                f"kill {sum(self.toll.kills.values()) + 1} {where} ({index}, {self._kind[1]}; "
                f"files in {kept}), under way {begun}: {error}"
            ) from error
        self.toll.kills[where] += 1

    def _wait(self, child: int, read: int, point: Point | None) -> list[str]:
        """Let a child live as long as it should; returns what it said."""
        said = bytearray()
        acknowledged = int(self._rng.integers(0, 40)) if point is None else _MOST_OPERATIONS
        still_s = float(self._rng.uniform(0, 0.05))
        patience = PATIENCE  # in looks, not by the clock: machines stand still, too
        dies_at: float | None = None
        while True:
            if dies_at is None and said.count(b"\ndone") >= acknowledged:
                dies_at = time.monotonic() + still_s
            waits_s = 1.0 if dies_at is None else max(0.0, dies_at - time.monotonic())
            ready, _, _ = select.select([read], [], [], waits_s)
            if ready:
                part = os.read(read, 65536)
                if not part:
                    break  # it is dead
                said += part
            elif dies_at is not None:
                os.kill(child, signal.SIGKILL)
                dies_at = time.monotonic() + 1.0
            else:
                patience -= 1
                if not patience:
                    self._give_up(child, read, bytes(said[-500:]))
        if point is not None and said.count(b"\ndone") >= _MOST_OPERATIONS:
            self.toll.missed[point.name] += 1
        _, status = os.waitpid(child, 0)
        lines = said.decode().split("\n")[:-1]
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise MismatchError(f"expected a killed process, got status {status}: {lines[-1:]}")
        return lines

    def _give_up(self, child: int, read: int, said: bytes) -> NoReturn:
        """Raise, with what a player that hangs is about."""
        os.kill(child, signal.SIGUSR1)
        time.sleep(1.0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stack = os.read(read, 65536)
        message = "expected a player at work, got one that hangs"
        raise MismatchError(f"{message}: {said.decode()}\n{stack.decode()}")

    def _follow(self, lines: list[str]) -> Operation | None:
        """Do to the dictionary what was acknowledged; returns what was under way."""
        begun: Operation | None = None
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "begin":
                begun = Operation.from_line(rest)
            elif word == "done" and begun is not None:
                self._truth.apply(begun)
                self.toll.operations += 1
                begun = None
        return begun

    def _look(self, index: str, begun: Operation | None) -> None:
        """Open what is left, or rather a copy of it, and compare."""
        copy = self._folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        if (self._folder / "gallery").exists():
            shutil.copytree(self._folder / "gallery", copy)
        with self._warned():
            player = Player(copy, DIMENSION, index, self._kind[1])
        try:
            self._truth = self._settle(player.gallery, begun)
            check_vectors(player.gallery, self._truth)
            check_file(copy)
            player.gallery.expire(NEVER)  # nobody is due: it only removes traces
            self._check_traces(copy)
        finally:
            player.gallery.close()

    def _settle(self, gallery: EmbeddedGallery, begun: Operation | None) -> Truth:
        """Which of the two it may be that a gallery holds."""
        if begun is None:
            check_content(gallery, self._truth)
            return self._truth
        happened = self._truth.copy()
        happened.apply(begun)
        self._truth.clock = begun.at
        self.toll.under_way += 1
        try:
            check_content(gallery, happened)
        except MismatchError:
            check_content(gallery, self._truth)
            # Numbers that were drawn for it are not drawn again: its vectors count as erased.
            self._truth.numbers = happened.numbers
            return self._truth
        self.toll.happened += 1
        return happened

    def _check_traces(self, directory: Path) -> None:
        """Look for vectors of the dead in all files."""
        needles = [each[:_TELLING].tobytes() for each in self._truth.gone]
        needles += [each[:_TELLING].astype(np.float16).tobytes() for each in self._truth.gone]
        for path in directory.iterdir():
            content = path.read_bytes()
            if found := sum(needle in content for needle in needles):
                raise MismatchError(f"expected no trace of the erased, got {found} in {path.name}")

    @contextmanager
    def _warned(self) -> Iterator[None]:
        """Count what reopening says."""
        with listening(lambda record: self.toll.warnings.update([str(record.msg)[:80]])):
            yield


@dataclass
class _Life:
    """What a child does."""

    directory: Path
    index: str
    storage: Storage
    truth: Truth
    seed: int

    def play(self, write: int, point: Point | None) -> NoReturn:
        """Play until somebody kills it."""
        try:
            rng = np.random.default_rng(self.seed)
            faulthandler.register(signal.SIGUSR1, file=write)
            if point is not None:
                point.lay(Fuse(int(rng.integers(1, point.passes + 1))))
            with listening(lambda record: _fail_at_errors(record, write)):
                self._play(write, rng)
        except BaseException as error:  # noqa: BLE001 - told to the parent, which raises
            _tell(write, f"error {type(error).__name__}: {error!s:.300}".replace("\n", " "))
        os._exit(1)

    def _play(self, write: int, rng: np.random.Generator) -> None:
        player = Player(self.directory, DIMENSION, self.index, self.storage)
        if rng.random() < 0.3:
            Thread(target=_search, args=[player, int(rng.integers(2**32))], daemon=True).start()
        for _ in range(_MOST_OPERATIONS):
            operation = self.truth.draw(rng)
            _tell(write, f"begin {operation.to_line()}")
            got, expected = player.perform(operation), self.truth.apply(operation)
            if got != expected:
                raise MismatchError(f"expected {expected}, got {got} from {operation}")
            _tell(write, "done")
        signal.pause()  # as it did not come to its point, it is killed here


def _search(player: Player, seed: int) -> None:
    """Search beside what is written; what is found does not matter here."""
    rng = np.random.default_rng(seed)
    while True:
        query = rng.integers(-99, 99, DIMENSION).astype(np.float32)
        try:
            player.gallery.search(query, model=MODEL, top_k=20)
        except GalleryError:  # between closing and opening
            time.sleep(0.001)


def _tell(write: int, line: str) -> None:
    os.write(write, f"{line}\n".encode())


def _fail_at_errors(record: logging.LogRecord, write: int) -> None:
    if record.levelno >= logging.ERROR:
        _tell(write, f"error {record.getMessage()}")
        os._exit(1)


class _Ear(logging.Handler):
    """Hands on what is logged."""

    def __init__(self, heard: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        """Hand it on."""
        self._heard(record)


@contextmanager
def listening(heard: Callable[[logging.LogRecord], None]) -> Iterator[None]:
    """Hear what galleries log, and keep it from the screen."""
    log = logging.getLogger("index")
    handler = _Ear(heard)
    propagates = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagates


def kill(
    kills: int,
    *,
    seed: int,
    folder: Path | None = None,
    progress: Progress = lambda _done, _toll: None,
) -> Toll:
    """Kill so many players; only in a process with a single thread.

    Raises:
        MismatchError: Something was lost, came back, or is out of step.
    """
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"expected a process with one thread to fork from, got {threads}")
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as parent, small_limits():
        killing = Killing(seed, Path(parent))
        killing.run(kills, progress)
    return killing.toll
