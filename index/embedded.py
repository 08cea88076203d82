"""The default gallery: everything in one directory and one process."""

import base64
import binascii
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np

from index.derived import Derived, OutOfStepError, Search
from index.gallery import (
    Counts,
    DuplicateTrackletError,
    Embeddings,
    Enrolment,
    Filters,
    GalleryError,
    GalleryUnavailableError,
    GroupBy,
    InvalidCursorError,
    InvalidEmbeddingError,
    ModelMismatchError,
    Page,
    SearchResult,
    TrackletRecord,
)
from index.locks import ReadWriteLock
from index.rows import Stored
from index.schema import damage_told
from index.store import Chunk, Store
from index.vectors import IndexPlan, processors

_log = logging.getLogger(__name__)
_CHANGEABLE = frozenset({"identity", "camera", "start_time", "end_time", "metadata"})
# Beyond this length the square of a distance may overflow float32: (2 * 2^62)^2 = 2^126.
_GREATEST_NORM = 2.0**62
_UPKEEP_PAUSE_WRITES = 1000
_CURSOR = re.compile(r"after-1:([1-9][0-9]{0,17})")


class EmbeddedGallery:
    """A `index.gallery.Gallery` on SQLite and FAISS.

    SQLite is the truth. What FAISS and numpy hold in memory is made from it at opening, and kept in
    step afterwards: a write is committed first, beside running searches, and searches are held off
    only while memory follows. A search that comes between the two notices that a row of its answer
    is not what it was, and begins again, so no answer contradicts its filters.

    Each search in a flat index keeps one processor busy. As many run at once as there are
    processors; those that wait meanwhile, and look at the same rows, share one call of FAISS.

    With the default index, "Flat", answers are exact. With others, an answer may miss rows, but the
    distances in it are exact: they are measured again with the stored vectors. Indexes that need
    training are flat until there are enough rows, see `index.vectors.IndexPlan`.

    Args:
        directory: Where the files are; made if it is missing. One opener at a time.
        index: A FAISS factory string.
        searches: How many calls of FAISS may be under way at once; None for one a processor, as
            OpenMP counts them.

    Raises:
        InvalidIndexError: The factory string cannot make a usable Euclidean index.
        DamagedGalleryError: The files are not a gallery that this version can read.
        GalleryUnavailableError: The directory cannot be used, or is open elsewhere.
        StorageFullError: The disk is full.
    """

    def __init__(
        self, directory: Path, *, index: str = "Flat", searches: int | None = None
    ) -> None:
        self._store = Store(directory)
        # Taken in this order. A writer holds the first throughout, the second while memory changes.
        self._writes = Lock()
        self._memory = ReadWriteLock()
        self._derived: Derived | None = None
        self._calls = searches or processors()
        self._stale = False
        self._committing = False
        self._closed = False
        self._writes_until_upkeep = 0
        try:
            with damage_told():
                self._plan = IndexPlan(index, self._store.content().dimension)
                self._derived = self._load()
        except BaseException:
            self._store.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the files. Calling it again does nothing."""
        with self._writes, self._memory.writing():
            if not self._closed:
                self._closed = True
                self._derived = None
                self._store.close()

    @property
    def model(self) -> str | None:
        """Fingerprint of the model whose embeddings it holds; None while it is empty."""
        with self._reading() as derived:
            return None if derived is None else derived.model

    def add(self, enrolments: Sequence[Enrolment]) -> None:
        """Add tracklets durably, see `index.gallery.Gallery.add`.

        Every now and then the call takes long, while it trains the index anew or frees memory.
        Searches go on meanwhile.
        """
        if not enrolments:
            return
        with self._writing():
            dimension = self._check_enrolments(enrolments)
            with self._store.transaction() as transaction:
                ids = [enrolment.record.tracklet_id for enrolment in enrolments]
                if taken := transaction.taken(ids):
                    raise DuplicateTrackletError(f"already in the gallery: {', '.join(taken)}")
                keys = [transaction.insert(enrolment) for enrolment in enrolments]
                transaction.commit()
            with self._changing_memory():
                self._derived = self._derived or Derived(
                    enrolments[0].record.model,
                    self._plan.build(dimension, sample=None),
                    calls=self._calls,
                )
                self._derived.add(Chunk.of(keys, enrolments))
            self._upkeep()

    def get(self, tracklet_id: str) -> TrackletRecord:
        """The record of a tracklet, see `index.gallery.Gallery.get`."""
        return self._store.get(tracklet_id).record

    def embedding(self, tracklet_id: str) -> Embeddings:
        """The stored embedding, see `index.gallery.Gallery.embedding`."""
        return self._store.embedding(tracklet_id)

    def strip(self, tracklet_id: str) -> bytes:
        """The stored film strip, see `index.gallery.Gallery.strip`."""
        return self._store.strip(tracklet_id)

    def update(self, tracklet_id: str, changes: Mapping[str, Any]) -> TrackletRecord:
        """Change a record durably, see `index.gallery.Gallery.update`."""
        if unknown := sorted(changes.keys() - _CHANGEABLE):
            expected = ", ".join(sorted(_CHANGEABLE))
            raise ValueError(f"expected fields among {expected}, got {', '.join(unknown)}")
        with self._writing(), self._store.transaction() as transaction:
            before = transaction.get(tracklet_id)
            transaction.replace(Stored(before.key, replace(before.record, **changes)))
            after = transaction.get(tracklet_id)  # as it is read from now on: times in UTC
            with self._changing_memory(transaction.commit):
                self._rows().update(after.key, after.record)
        return after.record

    def remove(self, tracklet_id: str) -> TrackletRecord:
        """Erase a tracklet durably, see `index.gallery.Gallery.remove`."""
        with self._writing():
            with self._store.transaction() as transaction:
                before = transaction.get(tracklet_id)
                transaction.delete(before.key)
                with self._changing_memory(transaction.commit):
                    self._rows().remove(before.key)
                    if not self._rows().columns.alive:
                        self._derived = None
            self._store.forget()
            self._upkeep()
        return before.record

    def list(self, filters: Filters, *, limit: int, cursor: str | None = None) -> Page:
        """One page of the records that pass the filters, see `index.gallery.Gallery.list`.

        Raises:
            InvalidCursorError: ``cursor`` was not given by ``list``.
            ValueError: ``limit`` is less than 1.
        """
        if limit < 1:
            raise ValueError(f"expected a limit of at least 1, got {limit}")
        after = 0 if cursor is None else _from_cursor(cursor)
        found = self._store.page(filters, after=after, limit=limit + 1)
        is_last = len(found) <= limit
        next_cursor = None if is_last else _to_cursor(found[limit - 1].key)
        return Page(tuple(stored.record for stored in found[:limit]), next_cursor)

    def search(
        self,
        embedding: Embeddings,
        *,
        model: str,
        top_k: int,
        group_by: GroupBy = "identity",
        filters: Filters | None = None,
        max_distance: float | None = None,
    ) -> SearchResult:
        """Rank what passes the filters, see `index.gallery.Gallery.search`.

        Raises:
            InvalidEmbeddingError: ``embedding`` is not a finite (D,) vector.
            ModelMismatchError: ``model`` is not the gallery's. An empty gallery answers any model.
            ValueError: ``top_k`` is less than 1.
        """
        if top_k < 1:
            raise ValueError(f"expected a top_k of at least 1, got {top_k}")
        search = Search(
            query=embedding,
            top_k=top_k,
            group_by=group_by,
            filters=filters or Filters(),
            max_distance=max_distance,
        )
        while True:
            with self._reading() as derived:
                if derived is not None:
                    _check_model(model, expected=derived.model)
                dimension = None if derived is None else derived.dimension
                _check_embedding(embedding, dimension=dimension)
                if derived is None:
                    return SearchResult((), 0, None)
                try:
                    return derived.search(self._store, search)
                except OutOfStepError as error:
                    # Else it is a change that is committed, and waits for this search to end.
                    if not self._committing and not self._stale:
                        message = "the gallery's file was changed by somebody else"
                        raise GalleryUnavailableError(message) from error

    def counts(self) -> Counts:
        """How much it holds now."""
        with self._reading() as derived:
            if derived is None:
                return Counts(0, 0)
            return Counts(derived.columns.alive, derived.columns.identities())

    def check(self) -> None:
        """Return when the store can be read and written, see `index.gallery.Gallery.check`.

        It waits for no search and no write of ours, however long they take; only where memory has
        to be made again from the store, and nothing is answered meanwhile, does it wait for that.
        """
        self._check_open()
        self._store.check()
        if self._stale:
            with self._reading():
                pass

    @contextmanager
    def _reading(self) -> Iterator[Derived | None]:
        while True:
            with self._memory.reading():
                self._check_open()
                if not self._stale:
                    yield self._derived
                    return
            with self._writing():
                pass  # beginning to write mends what is stale

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._writes:
            self._check_open()
            if self._stale:
                self._rebuild()
            yield

    @contextmanager
    def _changing_memory(self, commit: Callable[[], None] | None = None) -> Iterator[None]:
        """Commit, and hold off searches during the change in memory that belongs to it.

        The store is the truth: if the change fails in memory, memory is made again.
        """
        if commit:
            self._commit(commit)
        try:
            with self._memory.writing():
                self._stale = True  # whatever interrupts from here on
                self._committing = False
                yield
                self._stale = False
        except (RuntimeError, MemoryError, LookupError):
            if not self._stale:
                raise
            _log.exception("the index failed to follow the store; building it again")
            self._rebuild()
        except BaseException:
            self._stale, self._committing = True, False  # interrupted while it waited, or later
            raise

    def _commit(self, commit: Callable[[], None]) -> None:
        self._committing = True
        try:
            commit()
        except GalleryError:
            self._committing = False  # nothing has happened, there or here
            raise
        except BaseException:
            self._stale, self._committing = True, False  # who knows
            raise

    def _rebuild(self) -> None:
        """Make memory again from the store; searches go on with the old one unless it is stale."""
        if self._stale:
            with self._memory.writing():
                self._derived = None
        derived = self._load()
        with self._memory.writing():
            self._derived, self._stale = derived, False

    def _load(self) -> Derived | None:
        try:
            return Derived.load(self._store, self._plan, calls=self._calls)
        except (RuntimeError, MemoryError) as error:  # FAISS's own
            raise GalleryUnavailableError(f"cannot build the index: {error}") from error

    def _upkeep(self) -> None:
        """Train anew, or free the memory of removed rows, when it is time. Never fails."""
        self._writes_until_upkeep -= 1
        if self._derived is None or self._writes_until_upkeep > 0:
            return
        try:
            if self._derived.is_sparse:
                with self._changing_memory():
                    done = self._derived.compact()
                if not done:
                    self._rebuild()
            elif self._plan.wants_training(self._derived.vectors, self._derived.columns.alive):
                self._rebuild()
        except GalleryError:
            # What was asked for is done; the index is only less good than it could be.
            _log.exception("upkeep of the index failed; trying again later")
            self._writes_until_upkeep = _UPKEEP_PAUSE_WRITES

    def _rows(self) -> Derived:
        if self._derived is None:
            raise LookupError("the store holds rows, memory none")
        return self._derived

    def _check_open(self) -> None:
        if self._closed:
            raise GalleryUnavailableError("the gallery is closed")

    def _check_enrolments(self, enrolments: Sequence[Enrolment]) -> int:
        """Refuse what does not fit the gallery or itself; returns the dimension."""
        derived = self._derived
        first = enrolments[0]
        expected_model = first.record.model if derived is None else derived.model
        dimension = first.embedding.size if derived is None else derived.dimension
        for enrolment in enrolments:
            _check_model(enrolment.record.model, expected=expected_model)
            _check_embedding(enrolment.embedding, dimension=dimension)
        ids = Counter(enrolment.record.tracklet_id for enrolment in enrolments)
        if twice := sorted(tracklet_id for tracklet_id, times in ids.items() if times > 1):
            raise DuplicateTrackletError(f"twice in the same call: {', '.join(twice)}")
        if derived is None:
            self._plan.training_rows(dimension)  # raises if the index cannot be had in this size
        return dimension


def _check_model(model: str, *, expected: str) -> None:
    if model != expected:
        raise ModelMismatchError(f"expected embeddings of the model {expected}, got {model}")


def _check_embedding(embedding: Embeddings, *, dimension: int | None) -> None:
    shape, dtype = np.shape(embedding), getattr(embedding, "dtype", None)
    if dtype != np.float32 or len(shape) != 1 or shape[0] < 1 or dimension not in {None, shape[0]}:
        expected = f"({dimension},)" if dimension else "(D,)"
        raise InvalidEmbeddingError(f"expected {expected} float32, got {shape} {dtype}")
    # FAISS answers a NaN query with row -1, which Python reads as the last record.
    if not np.isfinite(embedding).all():
        raise InvalidEmbeddingError("expected finite numbers, got NaN or infinity")
    if float(np.linalg.norm(embedding.astype(np.float64))) > _GREATEST_NORM:
        raise InvalidEmbeddingError(f"expected a length of at most {_GREATEST_NORM:g}, got more")


def _to_cursor(key: int) -> str:
    return base64.urlsafe_b64encode(f"after-1:{key}".encode()).decode()


def _from_cursor(cursor: str) -> int:
    try:
        text = base64.b64decode(cursor, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):  # the latter for what is not ASCII
        text = ""
    match = _CURSOR.fullmatch(text)
    if match is None or _to_cursor(int(match[1])) != cursor:
        raise InvalidCursorError(f"expected a cursor from an earlier page, got {cursor!r}")
    return int(match[1])
