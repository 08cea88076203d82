"""Which FAISS factory strings a gallery can use, and why not the others.

A gallery filters by row inside the search, removes rows, and measures what is found again with the
stored vectors. So it takes kinds that search with a selector, and in which a removed row can be
taken out or left out; how roughly they keep vectors only decides what they find.

How far a search looks is not part of FAISS's strings. It may follow one, after a semicolon:
``IVF4096,SQ8;nprobe=256,candidates=2000``.
"""

import re
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Breadth:
    """How far an approximate search looks; None leaves it to the gallery.

    Args:
        nprobe: Into how many IVF lists.
        ef_search: How many rows an HNSW search keeps in mind.
        candidates: How many rows are named first, at least, to be measured as far as they matter.
    """

    nprobe: int | None = None
    ef_search: int | None = None
    candidates: int | None = None


_BREADTHS = {"nprobe": "nprobe", "efSearch": "ef_search", "candidates": "candidates"}
_GREATEST_BREADTH = 1_000_000


def parse(text: str) -> tuple[str, Breadth]:
    """Split what is said of an index into FAISS's factory string and how far to look.

    Args:
        text: A factory string, perhaps with ``;NAME=NUMBER,...`` after it.

    Raises:
        InvalidIndexError: What follows the semicolon is something else.
    """
    factory, semicolon, rest = text.partition(";")
    found: dict[str, int] = {}
    for part in rest.split(",") if semicolon else ():
        name, _, value = (each.strip() for each in part.partition("="))
        if name not in _BREADTHS or _BREADTHS[name] in found:
            names = ", ".join(_BREADTHS)
            raise InvalidIndexError(f"expected each of {names} at most once, got {part.strip()!r}")
        is_number = value.isascii() and value.isdecimal() and len(value) < 8
        if not is_number or not 1 <= int(value) <= _GREATEST_BREADTH:
            message = f"expected {name} as a number of 1 to {_GREATEST_BREADTH}, got {value!r}"
            raise InvalidIndexError(message)
        found[_BREADTHS[name]] = int(value)
    return factory.strip(), Breadth(**found)


def check_breadth(made: Any, factory: str, breadth: Breadth) -> None:
    """Refuse what an index cannot follow.

    Raises:
        InvalidIndexError: It has no lists, or fewer; or no graph.
    """
    inner = inner_of(made)
    lists = inner.nlist if isinstance(inner, faiss.IndexIVF) else 0
    if breadth.nprobe is not None and breadth.nprobe > lists:
        raise InvalidIndexError(
            f"expected nprobe of at most the {lists} IVF lists of {factory!r}, got {breadth.nprobe}"
        )
    if breadth.ef_search is not None and not isinstance(inner, faiss.IndexHNSW):
        raise InvalidIndexError(f"expected efSearch with an HNSW index, got it with {factory!r}")


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
