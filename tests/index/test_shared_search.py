"""Searches of many threads at once: they share calls, and get the answers they would get alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index import vectors as index_vectors
from index.derived import Derived
from index.embedded import EmbeddedGallery
from index.gallery import Embeddings, Filters, GalleryUnavailableError, SearchResult
from index.ranking import Nearest, Rows, expansion_error, rank, summation_error
from index.rows import SUMMED
from index.sharing import SharedCalls
from index.store import Transaction
from index.vectors import Allowed, IndexPlan, VectorIndex
from tests.index.conftest import Enrol, make_enrolment

PATIENCE_S = 60.0


class Calls:
    """Doubles numbers, slowly: each call waits until it is let go, and is recorded."""

    def __init__(self, *, at_once: int = 1, most: int = 64) -> None:
        self.shared = SharedCalls[int, int](self._call, at_once=at_once, most=most)
        self.made: list[list[int]] = []
        self.let_go = Event()
        self.fail_on: BaseException | None = None

    def _call(self, numbers: Sequence[int]) -> list[int]:
        self.made.append(list(numbers))
        assert self.let_go.wait(PATIENCE_S)
        if self.fail_on and len(numbers) > 1:
            error, self.fail_on = self.fail_on, None
            raise error
        return [2 * number for number in numbers]

    def waiting(self, count: int) -> None:
        """Return when so many wait."""
        until(lambda: len(self.shared._waiting) == count)


class Asker(Thread):
    """Asks one question; has the answer or the error when it has ended."""

    def __init__(self, calls: Calls, key: object, number: int) -> None:
        super().__init__(daemon=True)
        self.answer: int | BaseException | None = None
        self._ask = partial(calls.shared.ask, key, number)
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._ask()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.answer = error

    def ended(self) -> int | BaseException | None:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self.answer


def until(condition: Any) -> None:
    """Let other threads run until something is so."""
    pause = Event()
    for _ in range(100 * int(PATIENCE_S)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it has not come about")


def test_those_that_wait_meanwhile_share_the_next_call() -> None:
    calls = Calls()
    first = Asker(calls, "all", 1)
    until(lambda: calls.made)
    others = []
    for number in (2, 3, 4):
        others.append(Asker(calls, "all", number))
        calls.waiting(len(others))

    calls.let_go.set()

    assert [each.ended() for each in (first, *others)] == [2, 4, 6, 8]
    assert calls.made == [[1], [2, 3, 4]]


def test_only_equal_keys_share_and_whoever_came_first_is_first() -> None:
    calls = Calls()
    askers = [Asker(calls, "all", 1)]
    until(lambda: calls.made)
    for waiting, (key, number) in enumerate([("c1", 2), ("all", 3), ("c1", 4), ("all", 5)], 1):
        askers.append(Asker(calls, key, number))
        calls.waiting(waiting)

    calls.let_go.set()

    assert [each.ended() for each in askers] == [2, 4, 6, 8, 10]
    assert calls.made == [[1], [2, 4], [3, 5]]


def test_a_call_has_so_many_questions_at_most() -> None:
    calls = Calls(most=2)
    askers = [Asker(calls, "all", 1)]
    until(lambda: calls.made)
    for number in (2, 3, 4):
        askers.append(Asker(calls, "all", number))
        calls.waiting(number - 1)

    calls.let_go.set()

    assert [each.ended() for each in askers] == [2, 4, 6, 8]
    assert calls.made == [[1], [2, 3], [4]]


def test_as_many_calls_as_may_be_are_under_way_before_anybody_waits() -> None:
    calls = Calls(at_once=3)
    askers = [Asker(calls, "all", number) for number in range(5)]
    calls.waiting(2)
    assert sorted(len(each) for each in calls.made) == [1, 1, 1]

    calls.let_go.set()

    assert [each.ended() for each in askers] == [0, 2, 4, 6, 8]
    until(lambda: calls.shared._free == 3)


def test_an_error_reaches_all_that_share_the_call_and_nobody_else() -> None:
    calls = Calls()
    calls.fail_on = RuntimeError("std::bad_alloc")
    first = Asker(calls, "all", 1)
    until(lambda: calls.made)
    together = [Asker(calls, "all", number) for number in (2, 3)]
    calls.waiting(2)
    calls.let_go.set()

    answers = [each.ended() for each in together]

    assert [str(answer) for answer in answers] == ["std::bad_alloc"] * 2
    assert first.ended() == 2
    assert calls.shared.ask("all", 4) == 8


def test_an_interrupt_of_the_one_that_calls_leaves_the_others_their_answers() -> None:
    calls = Calls()
    calls.fail_on = KeyboardInterrupt()
    first = Asker(calls, "all", 1)
    until(lambda: calls.made)
    together = []
    for number in (2, 3, 4):
        together.append(Asker(calls, "all", number))
        calls.waiting(len(together))
    calls.let_go.set()

    answers = [each.ended() for each in together]

    assert isinstance(answers[0], KeyboardInterrupt)
    assert answers[1:] == [6, 8]
    assert first.ended() == 2
    assert calls.made == [[1], [2, 3, 4], [3, 4]]
    assert calls.shared.ask("all", 5) == 10


def test_one_that_is_interrupted_while_it_waits_leaves_the_queue() -> None:
    calls = Calls()
    first = Asker(calls, "all", 1)
    until(lambda: calls.made)
    asked = calls.shared._queue

    def interrupted(ticket: Any) -> None:
        asked(ticket)
        ticket.woken.wait = interrupt

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls.shared, "_queue", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calls.shared.ask("all", 2)
    calls.let_go.set()

    assert first.ended() == 2
    assert calls.shared.ask("all", 3) == 6
    assert calls.made == [[1], [3]]


def test_every_one_of_many_threads_gets_its_own_answer() -> None:
    calls = Calls(at_once=2, most=7)
    calls.let_go.set()
    wrong: list[tuple[int, int]] = []

    def ask_often(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for number in rng.integers(0, 10**9, 200).tolist():
            answer = calls.shared.ask(number % 3, number)
            if answer != 2 * number:
                wrong.append((number, answer))

    run_all([partial(ask_often, seed) for seed in range(16)])

    assert not wrong
    assert max(map(len, calls.made)) <= 7
    assert sum(map(len, calls.made)) == 16 * 200
    assert calls.shared._free == 2
    assert not calls.shared._waiting


def run_all(works: Sequence[Any]) -> None:
    """Run each in a thread; fail with the first of their errors, or if one does not end."""
    errors: list[BaseException] = []

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [Thread(target=guarded, args=[work], daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def filled(gallery: EmbeddedGallery, rows: int, dimension: int) -> Embeddings:
    """Row i is tracklet i of identity i % 90 at camera i % 3; returns the vectors."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(rows, dimension)).astype(np.float32)
    gallery.add(
        [
            make_enrolment(
                f"t{row}", vector.tolist(), identity=f"p{row % 90}", camera=f"c{row % 3}"
            )
            for row, vector in enumerate(vectors)
        ]
    )
    return vectors


def ask(gallery: EmbeddedGallery, query: Embeddings, **how: Any) -> SearchResult:
    asked: dict[str, Any] = {"model": "trsa-test", "top_k": 10} | how
    return gallery.search(query, **asked)


class HeldCalls:
    """Holds the first FAISS call of a gallery back until it is let go, and counts the queries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.let_go = Event()
        search = VectorIndex.search

        def held(index: VectorIndex, queries: Embeddings, *others: Any) -> list[Nearest]:
            self.sizes.append(len(queries))
            if len(self.sizes) == 1:
                assert self.let_go.wait(PATIENCE_S)
            return search(index, queries, *others)

        monkeypatch.setattr(VectorIndex, "search", held)


def waiting_in(gallery: EmbeddedGallery) -> int:
    assert gallery._derived is not None
    return len(gallery._derived._shared._waiting)


@pytest.mark.parametrize("removed", [0, 40])
def test_searches_that_wait_share_one_faiss_call_and_get_the_answers_they_get_alone(
    directory: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """Also where rows were removed, and where each leaves out another tracklet by name."""
    with EmbeddedGallery(directory, searches=1) as gallery:
        queries = filled(gallery, 600, 16)[:17] * np.float32(0.9)
        for row in range(removed):
            gallery.remove(f"t{row + 17}")
        wanted: list[dict[str, Any]] = [
            {
                "top_k": 3 + number,
                "group_by": "identity" if number % 2 else "tracklet",
                "filters": Filters(
                    exclude_tracklets=frozenset({f"t{number}"} if number % 3 else ())
                ),
            }
            for number in range(17)
        ]
        alone = [ask(gallery, query, **how) for query, how in zip(queries, wanted, strict=True)]
        calls = HeldCalls(monkeypatch)
        answers: dict[int, SearchResult] = {}

        def look(number: int) -> None:
            answers[number] = ask(gallery, queries[number], **wanted[number])

        def let_go() -> None:
            until(lambda: waiting_in(gallery) == 16)
            calls.let_go.set()

        run_all([*(partial(look, number) for number in range(17)), let_go])

        assert calls.sizes == [1, 16]
        assert [answers[number] for number in range(17)] == alone


def test_searches_with_equal_filters_share_a_call_and_others_do_not(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedGallery(directory, searches=1) as gallery:
        queries = filled(gallery, 300, 8)
        calls = HeldCalls(monkeypatch)
        cameras: dict[int, set[str | None]] = {}

        def look(number: int) -> None:
            at = Filters(cameras=frozenset({f"c{number % 2}"}))
            result = ask(gallery, queries[number], filters=at)
            cameras[number] = {match.record.camera for match in result.matches}

        def let_go() -> None:
            until(lambda: waiting_in(gallery) == 8)
            calls.let_go.set()

        run_all([*(partial(look, number) for number in range(9)), let_go])

        assert sorted(calls.sizes) in [[1, 4, 4], [1, 3, 5]]
        assert cameras == {number: {f"c{number % 2}"} for number in range(9)}


def test_an_error_of_faiss_reaches_all_and_the_next_search_is_answered(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedGallery(directory, searches=1) as gallery:
        queries = filled(gallery, 100, 8)
        calls = HeldCalls(monkeypatch)
        held, failed = VectorIndex.search, list[int]()

        def fail(index: VectorIndex, asked: Embeddings, *others: Any) -> list[Nearest]:
            found = held(index, asked, *others)
            if len(asked) > 1:
                raise MemoryError("std::bad_alloc")
            return found

        def look(number: int) -> None:
            try:
                ask(gallery, queries[number])
            except MemoryError:
                failed.append(number)

        def let_go() -> None:
            until(lambda: waiting_in(gallery) == 4)
            calls.let_go.set()

        with monkeypatch.context() as broken:
            broken.setattr(VectorIndex, "search", fail)
            run_all([*(partial(look, number) for number in range(5)), let_go])

        assert len(failed) == 4
        assert len(ask(gallery, queries[0]).matches) == 10


def test_a_storm_of_writes_beside_shared_searches_ends_and_breaks_no_filter(
    directory: Path,
) -> None:
    """Twelve threads search through one call at a time while four write."""
    at_c1, done = Filters(cameras=frozenset({"c1"})), Event()
    with EmbeddedGallery(directory, searches=1) as gallery:
        queries = filled(gallery, 200, 8)

        def write(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for number in range(30):
                name = f"new{seed}-{number}"
                gallery.add([make_enrolment(name, rng.normal(size=8).tolist(), camera="c1")])
                gallery.update(name, {"camera": "c2", "identity": f"p{number}"})
                gallery.update(f"t{rng.integers(200)}", {"camera": f"c{rng.integers(3)}"})
                if number % 2:
                    gallery.remove(name)

        def look(seed: int) -> None:
            rng = np.random.default_rng(seed)
            while not done.is_set():
                query = queries[rng.integers(200)]
                filters = at_c1 if rng.random() < 0.5 else None
                result = ask(gallery, query, filters=filters, group_by="tracklet", top_k=300)
                found = [match.record for match in result.matches]
                assert len({record.tracklet_id for record in found}) == len(found)
                assert len(found) == result.searched
                assert filters is None or {record.camera for record in found} == {"c1"}

        def write_all() -> None:
            try:
                run_all([partial(write, seed) for seed in range(4)])
            finally:
                done.set()

        run_all([write_all, *(partial(look, 100 + seed) for seed in range(12))])

        assert gallery.counts().tracklets == 200 + 4 * 15


@pytest.mark.parametrize("index", ["Flat", "HNSW8"])
def test_a_search_between_a_commit_and_memory_begins_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    """The store says c2 already, memory still c1: no answer may name a c2 among those at c1."""
    with EmbeddedGallery(directory, index=index) as gallery:
        gallery.add([make_enrolment(each, [1, 2], camera="c1") for each in "abc"])
        begun: list[SearchResult] = []
        tries: list[int] = []
        looked = Derived.search

        def counted(derived: Derived, *how: Any) -> SearchResult:
            tries.append(1)
            return looked(derived, *how)

        monkeypatch.setattr(Derived, "search", counted)
        commit = Transaction.commit
        at_c1 = Filters(cameras=frozenset({"c1"}))

        def look() -> None:
            begun.append(ask(gallery, np.array([1, 2], np.float32), filters=at_c1))

        threads: list[Thread] = []

        def commit_and_look(transaction: Transaction) -> None:
            commit(transaction)
            tries.clear()
            threads.append(Thread(target=look))
            threads[-1].start()
            until(lambda: len(tries) > 1)

        monkeypatch.setattr(Transaction, "commit", commit_and_look)
        gallery.update("b", {"camera": "c2"})
        threads[0].join(PATIENCE_S)
        gallery.remove("a")
        threads[1].join(PATIENCE_S)

        found = [[match.record.tracklet_id for match in each.matches] for each in begun]
        assert found == [["a", "c"], ["c"]]


def test_a_file_that_somebody_else_changed_is_told(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    gallery.add([enrol("a", [1, 2], camera="c1")])
    writer = gallery._store._writer
    writer.execute("UPDATE tracklets SET camera = 'c2'")
    writer.execute(f"UPDATE tracklets SET record_checksum = values_checksum({SUMMED})")  # noqa: S608

    with pytest.raises(GalleryUnavailableError, match="changed by somebody else"):
        ask(gallery, np.array([1, 2], np.float32))


def made_index(vectors: Embeddings) -> VectorIndex:
    index = IndexPlan("Flat").build(vectors.shape[1], None)
    index.add(np.arange(len(vectors)), vectors)
    return index


def true_squared(query: Embeddings, vectors: Embeddings) -> Any:
    return np.square(vectors.astype(np.float64) - query.astype(np.float64)).sum(axis=1)


@contextmanager
def always_expanded() -> Iterator[None]:
    """Multiply matrices for every single query."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_vectors, "_MOST_DIRECT_QUERIES", 0)
        yield


awkward = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "rows": st.integers(1, 200),
        "dimension": st.sampled_from([1, 3, 17, 192, 700]),
        # Far from the origin, |x|^2 - 2xy + |y|^2 leaves nothing of the distance but rounding.
        "offset": st.sampled_from([0.0, 1.0, 1e3, 1e6]),
        "scale": st.sampled_from([1e-30, 1e-19, 1e-3, 1.0, 1e9]),
    }
)


def drawn(seed: int, rows: int, dimension: int, offset: float, scale: float) -> Embeddings:
    rng = np.random.default_rng(seed)
    steps = rng.integers(0, 4, (rows, dimension))  # coarse: many ties
    return ((steps + offset) * scale).astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(awkward)
def test_expanded_distances_stay_within_their_bound(how: dict[str, Any]) -> None:
    vectors = drawn(**how)
    queries = np.concatenate([vectors[:3], -vectors[:2], vectors[:2] * np.float32(1.001)])
    index = made_index(vectors)
    everyone = Allowed(np.ones(len(vectors), dtype=np.bool_), everyone=True)

    with always_expanded():
        found = index.search(queries, 20, everyone)

    for query, nearest in zip(queries, found, strict=True):
        true = true_squared(query, vectors)
        assert nearest.error == expansion_error(query)
        squared = nearest.squared.astype(np.float64)
        assert (nearest.error.lower(squared) <= true[nearest.rows]).all()
        assert (nearest.error.upper(squared) >= true[nearest.rows]).all()
        others = np.delete(true, nearest.rows)
        assert (nearest.error.lower(nearest.horizon) <= others).all()


def test_a_search_with_a_selector_is_never_expanded() -> None:
    """However many queries, and even while another thread has FAISS expand."""
    vectors = drawn(0, 400, 192, 1e3, 1.0)
    index = made_index(vectors)
    most = Allowed(np.arange(400) > 0)

    with index_vectors._expanding():
        found = index.search(vectors[:64], 20, most)

    for query, nearest in zip(vectors[:64], found, strict=True):
        assert nearest.error == summation_error(192)
        true = true_squared(query, vectors)[nearest.rows]
        assert nearest.squared == pytest.approx(true, rel=1e-5)


class ExpandedSource:
    """What a gallery gives `rank`, without a gallery."""

    exhaustive = True

    def __init__(self, index: VectorIndex, query: Embeddings, vectors: Embeddings) -> None:
        self._index, self._query, self._vectors = index, query, vectors
        self._groups = np.arange(len(vectors)) % 7
        self.count = len(vectors)

    def nearest(self, count: int, without: Rows) -> Nearest:
        mask = ~np.isin(self._groups, without)
        allowed = Allowed(mask, everyone=bool(mask.all()))
        return self._index.search(self._query[np.newaxis], count, allowed)[0]

    def groups(self, rows: Rows) -> Rows:
        return self._groups[rows]

    def vectors(self, rows: Rows) -> Embeddings:
        return self._index.vectors(rows)

    def tracklet_ids(self, rows: Rows) -> Sequence[str]:
        return [f"t{row:04d}" for row in rows.tolist()]


@settings(max_examples=150, deadline=None)
@given(awkward, st.integers(1, 8), st.integers(1, 20))
def test_ranking_by_expanded_distances_equals_brute_force(
    how: dict[str, Any], top_k: int, first: int
) -> None:
    vectors = drawn(**how)
    query = vectors[0] * np.float32(1.0005)
    distances = np.sqrt(true_squared(query, vectors)).astype(np.float32).tolist()
    best: dict[int, tuple[float, str]] = {}
    for row, distance in enumerate(distances):
        best[row % 7] = min(best.get(row % 7, (np.inf, "")), (distance, f"t{row:04d}"))

    with always_expanded():
        source = ExpandedSource(made_index(vectors), query, vectors)
        ranked = rank(query, source, top_k=top_k, first=first)

    assert [(each.distance, each.tracklet_id) for each in ranked] == sorted(best.values())[:top_k]


def test_the_longest_embeddings_have_finite_distances_when_expanded(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    """Beside a removed one, whose place is further away still."""
    gallery.add([enrol("a", [2.0**62, 0]), enrol("gone", [0, 0]), enrol("b", [0, 2.0**62])])
    gallery.remove("gone")

    with always_expanded():
        result = ask(gallery, np.array([-(2.0**62), 0], np.float32))

    assert [match.record.tracklet_id for match in result.matches] == ["b", "a"]
    assert result.matches[1].distance == 2.0**63


def test_removed_rows_do_not_crowd_out_the_living_when_expanded(
    gallery: EmbeddedGallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred are gone, the query is where zeros would be: one look is enough all the same."""
    vectors = filled(gallery, 400, 8)
    for row in range(0, 200, 2):
        gallery.remove(f"t{row}")

    calls = HeldCalls(monkeypatch)
    calls.let_go.set()

    with always_expanded():
        result = ask(gallery, vectors[0] * 0, group_by="tracklet")

    assert calls.sizes == [1]
    left = [row for row in range(400) if row >= 200 or row % 2]
    order = sorted(left, key=lambda row: float(np.linalg.norm(vectors[row].astype(float))))
    assert [match.record.tracklet_id for match in result.matches] == [
        f"t{row}" for row in order[:10]
    ]
