"""Choosing the threshold of a gallery from labelled tracklets, and measuring what it does.

Two rates of mistaking one person for another are told apart, in the words of ISO/IEC 19795-1:

- the false-match rate (FMR) is of comparisons: how many of all pairs of two people are near enough;
- the false-positive identification rate (FPIR) is of queries: how many strangers find anybody in
  the whole gallery. It grows with the gallery, and is what `no_match` is about.

Their counterparts are the false-non-match rate (FNMR), of pairs of one person, and the
false-negative identification rate (FNIR), of queries whose person is there.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from index.bootstrap import (
    PairErrors,
    Plan,
    Rate,
    rate_of_identities,
    rate_of_nearest,
    rate_of_pairs,
)
from index.gallery import Embeddings, GalleryError, InvalidEmbeddingError
from index.pairs import BINS, Codes, Impostors, Progress, Survey, Tracklets, collect, survey

Floats = NDArray[np.float64]
Per = Literal["pair", "query"]

FEWEST_ERRORS = 10  # under which a rate is a guess; the rule of thumb asks for 30, see the docs
FEWEST_IDENTITIES = 10
MOST_TRACKLETS = 10_000
GREATEST_RATE = 0.2
_MOST_COLLECTED = 20_000_000  # pairs, 240 MB
_MOST_OF_ONE = 200  # tracklets of an identity, where not all tracklets are compared
_FEWEST_BINS, _MOST_BINS = 16, 80  # drawn; few pairs in many bins make spikes
_POINTS = 400
_VERSION = 1


class CalibrationError(GalleryError):
    """Raised when labelled tracklets cannot support a threshold, or a stored one is not valid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A threshold, and what it is known to do. Rates are 0 to 1, intervals (low, high).

    Args:
        threshold: Greatest Euclidean distance that is a match.
        rate: What `false_match_rate` is a share of: comparisons of pairs, or queries of strangers.
        false_match_rate: The rate that was asked for.
        measured_false_match_rate: Pairs of different identities within the threshold.
        interval: Of the false-match rate among people who were not there, at this threshold.
        false_non_match_rate: Pairs of one identity beyond it.
        false_non_match_interval: Likewise.
        false_positive_identification_rate: Queries that find another identity within it, while
            their own is left out.
        false_positive_identification_interval: Likewise.
        false_negative_identification_rate: Queries of identities that are there which do not find
            them first, or not within it.
        false_negative_identification_interval: Likewise.
        genuine_pairs: Pairs of one identity that were compared.
        impostor_pairs: Pairs of different identities that were compared.
        tracklets: That were compared with one another.
        identities: Of these tracklets.
        gallery_identities: That the queries were searched among; more where ``identities`` were
            drawn by lot.
        cameras: In which these tracklets were; 0 where cameras did not matter.
        across_cameras: Whether only tracklets from different cameras were compared.
        model: Fingerprint of the model whose embeddings they are.
        created_at: Timezone-aware.
        confidence: Of the intervals.
        seed: Of all draws.
    """

    threshold: float
    rate: Per
    false_match_rate: float
    measured_false_match_rate: float
    interval: tuple[float, float]
    false_non_match_rate: float
    false_non_match_interval: tuple[float, float]
    false_positive_identification_rate: float
    false_positive_identification_interval: tuple[float, float]
    false_negative_identification_rate: float
    false_negative_identification_interval: tuple[float, float]
    genuine_pairs: int
    impostor_pairs: int
    tracklets: int
    identities: int
    gallery_identities: int
    cameras: int
    across_cameras: bool
    model: str
    created_at: datetime
    confidence: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object: times in RFC 3339, intervals as lists."""
        values = asdict(self) | {"created_at": self.created_at.astimezone(UTC).isoformat()}
        return {name: list(one) if isinstance(one, tuple) else one for name, one in values.items()}

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps({"version": _VERSION} | self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Calibration":
        """Read what `to_json` wrote.

        Raises:
            CalibrationError: It is anything else: a name is unknown or missing, or a value is not
                of its kind or out of its range.
        """
        try:
            found = json.loads(text)
        except ValueError as error:
            raise CalibrationError("expected a calibration in JSON, got something else") from error
        if not isinstance(found, dict):
            raise CalibrationError(f"expected a calibration's object, got {type(found).__name__}")
        if found.pop("version", None) != _VERSION:
            raise CalibrationError(f"expected a calibration of version {_VERSION}, got another")
        expected = {field.name for field in fields(cls)}
        if found.keys() != expected:
            raise CalibrationError(
                f"a calibration: unknown {sorted(found.keys() - expected)}, "
                f"missing {sorted(expected - found.keys())}"
            )
        return cls(**{name: _read(name, one) for name, one in found.items()})


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationCurves:
    """What a picture of a calibration shows.

    Args:
        edges: (n + 1,) rising distances.
        genuine: (n,) pairs of one identity.
        impostor: (n,) pairs of different identities.
        nearest: (n,) queries, by the distance of the nearest other identity.
        thresholds: (m,) rising distances.
        false_match_rates: (m,) at these thresholds, likewise the next three.
        false_non_match_rates: (m,).
        false_positive_identification_rates: (m,).
        false_negative_identification_rates: (m,).
    """

    edges: Floats
    genuine: NDArray[np.int64]
    impostor: NDArray[np.int64]
    nearest: NDArray[np.int64]
    thresholds: Floats
    false_match_rates: Floats
    false_non_match_rates: Floats
    false_positive_identification_rates: Floats
    false_negative_identification_rates: Floats


@dataclass(frozen=True, slots=True)
class Measured:
    """What a threshold does on labelled tracklets; see `Calibration` for the names.

    Args:
        false_match: Of pairs of different identities.
        false_non_match: Of pairs of one identity.
        false_positive_identification: Of queries whose identity is left out.
        false_negative_identification: Of queries whose identity is there.
        genuine_pairs: Compared.
        impostor_pairs: Compared.
    """

    false_match: Rate
    false_non_match: Rate
    false_positive_identification: Rate
    false_negative_identification: Rate
    genuine_pairs: int
    impostor_pairs: int


class _Labelled(NamedTuple):
    """Tracklets in numbers, and how many there are of what."""

    tracklets: Tracklets
    identities: int
    gallery_identities: int
    cameras: int
    across: bool


class _Choice(NamedTuple):
    """A threshold, and how many errors of how many identities lie below it."""

    threshold: float
    errors: int
    identities: int


def calibrate(
    embeddings: Embeddings,
    identities: Sequence[str | None],
    cameras: Sequence[str | None],
    *,
    model: str,
    false_match_rate: float,
    rate: Per = "pair",
    across_cameras: bool = True,
    plan: Plan | None = None,
    most_tracklets: int = MOST_TRACKLETS,
    created_at: datetime | None = None,
    progress: Progress = lambda _done, _all: None,
) -> tuple[Calibration, CalibrationCurves]:
    """Choose the threshold for a rate of false matches.

    It lies midway between the last distance that the rate allows and the next one.

    Args:
        embeddings: (N, D) float32, finite.
        identities: N identities; tracklets without one take no part.
        cameras: N cameras; tracklets without one take no part, unless cameras do not matter.
        model: Fingerprint of the model that made the embeddings.
        false_match_rate: Greater than 0, at most 0.2.
        rate: Of what: of pairs of different identities, or of queries whose identity is not in
            the gallery.
        across_cameras: Compare tracklets from different cameras only, as a search across cameras
            does. Two tracklets from one camera share its light and view and are nearer.
        plan: How intervals are drawn.
        most_tracklets: Compared with one another at most; where there are more, identities are
            drawn by lot, at most 200 tracklets of each. The nearest stranger is looked for among
            all.
        created_at: Now where None.
        progress: Gets the tracklets done and all there are.

    Returns:
        The calibration, and curves to draw.

    Raises:
        InvalidEmbeddingError: The embeddings are not (N, D), or not finite.
        CalibrationError: There are too few pairs for the rate, or none, or the rate is out of
            range.
    """
    plan = plan or Plan()
    if not 0 < false_match_rate <= GREATEST_RATE:
        raise CalibrationError(
            f"expected a false-match rate in (0, {GREATEST_RATE}], got {false_match_rate}"
        )
    if rate not in get_args(Per):
        raise CalibrationError(f"rate: expected one of {get_args(Per)}, got {rate!r}")
    labelled = _arrange(embeddings, identities, cameras, across_cameras, plan, most_tracklets)
    found = survey(labelled.tracklets, progress)
    _check_pairs(found, labelled)
    choose = _choose_by_pairs if rate == "pair" else _choose_by_queries
    choice = choose(labelled, found, false_match_rate)
    measured = _measure(labelled, found, choice.threshold, plan)
    calibration = Calibration(
        threshold=choice.threshold,
        rate=rate,
        false_match_rate=float(false_match_rate),
        measured_false_match_rate=measured.false_match.value,
        interval=measured.false_match[1:],
        false_non_match_rate=measured.false_non_match.value,
        false_non_match_interval=measured.false_non_match[1:],
        false_positive_identification_rate=measured.false_positive_identification.value,
        false_positive_identification_interval=measured.false_positive_identification[1:],
        false_negative_identification_rate=measured.false_negative_identification.value,
        false_negative_identification_interval=measured.false_negative_identification[1:],
        genuine_pairs=measured.genuine_pairs,
        impostor_pairs=measured.impostor_pairs,
        tracklets=labelled.tracklets.drawn,
        identities=labelled.identities,
        gallery_identities=labelled.gallery_identities,
        cameras=labelled.cameras,
        across_cameras=across_cameras,
        model=model,
        created_at=created_at or datetime.now(UTC),
        confidence=plan.confidence,
        seed=plan.seed,
    )
    return calibration, _draw_curves(found)


def measure(
    embeddings: Embeddings,
    identities: Sequence[str | None],
    cameras: Sequence[str | None],
    threshold: float,
    *,
    across_cameras: bool = True,
    plan: Plan | None = None,
    most_tracklets: int = MOST_TRACKLETS,
    progress: Progress = lambda _done, _all: None,
) -> Measured:
    """Measure what a threshold does, on other people than those it was chosen on.

    Args:
        embeddings: See `calibrate`, likewise the others.
        identities: N identities.
        cameras: N cameras.
        threshold: Greatest Euclidean distance that is a match.
        across_cameras: See `calibrate`.
        plan: See `calibrate`.
        most_tracklets: See `calibrate`.
        progress: See `calibrate`.

    Raises:
        InvalidEmbeddingError: The embeddings are not (N, D), or not finite.
        CalibrationError: There are no pairs to compare, or twenty million are within the threshold.
    """
    plan = plan or Plan()
    labelled = _arrange(embeddings, identities, cameras, across_cameras, plan, most_tracklets)
    found = survey(labelled.tracklets, progress)
    _check_pairs(found, labelled)
    return _measure(labelled, found, threshold, plan)


def _arrange(
    embeddings: Embeddings,
    identities: Sequence[str | None],
    cameras: Sequence[str | None],
    across: bool,
    plan: Plan,
    most_tracklets: int,
) -> _Labelled:
    """Number what takes part, the tracklets that are compared with one another first."""
    rows = len(identities)
    if embeddings.ndim != 2 or len(embeddings) != rows or len(cameras) != rows:
        raise InvalidEmbeddingError(
            f"expected ({rows}, D) embeddings and as many cameras, "
            f"got {embeddings.shape} and {len(cameras)}"
        )
    if not np.isfinite(embeddings).all():
        raise InvalidEmbeddingError("embeddings hold NaN or infinity")
    taking = np.array(
        [
            row
            for row, (identity, camera) in enumerate(zip(identities, cameras, strict=True))
            if identity is not None and (camera is not None or not across)
        ],
        dtype=np.int64,
    )
    whose, people = _number([identities[row] for row in taking])
    where, places = _number([cameras[row] for row in taking])
    if people < FEWEST_IDENTITIES:
        raise CalibrationError(
            f"expected tracklets of at least {FEWEST_IDENTITIES} identities"
            f"{' with a camera' if across else ''}, got {people}"
        )
    if across and places < 2:
        raise CalibrationError(
            "expected pairs of tracklets across cameras, got one camera only: a threshold from one "
            "camera is too strict for another; ask for pairs within it if there is no other"
        )
    if not across:
        where = np.arange(len(taking), dtype=np.int32)  # none is compared with itself only
    chosen = _draw(whose, plan.seed, most_tracklets)
    order = np.concatenate([chosen, np.setdiff1d(np.arange(len(taking)), chosen)])
    vectors = embeddings[taking[order]].astype(np.float32)
    vectors -= vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    tracklets = Tracklets(vectors, whose[order], where[order], len(chosen))
    compared = whose[chosen]
    in_cameras = len(np.unique(where[chosen])) if across else 0
    return _Labelled(tracklets, len(np.unique(compared)), people, in_cameras, across)


def _number(names: Sequence[str | None]) -> tuple[Codes, int]:
    numbers: dict[str | None, int] = {}
    codes = [numbers.setdefault(name, len(numbers)) for name in names]
    return np.array(codes, dtype=np.int32), len(numbers)


def _draw(whose: Codes, seed: int, most: int) -> NDArray[np.int64]:
    """Places of the tracklets to compare: all, or those of identities drawn by lot."""
    if len(whose) <= most:
        return np.arange(len(whose))
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(whose))
    by_identity = shuffled[whose[shuffled].argsort(kind="stable")]
    groups = np.split(by_identity, np.cumsum(np.bincount(whose))[:-1])
    chosen: list[NDArray[np.int64]] = []
    total = 0
    for number in generator.permutation(len(groups)):
        group = groups[number][:_MOST_OF_ONE]
        if total + len(group) > most and len(chosen) >= FEWEST_IDENTITIES:
            break
        chosen.append(group)
        total += len(group)
    return np.sort(np.concatenate(chosen))


def _check_pairs(found: Survey, labelled: _Labelled) -> None:
    between, how = (" across cameras", "in two cameras") if labelled.across else ("", "twice")
    people = len(np.unique(found.genuine_identities))
    if people < FEWEST_IDENTITIES:
        raise CalibrationError(
            f"expected genuine pairs{between} of at least {FEWEST_IDENTITIES} identities, got "
            f"{len(found.genuine)} pairs of {people}: enrol more people {how}"
        )
    if not found.impostors.any():
        raise CalibrationError(f"expected pairs of different identities{between}, got none")


def _choose_by_pairs(labelled: _Labelled, found: Survey, rate: float) -> _Choice:
    total = int(found.impostors.sum())
    allowed = _allowed(rate, total)
    choice = _choose_among(_nearest_pairs(labelled, found, allowed), allowed)
    if choice.errors < FEWEST_ERRORS or choice.identities < FEWEST_IDENTITIES:
        needed: int | None = None
        tried = FEWEST_ERRORS
        while needed is None and tried <= GREATEST_RATE * total:
            needed = _needed(_nearest_pairs(labelled, found, tried))
            tried *= 2
        raise _unsupported(rate, choice, needed, total, "impostor pairs")
    return choice


def _choose_by_queries(labelled: _Labelled, found: Survey, rate: float) -> _Choice:
    asking = np.nonzero(np.isfinite(found.nearest_impostor))[0]
    order = asking[found.nearest_impostor[asking].argsort(kind="stable")]
    ends = labelled.tracklets.identities[order], found.nearest_identities[order]
    nearest = Impostors(found.nearest_impostor[order], np.minimum(*ends), np.maximum(*ends))
    choice = _choose_among(nearest, _allowed(rate, len(order)))
    if choice.errors < FEWEST_ERRORS or choice.identities < FEWEST_IDENTITIES:
        raise _unsupported(rate, choice, _needed(nearest), len(order), "queries")
    return choice


def _allowed(rate: float, total: int) -> int:
    return math.floor(rate * total + 1e-9)  # 0.07 * 100 is 7.000000000000001, 0.29 * 100 less


def _nearest_pairs(labelled: _Labelled, found: Survey, count: int) -> Impostors:
    """The ``count`` nearest impostor pairs, the next one, and others in its bin."""
    up_to = int(np.searchsorted(found.impostors.cumsum(), count + 1))
    return _collect(labelled, found, min(up_to, BINS - 1))


def _collect(labelled: _Labelled, found: Survey, up_to: int) -> Impostors:
    within = int(found.impostors[: up_to + 1].sum())
    if within > _MOST_COLLECTED:
        raise CalibrationError(
            f"expected embeddings that tell people apart, got {within} of "
            f"{found.impostors.sum()} impostor pairs at a distance of {_edge(found, up_to):.3g} "
            "or less"
        )
    return collect(labelled.tracklets, found.reach, up_to)


def _edge(found: Survey, number: int) -> float:
    return (number + 1) * found.reach / BINS


def _choose_among(nearest: Impostors, allowed: int) -> _Choice:
    """The threshold that lets no more than ``allowed`` of them pass; fewer where some tie."""
    beyond = nearest.distances[allowed]
    errors = int(np.searchsorted(nearest.distances, beyond, side="left"))
    last = nearest.distances[errors - 1] if errors else np.float32(0)
    ends = np.concatenate([nearest.first[:errors], nearest.second[:errors]])
    return _Choice((float(last) + float(beyond)) / 2, errors, len(np.unique(ends)))


def _needed(nearest: Impostors) -> int | None:
    """How many of the nearest pairs it takes to have enough errors of enough identities."""
    ends = np.stack([nearest.first, nearest.second], axis=1).ravel()
    _, begins = np.unique(ends, return_index=True)
    if len(begins) < FEWEST_IDENTITIES:
        return None
    pairs = int(np.sort(begins)[FEWEST_IDENTITIES - 1]) // 2 + 1
    return max(pairs, FEWEST_ERRORS)


def _unsupported(
    rate: float, choice: _Choice, needed: int | None, total: int, what: str
) -> CalibrationError:
    if needed is None or needed > GREATEST_RATE * total:
        support = f"which support no rate up to {GREATEST_RATE:g}"
    else:
        digits = 1 - math.floor(math.log10(needed / total))
        smallest = math.ceil(needed / total * 10**digits) / 10**digits
        support = f"which support no rate below {smallest:g}"
    return CalibrationError(
        f"expected at least {FEWEST_ERRORS} false matches of {FEWEST_IDENTITIES} identities at a "
        f"rate of {rate:g}, got {choice.errors} of {choice.identities} among {total} {what}, "
        f"{support}: enrol more people, or ask for a greater rate"
    )


def _measure(labelled: _Labelled, found: Survey, threshold: float, plan: Plan) -> Measured:
    asked = labelled.tracklets.identities[: labelled.tracklets.drawn]
    people = np.unique(asked)

    def rate_of(whose: Codes, errors: NDArray[np.bool_]) -> Rate:
        numbers = np.searchsorted(people, whose)
        of_each = np.bincount(numbers[errors], minlength=len(people))
        return rate_of_identities(of_each, np.bincount(numbers, minlength=len(people)), plan)

    asking = np.isfinite(found.nearest_impostor)
    hits = PairErrors(
        asked[asking].astype(np.int64),
        found.nearest_identities[asking].astype(np.int64),
        (found.nearest_impostor[asking] <= threshold).astype(np.int64),
    )
    with_mate = np.isfinite(found.nearest_mate)
    lost = (found.nearest_mate > threshold) | (found.nearest_mate >= found.nearest_impostor)
    near = _pair_errors(labelled, found, threshold, people)
    return Measured(
        rate_of_pairs(near, _in_cameras(labelled), plan, across=labelled.across),
        rate_of(found.genuine_identities, found.genuine > threshold),
        rate_of_nearest(hits, plan),
        rate_of(asked[with_mate], lost[with_mate]),
        len(found.genuine),
        int(found.impostors.sum()),
    )


def _in_cameras(labelled: _Labelled) -> NDArray[np.int64]:
    """Tracklets of each compared identity in each camera, (I, C); C is 1 where none matters."""
    drawn, tracklets = labelled.tracklets.drawn, labelled.tracklets
    _, who = np.unique(tracklets.identities[:drawn], return_inverse=True)
    where = np.zeros(drawn, np.int64)
    if labelled.across:
        _, where = np.unique(tracklets.cameras[:drawn], return_inverse=True)
    counts = np.zeros((who.max() + 1, where.max() + 1), np.int64)
    np.add.at(counts, (who, where), 1)
    return counts


def _pair_errors(labelled: _Labelled, found: Survey, threshold: float, people: Codes) -> PairErrors:
    """Impostor pairs within the threshold, counted for each pair of identities."""
    up_to = min(max(int(threshold * BINS / found.reach) + 1, 0), BINS - 1)
    near = _collect(labelled, found, up_to)
    within = int(np.searchsorted(near.distances, threshold, side="right"))
    first = np.searchsorted(people, near.first[:within]).astype(np.int64)
    second = np.searchsorted(people, near.second[:within])
    pairs, errors = np.unique(first * len(people) + second, return_counts=True)
    return PairErrors(pairs // len(people), pairs % len(people), errors)


def _draw_curves(found: Survey) -> CalibrationCurves:
    asking = np.isfinite(found.nearest_impostor)
    strangers = np.sort(found.nearest_impostor[asking])
    genuine = np.sort(found.genuine)
    edges = _occupied(found, genuine)
    fine = np.linspace(0, found.reach, BINS + 1)
    within = np.concatenate([[0], found.impostors.cumsum()])  # impostors below each fine edge
    at = np.searchsorted(fine, edges)
    points = _points(found, genuine)
    thresholds = fine[points]
    with_mate = np.isfinite(found.nearest_mate)
    right = np.sort(found.nearest_mate[with_mate & (found.nearest_mate < found.nearest_impostor)])
    return CalibrationCurves(
        edges=edges,
        genuine=np.histogram(genuine, edges)[0],
        impostor=np.diff(within[at]),
        nearest=np.histogram(strangers, edges)[0],
        thresholds=thresholds,
        false_match_rates=within[points] / within[-1],
        false_non_match_rates=1 - np.searchsorted(genuine, thresholds) / len(genuine),
        false_positive_identification_rates=np.searchsorted(strangers, thresholds) / len(strangers),
        false_negative_identification_rates=1
        - np.searchsorted(right, thresholds) / with_mate.sum(),
    )


def _occupied(found: Survey, genuine: NDArray[np.float32]) -> Floats:
    """At most 80 bins over the distances that there are; their edges are edges of fine bins."""
    bins = min(max(2 * math.isqrt(len(genuine)), _FEWEST_BINS), _MOST_BINS)
    occupied = np.nonzero(found.impostors)[0]
    to_bin = BINS / found.reach
    low = min(int(occupied[0]), int(genuine[0] * to_bin))
    high = max(int(occupied[-1]), int(genuine[-1] * to_bin)) + 1
    wide = max(-(-(high - low) // bins), 1)
    numbers = np.arange(low, low + wide * -(-(high - low) // wide) + 1, wide)
    return np.linspace(0, found.reach, BINS + 1)[np.minimum(numbers, BINS)]


def _points(found: Survey, genuine: NDArray[np.float32]) -> NDArray[np.int64]:
    """Fine edges that show both tails: steps of the FMR's logarithm, and of the FNMR."""
    below = found.impostors.cumsum()
    steps = np.geomspace(1, below[-1], _POINTS // 2)
    ranks = np.linspace(0, len(genuine) - 1, _POINTS // 2).astype(np.int64)
    edges = np.ceil(genuine[ranks] * (BINS / found.reach)).astype(np.int64)
    found_at = np.concatenate([np.searchsorted(below, steps) + 1, edges])
    return np.unique(np.minimum(found_at, BINS))


def _read(name: str, value: Any) -> Any:
    """A value of a stored calibration.

    Raises:
        CalibrationError: It is not of its kind, or out of its range.
    """
    [kind] = [field.type for field in fields(Calibration) if field.name == name]
    most = math.inf if name == "threshold" else 1.0
    is_interval = kind == tuple[float, float] and isinstance(value, list) and len(value) == 2
    if kind is float and _is_within(value, most):
        return float(value)
    if is_interval and all(_is_within(end, most) for end in value) and value[0] <= value[1]:
        return float(value[0]), float(value[1])
    if kind is int and type(value) is int and value >= 0:
        return value
    if (kind is bool or kind is str) and type(value) is kind and value != "":
        return value
    if kind == Per and value in get_args(Per):
        return value
    if kind is datetime and (time := _to_time(value)) is not None:
        return time
    raise CalibrationError(f"a calibration's {name}: got a value that is not allowed, {value!r}")


def _is_within(value: object, most: float) -> bool:
    return type(value) in (int, float) and 0 <= value <= most and value < math.inf  # type: ignore[operator]


def _to_time(value: object) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        return None
    return None if time.tzinfo is None else time
