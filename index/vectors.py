"""FAISS: which kinds of index a gallery can use, and one index in use."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from threading import Lock
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from index.gallery import Embeddings, InvalidIndexError
from index.ranking import Error, Nearest, Rows, expansion_error, summation_error

# Its type stubs know C++'s signatures, not those that its Python layer puts in their place.
faiss: Any = _faiss

_THRESHOLD = int(faiss.cvar.distance_compute_blas_threshold)

# What FAISS itself calls enough training points for each of its clusters.
_POINTS_PER_CENTROID = 39
# A training set this many times the smallest is as good as any (156 points for each cluster).
_SATURATION = 4
_LEAST_TRAINING_ROWS = 1000
# To judge a factory string before any vector has come: product quantisers want a divisor of D.
_EXAMPLE_DIMENSIONS = (2048, 6144, 5040)
# Up to so many queries a flat search measures each vector directly, for more it multiplies
# matrices: five cost as much as three or four, 64 as much as eight (2048 values, one thread).
_MOST_DIRECT_QUERIES = 4
# Further from every embedding that a gallery takes than any other, and its distances are finite.
_FAR = np.float32(2.0**63)


def processors() -> int:
    """How many threads OpenMP would use here."""
    return int(faiss.omp_get_max_threads())


class Allowed:
    """Which slots take part in a search.

    Args:
        mask: (N,) bool, by slot; not changed from here on.
        everyone: Whether the mask leaves out nothing but what was removed.
    """

    def __init__(self, mask: NDArray[np.bool_], *, everyone: bool = False) -> None:
        self.mask = mask
        self.everyone = everyone
        self.count = int(np.count_nonzero(mask))

    @cached_property
    def selector(self) -> Any:
        """The same for FAISS."""
        return _selector(self.mask)


class IndexPlan:
    """A FAISS factory string, and what it takes to follow it.

    An index that has to be trained (IVF, PQ, SQ) begins as a flat one, and is trained and built
    when there are enough rows: 39 for each cluster, so 39 * nlist for IVF and 39 * 256 for 8-bit
    product quantisers; at least 1000, and D where vectors are transformed first. It is trained
    again when the rows have doubled, until the training set was four times that large.

    Args:
        factory: As for ``faiss.index_factory``: "Flat", "HNSW32", "IVF1024,Flat", ...
        dimension: D, or None while nobody knows.

    Raises:
        InvalidIndexError: FAISS refuses it, or it cannot filter by row, or is not Euclidean.
    """

    def __init__(self, factory: str, dimension: int | None = None) -> None:
        self.factory = factory
        self._training_rows: dict[int, int] = {}
        self._check(dimension)

    def training_rows(self, dimension: int) -> int:
        """How many rows it takes to follow the plan; 0 if it needs no training.

        Raises:
            InvalidIndexError: FAISS cannot make it with this dimension.
        """
        if dimension not in self._training_rows:
            self._training_rows[dimension] = _training_rows(self._create(dimension))
        return self._training_rows[dimension]

    def wants_training(self, vectors: "VectorIndex", rows: int) -> bool:
        """Whether ``vectors`` should be replaced by one that is trained on the present rows."""
        needed = self.training_rows(vectors.dimension)
        if not needed or vectors.trained_on >= _SATURATION * needed:
            return False
        return rows >= max(needed, 2 * vectors.trained_on)

    def sample_rows(self, dimension: int, rows: int) -> int:
        """How many of so many rows to train with; 0 if none."""
        needed = self.training_rows(dimension)
        return min(rows, _SATURATION * needed) if rows >= needed else 0

    def build(self, dimension: int, sample: Embeddings | None) -> "VectorIndex":
        """Make an empty index.

        Args:
            dimension: D.
            sample: What to train with, (n, D) float32, as many as `sample_rows` said; None makes a
                flat index if the plan needs training.

        Raises:
            InvalidIndexError: FAISS cannot do it.
        """
        made = self._create(dimension)
        if sample is None:
            return VectorIndex(made if made.is_trained else faiss.IndexFlatL2(dimension))
        try:
            made.train(sample)
        except RuntimeError as error:
            raise InvalidIndexError(self._refusal(error)) from error
        return VectorIndex(made, trained_on=len(sample))

    def _check(self, dimension: int | None) -> None:
        refusals = []
        for possible in [dimension] if dimension is not None else _EXAMPLE_DIMENSIONS:
            try:
                self._create(possible)
            except InvalidIndexError as refusal:
                refusals.append(refusal)
            else:
                return
        raise refusals[0]

    def _create(self, dimension: int) -> Any:
        try:
            made = faiss.index_factory(dimension, self.factory, faiss.METRIC_L2)
        except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
            raise InvalidIndexError(self._refusal(error)) from error
        inner = _inner(made)
        if not isinstance(inner, _filterable()):
            raise InvalidIndexError(
                "expected a FAISS index of kind Flat, SQ, HNSW or IVF, perhaps behind PCA, OPQ or "
                f"the like, got {self.factory!r}: {type(inner).__name__} cannot filter by row"
            )
        if isinstance(inner, faiss.IndexIVF) and inner.nlist < 1:
            raise InvalidIndexError(f"expected at least one IVF list, got {self.factory!r}")
        if isinstance(inner, faiss.IndexHNSW) and inner.hnsw.nb_neighbors(0) < 4:
            raise InvalidIndexError(f"expected HNSW with two links or more, got {self.factory!r}")
        if made.metric_type != faiss.METRIC_L2 or _normalises(made):
            raise InvalidIndexError(f"expected a Euclidean index, got {self.factory!r}")
        return made

    def _refusal(self, error: BaseException) -> str:
        reason = re.sub(r"Error in .* at \S+:\d+: (Error: )?", "", str(error)).strip()
        return f"FAISS cannot make an index from {self.factory!r}: {reason}"


class VectorIndex:
    """One FAISS index whose ids are slots (see `index.columns.Columns`). Not thread-safe.

    Args:
        made: A trained FAISS index without rows.
        trained_on: How many rows it was trained with; 0 if it was not.
    """

    def __init__(self, made: Any, trained_on: int = 0) -> None:
        self._index = made
        self._inner = _inner(made)
        self.trained_on = trained_on
        if isinstance(self._inner, faiss.IndexIVF):
            # FAISS's own default of one list finds too little, and a factory string has no say.
            self._inner.nprobe = min(self._inner.nlist, max(8, self._inner.nlist // 16))

    @property
    def dimension(self) -> int:
        """D."""
        return int(self._index.d)

    @property
    def exhaustive(self) -> bool:
        """Whether a search looks at every vector, as it is."""
        return type(self._index) in {faiss.IndexFlat, faiss.IndexFlatL2}

    @property
    def _error(self) -> Error | None:
        keeps_vectors = {faiss.IndexIVFFlat, faiss.IndexHNSWFlat}
        if self.exhaustive or type(self._index) in keeps_vectors:
            return summation_error(self.dimension)
        return None

    def reserve(self, rows: int) -> None:
        """Make room for so many rows at once: growing step by step takes up to twice the memory."""
        if self.exhaustive:
            self._index.codes.resize(rows * self._index.code_size)
            self._index.codes.resize(0)  # keeps its room

    def add(self, slots: Rows, vectors: Embeddings) -> None:
        """Add rows in the next slots.

        Args:
            slots: (n,) int64, those that follow the last.
            vectors: (n, D) float32.
        """
        if isinstance(self._inner, faiss.IndexIVF):
            self._index.add_with_ids(vectors, slots)  # after a removal its own count is behind
        else:
            self._index.add(vectors)

    def vectors(self, slots: Rows) -> Embeddings:
        """The vectors in slots, (n, D) float32; only an `exhaustive` index has them as they were.

        Args:
            slots: (n,) int64.
        """
        vectors: Embeddings = self._codes()[slots].view(np.float32)
        return vectors

    def remove(self, slot: int) -> None:
        """Erase a vector as far as this kind of index can.

        Its slot must be left out of what a search finds.
        """
        if isinstance(self._inner, faiss.IndexIVFFastScan):
            return  # FAISS 1.15 mixes up what is added after a removal: most of it is not found
        if isinstance(self._inner, faiss.IndexIVF):
            self._index.remove_ids(np.array([slot], dtype=np.int64))
        elif isinstance(self._inner, faiss.IndexFlatCodes):
            self._codes()[slot] = 0
            if self.exhaustive:
                # Where it does not crowd out the living: matrices are multiplied with all slots.
                self._codes()[slot].view(np.float32)[0] = _FAR

    def compact(self, alive: NDArray[np.bool_]) -> bool:
        """Close the gaps of dead slots, if this kind of index can; says whether it did.

        Args:
            alive: (N,) bool, by slot.
        """
        if not isinstance(self._inner, faiss.IndexFlatCodes):
            return False
        self._index.remove_ids(_selector(~alive))
        return True

    def search(self, queries: Embeddings, count: int, allowed: Allowed) -> list[Nearest]:
        """The slots nearest to each query; from a flat index, perhaps with removed ones.

        A flat search keeps one processor busy, whatever the number of queries: threads that meet
        after every block of vectors take up to a hundred times as long as one, as soon as something
        else keeps the processors busy.

        Args:
            queries: (M, D) float32.
            count: How many slots for each.
            allowed: Which take part.
        """
        if not self.exhaustive:
            return self._search_selected(queries, count, allowed)
        with _single_threaded():
            if allowed.everyone and len(queries) > _MOST_DIRECT_QUERIES:
                return self._search_expanded(queries, count)
            return self._search_selected(queries, count, allowed)

    def _search_selected(self, queries: Embeddings, count: int, allowed: Allowed) -> list[Nearest]:
        # Even where all are allowed: with a selector, a flat search is nearly twice as fast, for
        # FAISS then measures four vectors at a time. And it never multiplies matrices.
        # At least one: FAISS does not like to be asked for none, and answers row -1 where none is.
        wanted = max(1, min(count, allowed.count))
        parameters = self._parameters(self._inner, wanted, allowed.selector)
        if self._inner is not self._index:
            parameters = faiss.SearchParametersPreTransform(index_params=parameters)
        distances, slots = self._index.search(queries, wanted, params=parameters)
        named_all = wanted >= allowed.count
        return [
            _nearest(one, squared, self._error, named_all=named_all)
            for one, squared in zip(slots, distances, strict=True)
        ]

    def _search_expanded(self, queries: Embeddings, count: int) -> list[Nearest]:
        wanted = min(count, int(self._index.ntotal))
        with _expanding():
            distances, slots = self._index.search(queries, wanted)
        named_all = wanted == self._index.ntotal
        return [
            _nearest(one, squared, expansion_error(query), named_all=named_all)
            for query, one, squared in zip(queries, slots, distances, strict=True)
        ]

    def _parameters(self, inner: Any, count: int, selector: Any) -> Any:
        if isinstance(inner, faiss.IndexIVF):
            # So many lists that twice the count is in them on average: a longer search looks
            # further, and one for everything looks everywhere.
            enough = -(-2 * count * inner.nlist // max(1, inner.ntotal))
            lists = min(inner.nlist, max(inner.nprobe, enough))
            return faiss.SearchParametersIVF(sel=selector, nprobe=lists)
        if isinstance(inner, faiss.IndexHNSW):
            breadth = max(inner.hnsw.efSearch, count)
            return faiss.SearchParametersHNSW(sel=selector, efSearch=breadth)
        return faiss.SearchParameters(sel=selector)

    def _codes(self) -> NDArray[np.uint8]:
        shape = (self._inner.ntotal, self._inner.code_size)
        codes = faiss.rev_swig_ptr(self._inner.codes.data(), shape[0] * shape[1])
        view: NDArray[np.uint8] = codes.reshape(shape)
        return view


_expanding_lock = Lock()
_expanding_now = 0


@contextmanager
def _expanding() -> Iterator[None]:
    """Have FAISS multiply matrices, however few the queries: its own threshold is one of a process.

    Meanwhile other searches may do so too. They do not matter: a search with a selector never does,
    and where a trained index assigns rows to its lists, either way will do.
    """
    global _expanding_now
    with _expanding_lock:
        _expanding_now += 1
        faiss.cvar.distance_compute_blas_threshold = 1
    try:
        yield
    finally:
        with _expanding_lock:
            _expanding_now -= 1
            if not _expanding_now:
                faiss.cvar.distance_compute_blas_threshold = _THRESHOLD


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Keep FAISS to this thread. OpenMP remembers the number for each thread that asks."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _nearest(
    slots: Rows, squared: NDArray[np.float32], error: Error | None, *, named_all: bool
) -> Nearest:
    found = slots >= 0  # FAISS pads with -1
    if not found.all():
        slots, squared, named_all = slots[found], squared[found], True
    horizon = np.inf if named_all or not len(squared) else float(squared[-1])
    return Nearest(slots, squared, horizon, error)


def _filterable() -> tuple[type, ...]:
    kinds = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexHNSW, faiss.IndexIVF)
    return kinds


def _inner(made: Any) -> Any:
    """The index behind vector transforms. The outer one owns it and has to be kept."""
    if isinstance(made, faiss.IndexPreTransform):
        return faiss.downcast_index(made.index)
    return made


def _normalises(made: Any) -> bool:
    if not isinstance(made, faiss.IndexPreTransform):
        return False
    steps = [faiss.downcast_VectorTransform(made.chain.at(i)) for i in range(made.chain.size())]
    return any(isinstance(step, faiss.NormalizationTransform) for step in steps)


def _training_rows(made: Any) -> int:
    if made.is_trained:
        return 0
    inner = _inner(made)
    storage = faiss.downcast_index(inner.storage) if isinstance(inner, faiss.IndexHNSW) else inner
    clusters = [getattr(inner, "nlist", 0)]
    if hasattr(storage, "pq"):
        clusters.append(int(storage.pq.ksub))
    transformed = made.d if inner is not made else 0
    return max(_LEAST_TRAINING_ROWS, transformed, _POINTS_PER_CENTROID * max(clusters))


def _selector(mask: NDArray[np.bool_]) -> Any:
    return faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
