"""Identities: listing, naming, joining, splitting, and what else is kept of a tracklet."""

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest

from index.embedded import EmbeddedGallery
from index.erasures import Erasures
from index.gallery import (
    Counts,
    DuplicateIdentityError,
    Erased,
    Filters,
    GalleryUnavailableError,
    IdentitySummary,
    InvalidCursorError,
    NotFoundError,
    StorageFullError,
)
from index.identities import summaries, summary
from index.store import Transaction
from tests.index.conftest import Enrol

PATIENCE_S = 20.0
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def nearest(
    gallery: EmbeddedGallery, *vector: float, identities: frozenset[str] | None = None
) -> list[str | None]:
    """The identities of an answer, by rank."""
    filters = Filters(identities=identities)
    query = np.array(vector, np.float32)
    found = gallery.search(query, model="trsa-test", top_k=10, filters=filters)
    return [match.record.identity for match in found.matches]


@pytest.fixture
def people(gallery: EmbeddedGallery, enrol: Enrol) -> EmbeddedGallery:
    """Anna twice, Bert once, and somebody whom nobody has named."""
    gallery.add(
        [
            enrol("a1", [1, 0], identity="anna", camera="c2"),
            enrol("b1", [2, 0], identity="bert", camera="c2"),
            enrol("a2", [3, 0], identity="anna", camera="c1"),
            enrol("x", [4, 0]),
        ]
    )
    return gallery


def test_identities_are_listed_by_name_with_their_counts_and_cameras(
    people: EmbeddedGallery,
) -> None:
    page = people.identities(limit=10)

    anna, bert = IdentitySummary("anna", 2, ("c1", "c2")), IdentitySummary("bert", 1, ("c2",))
    assert (page.items, page.next_cursor) == ((anna, bert), None)
    assert (people.identity("anna"), people.identity("bert")) == (anna, bert)


def test_pages_of_identities_survive_changes_between_them(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    gallery.add([enrol(each, [1, 2], identity=each) for each in ("d", "b", "käse", "a", "c")])

    first = gallery.identities(limit=2)
    gallery.remove_identity("b")
    gallery.rename_identity("d", "bb")
    second = gallery.identities(limit=2, cursor=first.next_cursor)
    last = gallery.identities(limit=2, cursor=second.next_cursor)

    pages = [[each.identity for each in page.items] for page in (first, second, last)]
    assert pages == [["a", "b"], ["bb", "c"], ["käse"]]
    assert last.next_cursor is None


def test_a_cursor_of_another_list_is_refused(people: EmbeddedGallery) -> None:
    listed = people.list(Filters(), limit=1).next_cursor
    identities = people.identities(limit=1).next_cursor
    encoded = base64.urlsafe_b64encode(b"identities-after-2:a").decode()

    for cursor in (listed, encoded, "nonsense!", "", "käse"):
        with pytest.raises(InvalidCursorError):
            people.identities(limit=1, cursor=cursor)
    with pytest.raises(InvalidCursorError):
        people.list(Filters(), limit=1, cursor=identities)
    with pytest.raises(ValueError, match="limit"):
        people.identities(limit=0)


def test_identities_are_listed_from_the_index_alone(people: EmbeddedGallery) -> None:
    """No row is read and nothing is sorted: a page takes as long as what it counts."""
    connection = people._store._writer
    asked: list[str] = []
    connection.set_trace_callback(asked.append)
    summaries(connection, after=None, limit=2)
    summaries(connection, after="anna", limit=2)
    summary(connection, "anna")
    connection.set_trace_callback(None)

    for query in asked:
        plan = connection.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
        assert "USING COVERING INDEX tracklets_identity" in plan[0][3]
        assert not [step for step in plan if "GROUP BY" in step[3] or "ORDER BY" in step[3]]
    assert len(asked) == 3


def test_a_new_name_counts_everywhere_at_once(people: EmbeddedGallery, directory: Path) -> None:
    renamed = people.rename_identity("anna", "zoe")

    assert renamed == IdentitySummary("zoe", 2, ("c1", "c2")) == people.identity("zoe")
    assert nearest(people, 0, 0) == ["zoe", "bert", None]
    assert nearest(people, 0, 0, identities=frozenset({"anna"})) == []
    assert people.get("a2").identity == "zoe"
    with pytest.raises(NotFoundError):
        people.identity("anna")
    people.close()
    with EmbeddedGallery(directory) as again:
        assert nearest(again, 0, 0) == ["zoe", "bert", None]


def test_a_name_that_somebody_has_is_refused_and_ones_own_changes_nothing(
    people: EmbeddedGallery,
) -> None:
    with pytest.raises(DuplicateIdentityError) as told:
        people.rename_identity("anna", "bert")

    assert "bert" not in str(told.value)
    assert people.rename_identity("anna", "anna").tracklets == 2
    assert nearest(people, 0, 0) == ["anna", "bert", None]


def test_merged_identities_rank_as_one(people: EmbeddedGallery) -> None:
    merged = people.merge_identity("bert", "anna")

    assert merged == IdentitySummary("anna", 3, ("c1", "c2"))
    assert nearest(people, 2, 0) == ["anna", None]
    assert people.counts() == Counts(4, 1)
    with pytest.raises(ValueError, match="same"):
        people.merge_identity("anna", "anna")


def test_moved_tracklets_split_an_identity(people: EmbeddedGallery) -> None:
    assert people.assign(["a2", "x", "x"], "cleo") == 2
    assert people.assign(["a2", "b1"], "cleo") == 1
    assert people.assign(["x"], None) == 1
    assert people.assign([], "cleo") == 0

    found = [(each.identity, each.tracklets) for each in people.identities(limit=9).items]
    assert found == [("anna", 1), ("cleo", 2)]
    assert nearest(people, 3, 0) == ["cleo", None, "anna"]


def test_one_unknown_id_keeps_all_where_they_are(people: EmbeddedGallery) -> None:
    with pytest.raises(NotFoundError, match="nobody"):
        people.assign(["x", "nobody", "a1"], "cleo")

    assert nearest(people, 0, 0) == ["anna", "bert", None]


def test_an_erased_identity_takes_its_tracklets_and_nothing_else(people: EmbeddedGallery) -> None:
    erased = people.remove_identity("anna")

    assert erased == Erased("anna", ("a1", "a2"))
    assert nearest(people, 0, 0) == ["bert", None]
    assert [each.tracklet_id for each in people.list(Filters(), limit=9).records] == ["b1", "x"]


def test_a_gallery_whose_last_identity_was_erased_takes_another_model(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    gallery.add([enrol("a", [1, 2], identity="anna"), enrol("b", [1, 2], identity="anna")])
    gallery.remove_identity("anna")

    gallery.add([enrol("a", [1, 2, 3], model="other")])

    assert gallery.model == "other"


@pytest.mark.parametrize(
    "use",
    [
        lambda gallery: gallery.identity("nobody"),
        lambda gallery: gallery.rename_identity("nobody", "anna"),
        lambda gallery: gallery.rename_identity("nobody", "nobody"),
        lambda gallery: gallery.merge_identity("nobody", "anna"),
        lambda gallery: gallery.merge_identity("anna", "nobody"),
        lambda gallery: gallery.remove_identity("nobody"),
    ],
)
def test_an_unknown_identity_is_not_found_and_not_named(
    people: EmbeddedGallery, use: Callable[[EmbeddedGallery], object]
) -> None:
    with pytest.raises(NotFoundError) as told:
        use(people)

    assert "nobody" not in str(told.value)
    assert nearest(people, 0, 0) == ["anna", "bert", None]


WRITES: list[tuple[Callable[[EmbeddedGallery], object], list[str | None]]] = [
    (lambda gallery: gallery.rename_identity("anna", "zoe"), ["zoe", "bert", None]),
    (lambda gallery: gallery.merge_identity("anna", "bert"), ["bert", None]),
    (lambda gallery: gallery.assign(["a1", "x"], "bert"), ["bert", "anna"]),
    (lambda gallery: gallery.remove_identity("anna"), ["bert", None]),
    (lambda gallery: gallery.expire(NOON, timedelta(0)), []),
]
NAMES = ["rename", "merge", "assign", "remove", "expire"]


@pytest.mark.parametrize(("write", "after"), WRITES, ids=NAMES)
def test_a_change_of_many_holds_up_no_search_while_it_waits_for_the_disk(
    people: EmbeddedGallery,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[EmbeddedGallery], object],
    after: list[str | None],
) -> None:
    people._clock = lambda: NOON + timedelta(days=1)
    for each in ("a1", "a2", "b1", "x"):
        people.update(each, {"expires_at": NOON})
    asked, done = Event(), Event()
    commit = Transaction.commit

    def slow_commit(transaction: Transaction) -> None:
        asked.set()
        assert done.wait(PATIENCE_S)
        commit(transaction)

    monkeypatch.setattr(Transaction, "commit", slow_commit)
    writer = Thread(target=write, args=[people], daemon=True)
    writer.start()
    assert asked.wait(PATIENCE_S)

    before = nearest(people, 0, 0)
    done.set()
    writer.join(PATIENCE_S)

    assert before == ["anna", "bert", None]
    assert nearest(people, 0, 0) == after


@pytest.mark.parametrize(("write", "after"), WRITES, ids=NAMES)
def test_a_search_between_a_commit_and_memory_begins_again(
    people: EmbeddedGallery,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[EmbeddedGallery], object],
    after: list[str | None],
) -> None:
    """It finds the rows of its answer changed, and answers with all of the change or none."""
    for each in ("a1", "a2", "b1", "x"):
        people.update(each, {"expires_at": NOON})
    committed, searching = Event(), Event()
    commit, rows = Transaction.commit, people._store.rows
    found: list[list[str | None]] = []

    def told_commit(transaction: Transaction) -> None:
        searching.wait(PATIENCE_S)
        commit(transaction)
        committed.set()

    def late_rows(keys: list[int], *, vectors: bool) -> dict[int, tuple[object, ...]]:
        searching.set()
        assert committed.wait(PATIENCE_S)
        return rows(keys, vectors=vectors)

    monkeypatch.setattr(Transaction, "commit", told_commit)
    monkeypatch.setattr(people._store, "rows", late_rows)
    reader = Thread(target=lambda: found.append(nearest(people, 0, 0)), daemon=True)
    reader.start()
    write(people)
    reader.join(PATIENCE_S)

    assert found == [after]


@pytest.mark.parametrize(("write", "after"), WRITES, ids=NAMES)
def test_a_change_of_many_that_is_refused_changes_nothing(
    people: EmbeddedGallery,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[EmbeddedGallery], object],
    after: list[str | None],
) -> None:
    for each in ("a1", "a2", "b1", "x"):
        people.update(each, {"expires_at": NOON})

    def refuse(_: Transaction) -> None:
        raise StorageFullError("cannot write the gallery: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "commit", refuse)
        with pytest.raises(StorageFullError):
            write(people)

    assert nearest(people, 0, 0) == ["anna", "bert", None]
    assert people.erasures().entries == ()
    write(people)
    assert nearest(people, 0, 0) == after


def test_memory_that_fails_to_follow_a_change_of_many_is_made_again(
    people: EmbeddedGallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("index.columns.Columns.name", fail)
        people.rename_identity("anna", "zoe")
        patch.setattr("index.vectors.VectorIndex.remove", fail)
        people.remove_identity("bert")

    assert nearest(people, 0, 0) == ["zoe", None]


def test_many_rows_are_changed_and_removed_in_one_step(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    gallery.add([enrol(f"t{row}", [row, 1], identity=f"p{row % 2}") for row in range(3000)])

    gallery.rename_identity("p1", "anna")
    gallery.remove_identity("p0")

    assert gallery.identity("anna").tracklets == 1500
    assert gallery.counts() == Counts(1500, 1)
    assert nearest(gallery, 0, 1) == ["anna"]


def test_kept_frames_come_back_in_order_and_go_with_their_tracklet(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    frames = tuple(f"frame {position}".encode() for position in range(12))
    gallery.add([enrol("a", [1, 2], frames=frames), enrol("b", [1, 2])])

    assert gallery.frames("a") == frames
    for tracklet_id in ("b", "nobody"):
        with pytest.raises(NotFoundError, match=tracklet_id):
            gallery.frames(tracklet_id)
    gallery.remove("a")
    assert gallery._store._writer.execute("SELECT count(*) FROM frames").fetchone() == (0,)


def test_quality_is_kept_and_cannot_be_changed(gallery: EmbeddedGallery, enrol: Enrol) -> None:
    quality = {"frames": 15, "sharpness": 0.25, "spread": None}
    gallery.add([enrol("a", [1, 2], quality=quality), enrol("b", [1, 2])])

    assert gallery.get("a").quality == quality
    assert gallery.get("b").quality is None
    with pytest.raises(ValueError, match="got quality"):
        gallery.update("a", {"quality": {}})


@pytest.mark.parametrize(
    "use",
    [
        lambda gallery: gallery.identities(limit=1),
        lambda gallery: gallery.identity("anna"),
        lambda gallery: gallery.rename_identity("anna", "zoe"),
        lambda gallery: gallery.merge_identity("anna", "bert"),
        lambda gallery: gallery.assign(["x"], "anna"),
        lambda gallery: gallery.remove_identity("anna"),
        lambda gallery: gallery.frames("x"),
        lambda gallery: gallery.expire(NOON),
        lambda gallery: gallery.calibration(),
        lambda gallery: gallery.set_calibration(None),
        lambda gallery: gallery.erasures(),
        lambda gallery: gallery.apply_erasures(Erasures()),
    ],
)
def test_a_closed_gallery_says_so(
    people: EmbeddedGallery, use: Callable[[EmbeddedGallery], object]
) -> None:
    people.close()

    with pytest.raises(GalleryUnavailableError, match="closed"):
        use(people)
