"""How embeddings are kept as bytes: as they are, or rounded to half the size.

A blob tells by its length what it is: four bytes a number for float32, and for float16 two bytes a
number and one more, a mark at the end. So the one can never be taken for the other.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from index.gallery import Embeddings, GalleryUnavailableError, InvalidEmbeddingError

Storage = Literal["float32", "float16"]

_FLOAT32 = np.dtype("<f4")
_FLOAT16 = np.dtype("<f2")
_HALF_MARK = b"h"
_GREATEST_HALF = 65504.0


class StorageMismatchError(GalleryUnavailableError):
    """Raised at opening when a gallery's embeddings are stored in another form than asked for."""


def dimension_of(size: int) -> int | None:
    """D of an embedding that takes so many bytes; None where no embedding does."""
    if size < 1:
        return None
    if size % 2:
        return size // _FLOAT16.itemsize or None
    return None if size % _FLOAT32.itemsize else size // _FLOAT32.itemsize


def storage_of(size: int) -> Storage:
    """In which form an embedding is that takes so many bytes, see `dimension_of`."""
    return "float16" if size % 2 else "float32"


def rounded(embedding: Embeddings, storage: Storage) -> Embeddings:
    """An embedding as it comes back from a store, (D,) float32.

    Args:
        embedding: (D,) float32, finite.
        storage: With "float16" each number becomes the nearest that has 11 binary digits, and those
            below 6e-5 lose more.

    Raises:
        InvalidEmbeddingError: A number is greater than float16 can be.
    """
    if storage == "float32":
        return embedding
    greatest = float(np.abs(embedding).max())
    if greatest > _GREATEST_HALF:
        raise InvalidEmbeddingError(
            f"expected numbers of at most {_GREATEST_HALF:g}, as the gallery keeps float16, "
            f"got {greatest:g}"
        )
    return embedding.astype(np.float16).astype(np.float32)


def to_blob(embedding: Embeddings, storage: Storage) -> bytes:
    """The bytes of an embedding, little-endian.

    Raises:
        InvalidEmbeddingError: See `rounded`.
    """
    if storage == "float32":
        return embedding.astype(_FLOAT32, copy=False).tobytes()
    return rounded(embedding, storage).astype(_FLOAT16).tobytes() + _HALF_MARK


def to_matrix(blobs: Sequence[bytes]) -> Embeddings:
    """(n, D) float32 of n embeddings' bytes, n >= 1.

    Raises:
        ValueError: They are not all of one form and size.
    """
    size = len(blobs[0])
    kept, count = (_FLOAT16, size // 2) if size % 2 else (_FLOAT32, size // _FLOAT32.itemsize)
    made = np.empty((len(blobs), count), dtype=np.float32)
    for row, blob in enumerate(blobs):  # each copied once: a search reads hundreds
        if len(blob) != size:
            raise ValueError(f"expected embeddings of {size} bytes, got one of {len(blob)}")
        made[row] = np.frombuffer(blob, kept, count)
    return made
