"""Embeddings kept as float16: what is rounded, what is exact, what is refused."""

from pathlib import Path

import numpy as np
import pytest

from index.embedded import EmbeddedGallery
from index.gallery import DamagedGalleryError, GalleryError, InvalidEmbeddingError
from index.store import FILE_NAME, Store
from index.vector_storage import (
    Storage,
    StorageMismatchError,
    dimension_of,
    rounded,
    storage_of,
    to_blob,
    to_matrix,
)
from tests.index.conftest import Enrol

STORAGES: list[Storage] = ["float32", "float16"]


def draw(rows: int, dimension: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(size=(rows, dimension)).astype(np.float32)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dimension", [1, 2, 3, 192, 2048])
def test_an_embedding_comes_back_from_its_bytes(storage: Storage, dimension: int) -> None:
    embeddings = draw(5, dimension)

    blobs = [to_blob(each, storage) for each in embeddings]

    expected = embeddings if storage == "float32" else embeddings.astype("<f2").astype("<f4")
    assert to_matrix(blobs).tolist() == expected.tolist()
    assert to_matrix(blobs).dtype == np.float32
    assert {dimension_of(len(blob)) for blob in blobs} == {dimension}
    assert {storage_of(len(blob)) for blob in blobs} == {storage}


@pytest.mark.parametrize("size", [0, 1, 2, 6, 8190])
def test_a_size_that_no_embedding_has_has_no_dimension(size: int) -> None:
    assert dimension_of(size) is None


@pytest.mark.parametrize("storage", STORAGES)
def test_embeddings_of_two_sizes_make_no_matrix(storage: Storage) -> None:
    short, long = (to_blob(draw(1, dimension)[0], storage) for dimension in (4, 5))

    for blobs in ([short, long], [long, short]):
        with pytest.raises(ValueError, match="got one of"):
            to_matrix(blobs)


@pytest.mark.parametrize("index", ["Flat", "SQfp16", "HNSW8", "HNSW8,SQfp16", "IVF4,Flat"])
def test_distances_are_exact_distances_to_what_was_rounded(
    directory: Path, enrol: Enrol, index: str
) -> None:
    """Before and after opening again, and the nearest of all is the nearest of the rounded."""
    embeddings = draw(1100, 16)
    kept = embeddings.astype(np.float16).astype(np.float64)
    query = draw(1101, 16)[-1]
    true = np.sqrt(np.square(kept - query).sum(axis=1))
    expected = [(f"t{row}", float(np.float32(true[row]))) for row in np.argsort(true)[:5]]
    with EmbeddedGallery(directory, index=index, storage="float16") as gallery:
        gallery.add([enrol(f"t{row}", embeddings[row].tolist()) for row in range(1100)])
        before = gallery.search(query, model="trsa-test", top_k=5)
        assert gallery.embedding("t7").tolist() == kept[7].tolist()
    with EmbeddedGallery(directory, index=index) as gallery:
        after = gallery.search(query, model="trsa-test", top_k=5)

    assert [(match.record.tracklet_id, match.distance) for match in before.matches] == expected
    assert after == before


@pytest.mark.parametrize("index", ["Flat", "HNSW8"])
def test_what_ties_when_rounded_ties_at_once(
    directory: Path, enrol: Enrol, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between 0.99951 and 1.00098 there is only 1."""
    monkeypatch.setattr("index.derived._FEW_ROWS", 0)
    with EmbeddedGallery(directory, index=index, storage="float16") as gallery:
        gallery.add([enrol("a", [1.0004]), enrol("b", [0.9998])])

        result = gallery.search(np.zeros(1, np.float32), model="trsa-test", top_k=1)

    assert [(match.record.tracklet_id, match.distance) for match in result.matches] == [("a", 1)]


def test_half_the_numbers_take_half_the_room(tmp_path: Path, enrol: Enrol) -> None:
    sizes, memory = [], []
    for storage in STORAGES:
        with EmbeddedGallery(tmp_path / storage, storage=storage) as gallery:
            gallery.add(
                [enrol(f"t{row}", each.tolist()) for row, each in enumerate(draw(500, 2048))]
            )
            assert gallery._derived is not None
            assert gallery._derived.vectors.exhaustive
            memory.append(gallery._derived.vectors._index.code_size)
        sizes.append((tmp_path / storage / FILE_NAME).stat().st_size)

    assert memory == [8192, 4096]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("greatest", [65504.0, -65504.0])
def test_the_greatest_half_is_kept_and_more_is_refused_before_anything_changes(
    directory: Path, enrol: Enrol, greatest: float
) -> None:
    beyond = float(np.nextafter(np.float32(greatest), np.float32(greatest * 2)))
    with EmbeddedGallery(directory, storage="float16") as gallery:
        gallery.add([enrol("a", [greatest, 1])])
        with pytest.raises(InvalidEmbeddingError, match="at most 65504"):
            gallery.add([enrol("b", [1, 1]), enrol("c", [1, beyond])])

        assert gallery.counts().tracklets == 1
        query = np.array([greatest, 1], np.float32)
        assert gallery.search(query * 8, model="trsa-test", top_k=1).matches[0].distance == (
            pytest.approx(7 * np.hypot(greatest, 1))
        )


def test_halves_that_are_subnormal_keep_their_distance(directory: Path, enrol: Enrol) -> None:
    least = 2.0**-24
    with EmbeddedGallery(directory, storage="float16") as gallery:
        gallery.add([enrol("a", [least, 0]), enrol("b", [0.4 * least, 0])])
        result = gallery.search(np.zeros(2, np.float32), model="trsa-test", top_k=2)

    found = [(match.record.tracklet_id, match.distance) for match in result.matches]
    assert found == [("b", 0), ("a", least)]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_gallery_keeps_its_storage(directory: Path, enrol: Enrol, storage: Storage) -> None:
    other: Storage = "float16" if storage == "float32" else "float32"
    with EmbeddedGallery(directory, storage=storage) as gallery:
        gallery.add([enrol("a", [1, 2])])

    with EmbeddedGallery(directory) as gallery:
        assert gallery.storage == storage
    with pytest.raises(StorageMismatchError, match=f"kept as {other}, got a gallery of {storage}"):
        EmbeddedGallery(directory, storage=other)
    EmbeddedGallery(directory, storage=storage).close()


def test_an_empty_gallery_takes_another_storage_and_remembers_it(
    directory: Path, enrol: Enrol
) -> None:
    with EmbeddedGallery(directory, storage="float16") as gallery:
        gallery.add([enrol("a", [1, 2])])
        gallery.remove("a")
    with EmbeddedGallery(directory, storage="float32") as gallery:
        gallery.add([enrol("a", [0.1, 2])])
        assert gallery.embedding("a")[0] == np.float32(0.1)
        gallery.remove("a")

    EmbeddedGallery(directory, storage="float16").close()
    store = Store(directory)
    assert store.storage == "float16"
    store.close()


def test_halves_in_a_gallery_of_whole_numbers_are_damage(directory: Path, enrol: Enrol) -> None:
    """Three bytes would be one number of float16."""
    with EmbeddedGallery(directory) as gallery:
        gallery.add([enrol("a", [1, 2])])
        gallery._store._writer.execute("UPDATE embeddings SET vector = x'003c68'")

    with pytest.raises(DamagedGalleryError, match="3 to 3 bytes"):
        EmbeddedGallery(directory)


def test_a_refusal_to_open_is_an_error_of_the_gallery_and_leaves_it_free(
    directory: Path, enrol: Enrol
) -> None:
    with EmbeddedGallery(directory) as gallery:
        gallery.add([enrol("a", [1, 2])])

    for _ in range(2):
        with pytest.raises(GalleryError, match="float16"):
            EmbeddedGallery(directory, storage="float16")
    EmbeddedGallery(directory).close()


def test_rounding_gives_float32_and_leaves_what_it_was_given() -> None:
    given = np.array([0.1, -3.3], np.float32)

    result = rounded(given, "float16")

    assert result.tolist() == given.astype(np.float16).tolist()
    assert result.dtype == np.float32
    assert given.tolist() == np.array([0.1, -3.3], np.float32).tolist()
