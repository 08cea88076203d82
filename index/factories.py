"""Which FAISS factory strings a gallery can use, and why not the others.

A gallery filters by row inside the search, removes rows, and measures what is found again with the
stored vectors. So it takes kinds that search with a selector, and in which a removed row can be
taken out or left out; how roughly they keep vectors only decides what they find.
"""

import re
from typing import Any

import faiss as _faiss

from index.gallery import InvalidIndexError

# Its type stubs know C++'s signatures, not those that its Python layer puts in their place.
faiss: Any = _faiss

# What FAISS itself calls enough training points for each of its clusters.
_POINTS_PER_CENTROID = 39
_LEAST_TRAINING_ROWS = 1000
_KINDS = (
    "Flat, SQ, HNSW (with Flat, SQ or PQ) or IVF (with Flat, SQ, PQ or RaBitQ), perhaps behind "
    "PCA, OPQ or the like"
)


def create(factory: str, dimension: int) -> Any:
    """Make an empty FAISS index that a gallery can use.

    Args:
        factory: As for ``faiss.index_factory``.
        dimension: D.

    Raises:
        InvalidIndexError: FAISS cannot make it, or a gallery cannot use it; says why.
    """
    try:
        made = faiss.index_factory(dimension, factory, faiss.METRIC_L2)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise InvalidIndexError(refusal(factory, error)) from error
    if reason := _reason(made):
        message = f"expected a FAISS index of kind {_KINDS}, got {factory!r}: {reason}"
        raise InvalidIndexError(message)
    return made


def inner_of(made: Any) -> Any:
    """The index behind vector transforms. The outer one owns it and has to be kept."""
    if isinstance(made, faiss.IndexPreTransform):
        return faiss.downcast_index(made.index)
    return made


def refusal(factory: str, error: BaseException) -> str:
    """What FAISS has against a factory string, in words."""
    reason = re.sub(r"Error in .* at \S+:\d+: (Error: )?", "", str(error)).strip()
    return f"FAISS cannot make an index from {factory!r}: {reason}"


def training_rows(made: Any) -> int:
    """How many rows it takes to train an index; 0 if it needs no training."""
    if made.is_trained:
        return 0
    inner = inner_of(made)
    storage = faiss.downcast_index(inner.storage) if isinstance(inner, faiss.IndexHNSW) else inner
    clusters = [getattr(inner, "nlist", 0)]
    if hasattr(storage, "pq"):
        clusters.append(int(storage.pq.ksub))
    transformed = made.d if inner is not made else 0
    return max(_LEAST_TRAINING_ROWS, transformed, _POINTS_PER_CENTROID * max(clusters))


def _reason(made: Any) -> str | None:
    """Why a gallery cannot use an index, or None."""
    inner = inner_of(made)
    kind = type(inner)
    if kind not in _usable():
        return _known_reasons().get(kind, f"{kind.__name__} cannot filter by row")
    if made.metric_type != faiss.METRIC_L2 or _normalises(made):
        return "it is not Euclidean"
    if isinstance(inner, faiss.IndexIVF):
        if inner.nlist < 1:
            return "it has no IVF list"
        coarse = type(faiss.downcast_index(inner.quantizer))
        if coarse not in _coarse():
            return (
                f"{coarse.__name__} cannot find the IVF lists reliably; leave it out, or say HNSW"
            )
    if isinstance(inner, faiss.IndexHNSW) and inner.hnsw.nb_neighbors(0) < 4:
        return "HNSW takes two links or more"
    if hasattr(inner, "sq") and inner.sq.qtype in _whole_numbers():
        return "it keeps whole numbers of 0 to 255, which embeddings are not"
    return None


def _usable() -> frozenset[type]:
    return frozenset(
        {
            faiss.IndexFlat,
            faiss.IndexFlatL2,
            faiss.IndexScalarQuantizer,
            faiss.IndexHNSWFlat,
            faiss.IndexHNSWSQ,
            faiss.IndexHNSWPQ,
            faiss.IndexIVFFlat,
            faiss.IndexIVFScalarQuantizer,
            faiss.IndexIVFPQ,
            faiss.IndexIVFPQFastScan,
            faiss.IndexIVFRaBitQ,
            faiss.IndexIVFRaBitQFastScan,
        }
    )


def _coarse() -> frozenset[type]:
    kinds = {
        faiss.IndexFlat,
        faiss.IndexFlatL2,
        faiss.IndexHNSWFlat,
        faiss.MultiIndexQuantizer,
    }
    return frozenset(kinds)


def _known_reasons() -> dict[type, str]:
    numbers = "a gallery numbers rows itself; leave IDMap out"
    again = "a gallery measures again with the stored vectors; leave the refinement out"
    return {
        faiss.IndexIDMap: numbers,
        faiss.IndexIDMap2: numbers,
        faiss.IndexRefine: again,
        faiss.IndexRefineFlat: again,
        faiss.IndexIVFPQR: f"FAISS cannot remove rows from it, and {again}",
    }


def _whole_numbers() -> frozenset[int]:
    kinds = faiss.ScalarQuantizer
    return frozenset({kinds.QT_8bit_direct, kinds.QT_8bit_direct_signed})


def _normalises(made: Any) -> bool:
    if not isinstance(made, faiss.IndexPreTransform):
        return False
    steps = [faiss.downcast_VectorTransform(made.chain.at(i)) for i in range(made.chain.size())]
    return any(isinstance(step, faiss.NormalizationTransform) for step in steps)
