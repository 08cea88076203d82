"""Calibration: pairs, thresholds, rates and intervals against slow loops and known populations."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from index import bootstrap, pairs
from index.bootstrap import PairErrors, Plan, Rate, rate_of_identities, rate_of_pairs
from index.calibration import (
    Calibration,
    CalibrationError,
    calibrate,
    measure,
)
from index.calibration_source import read_labelled
from index.embedded import EmbeddedGallery
from index.gallery import DamagedGalleryError, GalleryUnavailableError, InvalidEmbeddingError
from index.schema import MIGRATIONS, version_of
from index.store import FILE_NAME
from tests.index.conftest import Enrol

QUICK = Plan(rounds=100)
NOON = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
GOOD = Calibration(
    threshold=0.75,
    rate="pair",
    false_match_rate=0.01,
    measured_false_match_rate=0.0099,
    interval=(0.005, 0.02),
    false_non_match_rate=0.1,
    false_non_match_interval=(0.05, 0.2),
    false_positive_identification_rate=0.3,
    false_positive_identification_interval=(0.2, 0.4),
    false_negative_identification_rate=0.15,
    false_negative_identification_interval=(0.1, 0.2),
    genuine_pairs=100,
    impostor_pairs=10_000,
    tracklets=200,
    identities=100,
    gallery_identities=100,
    cameras=2,
    across_cameras=True,
    model="trsa-test",
    created_at=NOON,
    confidence=0.95,
    seed=0,
)


class People(NamedTuple):
    """Embeddings of drawn people, with who they show and where."""

    embeddings: NDArray[np.float32]
    identities: list[str]
    cameras: list[str]


def draw(
    seed: int, identities: int = 40, cameras: int = 3, each: int = 1, spread: float = 0.6
) -> People:
    """Clusters of 16 dimensions, one a person; some people look more like everybody than others."""
    generator = np.random.default_rng(seed)
    people = generator.standard_normal((identities, 16))
    people *= 0.8 + 0.4 * generator.random((identities, 1))
    shifts = 0.2 * np.random.default_rng(99).standard_normal((cameras, 16))
    who, where, _ = np.indices((identities, cameras, each)).reshape(3, -1)
    noise = spread * generator.standard_normal((len(who), 16))
    embeddings = (people[who] + shifts[where] + noise + 5).astype(np.float32)
    return People(embeddings, [f"p{one}" for one in who], [f"c{one}" for one in where])


class Slowly(NamedTuple):
    """What a loop over all pairs finds."""

    genuine: list[float]
    impostor: list[float]
    nearest_impostor: list[float]
    nearest_mate: list[float]


def compare_slowly(people: People) -> Slowly:
    vectors = people.embeddings.astype(np.float64)
    found = Slowly([], [], [], [])
    for a in range(len(vectors)):
        near = {True: np.inf, False: np.inf}
        for b in range(len(vectors)):
            if people.cameras[a] != people.cameras[b]:
                same = people.identities[a] == people.identities[b]
                away = float(np.linalg.norm(vectors[a] - vectors[b]))
                near[same] = min(near[same], away)
                if a < b:
                    (found.genuine if same else found.impostor).append(away)
        found.nearest_mate.append(near[True])
        found.nearest_impostor.append(near[False])
    return found


def chosen(people: People, at: float = 0.02, **options: object) -> Calibration:
    asked: dict[str, object] = {"model": "trsa-test", "plan": QUICK, "created_at": NOON}
    calibration, _ = calibrate(*people, false_match_rate=at, **(asked | options))  # type: ignore[arg-type]
    return calibration


def test_the_threshold_lies_between_the_last_pair_that_the_rate_allows_and_the_next() -> None:
    people = draw(1)
    distances = sorted(compare_slowly(people).impostor)
    allowed = int(0.02 * len(distances))

    calibration = chosen(people)

    middle = (distances[allowed - 1] + distances[allowed]) / 2
    assert calibration.threshold == pytest.approx(middle, rel=1e-6)
    assert calibration.measured_false_match_rate == allowed / len(distances)
    assert calibration.impostor_pairs == len(distances)


def test_every_rate_is_that_of_a_loop_over_all_pairs() -> None:
    people = draw(2, each=2)
    slowly = compare_slowly(people)
    limit = chosen(people).threshold

    found = measure(*people, limit, plan=QUICK)

    mates, others = np.array(slowly.nearest_mate), np.array(slowly.nearest_impostor)
    assert found.genuine_pairs == len(slowly.genuine)
    assert found.false_match.value == pytest.approx(np.mean(np.array(slowly.impostor) <= limit))
    assert found.false_non_match.value == pytest.approx(np.mean(np.array(slowly.genuine) > limit))
    assert found.false_positive_identification.value == pytest.approx(np.mean(others <= limit))
    assert found.false_negative_identification.value == pytest.approx(
        1 - np.mean((mates <= limit) & (mates < others))
    )


def test_a_rate_of_queries_is_kept_by_the_nearest_strangers() -> None:
    people = draw(3)
    others = sorted(compare_slowly(people).nearest_impostor)

    calibration = chosen(people, 0.2, rate="query")

    assert others[23] < calibration.threshold < others[24]
    assert calibration.false_positive_identification_rate == 0.2
    assert calibration.measured_false_match_rate < 0.05


def test_blocks_of_any_size_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    people = draw(4)
    whole = chosen(people)

    monkeypatch.setattr(pairs, "_ROWS", 7)
    monkeypatch.setattr(pairs, "_COLUMNS", 11)

    in_parts = chosen(people)
    assert in_parts.threshold == pytest.approx(whole.threshold, rel=1e-6)
    assert replace(in_parts, threshold=whole.threshold) == whole


def test_the_order_of_tracklets_does_not_matter_to_threshold_and_rates() -> None:
    people = draw(5)
    order = np.random.default_rng(0).permutation(len(people.embeddings))
    shuffled = People(
        people.embeddings[order],
        [people.identities[one] for one in order],
        [people.cameras[one] for one in order],
    )

    one, other = chosen(people), chosen(shuffled)

    assert one.threshold == pytest.approx(other.threshold, rel=1e-6)
    assert one.measured_false_match_rate == other.measured_false_match_rate
    assert one.false_positive_identification_rate == other.false_positive_identification_rate


def test_tracklets_without_identity_or_camera_take_no_part() -> None:
    people = draw(6)
    nobody = np.full((2, 16), 5, np.float32)

    calibration = chosen(
        People(
            np.concatenate([people.embeddings, nobody]),
            [*people.identities, None, "p0"],  # type: ignore[list-item]
            [*people.cameras, "c0", None],  # type: ignore[list-item]
        )
    )

    assert calibration == chosen(people)


def test_without_cameras_all_pairs_are_compared() -> None:
    people = draw(7, cameras=2)
    unknown = People(people.embeddings, people.identities, [None] * 80)  # type: ignore[list-item]

    calibration = chosen(unknown, across_cameras=False)

    assert calibration.genuine_pairs == 40
    assert calibration.impostor_pairs == 80 * 79 // 2 - 40
    assert calibration.cameras == 0


def test_a_large_gallery_is_drawn_from_and_searched_as_a_whole() -> None:
    """Everybody has a twin, whom half of those drawn would not find among the drawn."""
    people = draw(8, identities=60)
    for number in range(0, 180, 6):
        people.embeddings[number + 3 : number + 6] = people.embeddings[number : number + 3] + 0.01

    calibration = chosen(people, 0.1, most_tracklets=90)

    assert calibration.tracklets == 90
    assert calibration.identities == 30
    assert calibration.gallery_identities == 60
    assert calibration.false_positive_identification_rate > 0.95
    assert calibration == chosen(people, 0.1, most_tracklets=90)


def test_curves_count_every_pair_and_pass_through_the_operating_point() -> None:
    people = draw(9)

    calibration, curves = calibrate(*people, model="m", false_match_rate=0.02, plan=QUICK)

    assert curves.genuine.sum() == calibration.genuine_pairs
    assert curves.impostor.sum() == calibration.impostor_pairs
    assert curves.nearest.sum() == calibration.tracklets
    at = [calibration.threshold]
    rates = np.interp(at, curves.thresholds, curves.false_match_rates)
    assert rates[0] == pytest.approx(calibration.measured_false_match_rate, abs=1e-3)
    assert (np.diff(curves.false_match_rates) >= 0).all()
    assert (np.diff(curves.false_non_match_rates) <= 0).all()


def test_a_rate_that_the_pairs_do_not_support_is_refused_with_one_that_they_do() -> None:
    people = draw(10)

    with pytest.raises(CalibrationError, match=r"4 of \d among 4680 impostor pairs") as refusal:
        chosen(people, 0.001)

    smallest = float(str(refusal.value).split("no rate below ")[1].split(":")[0])
    assert chosen(people, smallest).measured_false_match_rate <= smallest
    with pytest.raises(CalibrationError, match="no rate below"):
        chosen(people, 0.9 * smallest)


def test_false_matches_of_a_few_people_are_too_few_however_many_pairs_they_make() -> None:
    """Twins with many tracklets would set everybody's threshold."""
    people = draw(11, identities=20, cameras=2, each=10, spread=0.05)
    first = np.array(people.identities) == "p0"
    people.embeddings[np.array(people.identities) == "p1"] = people.embeddings[first] + 0.01

    with pytest.raises(CalibrationError, match="got 190 of 2 among 38000 impostor pairs"):
        chosen(people, 0.005)


@pytest.mark.parametrize(
    ("people", "options", "reason"),
    [
        (draw(1, identities=9), {}, "at least 10 identities with a camera, got 9"),
        (draw(1, cameras=1), {}, "pairs of tracklets across cameras, got one camera only"),
        (draw(1, cameras=1), {"across_cameras": False}, "0 pairs of 0: enrol more people twice"),
        (draw(1), {"rate": "person"}, "rate: expected one of"),
    ],
)
def test_what_cannot_be_calibrated_on_is_refused_with_the_reason(
    people: People, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CalibrationError, match=reason):
        chosen(people, **options)


@pytest.mark.parametrize("rate", [0, -0.1, 0.21, float("nan")])
def test_a_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(CalibrationError, match="expected a false-match rate in"):
        chosen(draw(1), rate)


def test_embeddings_that_are_all_the_same_are_refused() -> None:
    people = draw(1)
    people.embeddings[:] = 1

    with pytest.raises(CalibrationError, match="got 0 of 0 among 4680 impostor pairs"):
        chosen(people)


def test_embeddings_that_are_not_finite_are_refused() -> None:
    people = draw(1)
    people.embeddings[3, 3] = np.nan

    with pytest.raises(InvalidEmbeddingError, match="NaN or infinity"):
        chosen(people)


@pytest.mark.parametrize("across", [True, False])
def test_a_pair_of_people_counts_as_often_as_both_are_drawn(
    across: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate of each round against a loop over all pairs of people."""
    generator = np.random.default_rng(0)
    cameras = generator.integers(4, size=(12, 3))
    people = list(itertools.combinations(range(12), 2))
    compared = np.outer(cameras.sum(axis=1), cameras.sum(axis=1))
    compared -= cameras @ cameras.T if across else 0
    errors = np.array([generator.integers(compared[pair] + 1) for pair in people])
    first, second = np.array(people).T
    rounds: list[NDArray[np.float64]] = []
    narrow = bootstrap._interval

    def spy(*asked: Any) -> Rate:
        rounds.append(asked[1])
        return narrow(*asked)

    monkeypatch.setattr(bootstrap, "_interval", spy)
    rate = rate_of_pairs(PairErrors(first, second, errors), cameras, QUICK, across=across)

    weights = QUICK.weigh(12).astype(np.float64)
    both = weights[first] * weights[second]
    all_compared = np.array([compared[pair] for pair in people])
    assert weights.sum(axis=0).tolist() == [12] * 100
    assert rounds[0] == pytest.approx((errors @ both) / (all_compared @ both), rel=1e-5)
    assert rate.value == pytest.approx(errors.sum() / all_compared.sum())


def test_no_error_among_few_people_is_no_promise_of_none() -> None:
    """Clopper and Pearson's interval of 0 errors in 20 trials reaches to 16.84 %."""
    rate = rate_of_identities(np.zeros(20, np.int64), np.full(20, 6), Plan())

    assert rate == pytest.approx((0, 0, 0.1684), abs=1e-4)


def test_intervals_narrow_with_people_and_not_with_their_tracklets() -> None:
    def width(identities: int, each: int) -> float:
        low, high = chosen(draw(1, identities, 2, each), 0.05).interval
        return high - low

    assert width(160, 1) < 0.6 * width(40, 1)
    assert width(40, 4) > 0.6 * width(40, 1)


@pytest.mark.slow
def test_the_interval_holds_the_rate_among_other_people_19_times_of_20() -> None:
    """200 sets of 60 people against 3,000 others: the true rate is known to a few per cent."""
    others = draw(12_345, identities=3000, cameras=2)
    seen_by = np.array(others.cameras) == "c0"
    one, other = others.embeddings[seen_by], others.embeddings[~seen_by]
    away = np.concatenate(
        [np.linalg.norm(one - np.roll(other, shift, axis=0), axis=1) for shift in range(1, 400)]
    )
    away.sort()

    held = above = 0
    for seed in range(200):
        calibration = chosen(draw(seed, 60, 2), 0.01, plan=Plan(rounds=500, seed=seed))
        true = float(np.mean(away <= calibration.threshold))
        low, high = calibration.interval
        held += low <= true <= high
        above += true > high

    print(f"held {held} of 200, {above} above")  # noqa: T201 shown with pytest -s
    assert held >= 180
    assert above <= 12


def test_a_calibration_survives_json() -> None:
    assert Calibration.from_json(GOOD.to_json()) == GOOD


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("seed"),
        lambda found: found.update(pid=3),
        lambda found: found.update(version=2),
        lambda found: found.update(threshold=float("nan")),
        lambda found: found.update(threshold=float("inf")),
        lambda found: found.update(threshold="0.7"),
        lambda found: found.update(threshold=-1),
        lambda found: found.update(false_match_rate=1.5),
        lambda found: found.update(interval=[0.2, 0.1]),
        lambda found: found.update(interval=[0.2]),
        lambda found: found.update(identities=True),
        lambda found: found.update(identities=-1),
        lambda found: found.update(across_cameras=1),
        lambda found: found.update(rate="person"),
        lambda found: found.update(rate=["pair"]),
        lambda found: found.update(model=""),
        lambda found: found.update(created_at="2026-11-26T12:00:00"),
        lambda found: found.update(created_at="yesterday"),
    ],
)
def test_a_stored_calibration_that_is_not_whole_and_sound_is_refused(
    change: Callable[[dict[str, object]], object],
) -> None:
    found = json.loads(GOOD.to_json())
    change(found)

    with pytest.raises(CalibrationError):
        Calibration.from_json(json.dumps(found))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "{"])
def test_a_stored_calibration_that_is_something_else_is_refused(text: str) -> None:
    with pytest.raises(CalibrationError):
        Calibration.from_json(text)


def test_an_open_gallery_is_read_as_it_is_and_only_what_has_an_identity(
    gallery: EmbeddedGallery, directory: Path, enrol: Enrol
) -> None:
    gallery.add(
        [
            enrol("a", [1, 2], identity="p1", camera="c1"),
            enrol("b", [3, 4]),
            enrol("c", [5, 6], identity="p2"),
        ]
    )

    found = read_labelled(directory)

    assert found.embeddings.tolist() == [[1, 2], [5, 6]]
    assert found[1:] == (["p1", "p2"], ["c1", None], "trsa-test")


def test_an_empty_gallery_has_no_labelled_tracklets(
    gallery: EmbeddedGallery, directory: Path
) -> None:
    assert gallery.model is None

    found = read_labelled(directory)

    assert found.embeddings.shape == (0, 0)
    assert found[1:] == ([], [], None)


def test_where_there_is_no_gallery_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(GalleryUnavailableError, match="expected a gallery"):
        read_labelled(tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a gallery, and longer than a header is" * 9])
def test_a_file_of_something_else_is_refused_untouched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(content)

    with pytest.raises(DamagedGalleryError):
        read_labelled(tmp_path)

    assert path.read_bytes() == content


def test_a_gallery_of_a_newer_version_is_refused(
    directory: Path, enrol: Enrol, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedGallery(directory) as opened:
        opened.add([enrol("a", [1, 2], identity="p1")])

    older = partial(version_of, newest=len(MIGRATIONS) - 1)
    monkeypatch.setattr("index.reading.version_of", older)

    with pytest.raises(DamagedGalleryError, match="written by a newer Passerby"):
        read_labelled(directory)
