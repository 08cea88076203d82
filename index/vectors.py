"""FAISS: one index in use, and what it takes to make one. Which kinds: `index.factories`."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from threading import Lock
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from index.factories import (
    Breadth,
    check_breadth,
    create,
    inner_of,
    parse,
    refusal,
    training_rows,
)
from index.gallery import Embeddings, InvalidIndexError
from index.ranking import Error, Nearest, Rows, expansion_error, summation_error
from index.vector_storage import Storage

# Its type stubs know C++'s signatures, not those that its Python layer puts in their place.
faiss: Any = _faiss

_THRESHOLD = int(faiss.cvar.distance_compute_blas_threshold)

# A training set this many times the smallest is as good as any (156 points for each cluster) ...
_SATURATION = 4
# ... and where vectors are long it takes no more memory than this, unless the smallest does.
_SAMPLE_BYTES = 1 << 30
# To judge a factory string before any vector has come: product quantisers want a divisor of D.
_EXAMPLE_DIMENSIONS = (2048, 6144, 5040)
# Up to so many queries a flat search measures each vector directly, for more it multiplies
# matrices: five cost as much as three or four, 64 as much as eight (2048 values, one thread).
_MOST_DIRECT_QUERIES = 4
_BYTES_AT_ONCE = 1 << 20
# A search looks into so many IVF lists times the root of their number: 192 of 1024, 384 of 4096.
# On drawn people that finds 99 % of the identities from 20,000 to a million tracklets.
_LISTS_OF_ROOT = 6
# Estimates order rows less well than distances do: at least so many are named.
_LEAST_NAMED_ROUGHLY = 256
_DEFAULT_BREADTH = Breadth()
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
    again when the rows have doubled, until the training set was four times that large, or 1 GiB.

    Args:
        index: As for ``faiss.index_factory``: "Flat", "HNSW32", "IVF1024,Flat", ...; perhaps with
            how far to look, see `index.factories.parse`.
        dimension: D, or None while nobody knows.
        storage: How embeddings are stored. With float16, a flat index takes half the memory, too.

    Raises:
        InvalidIndexError: FAISS refuses it, or it cannot filter by row, or is not Euclidean, or
            cannot look that far.
    """

    def __init__(
        self, index: str, dimension: int | None = None, storage: Storage = "float32"
    ) -> None:
        self.factory, self._breadth = parse(index)
        self.storage = storage
        self._flat = "Flat" if storage == "float32" else "SQfp16"
        self._training_rows: dict[int, int] = {}
        self._check(dimension)

    @property
    def description(self) -> str:
        """Equal for plans that lead to the same index, with this version of FAISS."""
        return f"{self.factory} of {self.storage} by FAISS {faiss.__version__}"

    def training_rows(self, dimension: int) -> int:
        """How many rows it takes to follow the plan; 0 if it needs no training.

        Raises:
            InvalidIndexError: FAISS cannot make it with this dimension.
        """
        if dimension not in self._training_rows:
            self._training_rows[dimension] = training_rows(self._create(dimension))
        return self._training_rows[dimension]

    def wants_training(self, vectors: "VectorIndex", rows: int) -> bool:
        """Whether ``vectors`` should be replaced by one that is trained on the present rows."""
        needed = self.training_rows(vectors.dimension)
        if not needed or vectors.trained_on >= self._most_rows(vectors.dimension):
            return False
        return rows >= max(needed, 2 * vectors.trained_on)

    def sample_rows(self, dimension: int, rows: int) -> int:
        """How many of so many rows to train with; 0 if none."""
        needed = self.training_rows(dimension)
        return min(rows, self._most_rows(dimension)) if rows >= needed else 0

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
            made = made if made.is_trained else create(self._flat, dimension)
            return self._index(made, trained_on=0)
        try:
            made.train(sample)
        except RuntimeError as error:
            raise InvalidIndexError(refusal(self.factory, error)) from error
        return self._index(made, trained_on=len(sample))

    def read(
        self, dimension: int, trained_on: int, source: Callable[[int], bytes]
    ) -> "VectorIndex":
        """Read what `VectorIndex.write` wrote, for this plan.

        Args:
            dimension: D.
            trained_on: See `VectorIndex`.
            source: Gives so many bytes, or what is left.

        Raises:
            InvalidIndexError: It is something else.
            RuntimeError: FAISS cannot read it.
        """
        made = faiss.read_index(faiss.PyCallbackIOReader(source, _BYTES_AT_ONCE))
        expected = self._create(dimension)
        if (type(made), type(inner_of(made)), made.d) != (
            type(expected),
            type(inner_of(expected)),
            dimension,
        ):
            raise InvalidIndexError(f"expected {self.factory!r}, got a {type(made).__name__}")
        return self._index(made, trained_on=trained_on)

    def _most_rows(self, dimension: int) -> int:
        """How many rows to train with at most."""
        needed = self.training_rows(dimension)
        affordable = _SAMPLE_BYTES // (dimension * np.dtype(np.float32).itemsize)
        return max(needed, min(_SATURATION * needed, affordable))

    def _check(self, dimension: int | None) -> None:
        refusals = []
        for possible in [dimension] if dimension is not None else _EXAMPLE_DIMENSIONS:
            try:
                self._create(possible)
            except InvalidIndexError as refused:
                refusals.append(refused)
            else:
                return
        raise refusals[0]

    def _create(self, dimension: int) -> Any:
        made = create(self._flat if self.factory == "Flat" else self.factory, dimension)
        check_breadth(made, self.factory, self._breadth)
        return made

    def _index(self, made: Any, *, trained_on: int) -> "VectorIndex":
        return VectorIndex(made, trained_on, self.storage, self._breadth)


class VectorIndex:
    """One FAISS index whose ids are slots (see `index.columns.Columns`). Not thread-safe.

    Args:
        made: A trained FAISS index.
        trained_on: How many rows it was trained with; 0 if it was not.
        storage: How the vectors are stored that it gets.
        breadth: How far to look.
    """

    def __init__(
        self,
        made: Any,
        trained_on: int = 0,
        storage: Storage = "float32",
        breadth: Breadth = _DEFAULT_BREADTH,
    ) -> None:
        self._index = made
        self._inner = inner_of(made)
        self._storage = storage
        self.trained_on = trained_on
        self._least_named = breadth.candidates or 1
        if isinstance(self._inner, faiss.IndexIVF):
            # FAISS's own default of one list finds too little.
            self._inner.nprobe = breadth.nprobe or lists_to_search(self._inner.nlist)
        elif isinstance(self._inner, faiss.IndexHNSW) and breadth.ef_search:
            self._inner.hnsw.efSearch = breadth.ef_search

    @property
    def dimension(self) -> int:
        """D."""
        return int(self._index.d)

    @property
    def exhaustive(self) -> bool:
        """Whether a search looks at every vector, as it is stored."""
        return self._is_flat or self._keeps_halves

    @property
    def is_derived_slowly(self) -> bool:
        """Whether making it anew takes so long that it is worth a file."""
        return isinstance(self._inner, faiss.IndexIVF | faiss.IndexHNSW)

    @property
    def forgets(self) -> bool:
        """Whether what is removed is really gone, so that `write` does not write it."""
        is_ivf = isinstance(self._inner, faiss.IndexIVF)
        return is_ivf and not isinstance(self._inner, faiss.IndexIVFFastScan)

    @property
    def _is_flat(self) -> bool:
        return type(self._index) in {faiss.IndexFlat, faiss.IndexFlatL2}

    @property
    def _keeps_halves(self) -> bool:
        """Whether it keeps float16 of what is float16 already, and so loses nothing."""
        is_scalar = type(self._index) is faiss.IndexScalarQuantizer
        half = faiss.ScalarQuantizer.QT_fp16
        return self._storage == "float16" and is_scalar and self._index.sq.qtype == half

    def to_name(self, likely: int) -> int:
        """How many rows to ask for.

        Args:
            likely: How many would do if this index named the nearest ones in their order.
        """
        least = 1 if self.exhaustive else _LEAST_NAMED_ROUGHLY
        return max(likely, least, self._least_named)

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
        kept = np.float16 if self._keeps_halves else np.float32
        vectors: Embeddings = self._codes()[slots].view(kept).astype(np.float32, copy=False)
        return vectors

    def remove(self, slots: Rows) -> None:
        """Erase vectors as far as this kind of index can: all at once, for each call looks at all.

        Their slots must be left out of what a search finds.

        Args:
            slots: (n,) int64.
        """
        if not len(slots):
            return
        if isinstance(self._inner, faiss.IndexIVFFastScan):
            return  # FAISS 1.15 mixes up what is added after a removal: most of it is not found
        if isinstance(self._inner, faiss.IndexIVF):
            mask = np.zeros(int(slots.max()) + 1, dtype=np.bool_)
            mask[slots] = True
            self._index.remove_ids(_selector(mask))
        elif isinstance(self._inner, faiss.IndexFlatCodes):
            self._codes()[slots] = 0
            if self._is_flat:
                # Where it does not crowd out the living: matrices are multiplied with all slots.
                self._codes().view(np.float32)[slots, 0] = _FAR

    def compact(self, alive: NDArray[np.bool_]) -> bool:
        """Close the gaps of dead slots, if this kind of index can; says whether it did.

        Args:
            alive: (N,) bool, by slot.
        """
        if isinstance(self._inner, faiss.IndexFlatCodes):
            self._index.remove_ids(_selector(~alive))
        elif self.forgets:
            self._renumber(np.cumsum(alive, dtype=np.int64) - 1)
        else:
            return False
        return True

    def write(self, sink: Callable[[bytes], int]) -> None:
        """Hand the index on as bytes.

        Args:
            sink: Takes a part, and says how much of it.
        """
        faiss.write_index(self._index, faiss.PyCallbackIOWriter(sink, _BYTES_AT_ONCE))

    @property
    def rows(self) -> int:
        """How many vectors there are, and of those that are not `forgets` also removed ones."""
        return int(self._index.ntotal)

    def _renumber(self, numbers: Rows) -> None:
        """Give the rows of an IVF index other slots, by the slots that they have."""
        lists = self._inner.invlists
        for number in range(lists.nlist):
            if size := lists.list_size(number):
                slots = faiss.rev_swig_ptr(lists.get_ids(number), size)
                slots[:] = numbers[slots]

    def search(self, queries: Embeddings, count: int, allowed: Allowed) -> list[Nearest]:
        """The slots nearest to each query; from a flat index, perhaps with removed ones.

        It keeps one processor busy, whatever the number of queries: threads that meet after every
        block or list of vectors gain little, and take up to a hundred times as long as one, as soon
        as something else keeps the processors busy.

        Args:
            queries: (M, D) float32.
            count: How many slots for each.
            allowed: Which take part.
        """
        with _single_threaded():
            if self._is_flat and allowed.everyone and len(queries) > _MOST_DIRECT_QUERIES:
                return self._search_expanded(queries, count)
            return self._search_selected(queries, count, allowed)

    def _search_selected(self, queries: Embeddings, count: int, allowed: Allowed) -> list[Nearest]:
        # Even where all are allowed: with a selector, a flat search is nearly twice as fast, for
        # FAISS then measures four vectors at a time. And it never multiplies matrices.
        wanted = min(count, allowed.count)
        if not wanted:  # FAISS does not like to be asked for none
            nothing = Nearest(np.empty(0, np.int64), np.empty(0, np.float32), np.inf, Error(0, 0))
            return [nothing] * len(queries)
        parameters = self._parameters(self._inner, wanted, allowed)
        if self._inner is not self._index:
            parameters = faiss.SearchParametersPreTransform(index_params=parameters)
        distances, slots = self._index.search(queries, wanted, params=parameters)
        named_all = wanted >= allowed.count
        error = summation_error(self.dimension)
        return [
            _nearest(one, squared, error, named_all=named_all)
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

    def _parameters(self, inner: Any, count: int, allowed: Allowed) -> Any:
        if isinstance(inner, faiss.IndexIVF):
            # So many lists that twice the count is in them on average, of those that take part: a
            # longer search looks further, and one for everything looks everywhere.
            enough = -(-2 * count * inner.nlist // max(1, allowed.count))
            lists = min(inner.nlist, max(inner.nprobe, enough))
            return faiss.SearchParametersIVF(sel=allowed.selector, nprobe=lists)
        if isinstance(inner, faiss.IndexHNSW):
            breadth = max(inner.hnsw.efSearch, count)
            return faiss.SearchParametersHNSW(sel=allowed.selector, efSearch=breadth)
        return faiss.SearchParameters(sel=allowed.selector)

    def _codes(self) -> NDArray[np.uint8]:
        shape = (self._inner.ntotal, self._inner.code_size)
        codes = faiss.rev_swig_ptr(self._inner.codes.data(), shape[0] * shape[1])
        view: NDArray[np.uint8] = codes.reshape(shape)
        return view


def lists_to_search(lists: int) -> int:
    """How many of so many IVF lists a search looks into, unless somebody chooses.

    The more lists there are, the smaller a part of them is enough.
    """
    return min(lists, math.ceil(_LISTS_OF_ROOT * math.sqrt(lists)))


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
    slots: Rows, squared: NDArray[np.float32], error: Error, *, named_all: bool
) -> Nearest:
    found = slots >= 0  # FAISS pads with -1
    if not found.all():
        slots, squared, named_all = slots[found], squared[found], True
    horizon = np.inf if named_all or not len(squared) else float(squared[-1])
    return Nearest(slots, squared, horizon, error)


def _selector(mask: NDArray[np.bool_]) -> Any:
    return faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
