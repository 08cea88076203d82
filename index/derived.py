"""What memory holds of a gallery: derived from the store, and at any time made again from it."""

import logging
import secrets
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from index.columns import Columns
from index.gallery import (
    Embeddings,
    Filters,
    GalleryUnavailableError,
    GroupBy,
    InvalidIndexError,
    Match,
    NotFoundError,
    SearchResult,
    TrackletRecord,
)
from index.ranking import ANY_ERROR, Nearest, Rows, rank
from index.rows import check_embeddings, to_microseconds, to_stored
from index.saved import Header, SavedIndexError
from index.sharing import SharedCalls
from index.store import Chunk, Content, Store
from index.vectors import Allowed, IndexPlan, VectorIndex

_log = logging.getLogger(__name__)
_ROWS_AT_ONCE = 2048
_TELLING_PAUSE_S = 10.0
_DESCRIBED_AT_ONCE = 50_000
# So few rows are measured one by one where FAISS would only guess: filters may leave a handful of
# rows that an approximate search does not happen to pass by.
_FEW_ROWS = 1000
_FIRST_CANDIDATES = 64
_MOST_FIRST_CANDIDATES = 1024
# By then each query of a call costs an eighth of what it costs alone, and answers still come soon.
_MOST_TOGETHER = 64
_EVERYONE = Filters()
_REMEMBERED_FILTERS = 16  # a byte and a bit a slot each


class OutOfStepError(Exception):
    """Raised when a search finds a row otherwise in the store than in memory; never leaves us."""


class Question(NamedTuple):
    """What one search asks of the vectors.

    Args:
        query: (D,) float32.
        wanted: How many slots.
        allowed: Which take part.
    """

    query: Embeddings
    wanted: int
    allowed: Allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What to look for, see `index.gallery.Gallery.search`."""

    query: Embeddings
    top_k: int
    group_by: GroupBy
    filters: Filters
    max_distance: float | None


class Derived:
    """Columns and vectors, slot by slot, of a gallery that is not empty.

    Many threads may search at once, but only while nobody changes anything.

    Args:
        model: Whose embeddings these are.
        vectors: An index without rows.
        calls: How many FAISS calls may be under way at once.
    """

    def __init__(self, model: str, vectors: VectorIndex, *, calls: int) -> None:
        self.model = model
        self.vectors = vectors
        self.columns = Columns()
        self.unsaved = 0  # rows that the saved index lacks, or has too many
        self._shared = SharedCalls(self._nearest, at_once=calls, most=_MOST_TOGETHER)
        # Who passes which filters, until the next change: often the same are asked for again.
        self._allowed: dict[Filters, Allowed] = {}
        self._per_group = _PerGroup()

    @classmethod
    def load(
        cls, store: Store, content: Content, plan: IndexPlan, *, calls: int
    ) -> "Derived | None":
        """Make it from the store; None if that is empty. Where it takes long, the log says how far.

        Raises:
            DamagedGalleryError: What is stored does not fit together.
            InvalidIndexError: FAISS cannot follow the plan with these rows.
        """
        tracklets, model, dimension = content
        if model is None or dimension is None:
            return None
        derived = cls(model, _built(store, plan, dimension, tracklets), calls=calls)
        derived.vectors.reserve(tracklets)
        told = time.monotonic()
        for chunk in store.chunks(_ROWS_AT_ONCE):
            derived.add(chunk)
            if time.monotonic() > told + _TELLING_PAUSE_S:
                told = time.monotonic()
                _log.info("indexed %d of %d tracklets", derived.columns.alive, tracklets)
        return derived

    @classmethod
    def from_saved(
        cls, store: Store, content: Content, plan: IndexPlan, *, calls: int
    ) -> "Derived":
        """Make it from the saved index, and from what the store says that is new or gone since.

        Raises:
            SavedIndexError: The saved index is none of this store and plan, or damaged.
        """
        with store.saved.reading() as (header, keys, file):
            _check_header(header, store, content, plan)
            try:
                vectors = plan.read(header.dimension, header.trained_on, file.read)
            except (RuntimeError, MemoryError, InvalidIndexError) as error:
                raise SavedIndexError(f"cannot read the index: {error}") from error
        if len(keys) != header.slots or vectors.rows != header.rows:
            message = f"{header.slots} keys and {header.rows} rows"
            raise SavedIndexError(f"expected {message}, got {len(keys)} and {vectors.rows}")
        derived = cls(header.model, vectors, calls=calls)
        derived._follow(store, keys)
        for chunk in store.chunks(_ROWS_AT_ONCE, after=int(keys.max(initial=0))):
            derived.add(chunk)
        return derived

    def save(self, store: Store, plan: IndexPlan) -> None:
        """Write it to the disk, for `from_saved`.

        Raises:
            OSError: The disk is full, or refuses.
            GalleryError: The store does.
        """
        header = Header(
            name=secrets.token_hex(16),
            model=self.model,
            dimension=self.dimension,
            plan=plan.description,
            trained_on=self.vectors.trained_on,
            slots=len(self.columns.keys),
            rows=self.vectors.rows,
        )
        alive = self.allowed(_EVERYONE).mask
        store.saved.write(header, np.where(alive, self.columns.keys, -1), self.vectors.write)
        # Last: until then the store knows the old file, and the new one counts for nothing.
        with store.transaction() as transaction:
            transaction.replace_property("saved-index", header.name)
            transaction.commit()
        self.unsaved = 0

    @property
    def can_be_saved(self) -> bool:
        """Whether it is worth a file, and a file would hold nothing that was erased."""
        vectors = self.vectors
        return vectors.is_derived_slowly and (vectors.forgets or not self.columns.dead)

    @property
    def dimension(self) -> int:
        """D."""
        return self.vectors.dimension

    def add(self, chunk: Chunk) -> None:
        """Add rows whose keys are greater than all before."""
        self._forget()
        slots = self.columns.append(chunk.keys, chunk.identities, chunk.cameras, chunk.start_times)
        self.vectors.add(slots, chunk.vectors)
        self.unsaved += len(slots)

    def update(self, key: int, record: TrackletRecord) -> None:
        """Replace what is known of a row."""
        self._forget()
        slot, start = self.columns.slot(key), to_microseconds(record.start_time)
        self.columns.update(slot, record.identity, record.camera, start)

    def name(self, keys: Sequence[int], identity: str | None) -> None:
        """Replace whom rows show."""
        self._forget()
        self.columns.name(self.columns.living(keys), identity)

    def remove(self, keys: Sequence[int]) -> None:
        """Take rows away, each once."""
        self._forget()
        slots = self.columns.living(keys)
        self.columns.bury(slots)
        self.vectors.remove(slots)
        self.unsaved += len(slots)

    @property
    def is_sparse(self) -> bool:
        """Whether it is time to `compact`: more than a fifth of the slots is dead."""
        return self.columns.dead > 64 + self.columns.alive // 4

    def compact(self) -> bool:
        """Free the memory of dead slots; says whether this kind of index can."""
        self._forget()
        if not self.vectors.compact(self.columns.mask(_EVERYONE)):
            return False
        self.columns.compact()
        return True

    def search(self, store: Store, search: Search) -> SearchResult:
        """Answer a search.

        Args:
            store: Where the records are read, and the vectors that memory has only roughly.
            search: With a query of the right dimension.

        Raises:
            OutOfStepError: A row of the answer is not in the store as it is in memory.
        """
        left_out = search.filters.exclude_tracklets
        source = _Searched(self, store, search, store.keys(left_out) if left_out else ())
        if not source.count:
            return SearchResult((), 0, None)
        first = self._first(search.top_k, search.group_by)
        ranked = rank(search.query, source, top_k=search.top_k, first=first)
        limit = search.max_distance
        near = [each for each in ranked if limit is None or each.distance <= limit]
        records = source.records([each.row for each in near])
        matches = tuple(map(Match, records, (each.distance for each in near)))
        return SearchResult(matches, source.count, ranked[0].distance if ranked else None)

    def nearest(self, key: Hashable, question: Question) -> Nearest:
        """The slots nearest to a query; threads that ask at the same time share a call.

        Args:
            key: Equal for questions of equal `Question.allowed`.
            question: What is asked. The answer may hold more slots, and removed ones.
        """
        if not self.vectors.exhaustive:
            key = (key, question.wanted)  # whoever asks for more looks further: no good as company
        return self._shared.ask(key, question)

    def allowed(self, filters: Filters) -> Allowed:
        """Which slots pass filters without ``exclude_tracklets``."""
        if (known := self._allowed.get(filters)) is not None:
            return known
        allowed = Allowed(self.columns.mask(filters), everyone=filters == _EVERYONE)
        if len(self._allowed) >= _REMEMBERED_FILTERS:
            self._allowed = {}
        self._allowed[filters] = allowed
        return allowed

    def _nearest(self, questions: Sequence[Question]) -> list[Nearest]:
        queries = np.stack([each.query for each in questions])
        count = max(each.wanted for each in questions)
        return self.vectors.search(queries, count, questions[0].allowed)

    def _first(self, top_k: int, group_by: GroupBy) -> int:
        """How many candidates will probably do: four times what evenly mixed groups would take."""
        mean = self._per_group.mean(self.columns) if group_by == "identity" else 1
        likely = min(int(4 * top_k * mean), _MOST_FIRST_CANDIDATES)
        return self.vectors.to_name(max(likely, 2 * top_k, _FIRST_CANDIDATES))

    def _follow(self, store: Store, keys: Rows) -> None:
        """Bring vectors that were saved into step with the store, and describe them.

        Args:
            store: The truth.
            keys: (N,) int64 by slot, -1 where a slot is dead.
        """
        for part in store.columns(_DESCRIBED_AT_ONCE, until=int(keys.max(initial=0))):
            self.columns.append(*part)
        there = np.isin(keys, self.columns.keys)
        if not np.array_equal(keys[there], self.columns.keys):
            raise SavedIndexError("expected rows as they are stored, got others")
        if there.all():
            return
        erased = np.flatnonzero(~there & (keys >= 0))
        if len(erased):  # whoever erased them did not come to that
            store.drop_saved()
        if not self.vectors.forgets:
            raise SavedIndexError("rows were erased since, which this kind of index cannot follow")
        self.vectors.remove(erased)
        self.vectors.compact(there)
        self.unsaved = len(erased)

    def _forget(self) -> None:
        self._allowed = {}


class _PerGroup:
    """How many rows a group has on average: counted again when a tenth of all has changed."""

    def __init__(self) -> None:
        self._counted = (0, 1.0)

    def mean(self, columns: Columns) -> float:
        """About how many; to count takes long where there are a million."""
        rows, mean = self._counted
        if abs(columns.alive - rows) > columns.alive // 10:
            mean = columns.alive / (columns.identities() + columns.unnamed())
            self._counted = (columns.alive, mean)
        return mean


class _Searched:
    """The rows that take part in one search, as `rank` wants to see them: a row is a slot."""

    def __init__(
        self, derived: Derived, store: Store, search: Search, left_out: Sequence[int]
    ) -> None:
        self._derived = derived
        self._store = store
        self._search = search
        # Some more than take part: those few that are left out by name do not keep this search from
        # sharing a call with others.
        self._filters = replace(search.filters, exclude_tracklets=frozenset())
        self._allowed = derived.allowed(self._filters)
        self._mask, self.count = self._allowed.mask, self._allowed.count
        if left_out:
            self._mask = self._mask.copy()
            self._mask[derived.columns.slots(left_out)] = False
            self.count = int(np.count_nonzero(self._mask))
        # Where FAISS guesses, and few take part, all of them are measured.
        self._names_all = not derived.vectors.exhaustive and self.count <= _FEW_ROWS
        self.exhaustive = derived.vectors.exhaustive or self._names_all
        self._rows: dict[int, tuple[Any, ...]] = {}

    def nearest(self, count: int, without: Rows) -> Nearest:
        if self._names_all:
            rows = np.flatnonzero(self._mask)
            return Nearest(rows, np.zeros(len(rows), dtype=np.float32), np.inf, ANY_ERROR)
        if len(without):
            return self._nearest_of_others(count, without)
        left_out = self._allowed.count - self.count
        question = Question(self._search.query, count + left_out, self._allowed)
        found = self._derived.nearest(self._filters, question)
        mine = self._mask[found.rows]
        return replace(found, rows=found.rows[mine], squared=found.squared[mine])

    def _nearest_of_others(self, count: int, without: Rows) -> Nearest:
        slots = np.arange(len(self._mask), dtype=np.int64)
        allowed = Allowed(self._mask & ~np.isin(self.groups(slots), without))
        return self._derived.nearest(object(), Question(self._search.query, count, allowed))

    def groups(self, rows: Rows) -> Rows:
        by_tracklet = self._search.group_by == "tracklet"
        return rows if by_tracklet else self._derived.columns.groups(rows)

    def vectors(self, rows: Rows) -> Embeddings:
        if self._derived.vectors.exhaustive:
            return self._derived.vectors.vectors(rows)
        try:
            return self._store.vectors(self._derived.columns.keys[rows].tolist())
        except NotFoundError as error:
            raise OutOfStepError from error

    def tracklet_ids(self, rows: Rows) -> Sequence[str]:
        keys = self._derived.columns.keys[rows].tolist()
        found = self._store.rows(keys, vectors=not self._derived.vectors.exhaustive)
        if len(found) < len(keys):
            raise OutOfStepError
        stored = [found[key] for key in keys]
        self._rows.update(zip(rows.tolist(), stored, strict=True))
        return [row[1] for row in stored]

    def records(self, rows: Sequence[int]) -> list[TrackletRecord]:
        """What is stored of rows whose ids were asked for."""
        stored = [self._rows[row] for row in rows]
        if not self._derived.vectors.exhaustive:  # they were measured as they are stored
            check_embeddings(stored, GalleryUnavailableError)
        records = [to_stored(row).record for row in stored]
        slots = np.array(rows, dtype=np.int64)
        known = ([row[column] for row in stored] for column in (2, 3, 4))  # see `index.rows.STORED`
        if not self._derived.columns.agree(slots, *known):
            raise OutOfStepError
        return records


def _built(store: Store, plan: IndexPlan, dimension: int, tracklets: int) -> VectorIndex:
    """An empty index, trained with a sample of what is stored if it takes that."""
    rows = plan.sample_rows(dimension, tracklets)
    if not rows:
        return plan.build(dimension, None)
    began = time.monotonic()
    _log.info("training the index with %d of %d tracklets", rows, tracklets)
    built = plan.build(dimension, store.sample(rows))
    _log.info("trained the index in %.0f s", time.monotonic() - began)
    return built


def _check_header(header: Header, store: Store, content: Content, plan: IndexPlan) -> None:
    name = store.property("saved-index")
    expected = (name, content.model, content.dimension, plan.description)
    got = (header.name, header.model, header.dimension, header.plan)
    if got != expected:
        raise SavedIndexError(f"expected one of {expected}, got one of {got}")
