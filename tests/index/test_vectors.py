"""FAISS indexes of every kind that a gallery takes, and those that it refuses."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from index.embedded import EmbeddedGallery
from index.gallery import Embeddings, Filters, InvalidIndexError
from index.vectors import Allowed, IndexPlan, VectorIndex, lists_to_search
from tests.index.conftest import Enrol, make_enrolment

DIMENSION = 8
ROWS = 2600
KINDS = [
    "Flat",
    "HNSW16",
    "IVF16,Flat",
    "IVF16,SQfp16",
    "IVF16,SQ8",
    "SQ8",
    "SQfp16",
    "HNSW32,SQfp16",
    "HNSW16,SQ8",
    "IVF8,PQ4x4",
    "IVF8,PQ8x4fs",
    "IVF16,RaBitQ4",
    "IVF16,RaBitQfs",
    "RR,IVF16,RaBitQ",
    "PCA6,Flat",
    "PCA6,IVF8,Flat",
    "PCA6,IVF16,SQ8",
    "PCA6,HNSW16",
    "IVF16_HNSW8,Flat",
]


@pytest.fixture(scope="module")
def vectors() -> Embeddings:
    return np.random.default_rng(0).normal(size=(ROWS, DIMENSION)).astype(np.float32)


@pytest.fixture(scope="module", params=KINDS)
def kept(
    request: pytest.FixtureRequest,
    fast_disk: Path | None,
    vectors: Embeddings,
) -> Iterator[tuple[str, Path]]:
    """Row i is tracklet i of identity i % 300 at camera i % 26, enrolled in parts."""
    added = [
        make_enrolment(
            f"t{row}", vectors[row].tolist(), identity=f"p{row % 300}", camera=f"c{row % 26}"
        )
        for row in range(ROWS)
    ]
    with tempfile.TemporaryDirectory(dir=fast_disk) as directory:
        with EmbeddedGallery(Path(directory), index=request.param) as gallery:
            for start in range(0, ROWS, 650):
                gallery.add(added[start : start + 650])
        yield request.param, Path(directory)


@pytest.fixture
def filled(kept: tuple[str, Path], directory: Path) -> Iterator[EmbeddedGallery]:
    """A copy of what was enrolled, opened again."""
    factory, original = kept
    shutil.copytree(original, directory)
    with EmbeddedGallery(directory, index=factory) as gallery:
        yield gallery


def slow_nearest(
    vectors: Embeddings, query: Embeddings, rows: NDArray[np.int64], top_k: int
) -> dict[str, float]:
    distances = np.sqrt(np.square(vectors[rows] - query.astype(float)).sum(axis=1))
    order = np.argsort(distances)[:top_k]
    return {f"t{rows[at]}": float(distances[at]) for at in order}


def test_every_kind_finds_nearly_all_with_exact_distances(
    filled: EmbeddedGallery, vectors: Embeddings
) -> None:
    rows = np.arange(ROWS)
    right = 0
    for query in np.random.default_rng(1).normal(size=(20, DIMENSION)).astype(np.float32):
        result = filled.search(query, model="trsa-test", top_k=10, group_by="tracklet")
        expected = slow_nearest(vectors, query, rows, 10)
        assert len(result.matches) == 10
        for match in result.matches:
            row = int(match.record.tracklet_id[1:])
            distance = float(np.linalg.norm(vectors[row].astype(float) - query))
            assert match.distance == pytest.approx(distance, rel=1e-6)
        right += len(expected.keys() & {match.record.tracklet_id for match in result.matches})

    assert right / 200 > 0.8  # the least by RaBitQ, which keeps 8 signs of a vector here


def test_every_kind_filters_inside_the_search(filled: EmbeddedGallery, vectors: Embeddings) -> None:
    """A hundred rows of one camera: exact with any kind, however rare they are."""
    rows = np.arange(3, ROWS, 26)
    for query in np.random.default_rng(2).normal(size=(10, DIMENSION)).astype(np.float32):
        result = filled.search(
            query,
            model="trsa-test",
            top_k=10,
            group_by="tracklet",
            filters=Filters(cameras=frozenset({"c3"})),
        )

        found = {match.record.tracklet_id: match.distance for match in result.matches}
        assert found == pytest.approx(slow_nearest(vectors, query, rows, 10))
        assert result.searched == 100


def test_every_kind_finds_all_of_a_thousandth(filled: EmbeddedGallery, vectors: Embeddings) -> None:
    chosen = Filters(identities=frozenset({"p3", "p29", "p55"}), cameras=frozenset({"c3"}))

    result = filled.search(-vectors[3], model="trsa-test", top_k=10, filters=chosen)

    assert {match.record.tracklet_id for match in result.matches} == {"t3", "t29", "t55"}


def test_no_kind_returns_what_filters_leave_out(filled: EmbeddedGallery) -> None:
    """Many rows pass here, so FAISS does the filtering."""
    half = frozenset(f"c{camera}" for camera in range(13))
    for query in np.random.default_rng(3).normal(size=(10, DIMENSION)).astype(np.float32):
        result = filled.search(
            query, model="trsa-test", top_k=40, filters=Filters(exclude_cameras=half)
        )

        assert len(result.matches) == 40
        assert not {match.record.camera for match in result.matches} & half
        assert result.searched == ROWS // 2


def test_a_removed_row_never_comes_back(filled: EmbeddedGallery, vectors: Embeddings) -> None:
    """Searched for by its own vector, before and after its memory is freed, and after reopening."""
    removed = range(0, 1200, 2)
    for number, row in enumerate(removed):
        filled.remove(f"t{row}")
        if number % 40 == 0:
            result = filled.search(vectors[row], model="trsa-test", top_k=5, group_by="tracklet")
            left = {int(match.record.tracklet_id[1:]) for match in result.matches}
            assert not left & set(removed[: number + 1])
            assert len(left) == 5

    assert filled._derived is not None
    dead = filled._derived.columns.dead
    assert dead < len(removed) / 2
    assert filled._derived.vectors._index.ntotal in {ROWS - 600, ROWS - 600 + dead}
    assert filled.counts().tracklets == ROWS - 600


def test_many_rows_are_removed_at_once(filled: EmbeddedGallery, vectors: Embeddings) -> None:
    """And what is left is found as before."""
    gone = {f"t{row}" for row in range(5, ROWS, 300)}

    assert set(filled.remove_identity("p5").tracklet_ids) == gone

    assert filled._derived is not None
    index = filled._derived.vectors
    assert index._index.ntotal == ROWS - (len(gone) if index.forgets else 0)
    for row in (5, 305, 6, 306):
        result = filled.search(vectors[row], model="trsa-test", top_k=40, group_by="tracklet")
        found = {match.record.tracklet_id for match in result.matches}
        assert not found & gone
        assert (f"t{row}" in found) == (f"t{row}" not in gone)


def test_an_ivf_index_closes_its_gaps_without_being_made_anew(
    directory: Path, enrol: Enrol, vectors: Embeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.derived._FEW_ROWS", 0)
    with EmbeddedGallery(directory, index="IVF4,Flat") as gallery:
        gallery.add([enrol(f"t{row}", vectors[row].tolist()) for row in range(1000)])
        monkeypatch.setattr(gallery, "_rebuild", None)

        for row in range(0, 600, 2):
            gallery.remove(f"t{row}")

        assert gallery._derived is not None
        assert gallery._derived.columns.dead < 300
        for row in (1, 599, 600, 999):
            result = gallery.search(vectors[row], model="trsa-test", top_k=1)
            assert result.matches[0].record.tracklet_id == f"t{row}"


def test_rows_added_after_removals_are_found(
    filled: EmbeddedGallery, enrol: Enrol, vectors: Embeddings
) -> None:
    for row in range(30):
        filled.remove(f"t{row}")

    filled.add([enrol(f"new{row}", vectors[row].tolist(), identity="new") for row in range(30)])

    for row in range(30):
        result = filled.search(vectors[row], model="trsa-test", top_k=1)
        assert [(m.record.tracklet_id, m.distance) for m in result.matches] == [(f"new{row}", 0.0)]


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "SQfp16"])
def test_asked_for_more_than_there_is_it_gives_what_there_is(factory: str) -> None:
    """FAISS fills up with row -1."""
    index = IndexPlan(factory).build(2, None)
    index.add(np.arange(3), np.array([[0, 0], [1, 1], [2, 2]], dtype=np.float32))

    allowed = Allowed(np.array([True, False, True]))
    [found] = index.search(np.zeros((1, 2), np.float32), 10, allowed)

    assert found.rows.tolist() == [0, 2]
    assert found.squared.tolist() == [0, 8]


def test_an_ivf_search_looks_further_where_few_take_part(vectors: Embeddings) -> None:
    """Eight lists of 64 would hold an eighth of them."""
    index = IndexPlan("IVF64,Flat;nprobe=8").build(DIMENSION, vectors)
    index.add(np.arange(ROWS), vectors)
    few = np.arange(ROWS) % 26 == 3

    [found] = index.search(vectors[:1], 100, Allowed(few))

    assert sorted(found.rows) == np.flatnonzero(few).tolist()


@pytest.mark.parametrize(
    ("lists", "searched"), [(16, 16), (64, 48), (512, 136), (1024, 192), (4096, 384)]
)
def test_of_more_lists_a_smaller_part_is_searched(lists: int, searched: int) -> None:
    assert lists_to_search(lists) == searched


def test_a_factory_string_may_say_how_far_to_look(vectors: Embeddings) -> None:
    ivf = IndexPlan("IVF16,Flat; nprobe=3, candidates=700").build(DIMENSION, vectors)
    hnsw = IndexPlan("HNSW8;efSearch=99").build(DIMENSION, None)

    assert ivf._inner.nprobe == 3
    assert [ivf.to_name(64), ivf.to_name(900)] == [700, 900]
    assert hnsw._inner.hnsw.efSearch == 99


def test_a_search_that_looks_further_finds_more(vectors: Embeddings) -> None:
    everyone = Allowed(np.ones(ROWS, dtype=np.bool_))
    right = {}
    for nprobe in (1, 4, 16):
        index = IndexPlan(f"IVF16,Flat;nprobe={nprobe}").build(DIMENSION, vectors)
        index.add(np.arange(ROWS), vectors)
        found = index.search(vectors[:50] * 0.5, 10, everyone)
        expected = [slow_nearest(vectors, each * 0.5, np.arange(ROWS), 10) for each in vectors[:50]]
        names = [{f"t{row}" for row in one.rows} for one in found]
        right[nprobe] = sum(len(a & b.keys()) for a, b in zip(names, expected, strict=True))

    assert right[1] < right[4] < right[16] == 500


def test_nobody_allowed_is_nobody_found(vectors: Embeddings) -> None:
    index = IndexPlan("IVF16,Flat").build(DIMENSION, vectors)
    index.add(np.arange(ROWS), vectors)

    [found] = index.search(vectors[:1], 10, Allowed(np.zeros(ROWS, dtype=np.bool_)))

    assert (len(found.rows), found.horizon) == (0, np.inf)


@pytest.mark.parametrize(
    "index",
    [
        "IVF16,Flat;",
        "IVF16,Flat;nprobe",
        "IVF16,Flat;nprobe=0",
        "IVF16,Flat;nprobe=17",
        "IVF16,Flat;nprobe=-1",
        "IVF16,Flat;nprobe=٣",
        "IVF16,Flat;nprobe=2,nprobe=3",
        "IVF16,Flat;ef_search=16",
        "IVF16,Flat;efSearch=16",
        "IVF16,Flat;candidates=1000001",
        "HNSW8;nprobe=1",
        "Flat;nprobe=1",
        ";nprobe=1",
    ],
)
def test_looking_as_no_index_can_is_refused_at_opening(directory: Path, index: str) -> None:
    with pytest.raises(InvalidIndexError, match=r"expected|FAISS"):
        EmbeddedGallery(directory, index=index)

    EmbeddedGallery(directory).close()


@pytest.mark.parametrize(("factory", "left"), [("Flat", [2.0**63, 0]), ("SQfp16", [0, 0])])
def test_a_removed_vector_leaves_memory_at_once(
    directory: Path, enrol: Enrol, factory: str, left: list[float]
) -> None:
    with EmbeddedGallery(directory, index=factory) as gallery:
        gallery.add([enrol("a", [1, 2]), enrol("b", [3, 4])])
        gallery.remove("a")

        assert gallery._derived is not None
        index = gallery._derived.vectors._index
        assert index.reconstruct(0).tolist() == left
        assert index.reconstruct(1).tolist() == [3, 4]


def test_an_index_that_needs_training_is_flat_until_there_are_enough_rows(
    directory: Path, enrol: Enrol, vectors: Embeddings
) -> None:
    """IVF30 needs 39 * 30 = 1170 rows; it is trained again at 2340."""
    added = [enrol(f"t{row}", vectors[row].tolist()) for row in range(ROWS)]
    trained = []
    with EmbeddedGallery(directory, index="IVF30,Flat") as gallery:
        for start, end in [(0, 1169), (1169, 1170), (1170, 2339), (2339, 2340)]:
            gallery.add(added[start:end])
            assert gallery._derived is not None
            trained.append(gallery._derived.vectors.trained_on)
    with EmbeddedGallery(directory, index="IVF30,Flat") as gallery:
        assert gallery._derived is not None
        assert not gallery._derived.vectors.exhaustive
        trained.append(gallery._derived.vectors.trained_on)

    assert trained == [0, 1170, 1170, 2340, 2340]


def test_training_that_fails_leaves_the_enrolment_and_the_old_index(
    directory: Path, enrol: Enrol, vectors: Embeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> VectorIndex:
        raise InvalidIndexError("training failed")

    with EmbeddedGallery(directory, index="IVF4,Flat") as gallery:
        gallery.add([enrol(f"t{row}", vectors[row].tolist()) for row in range(900)])
        monkeypatch.setattr(IndexPlan, "build", fail)
        gallery.add([enrol(f"t{row}", vectors[row].tolist()) for row in range(900, 1100)])

        result = gallery.search(vectors[1050], model="trsa-test", top_k=1)
        assert result.matches[0].record.tracklet_id == "t1050"


@pytest.mark.parametrize(
    "factory",
    [
        "",
        "nonsense",
        "IVF0,Flat",
        "IVF-1,Flat",
        "IVF99999999999999999999,Flat",
        "HNSW0",
        "LSH",
        "PQ8",
        "NSG16",
        "L2norm,Flat",
        "IDMap,Flat",
        "IDMap2,IVF16,Flat",
        "Flat,RFlat",
        "IVF4,Flat,RFlat",
        "IVF4,PQ8+8",
        "IVF4,FlatDedup",
        "IVF4,RQ2x4",
        "IVF4_NSG8,Flat",
        "HNSW16_4+PQ8",
        "SQ8_direct",
        "IVF4,SQ8_direct",
        "ITQ64,LSH",
        "RaBitQ",
    ],
)
def test_a_factory_string_of_no_use_is_refused_at_opening(directory: Path, factory: str) -> None:
    with pytest.raises(InvalidIndexError, match=r"got|FAISS"):
        EmbeddedGallery(directory, index=factory)

    EmbeddedGallery(directory).close()


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("IDMap,Flat", "a gallery numbers rows itself; leave IDMap out"),
        ("IVF4,SQ8,RFlat", "a gallery measures again with the stored vectors"),
        ("IVF4,PQ8+8", "FAISS cannot remove rows from it"),
        ("IVF4_NSG8,Flat", "say HNSW"),
        ("SQ8_direct", "whole numbers of 0 to 255"),
        ("LSH", "IndexLSH cannot filter by row"),
        ("L2norm,Flat", "not Euclidean"),
    ],
)
def test_a_refused_factory_string_is_told_why(directory: Path, factory: str, reason: str) -> None:
    with pytest.raises(InvalidIndexError, match=reason):
        EmbeddedGallery(directory, index=factory)


def test_a_training_set_takes_no_more_memory_than_it_must() -> None:
    """IVF4096 would like 639,000 rows, 5 GiB of 2048 numbers; it gets what it needs at least."""
    plan = IndexPlan("IVF4096,SQ8", 2048)
    made = IndexPlan("Flat").build(2048, None)

    assert plan.sample_rows(2048, 159_743) == 0
    assert plan.sample_rows(2048, 1_000_000) == 159_744
    assert IndexPlan("IVF1024,SQ8").sample_rows(2048, 1_000_000) == 131_072
    assert IndexPlan("IVF1024,SQ8").sample_rows(192, 1_000_000) == 159_744
    assert plan.wants_training(made, 200_000)
    made.trained_on = 159_744
    assert not plan.wants_training(made, 1_000_000)


def test_a_factory_string_that_does_not_fit_the_dimension_is_refused(
    directory: Path, enrol: Enrol
) -> None:
    """By the first enrolment into an empty gallery, or at opening where D is known."""
    with EmbeddedGallery(directory, index="IVF4,PQ3") as gallery:
        with pytest.raises(InvalidIndexError):
            gallery.add([enrol("a", [1, 2])])
        assert gallery.counts().tracklets == 0
    with EmbeddedGallery(directory) as gallery:
        gallery.add([enrol("a", [1, 2])])

    with pytest.raises(InvalidIndexError):
        EmbeddedGallery(directory, index="IVF4,PQ3")


def test_a_changed_factory_string_keeps_the_answers(
    directory: Path, enrol: Enrol, vectors: Embeddings
) -> None:
    with EmbeddedGallery(directory, index="HNSW8") as gallery:
        gallery.add([enrol(f"t{row}", vectors[row].tolist()) for row in range(500)])
        before = gallery.search(vectors[3] * 0.9, model="trsa-test", top_k=20)

    with EmbeddedGallery(directory, index="Flat") as gallery:
        assert gallery.search(vectors[3] * 0.9, model="trsa-test", top_k=20) == before
