"""The embedded gallery against plain Python: every answer, over random galleries and operations."""

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bench.gallery_truth import passes
from index.embedded import EmbeddedGallery
from index.erasures import Erasure, Erasures, Kind, digest
from index.gallery import (
    Counts,
    DuplicateIdentityError,
    DuplicateTrackletError,
    Enrolment,
    Erased,
    Filters,
    GroupBy,
    IdentitySummary,
    NotFoundError,
    SearchResult,
    TrackletRecord,
)
from index.vector_storage import Storage

# Thousands of galleries: each on a memory disk, where waiting for the disk takes no time.
MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108
START = datetime(2026, 1, 1, tzinfo=UTC)
DIMENSION = 3

names = st.sampled_from(["anna", "bert", "cleo", "dora"])
identities = st.none() | names
cameras = st.sampled_from([None, "c1", "c2", "c3"])
times = st.none() | st.integers(0, 5).map(lambda hours: START + timedelta(hours=hours))
# Small whole numbers: ties and duplicates everywhere, and no rounding in either computation.
vectors = st.lists(st.integers(-2, 2), min_size=DIMENSION, max_size=DIMENSION)
tracklet_ids = st.integers(0, 40).map(lambda number: f"t{number}")
filters = st.builds(
    Filters,
    identities=st.none() | st.frozensets(st.sampled_from(["anna", "bert", "nobody"])),
    unnamed=st.sampled_from([False, False, False, True]),
    cameras=st.none() | st.frozensets(st.sampled_from(["c1", "c2", "c9"])),
    exclude_cameras=st.frozensets(st.sampled_from(["c2", "c3", "c9"])),
    since=times,
    until=times,
    exclude_tracklets=st.frozensets(tracklet_ids, max_size=4),
)
group_bys: st.SearchStrategy[GroupBy] = st.sampled_from(["identity", "tracklet"])
records = st.builds(
    TrackletRecord,
    tracklet_id=tracklet_ids,
    identity=identities,
    camera=cameras,
    start_time=times,
    end_time=times,
    metadata=st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2),
    frames_received=st.just(40),
    frames_used=st.just(15),
    model=st.just("trsa-test"),
    created_at=st.integers(0, 20).map(lambda hours: START + timedelta(hours=hours)),
    content=st.just("0" * 64),
    expires_at=times,
    quality=st.none() | st.just({"sharpness": 0.5}),
)
enrolments = st.builds(
    Enrolment, records, vectors.map(lambda vector: np.array(vector, dtype=np.float32))
)
searches = st.fixed_dictionaries(
    {
        "query": vectors,
        "top_k": st.integers(1, 45),
        "group_by": group_bys,
        "filters": st.just(Filters()) | filters,
        "max_distance": st.none() | st.floats(0, 6),
    }
)


def slow_search(
    held: Mapping[str, Enrolment],
    query: Sequence[int],
    top_k: int,
    group_by: GroupBy,
    filters: Filters,
    max_distance: float | None,
) -> tuple[list[tuple[str, float]], int, float | None]:
    """What an answer should hold: (id, distance) by rank, searched, nearest."""
    seen = [each for each in held.values() if passes(each.record, filters)]
    ranked = sorted(
        (float(np.float32(math.dist(query, each.embedding.tolist()))), each.record.tracklet_id)
        for each in seen
    )
    matches: list[tuple[str, float]] = []
    groups: set[str | None] = set()
    for distance, tracklet_id in ranked:
        identity = held[tracklet_id].record.identity if group_by == "identity" else None
        if identity is None or identity not in groups:
            groups.add(identity)
            matches.append((tracklet_id, distance))
    near = [match for match in matches[:top_k] if max_distance is None or match[1] <= max_distance]
    return near, len(seen), ranked[0][0] if ranked else None


def fast_search(gallery: EmbeddedGallery, query: Sequence[int], **how: Any) -> SearchResult:
    return gallery.search(np.array(query, dtype=np.float32), model="trsa-test", **how)


def assert_same_answer(
    gallery: EmbeddedGallery, held: Mapping[str, Enrolment], search: dict[str, Any]
) -> None:
    result = fast_search(gallery, **search)
    found = [(match.record.tracklet_id, match.distance) for match in result.matches]
    assert (found, result.searched, result.nearest) == slow_search(held, **search)
    assert all(match.record == held[match.record.tracklet_id].record for match in result.matches)


def drawn_enrolments(seed: int, rows: int, groups: int) -> list[Enrolment]:
    """Many rows, cheaply: a few identities have most of them."""
    rng = np.random.default_rng(seed)
    names = ["anna", "bert", *(f"p{group}" for group in range(groups))]
    return [
        Enrolment(
            TrackletRecord(
                tracklet_id=f"t{number}",
                identity=names[int(groups * rng.random() ** 4)] if rng.random() < 0.9 else None,
                camera=f"c{rng.integers(1, 5)}",
                start_time=START + timedelta(hours=int(rng.integers(6))),
                frames_received=1,
                frames_used=1,
                model="trsa-test",
                created_at=START,
                content="0",
            ),
            rng.integers(-2, 3, DIMENSION).astype(np.float32),
        )
        for number in rng.permutation(rows)
    ]


def check_searches(added: list[Enrolment], asked: list[dict[str, Any]]) -> None:
    held = {each.record.tracklet_id: each for each in added}
    with (
        tempfile.TemporaryDirectory(dir=MEMORY_DISK) as directory,
        EmbeddedGallery(Path(directory)) as gallery,
    ):
        gallery.add(added)
        for search in asked:
            assert_same_answer(gallery, held, search)


@settings(max_examples=500, deadline=None)
@given(
    added=st.lists(enrolments, max_size=40, unique_by=lambda each: each.record.tracklet_id),
    asked=st.lists(searches, min_size=1, max_size=4),
)
def test_search_equals_the_slow_search(added: list[Enrolment], asked: list[dict[str, Any]]) -> None:
    check_searches(added, asked)


@settings(max_examples=900, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 60),
    groups=st.integers(1, 40),
    asked=st.lists(searches, min_size=1, max_size=2),
)
def test_search_in_many_small_galleries_equals_the_slow_search(
    seed: int, rows: int, groups: int, asked: list[dict[str, Any]]
) -> None:
    check_searches(drawn_enrolments(seed, rows, groups), asked)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(300, 900),
    groups=st.integers(1, 400),
    asked=st.lists(searches, min_size=1, max_size=2),
)
def test_search_in_larger_galleries_equals_the_slow_search(
    seed: int, rows: int, groups: int, asked: list[dict[str, Any]]
) -> None:
    """More rows than the first round of candidates, and most of them tied."""
    check_searches(drawn_enrolments(seed, rows, groups), asked)


class GalleryMachine(RuleBasedStateMachine):
    """Does the same to a gallery and to a dict, and compares."""

    factory = "Flat"
    storage: Storage = "float32"

    @initialize()
    def open(self) -> None:
        self.directory = tempfile.TemporaryDirectory(dir=MEMORY_DISK)
        # Erased are also people who, by their record, will only be enrolled later.
        self.now = START + timedelta(hours=6)
        self.held: dict[str, Enrolment] = {}
        self.erased: dict[tuple[Kind, str], datetime] = {}
        self.heard_of: dict[tuple[Kind, str], datetime] = {}
        self.open_gallery()

    def open_gallery(self) -> None:
        self.gallery = EmbeddedGallery(
            Path(self.directory.name),
            index=self.factory,
            storage=self.storage,
            clock=lambda: self.now,
        )

    def teardown(self) -> None:
        self.gallery.close()
        self.directory.cleanup()

    @rule(added=st.lists(enrolments, max_size=12))
    def add(self, added: list[Enrolment]) -> None:
        ids = [each.record.tracklet_id for each in added]
        if len(set(ids)) < len(ids) or self.held.keys() & set(ids):
            with pytest.raises(DuplicateTrackletError):
                self.gallery.add(added)
            return
        self.gallery.add(added)
        self.held |= {each.record.tracklet_id: each for each in added}

    @rule(tracklet_id=tracklet_ids)
    def remove(self, tracklet_id: str) -> None:
        if tracklet_id not in self.held:
            with pytest.raises(NotFoundError):
                self.gallery.remove(tracklet_id)
            return
        record = self.held[tracklet_id].record
        assert self.gallery.remove(tracklet_id) == record
        self.forget([tracklet_id])

    def forget(
        self, tracklet_ids: Iterable[str], identity: str | None = None, at: datetime | None = None
    ) -> None:
        """What an erasure does to the model."""
        gone: list[tuple[Kind, str]] = [("tracklet", each) for each in tracklet_ids]
        for _, tracklet_id in gone:
            del self.held[tracklet_id]
        if identity is not None:
            gone.append(("identity", identity))
        self.erased |= {each: max(at or self.now, self.erased.get(each, START)) for each in gone}

    def shown(self) -> dict[str, list[str]]:
        """The tracklets of each identity, in the order of enrolment."""
        shown: dict[str, list[str]] = defaultdict(list)
        for tracklet_id, each in self.held.items():
            if each.record.identity is not None:
                shown[each.record.identity].append(tracklet_id)
        return shown

    def name(self, tracklet_ids: Iterable[str], identity: str | None) -> None:
        for tracklet_id in tracklet_ids:
            before = self.held[tracklet_id]
            record = replace(before.record, identity=identity)
            self.held[tracklet_id] = replace(before, record=record)

    def summary(self, identity: str) -> IdentitySummary:
        tracklets = self.shown()[identity]
        seen = {self.held[tracklet_id].record.camera for tracklet_id in tracklets}
        return IdentitySummary(identity, len(tracklets), tuple(sorted(filter(None, seen))))

    @rule(name=names, to=names)
    def rename(self, name: str, to: str) -> None:
        shown = self.shown()
        if name not in shown or (to in shown and to != name):
            with pytest.raises(DuplicateIdentityError if name in shown else NotFoundError):
                self.gallery.rename_identity(name, to)
            return
        self.name(shown[name], to)
        assert self.gallery.rename_identity(name, to) == self.summary(to)

    @rule(name=names, into=names)
    def merge(self, name: str, into: str) -> None:
        shown = self.shown()
        if name == into or not {name, into} <= shown.keys():
            with pytest.raises(ValueError if name == into else NotFoundError):
                self.gallery.merge_identity(name, into)
            return
        self.name(shown[name], into)
        assert self.gallery.merge_identity(name, into) == self.summary(into)

    @rule(chosen=st.lists(tracklet_ids, max_size=6), identity=identities)
    def assign(self, chosen: list[str], identity: str | None) -> None:
        if not set(chosen) <= self.held.keys():
            with pytest.raises(NotFoundError):
                self.gallery.assign(chosen, identity)
            return
        changed = {each for each in chosen if self.held[each].record.identity != identity}
        self.name(chosen, identity)
        assert self.gallery.assign(chosen, identity) == len(changed)

    @rule(name=names)
    def remove_identity(self, name: str) -> None:
        shown = self.shown()
        if name not in shown:
            with pytest.raises(NotFoundError):
                self.gallery.remove_identity(name)
            return
        assert self.gallery.remove_identity(name) == Erased(name, tuple(shown[name]))
        self.forget(shown[name], name)

    @rule(hours=st.integers(0, 6), days=st.none() | st.sampled_from([0.1, 0.2, 1]))
    def expire(self, hours: int, days: float | None) -> None:
        now = START + timedelta(hours=hours)
        retention = None if days is None else timedelta(days=days)

        def is_due(record: TrackletRecord) -> bool:
            is_old = retention is not None and record.created_at <= now - retention
            return is_old or (record.expires_at is not None and record.expires_at <= now)

        due = {each for each, kept in self.held.items() if is_due(kept.record)}
        assert set(self.gallery.expire(now, retention)) == due
        self.forget(due, at=now)

    @rule(
        gone=st.lists(st.tuples(st.just("tracklet"), tracklet_ids), max_size=3),
        names=st.lists(st.tuples(st.just("identity"), names), max_size=1),
        hours=st.integers(0, 20),
    )
    def apply_erasures(
        self, gone: list[tuple[Kind, str]], names: list[tuple[Kind, str]], hours: int
    ) -> None:
        """Of another gallery, with a salt of its own."""
        at, salt = START + timedelta(hours=hours), b"another"
        ledger = Erasures(
            tuple(Erasure(digest(salt, kind, name), kind, at, salt) for kind, name in gone + names)
        )
        never = START - timedelta(hours=1)
        new = {each for each in gone + names if self.heard_of.get(each, never) < at}
        self.heard_of |= dict.fromkeys(new, at)
        banned = [
            tracklet_id
            for tracklet_id, each in self.held.items()
            if each.record.created_at <= at
            and new & {("tracklet", tracklet_id), ("identity", each.record.identity)}
        ]
        assert self.gallery.apply_erasures(ledger) == tuple(banned)
        self.forget(banned)

    @rule(record=records)
    def ledger(self, record: TrackletRecord) -> None:
        """It bans what was erased here or elsewhere after it was enrolled, and nothing else."""
        names = [("tracklet", record.tracklet_id), ("identity", record.identity)]
        known = [*self.erased.items(), *self.heard_of.items()]
        is_banned = any(what in names and at >= record.created_at for what, at in known)
        assert self.gallery.erasures().bans(record) == is_banned

    @rule(limit=st.integers(1, 3))
    def list_identities(self, limit: int) -> None:
        page = self.gallery.identities(limit=limit)
        found = [*page.items]
        while page.next_cursor:
            assert len(page.items) == limit
            page = self.gallery.identities(limit=limit, cursor=page.next_cursor)
            found += page.items
        assert found == [self.summary(name) for name in sorted(self.shown())]

    @precondition(lambda self: len(self.held) > 3)
    @rule()
    def remove_most(self) -> None:
        for tracklet_id in sorted(self.held)[1:]:
            self.remove(tracklet_id)

    @rule(
        tracklet_id=tracklet_ids,
        changes=st.fixed_dictionaries(
            {},
            optional={
                "identity": identities,
                "camera": cameras,
                "start_time": times,
                "expires_at": times,
            },
        ),
    )
    def update(self, tracklet_id: str, changes: dict[str, Any]) -> None:
        with suppress(NotFoundError):
            returned = self.gallery.update(tracklet_id, changes)
            before = self.held[tracklet_id]
            self.held[tracklet_id] = replace(before, record=replace(before.record, **changes))
            assert returned == self.held[tracklet_id].record
            return
        assert tracklet_id not in self.held

    @rule()
    def reopen(self) -> None:
        self.gallery.close()
        self.open_gallery()

    @rule()
    def compact(self) -> None:
        if self.gallery._derived is not None:
            with self.gallery._changing_memory():
                self.gallery._derived.compact()

    @rule(search=searches)
    def search(self, search: dict[str, Any]) -> None:
        assert_same_answer(self.gallery, self.held, search)

    @rule(filters=filters, limit=st.integers(1, 7))
    def list(self, filters: Filters, limit: int) -> None:
        page = self.gallery.list(filters, limit=limit)
        found = [*page.records]
        while page.next_cursor:
            assert len(page.records) == limit
            page = self.gallery.list(filters, limit=limit, cursor=page.next_cursor)
            found += page.records
        assert found == [each.record for each in self.held.values() if passes(each.record, filters)]

    @invariant()
    def counts_and_content(self) -> None:
        known = {each.record.identity for each in self.held.values()} - {None}
        assert self.gallery.counts() == Counts(len(self.held), len(known))
        assert self.gallery.model == ("trsa-test" if self.held else None)
        for tracklet_id, each in self.held.items():
            assert self.gallery.get(tracklet_id) == each.record
            assert self.gallery.embedding(tracklet_id).tolist() == each.embedding.tolist()


class ApproximateMachine(GalleryMachine):
    """Where an answer may miss rows, what it has must be right."""

    @rule(search=searches)
    def search(self, search: dict[str, Any]) -> None:
        result = fast_search(self.gallery, **search)
        everything = {**search, "top_k": 1000, "max_distance": None, "group_by": "tracklet"}
        right, searched, nearest = slow_search(self.held, **everything)
        found = [(match.record.tracklet_id, match.distance) for match in result.matches]
        assert set(found) <= set(right)
        assert found == sorted(found, key=lambda match: (match[1], match[0]))
        assert len(found) <= search["top_k"]
        assert result.searched == searched
        if result.nearest is None:
            assert found == []
        else:
            assert nearest is not None
            assert result.nearest >= nearest
        for match in result.matches:
            assert match.record == self.held[match.record.tracklet_id].record
            assert search["max_distance"] is None or match.distance <= search["max_distance"]
        if search["group_by"] == "identity":
            named = [m.record.identity for m in result.matches if m.record.identity is not None]
            assert len(named) == len(set(named))

    @rule()
    def die(self) -> None:
        """Opened again without a chance to save."""
        self.gallery._derived = None
        self.reopen()


@pytest.mark.parametrize(
    "factory",
    ["HNSW8", "HNSW8,SQfp16", "IVF2,Flat", "IVF2,SQfp16", "IVF2,SQ8", "IVF2,RaBitQ", "IVF2,PQ3x2"],
)
def test_any_sequence_of_operations_leaves_approximate_answers_right(
    factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained with a handful of rows, and never measured one by one."""
    monkeypatch.setattr("index.factories._LEAST_TRAINING_ROWS", 6)
    monkeypatch.setattr("index.factories._POINTS_PER_CENTROID", 3)
    monkeypatch.setattr("index.derived._FEW_ROWS", 0)

    class Machine(ApproximateMachine):
        pass

    Machine.factory = factory
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=25, stateful_step_count=25, deadline=None)
    )


# Fewer than 1000 rows: whatever the index, the answer is exact.
@pytest.mark.parametrize(
    ("factory", "storage"),
    [
        ("Flat", "float32"),
        ("Flat", "float16"),
        ("HNSW8", "float32"),
        ("IVF2,Flat", "float16"),
        ("SQ8", "float32"),
    ],
)
def test_any_sequence_of_operations_equals_a_dict(factory: str, storage: Storage) -> None:
    class Machine(GalleryMachine):
        pass

    Machine.factory, Machine.storage = factory, storage
    examples = 200 if (factory, storage) == ("Flat", "float32") else 50
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=examples, stateful_step_count=25, deadline=None)
    )
