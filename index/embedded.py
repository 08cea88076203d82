"""The default gallery: everything in one directory and one process."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np

from index import cursors
from index.calibration import Calibration
from index.derived import Derived, OutOfStepError, Search
from index.erasures import Erasures
from index.gallery import (
    Counts,
    DamagedGalleryError,
    DuplicateIdentityError,
    DuplicateTrackletError,
    Embeddings,
    Enrolment,
    Erased,
    Filters,
    GalleryError,
    GalleryUnavailableError,
    GroupBy,
    IdentityPage,
    IdentitySummary,
    InvalidEmbeddingError,
    ModelMismatchError,
    NotFoundError,
    Page,
    SearchResult,
    TrackletRecord,
)
from index.group_commit import Change, GroupCommit, attempted, commit
from index.locks import ReadWriteLock
from index.rows import Stored, from_microseconds, to_microseconds
from index.saved import SavedIndexError
from index.schema import damage_told
from index.store import Chunk, Content, Store, Transaction
from index.vector_storage import Storage, rounded
from index.vectors import IndexPlan, processors

_log = logging.getLogger(__name__)
_CHANGEABLE = frozenset({"identity", "camera", "start_time", "end_time", "metadata", "expires_at"})
# Beyond this length the square of a distance may overflow float32: (2 * 2^62)^2 = 2^126.
_GREATEST_NORM = 2.0**62
_UPKEEP_PAUSE_WRITES = 1000
# The index is saved when more than a tenth of its rows is not in the file, but not more often than
# this. What is missing there costs a start some time, and nothing else.
_SAVING_PAUSE_S = 600.0
# So many are erased at a time when theirs is over, and then others get their turn: a lock that is
# taken again at once is rarely seen free by those who wait for it.
_EXPIRED_AT_ONCE = 500
_TURN_S = 0.001
_LONG_AGO = to_microseconds(datetime.min.replace(tzinfo=UTC))


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

    Indexes that are slow to make (IVF, HNSW) are saved beside the store, at closing and every now
    and then, so that the next opening need not make them again; see `index.saved`.

    Args:
        directory: Where the files are; made if it is missing. One opener at a time.
        index: A FAISS factory string, perhaps with how far to look, see `index.factories.parse`.
        storage: How embeddings are kept; None for what they are kept as already, and float32 in a
            new gallery. With "float16" they are rounded when they are added, and take half the room
            on the disk, and with "Flat" in memory, too: distances are exact distances to what was
            rounded. It may change while the gallery is empty.
        searches: How many calls of FAISS may be under way at once; None for one a processor, as
            OpenMP counts them.
        clock: What the time is, aware: for the ledger of erasures.

    Raises:
        InvalidIndexError: The factory string cannot make a usable Euclidean index.
        StorageMismatchError: The gallery's embeddings are kept otherwise.
        DamagedGalleryError: The files are not a gallery that this version can read.
        GalleryUnavailableError: The directory cannot be used, or is open elsewhere.
        StorageFullError: The disk is full.
    """

    def __init__(
        self,
        directory: Path,
        *,
        index: str = "Flat",
        storage: Storage | None = None,
        searches: int | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = Store(directory, storage=storage)
        self._clock = clock
        # Taken in this order. A writer holds the first throughout, the second while memory changes.
        self._writes = Lock()
        self._memory = ReadWriteLock()
        self._additions = GroupCommit(self._add_together)
        self._updates = GroupCommit(self._update_together)
        self._removals = GroupCommit(self._remove_together)
        self._derived: Derived | None = None
        self._calls = searches or processors()
        self._stale = False
        self._committing = False
        self._closed = False
        self._writes_until_upkeep = 0
        self._saves_from = 0.0
        try:
            with damage_told():
                content = self._store.content()
                self._plan = IndexPlan(index, content.dimension, self._store.storage)
                self._derived = self._load_saved(content)
                if self._derived is None:
                    self._derived = self._load(content)
                    self._save()  # it may have taken long: whoever dies now need not wait again
        except BaseException:
            self._store.close(as_it_is=True)
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
        """Release the files. Calling it again does nothing.

        Before, an index that is slow to make is saved, if it has changed; searches go on meanwhile.
        """
        with self._writes:
            if not self._closed and not self._stale:
                self._save()
            with self._memory.writing():
                if not self._closed:
                    self._closed = True
                    self._derived = None
                    self._store.close()

    @property
    def storage(self) -> Storage:
        """How its embeddings are kept."""
        return self._store.storage

    @property
    def model(self) -> str | None:
        """Fingerprint of the model whose embeddings it holds; None while it is empty."""
        with self._reading() as derived:
            return None if derived is None else derived.model

    def add(self, enrolments: Sequence[Enrolment]) -> None:
        """Add tracklets durably, see `index.gallery.Gallery.add`.

        Threads that add at the same time share a transaction, and so the wait for the disk; each
        is refused, or not, for itself. Every now and then the call takes long, while it trains the
        index anew, saves it or frees memory. Searches go on meanwhile.
        """
        if not enrolments:
            return
        self._check_enrolments(enrolments)
        rounded_ones = [_rounded(enrolment, self._store.storage) for enrolment in enrolments]
        addition = self._additions.ask(rounded_ones)
        if addition.is_followed:
            self._keep_up()
        addition.result()

    def get(self, tracklet_id: str) -> TrackletRecord:
        """The record of a tracklet, see `index.gallery.Gallery.get`."""
        return self._store.get(tracklet_id).record

    def embedding(self, tracklet_id: str) -> Embeddings:
        """The stored embedding, see `index.gallery.Gallery.embedding`."""
        return self._store.embedding(tracklet_id)

    def strip(self, tracklet_id: str) -> bytes:
        """The stored film strip, see `index.gallery.Gallery.strip`."""
        return self._store.strip(tracklet_id)

    def frames(self, tracklet_id: str) -> tuple[bytes, ...]:
        """The kept frames, see `index.gallery.Gallery.frames`."""
        return self._store.frames(tracklet_id)

    def update(self, tracklet_id: str, changes: Mapping[str, Any]) -> TrackletRecord:
        """Change a record durably, see `index.gallery.Gallery.update`."""
        if unknown := sorted(changes.keys() - _CHANGEABLE):
            expected = ", ".join(sorted(_CHANGEABLE))
            raise ValueError(f"expected fields among {expected}, got {', '.join(unknown)}")
        return self._updates.ask((tracklet_id, changes)).result().record

    def remove(self, tracklet_id: str) -> TrackletRecord:
        """Erase a tracklet durably, see `index.gallery.Gallery.remove`.

        What SQLite leaves of it in unused parts of a large file is removed by a later call, see
        `index.store.Store.forget`; `expire` looks after that, too.
        """
        removal = self._removals.ask(tracklet_id)
        if removal.is_followed:
            self._keep_up()
        return removal.result().record

    def identities(self, *, limit: int, cursor: str | None = None) -> IdentityPage:
        """One page of the identities by name, see `index.gallery.Gallery.identities`.

        Raises:
            InvalidCursorError: ``cursor`` was not given by ``identities``.
            ValueError: ``limit`` is less than 1.
        """
        _check_limit(limit)
        after = None if cursor is None else cursors.to_identity(cursor)
        found = self._store.identities(after=after, limit=limit + 1)
        is_last = len(found) <= limit
        next_cursor = None if is_last else cursors.from_identity(found[limit - 1].identity)
        return IdentityPage(tuple(found[:limit]), next_cursor)

    def identity(self, name: str) -> IdentitySummary:
        """What is known of an identity, see `index.gallery.Gallery.identity`."""
        return self._store.identity(name)

    def rename_identity(self, name: str, to: str) -> IdentitySummary:
        """Give an identity another name, see `index.gallery.Gallery.rename_identity`."""
        with self._writing(), self._store.transaction() as transaction:
            tracklets = transaction.of_identity(name)
            if to == name:
                return transaction.identity(name)
            if transaction.has_identity(to):
                raise DuplicateIdentityError("expected a new name, got that of another identity")
            self._name(transaction, [*tracklets], to)
            return self._store.identity(to)

    def merge_identity(self, name: str, into: str) -> IdentitySummary:
        """Join an identity to another, see `index.gallery.Gallery.merge_identity`."""
        if name == into:
            raise ValueError("expected two identities to merge, got the same twice")
        with self._writing(), self._store.transaction() as transaction:
            tracklets = transaction.of_identity(name)
            transaction.identity(into)  # raises if it does not exist
            self._name(transaction, [*tracklets], into)
            return self._store.identity(into)

    def assign(self, tracklet_ids: Sequence[str], identity: str | None) -> int:
        """Say whom tracklets show, see `index.gallery.Gallery.assign`."""
        with self._writing(), self._store.transaction() as transaction:
            known = transaction.shown(tracklet_ids)
            if unknown := sorted(set(tracklet_ids) - known.keys()):
                raise NotFoundError(f"no tracklet has the id {unknown[0]}")
            keys = sorted(key for key, before in known.values() if before != identity)
            if keys:
                self._name(transaction, keys, identity)
            return len(keys)

    def remove_identity(self, name: str) -> Erased:
        """Erase an identity with its tracklets, see `index.gallery.Gallery.remove_identity`.

        No trace of it is in any file when the call returns, unless somebody was reading meanwhile:
        then `expire` looks after that.
        """
        with self._writing():
            with self._store.transaction() as transaction:
                tracklets = transaction.of_identity(name)
                self._erase(transaction, tracklets, at=self._clock(), identity=name)
            self._tidy(at_once=True)
        return Erased(name, tuple(tracklets.values()))

    def expire(self, now: datetime, retention: timedelta | None = None) -> tuple[str, ...]:
        """Erase what is to be erased by now, see `index.gallery.Gallery.expire`.

        It also removes what earlier erasures had to leave in the files, see
        `index.store.Store.forget`.
        """
        at = to_microseconds(now)
        enrolled = None
        if retention is not None:
            enrolled = max(at - retention // timedelta(microseconds=1), _LONG_AGO)
        erased: list[str] = []
        while self._store.has_traces or self._store.due(at, enrolled, limit=1):
            try:
                due = self._expire_some(at, enrolled)
            except GalleryError as error:
                if not erased:
                    raise
                # Whoever asks has to be told of those; the next call meets the error again.
                _log.warning("the rest of what has expired is erased later: %s", error)
                break
            erased += due
            if len(due) < _EXPIRED_AT_ONCE:
                break
            time.sleep(_TURN_S)
        return tuple(erased)

    def _expire_some(self, at: int, enrolled: int | None) -> Collection[str]:
        with self._writing():
            due = self._store.due(at, enrolled, limit=_EXPIRED_AT_ONCE)
            if due:
                with self._store.transaction() as transaction:
                    self._erase(transaction, due, at=from_microseconds(at))
            self._tidy()
        return due.values()

    def calibration(self) -> Calibration | None:
        """The calibration, see `index.gallery.Gallery.calibration`.

        It is read from the store each time: another process may have written it, see
        `index.guest.write_calibration`.

        Raises:
            CalibrationError: What is stored comes from a version with other calibrations.
        """
        text = self._store.property("calibration")
        if text is None:
            return None
        calibration = Calibration.from_json(text)
        return calibration if calibration.model == self.model else None

    def set_calibration(self, calibration: Calibration | None) -> None:
        """Keep a calibration, see `index.gallery.Gallery.set_calibration`."""
        with self._writing(), self._store.transaction() as transaction:
            transaction.replace_calibration(calibration)
            transaction.commit()

    def erasures(self) -> Erasures:
        """The ledger, see `index.gallery.Gallery.erasures`."""
        return self._store.erasures()

    def apply_erasures(self, erasures: Erasures) -> tuple[str, ...]:
        """Add a ledger and erase what it bans, see `index.gallery.Gallery.apply_erasures`."""
        with self._writing():
            with self._store.transaction() as transaction:
                new = erasures.without(transaction.erasures())
                transaction.enter(new.entries)
                outlines = transaction.outlines() if new.entries else ()
                banned = {key: each.tracklet_id for key, each in outlines if new.bans(each)}
                if banned:
                    self._erase(transaction, banned, at=self._clock())
                else:
                    transaction.commit()
            if banned:
                self._tidy(at_once=True)
        return tuple(banned.values())

    def list(self, filters: Filters, *, limit: int, cursor: str | None = None) -> Page:
        """One page of the records that pass the filters, see `index.gallery.Gallery.list`.

        Raises:
            InvalidCursorError: ``cursor`` was not given by ``list``.
            ValueError: ``limit`` is less than 1.
        """
        _check_limit(limit)
        after = 0 if cursor is None else cursors.to_key(cursor)
        found = self._store.page(filters, after=after, limit=limit + 1)
        is_last = len(found) <= limit
        next_cursor = None if is_last else cursors.from_key(found[limit - 1].key)
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

    def _add_together(self, additions: Sequence["_Addition"]) -> None:
        with self._writing():
            insert = _Inserting(self._derived)
            with self._store.transaction() as transaction:
                made = attempted(additions, transaction, insert)
                if not made:
                    return
                enrolments = [enrolment for each in made for enrolment in each.asked]
                keys = [key for each in made for key in each.result()]
                with self._changing_memory(partial(commit, transaction, made)):
                    if self._derived is None:
                        model, dimension = insert.expected(enrolments[0])
                        vectors = self._plan.build(dimension, sample=None)
                        self._derived = Derived(model, vectors, calls=self._calls)
                    self._derived.add(Chunk.of(keys, enrolments))
            additions[0].is_followed = self._wants_upkeep()

    def _update_together(self, updates: Sequence["_Update"]) -> None:
        with self._writing(), self._store.transaction() as transaction:
            made = attempted(updates, transaction, _update)
            if made:
                with self._changing_memory(partial(commit, transaction, made)):
                    for update in made:
                        self._rows().update(*update.result())

    def _remove_together(self, removals: Sequence["_Removal"]) -> None:
        at = self._clock()
        with self._writing():
            with self._store.transaction() as transaction:
                made = attempted(removals, transaction, partial(_remove, at=at))
                if not made:
                    return
                with self._changing_memory(partial(commit, transaction, made)):
                    self._drop_rows([each.result().key for each in made])
            self._store.forget()  # before anybody is told that it is gone
            removals[0].is_followed = self._wants_upkeep()

    def _name(self, transaction: Transaction, keys: Sequence[int], identity: str | None) -> None:
        """Say whom tracklets show, commit, and have memory follow."""
        transaction.name(keys, identity)
        with self._changing_memory(transaction.commit):
            self._rows().name(keys, identity)

    def _erase(
        self,
        transaction: Transaction,
        tracklets: Mapping[int, str],
        *,
        at: datetime,
        identity: str | None = None,
    ) -> None:
        """Erase tracklets, commit, and have memory follow; see `index.store.Transaction.erase`."""
        transaction.erase(tracklets, at=at, identity=identity)
        with self._changing_memory(transaction.commit):
            self._drop_rows([*tracklets])

    def _drop_rows(self, keys: Sequence[int]) -> None:
        self._rows().remove(keys)
        if not self._rows().columns.alive:
            self._derived = None

    def _tidy(self, *, at_once: bool = False) -> None:
        """After an erasure: free what it leaves on the disk and in memory. Never fails."""
        self._store.forget(at_once=at_once)
        self._upkeep()

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
        try:
            derived = self._load(self._store.content())
        except DamagedGalleryError as error:  # that is one at opening
            raise GalleryUnavailableError(str(error)) from error
        with self._memory.writing():
            self._derived, self._stale = derived, False

    def _load_saved(self, content: Content) -> Derived | None:
        """Memory from the saved index, or None. Where that is of no use, it is removed."""
        if not self._store.saved.exists:
            return None
        try:
            derived = Derived.from_saved(self._store, content, self._plan, calls=self._calls)
        except SavedIndexError as error:
            _log.warning("the index is made anew, the saved one is of no use: %s", error)
            self._store.drop_saved()
            return None
        self._saves_from = time.monotonic() + _SAVING_PAUSE_S
        return derived

    def _save_if_due(self) -> None:
        if self._is_saving_due():
            self._save()

    def _is_saving_due(self) -> bool:
        derived = self._derived
        if derived is None or not derived.can_be_saved or time.monotonic() < self._saves_from:
            return False
        return derived.unsaved > derived.columns.alive // 10 or not self._store.saved.exists

    def _save(self) -> None:
        """Save the index, if it is worth it and has changed. Never fails; searches go on."""
        derived = self._derived
        if derived is None or not derived.can_be_saved or not derived.unsaved:
            return
        self._saves_from = time.monotonic() + _SAVING_PAUSE_S
        try:
            derived.save(self._store, self._plan)
        except (OSError, RuntimeError, MemoryError, GalleryError) as error:
            reason = error.strerror if isinstance(error, OSError) else error  # without a path
            _log.warning("the index could not be saved; the next start makes it anew: %s", reason)

    def _load(self, content: Content) -> Derived | None:
        try:
            return Derived.load(self._store, content, self._plan, calls=self._calls)
        except (RuntimeError, MemoryError) as error:  # FAISS's own
            raise GalleryUnavailableError(f"cannot build the index: {error}") from error

    def _keep_up(self) -> None:
        """See `_upkeep`; for one who has been answered already."""
        with self._writes:
            if not self._closed and not self._stale:
                self._upkeep()

    def _wants_upkeep(self) -> bool:
        derived = self._derived
        return derived is not None and (
            derived.is_sparse
            or self._plan.wants_training(derived.vectors, derived.columns.alive)
            or self._is_saving_due()
        )

    def _upkeep(self) -> None:
        """Train anew, free the memory of removed rows, or save, when it is time. Never fails."""
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
            self._save_if_due()
        except (GalleryError, RuntimeError, MemoryError, OSError):
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

    def _check_enrolments(self, enrolments: Sequence[Enrolment]) -> None:
        """Refuse what does not fit itself, or the gallery as it is now."""
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


_Addition = Change[Sequence[Enrolment], Sequence[int]]
_Update = Change[tuple[str, Mapping[str, Any]], Stored]
_Removal = Change[str, Stored]


class _Inserting:
    """Inserts enrolments of one model and size: the gallery's, or of the first that come.

    Args:
        derived: What memory holds before.
    """

    def __init__(self, derived: Derived | None) -> None:
        self._expected = None if derived is None else (derived.model, derived.dimension)

    def expected(self, first: Enrolment) -> tuple[str, int]:
        """Of which model, and of how many numbers, embeddings have to be after a first one."""
        return self._expected or (first.record.model, first.embedding.size)

    def __call__(self, transaction: Transaction, enrolments: Sequence[Enrolment]) -> list[int]:
        """Insert what one caller adds, which is of one model and size; returns the keys."""
        first = enrolments[0]
        model, dimension = self.expected(first)
        _check_model(first.record.model, expected=model)
        _check_size(first.embedding, dimension=dimension)
        ids = [enrolment.record.tracklet_id for enrolment in enrolments]
        if taken := transaction.taken(ids):
            raise DuplicateTrackletError(f"already in the gallery: {', '.join(taken)}")
        keys = [transaction.insert(enrolment) for enrolment in enrolments]
        self._expected = (model, dimension)
        return keys


def _update(transaction: Transaction, asked: tuple[str, Mapping[str, Any]]) -> Stored:
    tracklet_id, changes = asked
    before = transaction.get(tracklet_id)
    transaction.replace(Stored(before.key, replace(before.record, **changes)))
    return transaction.get(tracklet_id)  # as it is read from now on: times in UTC


def _remove(transaction: Transaction, tracklet_id: str, *, at: datetime) -> Stored:
    before = transaction.get(tracklet_id)
    transaction.erase({before.key: tracklet_id}, at=at)
    return before


def _rounded(enrolment: Enrolment, storage: Storage) -> Enrolment:
    """An enrolment as it will come back."""
    if storage == "float32":
        return enrolment
    return replace(enrolment, embedding=rounded(enrolment.embedding, storage))


def _check_limit(limit: int) -> None:
    if limit < 1:
        raise ValueError(f"expected a limit of at least 1, got {limit}")


def _check_model(model: str, *, expected: str) -> None:
    if model != expected:
        raise ModelMismatchError(f"expected embeddings of the model {expected}, got {model}")


def _check_size(embedding: Embeddings, *, dimension: int | None) -> None:
    shape, dtype = np.shape(embedding), getattr(embedding, "dtype", None)
    if dtype != np.float32 or len(shape) != 1 or shape[0] < 1 or dimension not in {None, shape[0]}:
        expected = f"({dimension},)" if dimension else "(D,)"
        raise InvalidEmbeddingError(f"expected {expected} float32, got {shape} {dtype}")


def _check_embedding(embedding: Embeddings, *, dimension: int | None) -> None:
    _check_size(embedding, dimension=dimension)
    # FAISS answers a NaN query with row -1, which Python reads as the last record.
    if not np.isfinite(embedding).all():
        raise InvalidEmbeddingError("expected finite numbers, got NaN or infinity")
    if float(np.linalg.norm(embedding.astype(np.float64))) > _GREATEST_NORM:
        raise InvalidEmbeddingError(f"expected a length of at most {_GREATEST_NORM:g}, got more")
