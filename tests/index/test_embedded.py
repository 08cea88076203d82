"""The embedded gallery, claim by claim."""

import base64
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import numpy as np
import pytest

from index.embedded import EmbeddedGallery
from index.gallery import (
    Counts,
    DuplicateTrackletError,
    Filters,
    Gallery,
    GalleryUnavailableError,
    InvalidCursorError,
    InvalidEmbeddingError,
    ModelMismatchError,
    NotFoundError,
    SearchResult,
)
from index.store import Transaction
from tests.index.conftest import Enrol

PATIENCE_S = 20.0
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def search(gallery: Gallery, *vector: float, **how: Any) -> SearchResult:
    asked: dict[str, Any] = {"model": "trsa-test", "top_k": 10} | how
    return gallery.search(np.array(vector, dtype=np.float32), **asked)


def ids(result: SearchResult) -> list[str]:
    return [match.record.tracklet_id for match in result.matches]


def run_together(*works: Callable[[], None]) -> None:
    """Run each in a thread, and fail with the first of their errors."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [Thread(target=guarded, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_it_keeps_the_contract(gallery: EmbeddedGallery) -> None:
    contract: Gallery = gallery

    assert contract.counts() == Counts(0, 0)


def test_all_that_is_known_comes_back(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    one = enrol(
        "a",
        [0.1, 0.2],
        identity="p17",
        camera="c2",
        start_time=NOON,
        end_time=NOON + timedelta(microseconds=1),
        metadata={"shop": {"floor": 2}, "tags": ["käse", None, 1.5, "\ud800"]},
        strip=b"\xff\xd8jpeg",
    )
    gallery.add([one])

    assert gallery.get("a") == one.record
    assert gallery.embedding("a").dtype == np.float32
    assert gallery.embedding("a").tolist() == one.embedding.tolist()
    assert gallery.strip("a") == b"\xff\xd8jpeg"
    assert search(gallery, 0.1, 0.2).matches[0].record == one.record


def test_times_of_other_zones_come_back_in_utc(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    there = datetime(2026, 11, 22, 14, tzinfo=timezone(timedelta(hours=2)))
    gallery.add([enrol("a", [1, 2], start_time=there)])

    changed = gallery.update("a", {"end_time": there})

    assert (changed.start_time, changed.end_time) == (NOON, NOON)
    assert changed.start_time is not None
    assert changed.start_time.tzinfo is UTC
    assert changed == gallery.get("a")


def test_an_identity_ranks_by_its_nearest_tracklet_and_unnamed_ones_for_themselves(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    gallery.add([enrol(f"anna-{place}", [place], identity="anna") for place in (1, 2, 9)])
    gallery.add([enrol("bert", [4], identity="bert"), enrol("x", [3]), enrol("y", [5])])

    result = search(gallery, 0)

    assert [(match.record.tracklet_id, match.distance) for match in result.matches] == [
        ("anna-1", 1.0),
        ("x", 3.0),
        ("bert", 4.0),
        ("y", 5.0),
    ]
    assert (result.searched, result.nearest) == (6, 1.0)


def test_nearest_is_told_even_when_it_is_too_far(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    gallery.add([enrol("a", [3, 4])])

    assert search(gallery, 0, 0, max_distance=4.9) == SearchResult((), 1, 5.0)
    assert ids(search(gallery, 0, 0, max_distance=5.0)) == ["a"]


def test_filters_that_leave_nothing_answer_nothing(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    gallery.add([enrol("a", [3, 4], camera="c1")])

    result = search(gallery, 0, 0, filters=Filters(cameras=frozenset({"c2"})))

    assert result == SearchResult((), 0, None)


def test_top_k_above_the_count_gives_each_once(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    gallery.add([enrol(f"t{row}", [row, 0]) for row in range(3)])

    assert ids(search(gallery, 0, 0, top_k=500)) == ["t0", "t1", "t2"]


def test_an_empty_gallery_answers_any_model_with_nothing(gallery: EmbeddedGallery) -> None:
    assert search(gallery, 1, 2, model="whatever") == SearchResult((), 0, None)


@pytest.mark.parametrize(
    "embedding",
    [
        np.array([1, np.nan], dtype=np.float32),
        np.array([1, np.inf], dtype=np.float32),
        np.array([1, 1e30], dtype=np.float32),
        np.array([1, 2, 3], dtype=np.float32),
        np.array([[1, 2]], dtype=np.float32),
        np.array([], dtype=np.float32),
        np.array([1, 2], dtype=np.float64),
    ],
    ids=["nan", "infinity", "overflow", "longer", "matrix", "empty", "float64"],
)
def test_an_embedding_that_is_none_is_refused(
    gallery: EmbeddedGallery, enrol: Enrol, embedding: Any
) -> None:
    gallery.add([enrol("a", [1, 2])])
    wrong = enrol("b", [1, 2])
    object.__setattr__(wrong, "embedding", embedding)

    with pytest.raises(InvalidEmbeddingError):
        gallery.search(embedding, model="trsa-test", top_k=1)
    with pytest.raises(InvalidEmbeddingError):
        gallery.add([enrol("c", [3, 4]), wrong])

    assert gallery.counts().tracklets == 1
    with pytest.raises(NotFoundError):
        gallery.get("c")


def test_the_longest_embeddings_have_finite_distances(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    gallery.add([enrol("a", [2.0**62, 0]), enrol("b", [0, 2.0**62])])

    result = search(gallery, -(2.0**62), 0)

    assert ids(result) == ["b", "a"]
    assert result.matches[1].distance == 2.0**63


def test_distances_whose_squares_underflow_in_float32_rank_exactly(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    """FAISS sees 8 and 10 of the least float32 here, in truth they are 11.9 and 10."""
    least = 2.0**-149
    gallery.add([enrol("far", [(1.49 * least) ** 0.5] * 8)])
    gallery.add([enrol("near", [(10 * least) ** 0.5] + [0] * 7)])

    assert ids(search(gallery, *[0] * 8, top_k=1)) == ["near"]


def test_another_model_is_refused(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    gallery.add([enrol("a", [1, 2])])

    with pytest.raises(ModelMismatchError, match="trsa-test, got other"):
        search(gallery, 1, 2, model="other")
    with pytest.raises(ModelMismatchError):
        gallery.add([enrol("b", [1, 2]), enrol("c", [1, 2, 3], model="other")])

    assert gallery.counts().tracklets == 1


def test_two_models_in_one_call_are_refused(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    with pytest.raises(ModelMismatchError):
        gallery.add([enrol("a", [1, 2]), enrol("b", [1, 2], model="other")])

    assert gallery.model is None


def test_a_gallery_that_is_empty_again_takes_another_model(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    gallery.add([enrol("a", [1, 2])])
    gallery.remove("a")

    gallery.add([enrol("a", [1, 2, 3], model="other")])

    assert gallery.model == "other"
    assert ids(search(gallery, 1, 2, 3, model="other")) == ["a"]


@pytest.mark.parametrize("second", ["a", "b"])
def test_a_taken_id_refuses_the_whole_call(
    gallery: EmbeddedGallery, enrol: Enrol, second: str
) -> None:
    gallery.add([enrol("a", [1, 2])])

    with pytest.raises(DuplicateTrackletError, match=second):
        gallery.add([enrol("b", [3, 4]), enrol(second, [5, 6])])

    assert gallery.counts().tracklets == 1
    assert ids(search(gallery, 3, 4)) == ["a"]


def test_of_two_that_enrol_an_id_at_once_exactly_one_wins(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    def enrol_one(who: int, number: int, start: Barrier, won: list[int]) -> None:
        start.wait(PATIENCE_S)
        with suppress(DuplicateTrackletError):
            gallery.add([enrol(f"t{number}", [who, number])])
            won.append(who)

    for number in range(20):
        start, won = Barrier(2), list[int]()

        run_together(
            partial(enrol_one, 1, number, start, won), partial(enrol_one, 2, number, start, won)
        )

        assert len(won) == 1
        assert gallery.embedding(f"t{number}").tolist() == [won[0], number]
    assert gallery.counts().tracklets == 20


def test_a_record_that_cannot_be_written_leaves_nothing(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    with pytest.raises(ValueError, match="JSON"):
        gallery.add([enrol("a", [1, 2]), enrol("b", [1, 2], metadata={"a": float("nan")})])

    assert gallery.counts().tracklets == 0
    gallery.add([enrol("a", [1, 2])])
    assert ids(search(gallery, 1, 2)) == ["a"]


@pytest.mark.parametrize("method", ["get", "embedding", "strip", "remove"])
def test_an_unknown_id_is_not_found(gallery: EmbeddedGallery, method: str) -> None:
    with pytest.raises(NotFoundError, match="nobody"):
        getattr(gallery, method)("nobody")


def test_an_unknown_id_cannot_be_updated(gallery: EmbeddedGallery) -> None:
    with pytest.raises(NotFoundError):
        gallery.update("nobody", {"identity": "p1"})


def test_a_field_that_cannot_change_is_refused(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    gallery.add([enrol("a", [1, 2])])

    with pytest.raises(ValueError, match="got content, tracklet_id"):
        gallery.update("a", {"tracklet_id": "b", "content": "", "camera": "c1"})

    assert gallery.get("a").camera is None


def test_a_change_counts_in_the_next_search(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    gallery.add([enrol("a", [1, 2]), enrol("b", [1, 3], identity="p1")])

    gallery.update("a", {"identity": "p1", "camera": "c1", "start_time": NOON})

    assert ids(search(gallery, 1, 2)) == ["a"]
    at_noon = Filters(cameras=frozenset({"c1"}), since=NOON, until=NOON)
    assert ids(search(gallery, 1, 2, filters=at_noon)) == ["a"]
    assert gallery.counts() == Counts(2, 1)


def test_a_reopened_gallery_gives_the_same_answers(directory: Path, enrol: Enrol) -> None:
    rng = np.random.default_rng(0)
    with EmbeddedGallery(directory) as gallery:
        gallery.add(
            [
                enrol(f"t{row}", rng.normal(size=16).tolist(), identity=f"p{row % 70}")
                for row in range(400)
            ]
        )
        gallery.remove("t17")
        gallery.update("t18", {"identity": None})
        queries = rng.normal(size=(20, 16)).astype(np.float32)
        before = [gallery.search(each, model="trsa-test", top_k=30) for each in queries]

    with EmbeddedGallery(directory) as gallery:
        after = [gallery.search(each, model="trsa-test", top_k=30) for each in queries]

    assert after == before


def test_an_addition_does_not_hold_up_searches_while_it_waits_for_the_disk(
    gallery: EmbeddedGallery, enrol: Enrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.add([enrol("a", [1, 2])])
    at_the_disk, disk_done = Event(), Event()
    commit = Transaction.commit

    def slow_commit(transaction: Transaction) -> None:
        at_the_disk.set()
        assert disk_done.wait(PATIENCE_S)
        commit(transaction)

    monkeypatch.setattr(Transaction, "commit", slow_commit)

    def look() -> None:
        assert at_the_disk.wait(PATIENCE_S)
        assert ids(search(gallery, 1, 2)) == ["a"]
        disk_done.set()

    run_together(lambda: gallery.add([enrol("b", [1, 2])]), look)

    assert ids(search(gallery, 1, 2)) == ["a", "b"]


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_searches_beside_writes_are_consistent(directory: Path, enrol: Enrol, factory: str) -> None:
    """No answer holds what was gone before it began, lacks what was there, or breaks its filter."""
    rounds, done = 60, Event()
    there, gone = {f"stable{row}" for row in range(20)}, set[str]()
    only_c1 = Filters(cameras=frozenset({"c1"}))
    with EmbeddedGallery(directory, index=factory) as gallery:
        gallery.add([enrol(each, [len(each), 1], camera="c1") for each in sorted(there)])

        def write(name: str) -> None:
            for number in range(rounds):
                new = [f"{name}{number}-{part}" for part in range(3)]
                gallery.add([enrol(each, [number, 2], camera="c1") for each in new])
                there.update(new)
                gallery.update(new[0], {"camera": "c2"})
                there.difference_update(new[1:2])
                gallery.remove(new[1])
                gone.add(new[1])
                gallery.update(new[0], {"camera": "c1"})

        def look() -> None:
            while not done.is_set():
                gone_before, certain = gone.copy(), {each for each in there.copy() if "-2" in each}
                result = search(gallery, 3, 2, top_k=500, group_by="tracklet", filters=only_c1)
                found = ids(result)
                assert len(found) == len(set(found)) == result.searched
                assert not gone_before & set(found)
                assert certain <= set(found)
                assert {match.record.camera for match in result.matches} == {"c1"}
                gallery.list(only_c1, limit=50)

        def write_all() -> None:
            try:
                run_together(lambda: write("x"), lambda: write("y"))
            finally:
                done.set()

        run_together(write_all, look, look)

        assert gallery.counts().tracklets == 20 + 2 * rounds * 2


def test_when_memory_fails_after_a_commit_it_is_made_again_from_the_store(
    gallery: EmbeddedGallery, enrol: Enrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.add([enrol("a", [1, 2])])
    assert gallery._derived is not None

    def fail(*_: object) -> None:
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(gallery._derived.vectors, "add", fail)
    gallery.add([enrol("b", [1, 3])])
    monkeypatch.setattr(gallery._derived.vectors, "remove", fail)
    gallery.remove("a")

    assert ids(search(gallery, 1, 2)) == ["b"]
    assert gallery.counts().tracklets == 1


def test_when_memory_cannot_be_made_again_nothing_is_answered_until_it_can(
    gallery: EmbeddedGallery, enrol: Enrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.add([enrol("a", [1, 2])])

    def fail(*_: object) -> None:
        raise RuntimeError("std::bad_alloc")

    with monkeypatch.context() as broken:
        broken.setattr("index.vectors.VectorIndex.add", fail)
        with pytest.raises(GalleryUnavailableError, match="cannot build the index"):
            gallery.add([enrol("b", [1, 3])])
        with pytest.raises(GalleryUnavailableError):
            search(gallery, 1, 2)
        with pytest.raises(GalleryUnavailableError):
            gallery.check()

    assert ids(search(gallery, 1, 2)) == ["a", "b"]
    gallery.check()


def test_an_interrupted_change_is_mended(
    gallery: EmbeddedGallery, enrol: Enrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.add([enrol("a", [1, 2]), enrol("b", [1, 3])])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr("index.derived.Derived.remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            gallery.remove("a")

    assert ids(search(gallery, 1, 2)) == ["b"]


def test_pages_follow_enrolment_and_survive_removals(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    order = ["m", "a", "z", "k", "b"]
    gallery.add([enrol(each, [1, 2]) for each in order])

    first = gallery.list(Filters(), limit=2)
    gallery.remove("a")
    second = gallery.list(Filters(), limit=2, cursor=first.next_cursor)
    last = gallery.list(Filters(), limit=2, cursor=second.next_cursor)

    pages = [[record.tracklet_id for record in page.records] for page in (first, second, last)]
    assert pages == [["m", "a"], ["z", "k"], ["b"]]
    assert last.next_cursor is None


def test_an_old_cursor_does_not_miss_what_came_after_removals(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    """A place in the order of enrolment is never given twice."""
    gallery.add([enrol(each, [1, 2]) for each in "abc"])
    cursor = gallery.list(Filters(), limit=2).next_cursor
    gallery.remove("b")
    gallery.remove("c")

    gallery.add([enrol("d", [1, 2])])

    page = gallery.list(Filters(), limit=2, cursor=cursor)
    assert [record.tracklet_id for record in page.records] == ["d"]


def test_a_full_last_page_has_no_cursor(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    gallery.add([enrol(each, [1, 2]) for each in "ab"])

    assert gallery.list(Filters(), limit=2).next_cursor is None


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "1",
        "nonsense!",
        "käse",
        "=",
        *(
            base64.urlsafe_b64encode(text).decode()
            for text in (b"after-1:", b"after-1:x", b"after-1:01", b"after-2:1", b"after-1:-1",
                         b"after-1:9999999999999999999999", b"after-1:1\n", b"\xff\xff")
        ),
    ],
)  # fmt: skip
def test_a_cursor_that_it_did_not_give_is_refused(gallery: EmbeddedGallery, cursor: str) -> None:
    with pytest.raises(InvalidCursorError):
        gallery.list(Filters(), limit=1, cursor=cursor)


def test_counts_below_one_are_refused(gallery: EmbeddedGallery) -> None:
    with pytest.raises(ValueError, match="top_k"):
        search(gallery, 1, 2, top_k=0)
    with pytest.raises(ValueError, match="limit"):
        gallery.list(Filters(), limit=0)


@pytest.mark.parametrize(
    "use",
    [
        lambda gallery, enrol: gallery.add([enrol("b", [1, 2])]),
        lambda gallery, _: gallery.get("a"),
        lambda gallery, _: gallery.embedding("a"),
        lambda gallery, _: gallery.strip("a"),
        lambda gallery, _: gallery.update("a", {}),
        lambda gallery, _: gallery.remove("a"),
        lambda gallery, _: gallery.list(Filters(), limit=1),
        lambda gallery, _: search(gallery, 1, 2),
        lambda gallery, _: gallery.counts(),
        lambda gallery, _: gallery.model,
        lambda gallery, _: gallery.check(),
    ],
)
def test_a_closed_gallery_says_so(
    gallery: EmbeddedGallery, enrol: Enrol, use: Callable[[EmbeddedGallery, Enrol], object]
) -> None:
    gallery.add([enrol("a", [1, 2])])
    gallery.close()
    gallery.close()

    with pytest.raises(GalleryUnavailableError, match="closed"):
        use(gallery, enrol)


def test_closing_leaves_one_file_and_the_lock(directory: Path, enrol: Enrol) -> None:
    with EmbeddedGallery(directory) as gallery:
        gallery.add([enrol("a", [1, 2])])
        gallery.get("a")

    names = {path.name for path in directory.iterdir()}
    assert names == {"passerby.sqlite3", "passerby.lock"}
