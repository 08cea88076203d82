"""What a report says in words and numbers: what was measured, how, and what came out."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from model import anchors
from model.anchors import Benchmark, Figures
from model.datasets.findings import shorten
from model.datasets.tracklets import natural_key
from model.evaluation_plan import describe_namesakes
from model.report_data import Evaluation, Rates, Unit, read_rates

_LAYOUTS = {"folder": "a folder of tracklets", "mars": "MARS", "market-1501": "Market-1501"}
_RANKS = (
    ("Rank-1", "rank_1"),
    ("Rank-5", "rank_5"),
    ("Rank-10", "rank_10"),
    ("Rank-20", "rank_20"),
)
_COUNTED = (("identities", "identity"), ("tracklets", "tracklet"))
_PROTOCOLS = {
    "published": "published: each query in the whole gallery",
    "pooled": "pooled: each query in the whole gallery",
    "camera-pairs": "camera pairs: the queries of each camera in each other camera; the mean over "
    "pairs, each with the weight of its queries",
}


def describe(evaluation: Evaluation) -> dict[str, Any]:
    """Fill the parts of the page that say what was measured, and what came out."""
    units = evaluation.units
    mean, deviation = _figures(evaluation.mean), _figures(evaluation.deviation)
    checkpoints = evaluation.checkpoints
    return {
        "title": checkpoints[0] if len(checkpoints) == 1 else f"{len(checkpoints)} checkpoints",
        "layout_name": layout_name(evaluation),
        "summary": _summary(evaluation),
        "headline": _headline(mean, deviation),
        "noise": _noise(evaluation),
        "facts": list(_facts(evaluation)),
        "units": [{**asdict(_figures(unit.rates)), **_counts(unit)} for unit in units],
        "has_names": len({unit.name for unit in units}) > 1,
        "has_seeds": any(unit.seed is not None for unit in units),
        "has_draws": any(unit.frame_seed is not None for unit in units),
        "mean": mean,
        "deviation": deviation,
        "spreads": _spreads(evaluation),
        "full": _full(units),
        "pairs": _pair_rows(units),
        "occlusion": _occlusion_rows(units),
        "colophon": _colophon(evaluation),
    }


def layout_name(evaluation: Evaluation) -> str:
    """Name the data for people, synthetic ones as such."""
    benchmark = benchmark_of(evaluation)
    if benchmark is not None:
        name = anchors.BENCHMARK_NAMES[benchmark]
        return f"synthetic tracklets in the layout of {name}" if evaluation.is_drawn else name
    if evaluation.is_drawn:
        return "synthetic tracklets"
    return _LAYOUTS.get(evaluation.layout, evaluation.layout)


def benchmark_of(evaluation: Evaluation) -> Benchmark | None:
    """Return which of the paper's benchmarks has the layout of the data, if any."""
    return next((name for name in anchors.BENCHMARKS if name == evaluation.layout), None)


def _summary(evaluation: Evaluation) -> str:
    splits = len({unit.split for unit in evaluation.units})
    origin = "; ".join(evaluation.sources)
    parts = [_count(len(evaluation.units), "measurement"), f"over {_count(splits, 'split')}"]
    parts.append(f"({origin})")
    queries = sorted({unit.queries for unit in evaluation.units})
    few, many = queries[0], queries[-1]
    parts.append(f"of {_count(many, 'query')}" if few == many else f"of {few} to {many} queries")
    each = " each" if len(evaluation.units) > 1 else ""
    return f"{' '.join(parts)}{each}."


def _headline(mean: Figures, deviation: Figures) -> list[dict[str, Any]]:
    named = [*_RANKS, ("mAP", "mean_ap")]
    return [
        {"name": name, "mean": getattr(mean, key), "deviation": getattr(deviation, key)}
        for name, key in named
    ]


def _noise(evaluation: Evaluation) -> str:
    rate = evaluation.mean["rank_1"] or 0.0
    queries = min(unit.queries for unit in evaluation.units)
    error = _binomial_error(rate, queries)
    if error is None:
        # The rule of three: an event unseen in n trials has a rate below 3 / n, at 95 %.
        return (
            f"{_count(queries, 'query')} cannot tell this rank-1 from one that is "
            f"{min(300 / max(queries, 1), 100):.0f} points away."
        )
    told = (
        f"Chance alone: {_count(queries, 'query')} put a binomial standard error of {error:.1f} "
        "points on the rank-1 of one split."
    )
    if len(evaluation.units) == 1:
        return f"{told} This is one measurement: smaller differences say nothing."
    return (
        f"{told} The splits share people, so the error of the mean is more than that over the "
        "square root of their number."
    )


def _binomial_error(rate: float, queries: int) -> float | None:
    """Standard error of a rate (0-1) in points; None where all or none says nothing of it."""
    if queries < 1 or not 0 < rate < 1:
        return None
    return 100 * math.sqrt(rate * (1 - rate) / queries)


def _facts(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    """Say under what circumstances the figures came about, so that nobody compares unlike ones."""
    checkpoints = evaluation.checkpoints
    yield ("Checkpoint" if len(checkpoints) == 1 else "Checkpoints"), ", ".join(checkpoints)
    if network := evaluation.results.get("network"):
        yield "Network", ", ".join(f"{name} {_plain(value)}" for name, value in network.items())
    if trained := _training(evaluation):
        yield "Trained", trained
    yield "Data", _data(evaluation)
    splits = sorted({unit.split for unit in evaluation.units}, key=natural_key)
    yield "Splits", f"{len(splits)}: {', '.join(splits)}"
    yield "Where the splits come from", "; ".join(evaluation.sources)
    if seeds := _seeds(unit.seed for unit in evaluation.units):
        yield "Seeds of training", seeds
    yield "Frames", _frames(evaluation)
    if seeds := _seeds(unit.frame_seed for unit in evaluation.units):
        yield "Seeds of drawn frames", seeds
    protocol = str(evaluation.option("protocol"))
    yield "Protocol", _PROTOCOLS.get(protocol, protocol)
    yield (
        "Same camera",
        "what shows the query's person in the query's camera is left out, neither right nor wrong",
    )
    yield "Ties", "pessimistic: at equal distance, wrong stands before right"
    scaled = " of embeddings scaled to length 1" if evaluation.option("unit") else ""
    yield "Distance", f"Euclidean{scaled}"
    if computed := _computed(evaluation):
        yield "Computed", computed
    reranked = evaluation.option("reranked")
    yield "Re-ranking", "by k-reciprocal neighbours" if reranked else "none"
    yield "People seen in training", _seen(evaluation)


def _seeds(seeds: Iterable[int | None]) -> str:
    found = sorted({seed for seed in seeds if seed is not None})
    return f"{len(found)}: {', '.join(map(str, found))}" if found else ""


def _plain(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _computed(evaluation: Evaluation) -> str:
    options = evaluation.results.get("options") or {}
    return " on ".join(str(options[name]) for name in ("precision", "device") if name in options)


def _training(evaluation: Evaluation) -> str:
    """What the first checkpoint says about its training; "" where it says nothing."""
    first: Mapping[str, Any] = next(iter(evaluation.results.get("checkpoints") or ()), {})
    provenance = first.get("provenance") or {}
    recipe, data = provenance.get("recipe"), provenance.get("data")
    told = []
    if isinstance(recipe, Mapping) and recipe.get("name"):
        told.append(f"recipe {recipe['name']}")
    told += [f"{provenance[name]} {name}" for name in ("epochs", "steps") if provenance.get(name)]
    if isinstance(data, Mapping):
        people = data.get("train_identities")
        if isinstance(people, list):
            told.append(f"{len(people)} people of {data.get('layout')} {data.get('fingerprint')}")
    if not told and provenance:
        told = [f"{name}: {value}" for name, value in provenance.items() if isinstance(value, str)]
    return ", ".join(told)


def _data(evaluation: Evaluation) -> str:
    data = evaluation.data
    told = [layout_name(evaluation), str(data["fingerprint"])]
    told += [_count(int(data[key]), one) for key, one in _COUNTED if key in data]
    if cameras := data.get("cameras"):
        told.append(_count(len(cameras), "camera"))
    return ", ".join(told)


def _frames(evaluation: Evaluation) -> str:
    number = evaluation.option("clip_frames") or 15
    frames = str(evaluation.option("frames"))
    return {
        "even": f"even: {number} of each tracklet, evenly spaced",
        "random": f"random: {number} of each tracklet, drawn from a seed",
        "all": f"all, in clips of {number}",
    }.get(frames, frames)


def _seen(evaluation: Evaluation) -> str:
    seen = int(evaluation.results.get("seen_identities") or 0)
    if seen:
        return f"{seen} of the tested people were trained on: these figures are no test"
    if namesakes := _namesakes(evaluation):
        return f"none of this data, as far as the checkpoint says; but {namesakes}"
    return "none of those tested, as far as the checkpoint says"


def _namesakes(evaluation: Evaluation) -> str:
    count = int(evaluation.results.get("namesakes") or 0)
    return describe_namesakes(count) if count else ""


def _count(number: int, one: str) -> str:
    many = one[:-1] + "ies" if one.endswith("y") else one + "s"
    return f"{number:,} {one if number == 1 else many}"


def percent(rate: float | None) -> str:
    """Write a share (0-1) as a percentage."""
    return "unknown" if rate is None else f"{100 * rate:.1f} %"


def _figures(rates: Rates) -> Figures:
    return Figures(*(None if rate is None else 100 * rate for rate in rates.values()))


def _counts(unit: Unit) -> dict[str, Any]:
    return {
        "name": unit.name,
        "split": unit.split,
        "seed": unit.seed,
        "frame_seed": unit.frame_seed,
        "queries": unit.queries,
        "skipped": unit.skipped,
        "gallery": unit.gallery,
    }


def _spreads(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Deviations over splits and over either kind of seed, where there are several of two."""
    spreads = [
        (label, evaluation.results.get(key) or {})
        for label, key in (
            ("over splits, seeds averaged", "over_splits"),
            ("over seeds, splits averaged", "over_seeds"),
            ("over frame seeds, the rest averaged", "over_frame_seeds"),
        )
    ]
    several = [(label, one) for label, one in spreads if one.get("count", 0) > 1]
    if len(several) < 2:
        return []
    return [{"label": label, "rates": _figures(read_rates(one["std"]))} for label, one in several]


def _full(units: Sequence[Unit]) -> str:
    """Say which ranks hold the whole gallery; "" where none of those shown does."""
    paired = any(unit.pairs for unit in units)
    sizes = [int(one["gallery"]) for unit in units for one in unit.pairs.values()]
    smallest = min(sizes if paired else [unit.gallery for unit in units])
    full = [f"rank-{k}" for k in (1, 5, 10, 20) if k >= smallest]
    if not full:
        return ""
    named = " and ".join(filter(None, (", ".join(full[:-1]), full[-1])))
    where = "smallest gallery of a pair of cameras" if paired else "smallest gallery"
    return (
        f"The {where} holds {_count(smallest, 'tracklet')}: there {named} of any network is 100 %."
    )


def describe_left_out(pairs: list[str]) -> str:
    """Say which pairs of cameras do not count; "" where all do."""
    if not pairs:
        return ""
    names = [name.replace(">", " → ") for name in pairs]
    return (
        f"{_count(len(pairs), 'pair')} of cameras left out, where no query has its person in the "
        f"gallery, or the gallery holds one person only: {shorten(names)}"
    )


def _pair_rows(units: Iterable[Unit]) -> list[dict[str, Any]]:
    """Means over units of each pair of cameras."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for unit in units:
        for name, rates in unit.pairs.items():
            found.setdefault(name, []).append(rates)
    return [
        {
            "name": name.replace(">", " → "),
            "queries": sum(int(one["queries"]) for one in found[name]),
            "gallery": round(sum(int(one["gallery"]) for one in found[name]) / len(found[name])),
            "rank_1": _mean_percent(one["rank_1"] for one in found[name]),
            "mean_ap": _mean_percent(one["mAP"] for one in found[name]),
        }
        for name in sorted(found, key=natural_key)
    ]


def _mean_percent(rates: Iterable[float]) -> float:
    values = list(rates)
    return 100 * sum(values) / len(values)


def _occlusion_rows(units: Iterable[Unit]) -> list[dict[str, Any]]:
    """Rank-1 of each level of occlusion, all queries of all units together."""
    queries: dict[str, int] = {}
    right: dict[str, float] = {}
    for unit in units:
        for level, found in unit.occlusion.items():
            number = int(found["queries"])
            queries[level] = queries.get(level, 0) + number
            right[level] = right.get(level, 0.0) + number * float(found["rank_1"] or 0.0)
    rows = []
    for level in sorted(queries, key=natural_key):
        rate = right[level] / queries[level] if queries[level] else 0.0
        rows.append(
            {
                "name": _occlusion_name(level),
                "queries": queries[level],
                "rank_1": 100 * rate if queries[level] else None,
                "error": _binomial_error(rate, queries[level]),
            }
        )
    return rows


def _occlusion_name(level: str) -> str:
    """Say what a level of `model.datasets.truth.LEVELS` means."""
    return {
        "0": "hidden in no frame",
        "25": "in up to 25 % of the frames",
        "50": "in 25 to 50 %",
        "75": "in more than 50 %",
    }.get(level, f"level {level}")


def warn(evaluation: Evaluation, frames: int, missing: int) -> list[str]:
    """Say what a reader must not overlook.

    Args:
        evaluation: What is reported.
        frames: How many frames the page shows.
        missing: How many of them could not be read.
    """
    warnings = []
    if int(evaluation.results.get("seen_identities") or 0):
        warnings.append(f"{_seen(evaluation)}.")
    if namesakes := _namesakes(evaluation):
        warnings.append(f"{namesakes}.")
    if left_out := describe_left_out(evaluation.pairs_left_out):
        warnings.append(f"{left_out}.")
    skipped = sum(unit.skipped for unit in evaluation.units)
    if skipped:
        warnings.append(
            f"{_count(skipped, 'query')} had no match in the gallery and count nowhere."
        )
    if missing:
        warnings.append(
            f"{missing} of the {_count(frames, 'frame')} that this page shows are not "
            "where the data were, or cannot be read: grey boxes with a cross stand for them. "
            "`passerby report DIR --data FOLDER` makes the page again from where the data lie now."
        )
    return warnings


def _colophon(evaluation: Evaluation) -> str:
    versions = evaluation.results.get("versions") or {}
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    duration = evaluation.results.get("duration_s")
    took = f" The last run of the evaluation took {float(duration):,.0f} s." if duration else ""
    return f"Made by passerby evaluate with {told}.{took}"
