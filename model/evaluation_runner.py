"""Evaluation over splits and seeds: resumed, measured, written down.

Each unit of the plan becomes a file as soon as it is measured; one whose file says that it was made
of the very same is not made again.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.checkpoint import load_checkpoint
from model.datasets.tracklets import Tracklet, natural_key
from model.datasets.truth import has_truth, read_truth
from model.embedder import Embedder, choose_device
from model.errors import EvaluationError
from model.evaluation import (
    ClipChoice,
    Comparison,
    compare,
    embed_tracklets,
    embed_with_attention,
    left_out_pairs,
    plan_comparisons,
    tested_tracklets,
    tracklet_name,
    used_frames,
)
from model.evaluation_files import (
    EmbeddingCache,
    read_json,
    require_writable,
    write_aside,
    write_json,
)
from model.evaluation_plan import (
    FORMAT,
    EvaluationListener,
    EvaluationTask,
    Subject,
    Unit,
    plan_units,
)
from model.frames import choose_frames
from model.measures import Measures, average_measures, order_gallery
from model.runs import versions

RESULTS, UNITS, EMBEDDINGS, ATTENTION = "results.json", "units", "embeddings", "attention"
MEASURES = ("rank_1", "rank_5", "rank_10", "rank_20", "mAP", "mINP")
SHOWN_MATCHES, SHOWN_FRAMES = 10, 8
SHOWN_EXTREMES = 4  # best queries, and as many worst failures, whose attention is kept

Vectors = NDArray[np.float32]
Json = dict[str, Any]


def evaluate(task: EvaluationTask, listener: EvaluationListener | None = None) -> Json:
    """Evaluate, or go on with an evaluation, and write its results.

    Args:
        task: What.
        listener: Hears of it.

    Returns:
        What was written to ``results.json``.

    Raises:
        CheckpointError: A checkpoint is missing, damaged or of another architecture.
        EvaluationError: Something asked for is not there, a checkpoint knows who is tested, or
            a file cannot be written.
        InvalidFramesError: A frame cannot be decoded; what was embedded before is kept.
    """
    listener = listener or EvaluationListener()
    started = time.monotonic()
    require_writable(task.output)
    units = plan_units(task, listener)
    pending = [unit for unit in units if _read_unit(task, unit) is None]
    if len(pending) < len(units):
        listener.said(f"{len(units) - len(pending)} of {len(units)} units are there already")
    _measure_units(task, pending, listener)
    made = [(unit, _require_unit(task, unit)) for unit in units]
    attention = _keep_attention(task, made)
    results = _summarise(task, made)
    results |= {"attention": attention, "duration_s": round(time.monotonic() - started, 3)}
    write_json(task.output / RESULTS, results, indent=2)
    return results


def _read_unit(task: EvaluationTask, unit: Unit) -> Json | None:
    """What a unit's file says, if it was made of the same."""
    values = read_json(task.output / UNITS / unit.file)
    return values if values is not None and values.get("key") == unit.key else None


def _require_unit(task: EvaluationTask, unit: Unit) -> Json:
    values = _read_unit(task, unit)
    if values is None:
        raise EvaluationError(f"expected {task.output / UNITS / unit.file} as it was just written")
    return values


def _measure_units(
    task: EvaluationTask, units: Sequence[Unit], listener: EvaluationListener
) -> None:
    """Embed and measure, checkpoint by checkpoint; splits of one share their embeddings."""
    groups: dict[tuple[Path, int | None], list[Unit]] = {}
    for unit in units:
        groups.setdefault((unit.subject.path, unit.frame_seed), []).append(unit)
    missing = {key: _missing(_open_cache(task, group[0]), group) for key, group in groups.items()}
    done, total = 0, sum(len(one) for one in missing.values())
    listener.progress(0, total)

    def tell() -> None:
        nonlocal done
        done += 1
        listener.progress(done, total)

    for key, group in groups.items():
        cache = _open_cache(task, group[0])
        if missing[key]:
            embedder = _load(task, group[0].subject)
            choice = _choice(task, group[0].subject)
            _fill(cache, embedder, missing[key], choice, _draw(group[0]), tell)
        for unit in group:
            write_json(task.output / UNITS / unit.file, _measure(task, unit, cache.embeddings))


def _load(task: EvaluationTask, subject: Subject) -> Embedder:
    checkpoint = load_checkpoint(subject.path)
    return Embedder(checkpoint, device=task.device, precision=task.precision)


def _open_cache(task: EvaluationTask, unit: Unit) -> EmbeddingCache:
    return EmbeddingCache(task.output / _cache_file(task, unit))


def _cache_file(task: EvaluationTask, unit: Unit) -> str:
    """Name all that decides an embedding, so that another one is another file."""
    choice = task.options.choice
    parts = [unit.subject.fingerprint, task.fingerprint, task.stamp]
    parts += [f"{choice.frames}{choice.clip_frames}", task.resolved_precision]
    if unit.frame_seed is not None:
        parts.append(f"seed{unit.frame_seed}")
    return f"{EMBEDDINGS}/{'-'.join(parts)}.npz"


def _choice(task: EvaluationTask, subject: Subject) -> ClipChoice:
    """Which frames a checkpoint is shown: each once, where it weighs them by their agreement."""
    weighs = subject.network.get("temporal", "mean") != "mean"
    return replace(task.options.choice, wraps=not weighs)


def _draw(unit: Unit) -> int:
    """The seed of drawn frames; any other choice takes no notice of it."""
    return unit.frame_seed or 0


def _missing(cache: EmbeddingCache, units: Sequence[Unit]) -> list[Tracklet]:
    needed = tested_tracklets([unit.split for unit in units])
    return [one for one in needed if tracklet_name(one) not in cache.embeddings]


def _fill(
    cache: EmbeddingCache,
    embedder: Embedder,
    tracklets: Sequence[Tracklet],
    choice: ClipChoice,
    seed: int,
    tell: Callable[[], None],
) -> None:
    """Embed into a cache; whatever ends it, what is done is saved."""
    try:
        with closing(embed_tracklets(embedder, tracklets, choice, seed=seed)) as stream:
            for tracklet, embedding in stream:
                cache.add(tracklet_name(tracklet), embedding)
                tell()
    finally:
        cache.save()


def _measure(task: EvaluationTask, unit: Unit, embeddings: Mapping[str, Vectors]) -> Json:
    if task.options.unit:
        names = [tracklet_name(one) for one in tested_tracklets([unit.split])]
        embeddings = {name: _scaled(embeddings[name]) for name in names}
    comparisons = plan_comparisons(unit.split, task.protocol)
    parts: list[Measures] = []
    rankings: list[Json] = []
    for comparison in comparisons:
        measures, distances = compare(comparison, embeddings, reranked=task.options.rerank)
        parts.append(measures)
        rankings += _rankings(task, unit, comparison, measures, distances)
    measures = average_measures(parts)
    values = {
        "key": unit.key,
        "name": unit.subject.name,
        "checkpoint": unit.subject.fingerprint,
        "data": _describe_data(task),
        **{name: unit.key[name] for name in ("split", "source", "seed", "frame_seed")},
        **{name: unit.key[name] for name in ("frames", "clip_frames", "protocol", "reranked")},
        "unit": task.options.unit,
        "seen_identities": len(unit.seen),
        "namesakes": unit.namesakes,
        "embeddings": _cache_file(task, unit),
        **_figures(measures),
    }
    if task.protocol == "camera-pairs":
        values["pairs_left_out"] = left_out_pairs(unit.split, task.protocol)
        values["pairs"] = {
            one.name: _figures(part) for one, part in zip(comparisons, parts, strict=True)
        }
    if has_truth(task.dataset.root):
        values["occlusion"] = _by_occlusion(task, comparisons, measures)
    return values | {"rankings": rankings}


def _by_occlusion(
    task: EvaluationTask, comparisons: Sequence[Comparison], measures: Measures
) -> Json:
    """Measures by how much of the person the query's frames hide, in a drawn set that knows it."""
    truth = read_truth(task.dataset.root)
    queries = [query for comparison in comparisons for query in comparison.query]
    levels = np.array([truth.of(query).level for query in queries])
    found: Json = {}
    for level in np.unique(levels[measures.ranks > 0]).tolist():
        chosen = (levels == level) & (measures.ranks > 0)
        found[str(level)] = {
            "rank_1": float((measures.ranks[chosen] == 1).mean()),
            "mAP": float(measures.average_precisions[chosen].mean()),
            "queries": int(chosen.sum()),
        }
    return found


def _scaled(embedding: Vectors) -> Vectors:
    length = float(np.linalg.norm(embedding.astype(np.float64)))
    return embedding / np.float32(length) if length else embedding


def _figures(measures: Measures) -> Json:
    return {
        "rank_1": measures.rank_1,
        "rank_5": measures.rank_5,
        "rank_10": measures.rank_10,
        "rank_20": measures.rank_20,
        "mAP": measures.mean_average_precision,
        "mINP": measures.mean_inverse_negative_penalty,
        "cmc": measures.cmc.tolist(),
        "queries": measures.counted,
        "skipped": measures.skipped,
        "gallery": measures.gallery,
    }


def _rankings(
    task: EvaluationTask,
    unit: Unit,
    comparison: Comparison,
    measures: Measures,
    distances: NDArray[np.float64],
) -> list[Json]:
    """What each query found, nearest first; junk is left out as it is when measuring."""
    identities = np.array([one.identity for one in comparison.gallery])
    cameras = np.array([one.camera for one in comparison.gallery])
    found = []
    for row, query, rank in zip(distances, comparison.query, measures.ranks, strict=True):
        correct = identities == query.identity
        order = order_gallery(row, correct, ~(correct & (cameras == query.camera)))
        top = [
            {
                **_describe_tracklet(task, comparison.gallery[place], _draw(unit)),
                "distance": float(row[place]),
                "correct": bool(correct[place]),
            }
            for place in order[:SHOWN_MATCHES]
        ]
        described = _describe_tracklet(task, query, _draw(unit))
        pair = {"pair": comparison.name} if comparison.name else {}
        found.append({"query": described, **pair, "rank": int(rank) or None, "top": top})
    return found


def _describe_tracklet(task: EvaluationTask, tracklet: Tracklet, seed: int) -> Json:
    used = used_frames(tracklet, task.options.choice, seed)
    shown = [used[place] for place in choose_frames(len(used), SHOWN_FRAMES)]
    return {
        "identity": tracklet.identity,
        "camera": tracklet.camera,
        "name": tracklet.name,
        "frames": [_relative(tracklet.frames[place], task.dataset.root) for place in shown],
    }


def _relative(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _describe_data(task: EvaluationTask) -> Json:
    return {
        "fingerprint": task.fingerprint,
        "layout": task.dataset.layout,
        "root": str(task.dataset.root.resolve()),
        "tracklets": len(task.dataset.tracklets),
        "identities": len({one.identity for one in task.dataset.tracklets}),
        "cameras": sorted({one.camera for one in task.dataset.tracklets}, key=natural_key),
    }


def _keep_attention(task: EvaluationTask, made: Sequence[tuple[Unit, Json]]) -> list[Json]:
    """Keep where the network looks in the best queries and in the worst failures."""
    tracklets = {tracklet_name(one): one for one in task.dataset.tracklets}
    chosen = _extremes(made)
    kept: list[Json] = []
    embedders: dict[Path, Embedder] = {}
    for number, (unit, ranking, kind) in enumerate(chosen):
        subject = unit.subject
        if subject.path not in embedders:
            embedders = {subject.path: _load(task, subject)}  # one at a time in memory
        tracklet = tracklets[_name_of(ranking["query"])]
        choice = task.options.choice
        attention = embed_with_attention(embedders[subject.path], tracklet, choice, _draw(unit))
        used = used_frames(tracklet, choice, _draw(unit))
        frames = [_relative(tracklet.frames[place], task.dataset.root) for place in used]
        file = f"{ATTENTION}/{number}.npz"
        with write_aside(task.output / file) as draft, draft.open("wb") as target:
            np.savez_compressed(target, attention=attention.astype(np.float32))
        kept.append(
            {
                "file": file,
                "unit": f"{UNITS}/{unit.file}",
                "kind": kind,
                "query": {**ranking["query"], "frames": frames},
                "rank": ranking["rank"],
            }
        )
    return kept


def _extremes(made: Sequence[tuple[Unit, Json]]) -> list[tuple[Unit, Json, str]]:
    """The nearest right answers and the worst failures, each tracklet once, grouped by unit."""
    answered = [
        (unit, ranking)
        for unit, values in made
        for ranking in values["rankings"]
        if ranking["rank"] is not None
    ]
    right = [one for one in answered if one[1]["rank"] == 1]
    wrong = [one for one in answered if one[1]["rank"] > 1]
    right.sort(key=lambda one: one[1]["top"][0]["distance"])
    wrong.sort(key=lambda one: (-one[1]["rank"], one[1]["top"][0]["distance"]))
    taken: set[str] = set()
    chosen: list[tuple[Unit, Json, str]] = []
    for kind, candidates in (("best", right), ("worst", wrong)):
        count = 0
        for unit, ranking in candidates:
            name = _name_of(ranking["query"])
            if count < SHOWN_EXTREMES and name not in taken:
                taken.add(name)
                chosen.append((unit, ranking, kind))
                count += 1
    return chosen


def _name_of(described: Mapping[str, str]) -> str:
    tracklet = Tracklet(described["identity"], described["camera"], described["name"], ())
    return tracklet_name(tracklet)


def _summarise(task: EvaluationTask, made: Sequence[tuple[Unit, Json]]) -> Json:
    units = [
        {
            "file": f"{UNITS}/{unit.file}",
            **{name: one for name, one in values.items() if name not in _NOT_SUMMARISED},
        }
        for unit, values in made
    ]
    first = made[0][0].subject
    subjects = {unit.subject.path: unit.subject for unit, _ in made}
    options = asdict(task.options) | {
        "protocol": task.protocol,
        "precision": task.resolved_precision,
        "device": str(choose_device(task.device)),
        "frame_seeds": sorted(set(task.seeds)) if task.options.choice.frames == "random" else [],
    }
    mean, std = _mean_and_std(units)
    return {
        "format": FORMAT,
        "options": options,
        "data": _describe_data(task),
        "checkpoints": [
            {"name": one.name, "fingerprint": one.fingerprint, "provenance": dict(one.provenance)}
            for one in subjects.values()
        ],
        "network": dict(first.network),
        "units": units,
        "mean": mean,
        "std": std,
        "over_splits": _spread(units, "split"),
        "over_seeds": _spread(units, "seed"),
        "over_frame_seeds": _spread(units, "frame_seed"),
        "splits": _count(units, "split"),
        "seeds": _count(units, "seed"),
        "frame_seeds": _count(units, "frame_seed"),
        "sources": sorted({one["source"] for one in units}),
        "seen_identities": max(one["seen_identities"] for one in units),
        "namesakes": max(one["namesakes"] for one in units),
        "pairs_left_out": _all_left_out(units),
        "versions": versions(),
    }


_NOT_SUMMARISED = ("key", "data", "cmc", "pairs", "rankings")


def _count(units: Iterable[Mapping[str, Any]], what: str) -> int:
    """How many splits or seeds there are; a seed of nothing is None and counts as none."""
    return len({one[what] for one in units} - {None})


def _all_left_out(units: Iterable[Mapping[str, Any]]) -> list[str]:
    """Camera pairs that were left out of one unit or more."""
    names = {name for one in units for name in one.get("pairs_left_out", ())}
    return sorted(names, key=natural_key)


def _mean_and_std(units: Iterable[Mapping[str, Any]]) -> tuple[Json, Json]:
    """Mean and sample deviation of each measure; null deviations for a single unit."""
    rows = np.array([[one[name] for name in MEASURES] for one in units])
    mean = dict(zip(MEASURES, rows.mean(axis=0).tolist(), strict=True))
    if len(rows) < 2:
        return mean, dict.fromkeys(MEASURES)
    return mean, dict(zip(MEASURES, rows.std(axis=0, ddof=1).tolist(), strict=True))


def _spread(units: Sequence[Mapping[str, Any]], over: str) -> Json:
    """Mean and deviation over splits or over seeds, after averaging what shares one."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for unit in units:
        groups.setdefault(unit[over], []).append(unit)
    averages = [_mean_and_std(members)[0] for members in groups.values()]
    mean, std = _mean_and_std(averages)
    return {"count": _count(units, over), "mean": mean, "std": std}
