"""Importing: what an export holds becomes part of a gallery, all of it or nothing."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from index.calibration import Calibration, CalibrationError
from index.erasures import Erasures
from index.exchange import (
    EMBEDDINGS_NAME,
    ERASURES_NAME,
    GREATEST_DIMENSION,
    GREATEST_LINE_BYTES,
    GREATEST_MANIFEST_BYTES,
    MANIFEST_NAME,
    PARQUET_NAME,
    STRIPS_NAME,
    TRACKLETS_NAME,
    ExchangeError,
    ExportManifest,
    FileSum,
    from_line,
    read_manifest,
)
from index.files import Hashed, Progress, no_progress, open_regular, told
from index.gallery import Embeddings, Enrolment, TrackletRecord
from index.ledger import GREATEST_LEDGER_BYTES, parse_ledger
from index.rows import RECORD
from index.store import FILE_NAME, Store, Transaction
from index.vector_storage import Storage

_VECTOR = np.dtype("<f4")
_ROWS_AT_ONCE = 1000
_LISTED_IDS = 5
_GREATEST_STRIP_BYTES = 16 << 20
_GREATEST_NORM = 2.0**62  # as in `index.embedded`: beyond, distances overflow
_ID_COLUMN = RECORD.split(", ").index("tracklet_id")
_CONTENT_COLUMN = RECORD.split(", ").index("content")
_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did.

    Args:
        added: Tracklets.
        already_there: Tracklets of the folder whose id and content the gallery had.
        banned: Tracklets of the folder that a ledger says were erased; they are left out.
        expired: Tracklets of the folder whose time is over; they are left out, too.
        erased: Tracklets of the gallery that the folder's ledger says were erased; they are gone.
    """

    added: int
    already_there: int
    banned: int
    expired: int
    erased: int


class _Row(NamedTuple):
    """One tracklet of the folder; its number is its place there."""

    number: int
    record: TrackletRecord
    embedding: Embeddings
    strip_sha256: str | None


@dataclass
class _Plan:
    """Which of the folder's tracklets are not added, and why."""

    seen: set[str] = field(default_factory=set)
    already_there: set[str] = field(default_factory=set)
    banned: set[str] = field(default_factory=set)
    expired: set[str] = field(default_factory=set)
    taken: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> set[str]:
        """All that are not added."""
        return self.already_there | self.banned | self.expired


def import_gallery(
    folder: Path,
    data_dir: Path,
    *,
    ledgers: Sequence[Erasures] = (),
    storage: Storage | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    progress: Progress = no_progress,
) -> Imported:
    """Add what an export holds to a gallery; all of it, or nothing if anything is refused.

    All is read and checked before anything is written, and read and checked again while it is
    written, in one transaction. What is there already, with the same content, is passed over, so an
    import that was killed is repeated.

    What expired before the import began is left out: a service would erase it at once.

    The ledgers of folder and gallery become one: what either says was erased is not added, and what
    the folder's bans in the gallery is erased, see `index.gallery.Gallery.apply_erasures`. An empty
    gallery takes the folder's calibration.

    Args:
        folder: What `index.exporting.export_gallery` made, in the format "npy".
        data_dir: The gallery's data directory; made if it is missing.
        ledgers: What else was erased, see `index.ledger.read_ledger`.
        storage: How the gallery keeps embeddings, see `index.store.Store`.
        clock: What the time is, aware: for the ledger, and for what has expired.
        progress: See `index.files.Progress`.

    Raises:
        InvalidEmbeddingError: A number is too large for the way in which the gallery keeps them.
        StorageMismatchError: The gallery keeps them otherwise.
        ExchangeError: The folder is not a whole export, or does not fit the gallery.
        StorageFullError: The disk is full.
        GalleryUnavailableError: The directory cannot be used, or is open elsewhere.
        DamagedGalleryError: There is a file in it that is not a gallery.
    """
    now = clock()
    source = _Source(folder)
    theirs = _joined([source.ledger, *ledgers])
    with ExitStack() as stack:
        store = None
        if (data_dir / FILE_NAME).exists():  # else none is made before the folder is known as good
            store = stack.enter_context(_opened(data_dir, storage))
            _check_fit(source.manifest, store)
        plan = _examine(source, store, _joined(ledgers), now, progress)
        store = store or stack.enter_context(_opened(data_dir, storage))
        was_empty = store.content().tracklets == 0
        with store.transaction() as transaction:
            erased = _apply(theirs, transaction, now)
            added = _add(source, plan, transaction, progress)
            if was_empty and source.calibration is not None:
                transaction.replace_calibration(source.calibration)
            transaction.commit()
        if erased:
            store.forget(at_once=True)
    return Imported(
        added=added,
        already_there=len(plan.already_there),
        banned=len(plan.banned),
        expired=len(plan.expired),
        erased=erased,
    )


@contextmanager
def _opened(data_dir: Path, storage: Storage | None) -> Iterator[Store]:
    store = Store(data_dir, storage=storage)
    try:
        yield store
    finally:
        store.close()


def _joined(ledgers: Sequence[Erasures]) -> Erasures:
    return Erasures(tuple(entry for ledger in ledgers for entry in ledger.entries))


def _check_fit(manifest: ExportManifest, store: Store) -> None:
    _, model, dimension = store.content()
    if model is None or manifest.model is None:
        return
    if manifest.model != model:
        message = f"expected an export of the model {model}, got one of {manifest.model}"
        raise ExchangeError(message)
    if manifest.dimension != dimension:
        message = f"expected embeddings of {dimension} numbers, got {manifest.dimension}"
        raise ExchangeError(message)


def _examine(
    source: "_Source", store: Store | None, others: Erasures, now: datetime, progress: Progress
) -> _Plan:
    """Read all of the folder, and decide for each tracklet; nothing is written."""
    # Whoever is in the folder outlived what its own ledger says: a name may be given again.
    ledger = _joined([others, store.erasures()] if store else [others]).without(source.ledger)
    plan = _Plan()
    for part in source.parts(progress, "checking"):
        contents = _contents(store, part) if store else {}
        for row in part:
            source.strip(row)
            _decide(row.record, plan, ledger, now, contents.get(row.record.tracklet_id))
    if plan.taken:
        listed = ", ".join(plan.taken[:_LISTED_IDS])
        raise ExchangeError(
            "expected ids that are new to the gallery or have the same content there, got "
            f"{len(plan.taken)} others: {listed}{', ...' * (len(plan.taken) > _LISTED_IDS)}"
        )
    return plan


def _decide(
    record: TrackletRecord, plan: _Plan, ledger: Erasures, now: datetime, content: str | None
) -> None:
    tracklet_id = record.tracklet_id
    if tracklet_id in plan.seen:
        raise ExchangeError(f"{TRACKLETS_NAME}: expected each id once, got {tracklet_id} twice")
    plan.seen.add(tracklet_id)
    if ledger.bans(record):
        plan.banned.add(tracklet_id)
    elif content == record.content:
        plan.already_there.add(tracklet_id)
    elif record.expires_at is not None and record.expires_at <= now:
        plan.expired.add(tracklet_id)
    elif content is not None:
        plan.taken.append(tracklet_id)


def _contents(store: Store, part: Sequence[_Row]) -> dict[str, str]:
    """What the gallery has under the ids of some rows: contents by id."""
    keys = store.keys(row.record.tracklet_id for row in part)
    found = store.rows(keys, vectors=False).values()
    return {row[_ID_COLUMN]: row[_CONTENT_COLUMN] for row in found}


def _apply(ledger: Erasures, transaction: Transaction, now: datetime) -> int:
    """Enter a ledger and erase what it bans; returns how many tracklets that were."""
    new = ledger.without(transaction.erasures())
    transaction.enter(new.entries)
    outlines = transaction.outlines() if new.entries else ()
    banned = {key: each.tracklet_id for key, each in outlines if new.bans(each)}
    if banned:
        transaction.erase(banned, at=now)
    return len(banned)


def _add(source: "_Source", plan: _Plan, transaction: Transaction, progress: Progress) -> int:
    """Insert what is to be added; returns how many tracklets that were."""
    left_out = plan.left_out
    added = 0
    if left_out == plan.seen:  # as where an import is repeated
        return added
    for part in source.parts(progress, "importing"):
        for row in part:
            if row.record.tracklet_id in left_out:
                continue
            transaction.insert(Enrolment(row.record, row.embedding, source.strip(row)))
            added += 1
    return added


class _Source:
    """A folder to import, as far as its manifest and its ledger say.

    Raises:
        ExchangeError: It is not a whole export in the format "npy".
        LedgerError: Its ledger is none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        content = self._read(MANIFEST_NAME, GREATEST_MANIFEST_BYTES)
        self.manifest = read_manifest(folder, content)
        files = self.manifest.files
        if PARQUET_NAME in files:
            raise ExchangeError("expected an export in the format npy, got one in Parquet")
        expected = {EMBEDDINGS_NAME, TRACKLETS_NAME, ERASURES_NAME}
        if files.keys() != expected:  # no other name is ever opened
            raise ExchangeError(f"expected the files {sorted(expected)}, got {sorted(files)[:9]}")
        self._check_shape()
        content = self._read(ERASURES_NAME, GREATEST_LEDGER_BYTES)
        _check_sum(ERASURES_NAME, FileSum(len(content), sha256(content).hexdigest()), files)
        self.ledger = parse_ledger(content, ERASURES_NAME)
        self.calibration = self._calibration()

    def parts(self, progress: Progress, doing: str) -> Iterator[Sequence[_Row]]:
        """All rows in their order, some at a time; after the last, the checksums are compared.

        Raises:
            ExchangeError: A file is not what it should be.
        """
        count = self.manifest.tracklets
        with (
            told(f"read the export {self._folder.name}", ExchangeError),
            open_regular(self._folder / EMBEDDINGS_NAME) as vectors,
            open_regular(self._folder / TRACKLETS_NAME) as records,
        ):
            hashed_vectors, hashed_records = Hashed(vectors), Hashed(records)
            self._read_header(hashed_vectors)
            for first in range(0, count, _ROWS_AT_ONCE):
                rows = min(_ROWS_AT_ONCE, count - first)
                embeddings = self._read_vectors(hashed_vectors, first, rows)
                yield [
                    _Row(first + row, *self._read_record(hashed_records, first + row, embedding))
                    for row, embedding in enumerate(embeddings)
                ]
                progress(doing, first + rows, count)
            _check_end(EMBEDDINGS_NAME, hashed_vectors, vectors, self.manifest)
            _check_end(TRACKLETS_NAME, hashed_records, records, self.manifest)

    def strip(self, row: _Row) -> bytes | None:
        """The film strip of a row, or None where it has none.

        Raises:
            ExchangeError: It is not the one that the record names.
        """
        if row.strip_sha256 is None:
            return None
        name = f"{STRIPS_NAME}/{row.number}.jpg"
        if not self.manifest.strips:
            raise ExchangeError(f"expected an export without strips, got a checksum of {name}")
        content = self._read(name, _GREATEST_STRIP_BYTES)
        if sha256(content).hexdigest() != row.strip_sha256 or not content.startswith(_JPEG):
            raise ExchangeError(f"expected the strip that line {row.number + 1} names in {name}")
        return content

    def _read(self, name: str, most: int) -> bytes:
        with (
            told(f"read {name} of the export {self._folder.name}", ExchangeError),
            open_regular(self._folder / name) as file,
        ):
            content = file.read(most + 1)
        if len(content) > most:
            raise ExchangeError(f"{name}: expected at most {most} bytes, got more")
        return content

    def _check_shape(self) -> None:
        dimension, count = self.manifest.dimension, self.manifest.tracklets
        is_empty = self.manifest.model is None
        if is_empty != (count == 0) or is_empty != (dimension is None):
            raise ExchangeError("expected model and dimension of all tracklets, got less or more")
        if dimension is not None and not 1 <= dimension <= GREATEST_DIMENSION:
            raise ExchangeError(f"expected 1 to {GREATEST_DIMENSION} numbers, got {dimension}")

    def _calibration(self) -> Calibration | None:
        values = self.manifest.calibration
        if values is None:
            return None
        try:
            calibration = Calibration.from_json(json.dumps(values))
        except CalibrationError as error:
            raise ExchangeError(f"{MANIFEST_NAME}: {error}") from error
        return calibration if calibration.model == self.manifest.model else None

    def _read_header(self, file: Hashed) -> None:
        expected = ((self.manifest.tracklets, self.manifest.dimension or 0), False, _VECTOR)
        try:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("another version")
            found = np.lib.format.read_array_header_1_0(file)
        except (ValueError, SyntaxError, RecursionError) as error:
            raise ExchangeError(
                f"{EMBEDDINGS_NAME}: expected an array of numpy's format 1.0, got something else"
            ) from error
        if found != expected:
            raise ExchangeError(
                f"{EMBEDDINGS_NAME}: expected {expected[0]} {_VECTOR} in C order, got "
                f"{found[0]} {found[2]}{' in Fortran order' * found[1]}"
            )

    def _read_vectors(self, file: Hashed, first: int, rows: int) -> Embeddings:
        dimension = self.manifest.dimension or 0
        content = file.read(rows * dimension * _VECTOR.itemsize)
        if len(content) < rows * dimension * _VECTOR.itemsize:
            count = self.manifest.tracklets
            raise ExchangeError(f"{EMBEDDINGS_NAME}: expected {count} embeddings, got fewer")
        embeddings = np.frombuffer(content, _VECTOR).astype(np.float32).reshape(rows, dimension)
        with np.errstate(invalid="ignore", over="ignore"):
            norms = np.linalg.norm(embeddings.astype(np.float64), axis=1)
        wrong = np.flatnonzero(~(norms <= _GREATEST_NORM))  # NaN is not either
        if wrong.size:
            raise ExchangeError(
                f"{EMBEDDINGS_NAME}, row {first + int(wrong[0])}: expected finite numbers and a "
                f"length of at most {_GREATEST_NORM:g}, got others"
            )
        return embeddings

    def _read_record(
        self, file: Hashed, number: int, embedding: Embeddings
    ) -> tuple[TrackletRecord, Embeddings, str | None]:
        line = file.readline(GREATEST_LINE_BYTES)
        where = f"{TRACKLETS_NAME}, line {number + 1}"
        if not line.endswith(b"\n"):
            raise ExchangeError(
                f"{where}: expected a line of less than {GREATEST_LINE_BYTES} bytes, got "
                f"{'none' if not line else 'a longer one, or no end of it'}"
            )
        try:
            record, strip_sha256 = from_line(line)
        except ValueError as error:
            raise ExchangeError(f"{where}: {error}") from error
        if record.model != self.manifest.model:
            raise ExchangeError(f"{where}: expected the model {self.manifest.model}, got another")
        return record, embedding, strip_sha256


def _check_end(name: str, hashed: Hashed, file: BinaryIO, manifest: ExportManifest) -> None:
    if file.read(1):
        raise ExchangeError(f"{name}: expected {manifest.tracklets} tracklets, got more")
    _check_sum(name, FileSum(hashed.count, hashed.hex), manifest.files)


def _check_sum(name: str, found: FileSum, files: Mapping[str, FileSum]) -> None:
    if found != files[name]:
        raise ExchangeError(
            f"{name}: expected {files[name].bytes} bytes with the SHA-256 {files[name].sha256}, "
            f"got {found.bytes} with {found.sha256}"
        )
