"""What memory holds of a gallery: derived from the store, and at any time made again from it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from index.columns import Columns
from index.gallery import Embeddings, Filters, GroupBy, TrackletRecord
from index.ranking import Ranked, Rows, rank
from index.rows import to_microseconds
from index.store import Chunk, Store
from index.vectors import IndexPlan, VectorIndex

_ROWS_AT_ONCE = 2048
# So few rows are measured one by one where FAISS would only guess: filters may leave a handful of
# rows that an approximate search does not happen to pass by.
_FEW_ROWS = 1000
_FIRST_CANDIDATES = 256
_MOST_FIRST_CANDIDATES = 1024


class Derived:
    """Columns and vectors, slot by slot, of a gallery that is not empty. Not thread-safe.

    Args:
        model: Whose embeddings these are.
        vectors: An index without rows.
    """

    def __init__(self, model: str, vectors: VectorIndex) -> None:
        self.model = model
        self.vectors = vectors
        self.columns = Columns()

    @classmethod
    def load(cls, store: Store, plan: IndexPlan) -> "Derived | None":
        """Make it from the store; None if that is empty.

        Raises:
            DamagedGalleryError: What is stored does not fit together.
            InvalidIndexError: FAISS cannot follow the plan with these rows.
        """
        tracklets, model, dimension = store.content()
        if model is None or dimension is None:
            return None
        sample_rows = plan.sample_rows(dimension, tracklets)
        sample = store.sample(sample_rows) if sample_rows else None
        derived = cls(model, plan.build(dimension, sample))
        derived.vectors.reserve(tracklets)
        for chunk in store.chunks(_ROWS_AT_ONCE):
            derived.add(chunk)
        return derived

    @property
    def dimension(self) -> int:
        """D."""
        return self.vectors.dimension

    def add(self, chunk: Chunk) -> None:
        """Add rows whose keys are greater than all before."""
        slots = self.columns.append(chunk.keys, chunk.identities, chunk.cameras, chunk.start_times)
        self.vectors.add(slots, chunk.vectors)

    def update(self, key: int, record: TrackletRecord) -> None:
        """Replace what is known of a row."""
        slot, start = self.columns.slot(key), to_microseconds(record.start_time)
        self.columns.update(slot, record.identity, record.camera, start)

    def remove(self, key: int) -> None:
        """Take a row away."""
        slot = self.columns.slot(key)
        self.columns.bury(slot)
        self.vectors.remove(slot)

    @property
    def is_sparse(self) -> bool:
        """Whether it is time to `compact`: more than a fifth of the slots is dead."""
        return self.columns.dead > 64 + self.columns.alive // 4

    def compact(self) -> bool:
        """Free the memory of dead slots; says whether this kind of index can."""
        if not self.vectors.compact(self.columns.mask(Filters())):
            return False
        self.columns.compact()
        return True

    def rank(
        self,
        store: Store,
        query: Embeddings,
        *,
        top_k: int,
        group_by: GroupBy,
        mask: NDArray[np.bool_],
    ) -> list[Ranked]:
        """Rank the rows of a mask.

        Args:
            store: Where the vectors are read for the final distances.
            query: (D,) float32.
            top_k: How many.
            group_by: As for `index.gallery.Gallery.search`.
            mask: (N,) bool, by slot; only rows that are alive.
        """
        searched = _Searched(self, store, query, mask, group_by)
        return rank(query, searched, top_k=top_k, first=self._first(top_k, group_by))

    def _first(self, top_k: int, group_by: GroupBy) -> int:
        """How many candidates will probably do: four times what evenly mixed groups would take."""
        groups = self.columns.identities() + self.columns.unnamed()
        mean = self.columns.alive / groups if group_by == "identity" else 1
        likely = min(int(4 * top_k * mean), _MOST_FIRST_CANDIDATES)
        return max(likely, 2 * top_k, _FIRST_CANDIDATES)


class _Searched:
    """The rows that take part in one search, as `rank` wants to see them: a row is a slot."""

    def __init__(
        self,
        derived: Derived,
        store: Store,
        query: Embeddings,
        mask: NDArray[np.bool_],
        group_by: GroupBy,
    ) -> None:
        self._derived = derived
        self._store = store
        self._query = query
        self._mask = mask
        self._group_by = group_by
        self.count = int(np.count_nonzero(mask))
        self.exhaustive = derived.vectors.exhaustive
        self._measures_all = not self.exhaustive and self.count <= _FEW_ROWS
        self.error = None if self._measures_all else derived.vectors.error

    def nearest(self, count: int, without: Rows) -> tuple[Rows, NDArray[np.float32]]:
        if self._measures_all:
            rows = np.flatnonzero(self._mask)
            return rows, np.zeros(len(rows), dtype=np.float32)
        allowed = self._mask
        if len(without):
            slots = np.arange(len(allowed), dtype=np.int64)
            allowed = allowed & ~np.isin(self.groups(slots), without)
        return self._derived.vectors.search(self._query, min(count, self.count), allowed)

    def groups(self, rows: Rows) -> Rows:
        return rows if self._group_by == "tracklet" else self._derived.columns.groups(rows)

    def fetch(self, rows: Rows) -> tuple[Sequence[str], Embeddings]:
        return self._store.vectors(self._derived.columns.keys[rows].tolist())
