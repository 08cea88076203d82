"""Random operations on a gallery, and a dictionary that says what they leave and answer.

An operation is plain data: it can be drawn in one process, printed, and followed in another.
Vectors hold whole numbers: distances come out the same however they are summed.
"""

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np

from index.calibration import Calibration
from index.embedded import EmbeddedGallery
from index.gallery import (
    DuplicateIdentityError,
    DuplicateTrackletError,
    Embeddings,
    Enrolment,
    Erased,
    Filters,
    GalleryError,
    IdentitySummary,
    NotFoundError,
    TrackletRecord,
)

MODEL = "trsa-bench"
START = datetime(2026, 1, 1, tzinfo=UTC)
NEVER = START - timedelta(days=1)
NAMES = tuple(f"p{number}" for number in range(12))
CAMERAS = (None, "c1", "c2", "c3")
_UNKNOWN = "nobody"
_ENTRIES_CHECKED = 200
_GREATEST = 99  # of a vector's numbers, which float16 holds, too
_WEIGHTS: Mapping[str, float] = {
    "enrol": 8,
    "patch": 6,
    "remove": 5,
    "assign": 4,
    "merge": 1,
    "rename": 1,
    "remove_identity": 0.6,
    "expire": 1,
    "calibrate": 0.5,
    "query": 8,
    "restart": 0.1,
    "snapshot": 0.05,
    "restore": 0.03,
}
CALIBRATION = Calibration(
    threshold=1.0,
    rate="pair",
    false_match_rate=0.01,
    measured_false_match_rate=0.009,
    interval=(0.001, 0.02),
    false_non_match_rate=0.1,
    false_non_match_interval=(0.05, 0.2),
    false_positive_identification_rate=0.3,
    false_positive_identification_interval=(0.2, 0.4),
    false_negative_identification_rate=0.1,
    false_negative_identification_interval=(0.0, 0.2),
    genuine_pairs=30,
    impostor_pairs=900,
    tracklets=60,
    identities=30,
    gallery_identities=30,
    cameras=3,
    across_cameras=True,
    model=MODEL,
    created_at=START,
    confidence=0.95,
    seed=0,
)


class MismatchError(Exception):
    """Raised when a gallery is not, or does not answer, what the dictionary says."""


class Operation(NamedTuple):
    """Something to do.

    Args:
        kind: One of those that `Truth.apply` knows.
        at: When, in seconds since `START`; each operation has a time of its own.
        how: JSON.
    """

    kind: str
    at: int
    how: dict[str, Any]

    @property
    def now(self) -> datetime:
        """When, aware."""
        return START + timedelta(seconds=self.at)

    def to_line(self) -> str:
        """As text, for `from_line`."""
        return json.dumps(self)

    @classmethod
    def from_line(cls, line: str) -> "Operation":
        """Read what `to_line` wrote."""
        return cls(*json.loads(line))


@dataclass(frozen=True, slots=True)
class Shape:
    """What the tracklets of a run are like.

    Args:
        dimension: D.
        tracklets: About how many there are at a time.
        weights: How often each kind of operation is drawn, relative to the others, where it is not
            as often as usual.
    """

    dimension: int = 16
    tracklets: int = 150
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Truth:
    """What a gallery should hold, and what was erased from it when."""

    shape: Shape = field(default_factory=Shape)
    held: dict[str, Enrolment] = field(default_factory=dict)
    erased: dict[tuple[str, str], datetime] = field(default_factory=dict)
    threshold: float | None = None
    gone: deque[Embeddings] = field(default_factory=lambda: deque(maxlen=40))  # the last erased
    numbers: int = 0
    clock: int = 0
    saved: "Truth | None" = None

    def copy(self) -> "Truth":
        """One that changes on its own."""
        return replace(self, held=dict(self.held), erased=dict(self.erased), gone=self.gone.copy())

    # What to do next.

    def draw(self, rng: np.random.Generator) -> Operation:
        """Draw an operation; most of them do something."""
        weights = {**_WEIGHTS, **self.shape.weights}
        if len(self.held) > self.shape.tracklets:
            weights |= {"enrol": 0.0}
        elif len(self.held) < self.shape.tracklets // 2:
            weights |= {"remove": weights["remove"] / 4, "remove_identity": 0.0}
        if self.saved is None:
            weights["restore"] = 0.0
        share = np.array([*weights.values()]) / sum(weights.values())
        kind = str(rng.choice([*weights], p=share))
        how: dict[str, Any] = getattr(self, f"_draw_{kind}", lambda _: {})(rng)
        return Operation(kind, self.clock + 1, how)

    def _draw_enrol(self, rng: np.random.Generator) -> dict[str, Any]:
        count = int(rng.integers(1, 6))
        ids = [f"t{self.numbers + number}" for number in range(count)]
        if self.numbers and rng.random() < 0.1:  # one that is there, or was
            ids[0] = f"t{rng.integers(self.numbers)}"
        return {
            "first": self.numbers,
            "tracklets": [
                {
                    "id": each,
                    "identity": _one_of(rng, (*NAMES, None)),
                    "camera": _one_of(rng, CAMERAS),
                    "start": int(rng.integers(6)) if rng.random() < 0.8 else None,
                    "expires": int(rng.integers(100, 4000)) if rng.random() < 0.2 else None,
                    "strip": int(rng.integers(1, 6000)) if rng.random() < 0.5 else 0,
                }
                for each in ids
            ],
        }

    def _draw_patch(self, rng: np.random.Generator) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if rng.random() < 0.5:
            changes["identity"] = _one_of(rng, (*NAMES, None))
        if rng.random() < 0.5:
            changes["camera"] = _one_of(rng, CAMERAS)
        if rng.random() < 0.3:
            changes["metadata"] = {"note": "x" * int(rng.integers(3000))}
        return {"id": self._an_id(rng), "changes": changes}

    def _draw_remove(self, rng: np.random.Generator) -> dict[str, Any]:
        return {"id": self._an_id(rng)}

    def _draw_assign(self, rng: np.random.Generator) -> dict[str, Any]:
        ids = [self._an_id(rng, known=0.98) for _ in range(rng.integers(1, 7))]
        return {"ids": ids, "identity": _one_of(rng, (*NAMES, None))}

    def _draw_merge(self, rng: np.random.Generator) -> dict[str, Any]:
        return {"name": _one_of(rng, NAMES), "into": _one_of(rng, NAMES)}

    def _draw_rename(self, rng: np.random.Generator) -> dict[str, Any]:
        free = [name for name in NAMES if name not in self._shown()]
        to = free if free and rng.random() < 0.8 else NAMES
        return {"name": _one_of(rng, NAMES), "to": _one_of(rng, to)}

    def _draw_remove_identity(self, rng: np.random.Generator) -> dict[str, Any]:
        return {"name": _one_of(rng, NAMES)}

    def _draw_expire(self, rng: np.random.Generator) -> dict[str, Any]:
        keep = int(rng.integers(500, 8000)) if rng.random() < 0.3 else None
        return {"keep_s": keep}

    def _draw_calibrate(self, rng: np.random.Generator) -> dict[str, Any]:
        return {"threshold": float(rng.integers(1, 100)) if rng.random() < 0.8 else None}

    def _draw_query(self, rng: np.random.Generator) -> dict[str, Any]:
        known = self.held.get(self._an_id(rng))
        near = np.zeros(self.shape.dimension) if known is None else known.embedding
        moved = near + rng.integers(-3, 4, self.shape.dimension) * (rng.random() < 0.8)
        filters: dict[str, Any] = {}
        if rng.random() < 0.3:
            filters["identities"] = [_one_of(rng, NAMES) for _ in range(3)]
        if rng.random() < 0.1:
            filters["unnamed"] = True
        if rng.random() < 0.3:
            filters["cameras"] = [_one_of(rng, CAMERAS[1:]) for _ in range(2)]
        if rng.random() < 0.2:
            filters["exclude_cameras"] = [_one_of(rng, CAMERAS[1:])]
        if rng.random() < 0.2:
            filters["exclude_tracklets"] = [self._an_id(rng) for _ in range(3)]
        if rng.random() < 0.2:
            filters["since"] = int(rng.integers(6))
        if rng.random() < 0.2:
            filters["until"] = int(rng.integers(6))
        return {
            "vector": moved.tolist(),
            "top_k": int(rng.integers(1, 30)),
            "group_by": _one_of(rng, ("identity", "tracklet")),
            "filters": filters,
        }

    def _an_id(self, rng: np.random.Generator, known: float = 0.9) -> str:
        if self.held and rng.random() < known:
            return [*self.held][rng.integers(len(self.held))]
        return f"t{rng.integers(self.numbers)}" if self.numbers else _UNKNOWN

    # What it leaves and answers.

    def apply(self, operation: Operation) -> object:
        """Follow an operation; returns what it answers, or the kind of error that it raises."""
        self.clock = operation.at
        followed: Callable[[Operation], object] = getattr(self, f"_{operation.kind}")
        return followed(operation)

    def _enrol(self, operation: Operation) -> object:
        added = enrolments(operation, self.shape.dimension)
        self.numbers = max(self.numbers, operation.how["first"] + len(added))
        if any(each.record.tracklet_id in self.held for each in added):
            return DuplicateTrackletError
        self.held |= {each.record.tracklet_id: each for each in added}
        return None

    def _patch(self, operation: Operation) -> object:
        before = self.held.get(operation.how["id"])
        if before is None:
            return NotFoundError
        record = replace(before.record, **operation.how["changes"])
        self.held[record.tracklet_id] = replace(before, record=record)
        return record

    def _remove(self, operation: Operation) -> object:
        tracklet_id = operation.how["id"]
        if tracklet_id not in self.held:
            return NotFoundError
        record = self.held[tracklet_id].record
        self._erase([tracklet_id], operation.now)
        return record

    def _assign(self, operation: Operation) -> object:
        ids, identity = operation.how["ids"], operation.how["identity"]
        if not set(ids) <= self.held.keys():
            return NotFoundError
        return self._name(ids, identity)

    def _merge(self, operation: Operation) -> object:
        name, into = operation.how["name"], operation.how["into"]
        if name == into:
            return ValueError
        shown = self._shown()
        if not {name, into} <= shown.keys():
            return NotFoundError
        self._name(shown[name], into)
        return self.summary(into)

    def _rename(self, operation: Operation) -> object:
        name, to = operation.how["name"], operation.how["to"]
        shown = self._shown()
        if name not in shown:
            return NotFoundError
        if to in shown and to != name:
            return DuplicateIdentityError
        self._name(shown[name], to)
        return self.summary(to)

    def _remove_identity(self, operation: Operation) -> object:
        name = operation.how["name"]
        gone = self._shown().get(name)
        if gone is None:
            return NotFoundError
        self._erase(gone, operation.now)
        self._enter("identity", name, operation.now)
        return Erased(name, tuple(gone))

    def _expire(self, operation: Operation) -> object:
        keep_s, now = operation.how["keep_s"], operation.now
        oldest = NEVER if keep_s is None else now - timedelta(seconds=keep_s)
        due = [
            tracklet_id
            for tracklet_id, each in self.held.items()
            if each.record.created_at <= oldest
            or (each.record.expires_at is not None and each.record.expires_at <= now)
        ]
        self._erase(due, now)
        return set(due)

    def _calibrate(self, operation: Operation) -> object:
        self.threshold = operation.how["threshold"]
        return None

    def _query(self, operation: Operation) -> object:
        how = operation.how
        wanted = to_filters(how["filters"])
        seen = [each for each in self.held.values() if passes(each.record, wanted)]
        if not seen:
            return [], 0, None
        away = np.stack([each.embedding for each in seen]).astype(np.float64) - how["vector"]
        distances = np.sqrt(np.square(away).sum(axis=1)).astype(np.float32).tolist()
        ranked = sorted(zip(distances, (each.record.tracklet_id for each in seen), strict=True))
        by_identity = how["group_by"] == "identity"
        matches: dict[str, tuple[str, float]] = {}
        for distance, tracklet_id in ranked:
            identity = self.held[tracklet_id].record.identity if by_identity else None
            matches.setdefault(identity or f" {tracklet_id}", (tracklet_id, distance))
        return [*matches.values()][: how["top_k"]], len(seen), ranked[0][0]

    def _restart(self, _: Operation) -> object:
        return None

    def _snapshot(self, _: Operation) -> object:
        self.saved = replace(self.copy(), saved=None)
        return len(self.held), len(self._shown())

    def _restore(self, operation: Operation) -> object:
        """Back to what was saved, but for those who were erased since."""
        if self.saved is None:
            raise ValueError("expected a snapshot before a restore, got none")
        saved = self.saved
        new = {what: at for what, at in self.erased.items() if saved.erased.get(what, NEVER) < at}
        banned = [
            tracklet_id
            for tracklet_id, each in saved.held.items()
            for names in [(("tracklet", tracklet_id), ("identity", each.record.identity))]
            if any(new.get((kind, name or ""), NEVER) >= each.record.created_at
                   for kind, name in names)
        ]  # fmt: skip
        self.held, self.threshold = dict(saved.held), saved.threshold
        self.erased = saved.erased | self.erased
        self._erase(banned, operation.now)
        return len(banned)

    def summary(self, name: str) -> IdentitySummary:
        """What is known of an identity."""
        shown = self._shown()[name]
        seen = {self.held[tracklet_id].record.camera for tracklet_id in shown}
        return IdentitySummary(name, len(shown), tuple(sorted(filter(None, seen))))

    def identities(self) -> list[IdentitySummary]:
        """What is known of all of them."""
        return [self.summary(name) for name in sorted(self._shown())]

    def _shown(self) -> dict[str, list[str]]:
        """The tracklets of each identity, in the order of enrolment."""
        shown: dict[str, list[str]] = {}
        for tracklet_id, each in self.held.items():
            if each.record.identity is not None:
                shown.setdefault(each.record.identity, []).append(tracklet_id)
        return shown

    def _name(self, ids: Sequence[str], identity: str | None) -> int:
        changed = {each for each in ids if self.held[each].record.identity != identity}
        for each in changed:
            before = self.held[each]
            self.held[each] = replace(before, record=replace(before.record, identity=identity))
        return len(changed)

    def _erase(self, ids: Sequence[str], at: datetime) -> None:
        for each in ids:
            self.gone.append(self.held.pop(each).embedding)
            self._enter("tracklet", each, at)

    def _enter(self, kind: str, name: str, at: datetime) -> None:
        self.erased.pop((kind, name), None)  # so that the latest stand at the end
        self.erased[kind, name] = at


def enrolments(operation: Operation, dimension: int) -> list[Enrolment]:
    """The tracklets that an operation enrols: the same in every process."""
    return [
        _enrolment(operation, operation.how["first"] + number, each, dimension)
        for number, each in enumerate(operation.how["tracklets"])
    ]


def _enrolment(
    operation: Operation, number: int, each: Mapping[str, Any], dimension: int
) -> Enrolment:
    rng, expires = np.random.default_rng(number), each["expires"]
    record = TrackletRecord(
        tracklet_id=each["id"],
        identity=each["identity"],
        camera=each["camera"],
        start_time=_hour(each["start"]),
        metadata={"number": number},
        frames_received=40,
        frames_used=15,
        model=MODEL,
        created_at=operation.now,
        content=f"{number:064x}",
        expires_at=None if expires is None else operation.now + timedelta(seconds=expires),
    )
    vector = rng.integers(-_GREATEST, _GREATEST + 1, dimension).astype(np.float32)
    return Enrolment(record, vector, rng.bytes(each["strip"]) if each["strip"] else None)


def to_filters(how: Mapping[str, Any]) -> Filters:
    """The filters of a drawn query."""
    identities, cameras = how.get("identities"), how.get("cameras")
    return Filters(
        identities=None if identities is None else frozenset(identities),
        unnamed=how.get("unnamed", False),
        cameras=None if cameras is None else frozenset(cameras),
        exclude_cameras=frozenset(how.get("exclude_cameras", ())),
        since=_hour(how.get("since")),
        until=_hour(how.get("until")),
        exclude_tracklets=frozenset(how.get("exclude_tracklets", ())),
    )


def query_of(how: Mapping[str, Any]) -> Embeddings:
    """The vector of a drawn query, (D,) float32."""
    return np.array(how["vector"], dtype=np.float32)


def check_content(gallery: EmbeddedGallery, truth: Truth) -> None:
    """Return when a gallery holds what it should, and nothing else.

    Raises:
        MismatchError: It does not; says what.
    """
    records = _all_records(gallery)
    expected = {tracklet_id: each.record for tracklet_id, each in truth.held.items()}
    if list(records.items()) != list(expected.items()):
        lost, more = expected.keys() - records.keys(), records.keys() - expected.keys()
        other = sorted(one for one in expected if records.get(one, expected[one]) != expected[one])
        raise MismatchError(
            f"expected the records that were acknowledged, got {len(lost)} less ({_some(lost)}), "
            f"{len(more)} more ({_some(more)}), {len(other)} others ({_some(other)})"
        )
    for tracklet_id, each in truth.held.items():
        _same("embedding", gallery.embedding(tracklet_id).tolist(), each.embedding.tolist())
        _same("strip", _strip(gallery, tracklet_id), each.strip)
    identities = list(gallery.identities(limit=1000).items)
    _same("identities", identities, truth.identities())
    counts = gallery.counts()
    _same("counts", (counts.tracklets, counts.identities), (len(records), len(identities)))
    calibration = gallery.calibration()
    threshold = truth.threshold if truth.held else None
    _same("threshold", calibration and calibration.threshold, threshold)
    _check_ledger(gallery, truth)


def check_vectors(gallery: EmbeddedGallery, truth: Truth) -> None:
    """Return when FAISS has all vectors, at the place of their records, and no others.

    Raises:
        MismatchError: It has not; says what.
    """
    derived = gallery._derived
    if derived is None:
        _same("number of vectors", 0, len(truth.held))
        return
    vectors = derived.vectors
    if vectors.forgets:
        _same("number of vectors", vectors.rows, len(truth.held))
    else:
        _same("number of slots", vectors.rows, len(derived.columns.keys))
    for tracklet_id, each in truth.held.items():
        found = gallery.search(each.embedding, model=MODEL, top_k=1, group_by="tracklet")
        _same("number of tracklets searched", found.searched, len(truth.held))
        if [match.distance for match in found.matches] != [0.0]:
            raise MismatchError(f"expected to find {tracklet_id} at distance 0, got {found}")
        named = found.matches[0].record.tracklet_id
        if named != tracklet_id:
            _same("vector found", truth.held[named].embedding.tolist(), each.embedding.tolist())


def _check_ledger(gallery: EmbeddedGallery, truth: Truth) -> None:
    ledger = gallery.erasures()
    latest = [*truth.erased.items()][-_ENTRIES_CHECKED:]  # it only ever grows
    for (kind, name), at in latest:
        record = replace(_SOMEBODY, created_at=at)
        if kind == "tracklet":
            record = replace(record, tracklet_id=name)
        else:
            record = replace(record, identity=name)
        if not ledger.bans(record):
            raise MismatchError(
                f"expected the erasure of the {kind} {name} in the ledger, got none"
            )
        if ledger.bans(replace(record, created_at=at + timedelta(milliseconds=1))):
            raise MismatchError(
                f"expected the erasure of the {kind} {name} at {at}, got a later one"
            )


_SOMEBODY = TrackletRecord(
    tracklet_id=_UNKNOWN,
    frames_received=1,
    frames_used=1,
    model=MODEL,
    created_at=START,
    content="",
)


def _all_records(gallery: EmbeddedGallery) -> dict[str, TrackletRecord]:
    page = gallery.list(Filters(), limit=1000)
    records = [*page.records]
    while page.next_cursor:
        page = gallery.list(Filters(), limit=1000, cursor=page.next_cursor)
        records += page.records
    return {record.tracklet_id: record for record in records}


def _strip(gallery: EmbeddedGallery, tracklet_id: str) -> bytes | None:
    try:
        return gallery.strip(tracklet_id)
    except NotFoundError:
        return None


def passes(record: TrackletRecord, filters: Filters) -> bool:
    """Whether a record passes filters, one condition after the other."""
    start = record.start_time
    return (
        (filters.identities is None or record.identity in filters.identities)
        and not (filters.unnamed and record.identity is not None)
        and (filters.cameras is None or record.camera in filters.cameras)
        and record.camera not in filters.exclude_cameras
        and (filters.since is None or (start is not None and start >= filters.since))
        and (filters.until is None or (start is not None and start <= filters.until))
        and record.tracklet_id not in filters.exclude_tracklets
    )


def _same(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise MismatchError(f"{what}: expected {expected}, got {got}"[:2000])


def _some(ids: Any) -> str:
    return ", ".join(sorted(ids)[:5])


def _hour(number: int | None) -> datetime | None:
    return None if number is None else START + timedelta(hours=number)


def _one_of(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


Refused = (GalleryError, ValueError)
"""What a gallery raises to refuse an operation."""
