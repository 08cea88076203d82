"""Whether a calibration's promise is kept: on drawn people, whose truth is known, and on real ones.

python -m bench.calibration drawn
python -m bench.calibration real --data WARD
python -m bench.calibration large --tracklets 100000
"""

import argparse
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from index.bootstrap import Plan
from index.calibration import Calibration, CalibrationError, Per, calibrate, measure
from model.checkpoint import find_checkpoint, load_checkpoint
from model.datasets.layouts import survey_dataset
from model.datasets.tracklets import Tracklet
from model.embedder import Embedder
from model.frames import read_clip
from service.calibration import report

Floats = NDArray[np.float32]
KINDS = ("alike", "some like everybody", "groups of lookalikes")
# Identities, cameras, tracklets of each in each camera, rate, of what.
CASES: tuple[tuple[int, int, int, float, Per], ...] = (
    (20, 3, 1, 0.05, "pair"),
    (60, 2, 1, 0.01, "pair"),
    (100, 3, 3, 0.01, "pair"),
    (300, 2, 1, 0.001, "pair"),
    (60, 2, 1, 0.15, "query"),
    (300, 2, 1, 0.05, "query"),
    (100, 3, 3, 0.1, "query"),
)
_DIMENSIONS, _OTHERS = 32, 3000


class People(NamedTuple):
    """Labelled embeddings."""

    embeddings: Floats
    identities: NDArray[Any]
    cameras: NDArray[Any]

    def part(self, chosen: NDArray[np.bool_]) -> "People":
        """Some of them."""
        return People(self.embeddings[chosen], self.identities[chosen], self.cameras[chosen])


def draw(seed: int, kind: str, identities: int, cameras: int, each: int) -> People:
    """Clusters, one a person, moved a little by each camera."""
    generator = np.random.default_rng(seed)
    people = generator.standard_normal((identities, _DIMENSIONS))
    if kind == "some like everybody":
        people *= 0.5 + generator.random((identities, 1))
    if kind == "groups of lookalikes":
        looks = np.random.default_rng(77).standard_normal((40, _DIMENSIONS))
        people = 0.7 * people + 0.75 * looks[generator.integers(40, size=identities)]
    shifts = 0.2 * np.random.default_rng(99).standard_normal((cameras, _DIMENSIONS))
    where, _, who = np.indices((cameras, each, identities)).reshape(3, -1)
    noise = 0.6 * generator.standard_normal((len(who), _DIMENSIONS))
    return People((people[who] + shifts[where] + noise).astype(np.float32), who, where)


def true_pairs(kind: str, cameras: int) -> Floats:
    """Sorted distances of a million and more pairs of 3,000 other people."""
    others = draw(12_345, kind, _OTHERS, cameras, 1)
    first, second = np.random.default_rng(5).integers(len(others.embeddings), size=(2, 1_500_000))
    compared = others.identities[first] != others.identities[second]
    compared &= others.cameras[first] != others.cameras[second]
    parts = np.array_split(np.nonzero(compared)[0], 16)
    vectors = others.embeddings
    found = [np.linalg.norm(vectors[first[p]] - vectors[second[p]], axis=1) for p in parts]
    return np.sort(np.concatenate(found))


def true_nearest(kind: str, identities: int, cameras: int, each: int) -> Floats:
    """Sorted distances of strangers to the nearest of a gallery, over thirty galleries."""
    found = []
    for seed in range(30):
        gallery = draw(70_000 + seed, kind, identities - 1, cameras, each)
        strangers = draw(80_000 + seed, kind, 200, cameras, 1)
        away = np.square(strangers.embeddings).sum(axis=1)[:, None]
        away = away + np.square(gallery.embeddings).sum(axis=1)
        away -= 2 * strangers.embeddings @ gallery.embeddings.T
        away[strangers.cameras[:, None] == gallery.cameras] = np.inf
        found.append(np.sqrt(np.maximum(away.min(axis=1), 0)))
    return np.sort(np.concatenate(found))


def run_drawn(sets: int, console: Console) -> None:
    """How often an interval holds the truth."""
    for kind in KINDS:
        for identities, cameras, each, rate, per in CASES:
            pairs = true_pairs(kind, cameras)
            nearest = true_nearest(kind, identities, cameras, each)
            held, above, true = np.zeros(2), np.zeros(2), []
            for seed in range(1000, 1000 + sets):
                people = draw(seed, kind, identities, cameras, each)
                found = attempt(people, rate, rate_of=per, plan=Plan(rounds=500, seed=seed))
                if isinstance(found, CalibrationError):
                    continue
                truth = [np.mean(one <= found.threshold) for one in (pairs, nearest)]
                intervals = (found.interval, found.false_positive_identification_interval)
                held += [
                    low <= one <= high for one, (low, high) in zip(truth, intervals, strict=True)
                ]
                above += [one > high for one, (_, high) in zip(truth, intervals, strict=True)]
                true.append(truth)
            shares = " ".join(f"{one:.3f}" for one in (*held / len(true), *above / len(true)))
            console.print(
                f"{kind}: {identities} people, {cameras} cameras, {each} each, {rate} of a {per}: "
                f"{len(true)} sets; FMR and FPIR held, and above: {shares}; "
                f"mean truth {np.mean(true, axis=0).round(5)}"
            )


def attempt(
    people: People, rate: float, *, rate_of: Per, plan: Plan | None = None
) -> Calibration | CalibrationError:
    """A calibration, or why there is none."""
    try:
        return calibrate(
            *as_lists(people),
            model="bench",
            false_match_rate=rate,
            rate=rate_of,
            plan=plan,
        )[0]
    except CalibrationError as error:
        return error


def as_lists(people: People) -> tuple[Floats, list[str], list[str]]:
    """What `calibrate` takes."""
    return (
        people.embeddings,
        [str(one) for one in people.identities],
        [str(one) for one in people.cameras],
    )


def run_real(
    data: Path, halvings: int, rates: Sequence[tuple[float, Per]], console: Console
) -> None:
    """What real people get, and whether half of them speak for the other half."""
    checkpoint = load_checkpoint(find_checkpoint("bundled"))
    taught = set(taught_names(checkpoint.provenance))
    embedder = Embedder(checkpoint, device="cpu")
    survey, _ = survey_dataset(data)
    people = embed(survey.tracklets, embedder)
    known = np.isin(people.identities, sorted(taught))
    console.print(
        f"{len(np.unique(people.identities))} people, {known.sum()} tracklets of taught ones"
    )
    for name, part in (("all", people), ("unseen", people.part(~known))):
        try:
            labelled = as_lists(part)
            found = calibrate(*labelled, model=embedder.model, false_match_rate=0.01)
        except CalibrationError as error:
            console.print(f"{name}: {error}")
            continue
        console.print(name)
        report(*found, console)
    for rate, per in rates:
        console.print(f"{rate} of a {per}: {halve(people, rate, per, halvings)} (all)")
        console.print(
            f"{rate} of a {per}: {halve(people.part(~known), rate, per, halvings)} (unseen)"
        )
    for name, chosen in (("taught", known), ("unseen", ~known)):
        found_or_not = attempt(people.part(chosen), 0.03, rate_of="pair")
        if isinstance(found_or_not, CalibrationError):
            console.print(f"calibrated on the {name}: {found_or_not}")
            continue
        others = measure(*as_lists(people.part(~chosen)), found_or_not.threshold)
        console.print(
            f"calibrated on the {name} for 3 %, {found_or_not.interval}; "
            f"others {others.false_match}"
        )


def halve(people: People, rate: float, per: Per, halvings: int) -> str:
    """Calibrate on random halves of the people, measure on the others."""
    names = np.unique(people.identities)
    kept = inside = 0
    refused = ""
    measured = []
    for seed in range(halvings):
        drawn = np.random.default_rng(seed).permutation(names)[: len(names) // 2]
        half = np.isin(people.identities, drawn)
        found = attempt(people.part(half), rate, rate_of=per)
        if isinstance(found, CalibrationError):
            refused = str(found)
            continue
        others = measure(*as_lists(people.part(~half)), found.threshold)
        by_pairs = per == "pair"
        other = others.false_match if by_pairs else others.false_positive_identification
        low, high = found.interval if by_pairs else found.false_positive_identification_interval
        kept += other.low <= rate <= other.high
        inside += low <= other.value <= high
        measured.append(other.value)
    if not measured:
        return f"all refused: {refused}"
    return (
        f"{len(measured)} of {halvings} halves; promise within the others' interval {kept}, "
        f"others' rate within the promised one {inside}, mean of the others {np.mean(measured):.4f}"
    )


def embed(tracklets: Sequence[Tracklet], embedder: Embedder) -> People:
    """Embed with 15 frames a tracklet."""
    made: list[Floats] = []
    for begin in range(0, len(tracklets), 8):
        some = tracklets[begin : begin + 8]
        clips = [read_clip(one.frames, embedder.preprocessing) for one in some]
        made += [one.embedding for one in embedder.embed(clips)]
    return People(
        np.stack(made),
        np.array([one.identity for one in tracklets]),
        np.array([one.camera for one in tracklets]),
    )


def taught_names(provenance: object) -> Iterator[str]:
    """Everybody whom a checkpoint, or what it started from, was taught with."""
    if isinstance(provenance, Mapping):
        for name, one in provenance.items():
            if name == "train_identities":  # in a mix of sets with the name of each in front
                yield from (who.rpartition("/")[2] for who in one)
            else:
                yield from taught_names(one)
    elif isinstance(provenance, list):
        for one in provenance:
            yield from taught_names(one)


def run_large(tracklets: int, console: Console) -> None:
    """How long a large gallery takes, five tracklets a person, 2,048 numbers each."""
    generator = np.random.default_rng(0)
    people = generator.standard_normal((tracklets // 5, 2048), dtype=np.float32)
    who = np.arange(tracklets) % len(people)
    embeddings = people[who]
    embeddings += 0.6 * generator.standard_normal((tracklets, 2048), dtype=np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    where = generator.integers(6, size=tracklets)
    began = time.perf_counter()
    found, _ = calibrate(
        *as_lists(People(embeddings, who, where)), model="bench", false_match_rate=1e-4
    )
    spent = time.perf_counter() - began
    most_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    console.print(f"{tracklets} tracklets: {spent:.0f} s, {most_bytes / 1e9:.1f} GB; {found}")


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("drawn", "real", "large"))
    parser.add_argument("--sets", type=int, default=120)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--halvings", type=int, default=50)
    parser.add_argument("--tracklets", type=int, default=100_000)
    asked = parser.parse_args()
    console = Console(width=130)
    if asked.what == "drawn":
        run_drawn(asked.sets, console)
    elif asked.what == "large":
        run_large(asked.tracklets, console)
    elif asked.data is None:
        parser.error("real: expected --data")
    else:
        rates: tuple[tuple[float, Per], ...] = (
            (0.005, "pair"),
            (0.01, "pair"),
            (0.02, "pair"),
            (0.05, "pair"),
            (0.2, "query"),
        )
        run_real(asked.data, asked.halvings, rates, console)


if __name__ == "__main__":
    main()
