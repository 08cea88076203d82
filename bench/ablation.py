"""What each part of the paper contributes: its Table 1 and the readings of its equations, drawn.

    .venv/bin/passerby synth ablation-data --preset clutter --occluded 0.5 --size small
    .venv/bin/python -m bench.ablation --data ablation-data --output ablation

Each row is a recipe; each seed draws another half of the people, other weights and other batches,
the same ones for every row, so that rows are compared in pairs. The small backbone "conv5" stands
in for ResNet-50: 64x32 pixels make the 16x8 cells of the paper, and a run takes a minute on one
core. Test: camera 1 asks, camera 2 answers, 8 even frames. Beside rank-1 and mAP: what the
attention falls on (the person, what hides them, the background), and rank-1 by how much of the
query was hidden. Runs that are there already are not run again.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import sqrt
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from model.checkpoint import load_checkpoint
from model.datasets.layouts import fingerprint_dataset, read_dataset
from model.datasets.tracklets import Dataset, Split, Tracklet
from model.datasets.truth import LEVELS, Truth, read_truth
from model.embedder import Embedder
from model.frames import choose_frames, read_clip
from model.measures import Measures, rank_queries
from model.recipe import load_recipe
from model.runs import RunFolder, describe_split
from model.training import Job, Trainer

FRAMES = 8
NONE = ["network.attention=none", "loss.regulariser=none"]
ZSCORE = ["network.attention=softmax", "network.temperature=std"]
PRINTED = ["network.attention=softmax", "network.temperature=1.0", "network.pool=mean"]
NO_REG = ["loss.regulariser=none"]
REG = ["loss.regulariser=printed"]
CE = ["loss.identity=ce"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Args:
        name: Its key.
        label: What it is, for people.
        settings: Laid over the common recipe.
        beside: The row that it is compared with, in pairs.
    """

    name: str
    label: str
    settings: tuple[str, ...]
    beside: str | None = None


ROWS = (
    Row("baseline", "Baseline: CE, average pooling", (*CE, *NONE, "loss.triplet=false")),
    Row("triplet", "+ L_v", (*CE, *NONE), "baseline"),
    Row("sam", "+ SAM (z-score)", (*CE, *ZSCORE, *NO_REG), "triplet"),
    Row("reg", "+ Reg", (*CE, *ZSCORE, *REG), "sam"),
    Row("default", "CE -> L_f (softmax focal): the default", (*ZSCORE, *REG), "reg"),
    Row("sam-printed", "+ SAM as printed (T = 1, mean)", (*CE, *PRINTED, *NO_REG), "triplet"),
    Row("reg-printed", "+ Reg as printed", (*CE, *PRINTED, *REG), "sam-printed"),
    Row(
        "paper",
        "CE -> L_f as printed: every equation as printed",
        (*PRINTED, *REG, "loss.identity=focal_literal"),
        "reg-printed",
    ),
    Row(
        "sum",
        "SAM: softmax of the sum, weighted sum",
        (*CE, "network.temperature=1.0", *NO_REG),
        "sam",
    ),
    Row("mean", "SAM: softmax of the mean", (*CE, "network.attention=mean", *NO_REG), "sam"),
    Row("l1", "SAM: L1, as the code of [16]", (*CE, "network.attention=l1", *NO_REG), "sam"),
    Row("cv", "Reg: coverage CV^2", (*ZSCORE, "loss.regulariser=cv"), "default"),
    Row("consistency", "Reg: consistency", (*ZSCORE, "loss.regulariser=consistency"), "default"),
    Row("sigmoid", "L_f: full sigmoid focal", (*ZSCORE, "loss.identity=focal_sigmoid"), "default"),
    Row("literal", "L_f: as printed", (*ZSCORE, "loss.identity=focal_literal"), "default"),
    Row("no-identity", "no identity loss", (*ZSCORE, "loss.identity=none"), "default"),
    Row("triplet-only", "L_v alone, average pooling", (*NONE, "loss.identity=none"), "triplet"),
)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a drawn set with its truth")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(row.name for row in ROWS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--train", type=int, default=150, help="training identities")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--backbone", choices=("conv5", "resnet50"), default="conv5")
    parser.add_argument("--set", action="append", default=[], help="change every row's recipe")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if row.name in arguments.rows.split(",")]
    # By seed first: a table that is stopped early is complete for fewer seeds.
    work = [(row, seed) for seed in range(arguments.seeds) for row in rows]
    began = time.monotonic()
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        futures = [pool.submit(run_row, row, seed, arguments) for row, seed in work]
        results = []
        for done, future in enumerate(futures, start=1):
            results.append(future.result())
            left = (time.monotonic() - began) / done * (len(futures) - done)
            result = results[-1]
            print(
                f"[{done}/{len(futures)}] {result['row']} seed {result['seed']}: "
                f"rank-1 {result['rank_1']:.3f}, {left / 60:.0f} min left",
                flush=True,
            )
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    table = make_table(results, rows)
    (arguments.output / "table.md").write_text(table)
    print(table)


def settings_of(row: Row, arguments: argparse.Namespace, batches: int) -> list[str]:
    """The whole recipe of a row, as settings over the default one."""
    height, width = (64, 32) if arguments.backbone == "conv5" else (256, 128)
    epochs = -(-arguments.steps // batches)
    return [
        "start=random",
        f"network.backbone={arguments.backbone}",
        f"preprocessing.height={height}",
        f"preprocessing.width={width}",
        "batch.frames=4",
        # 3e-4 is for weights that have seen ImageNet; from random ones this is few steps.
        "optimiser.rate=1e-3",
        f"optimiser.epochs={epochs}",
        # The rate falls once, for the last fifth.
        f"optimiser.milestones=[{epochs * 4 // 5}]",
        *row.settings,
        *arguments.set,
    ]


def run_row(row: Row, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and test one row with one seed, or read what it gave before."""
    result_path = arguments.output / f"{row.name}-{seed}.json"
    if result_path.exists():
        result: dict[str, Any] = json.loads(result_path.read_text())
        return result
    torch.set_num_threads(1)
    dataset = read_dataset(arguments.data, "folder")
    split = halve(dataset, arguments.train, seed)
    recipe = load_recipe("folder", settings_of(row, arguments, batches=-(-arguments.train // 8)))
    data = describe_split(split, layout="folder", fingerprint=fingerprint_dataset(dataset))
    folder = RunFolder(arguments.output / "runs" / f"{row.name}-{seed}")
    began = time.monotonic()
    product = Trainer(Job(recipe, split, data, seed=seed, workers=1), folder).run()
    if product is None:
        raise KeyboardInterrupt
    train_s = time.monotonic() - began
    result = {"row": row.name, "seed": seed, "train_s": round(train_s, 1)}
    result |= measure(product, split, read_truth(arguments.data))
    last = [line for line in folder.read_log() if "loss" in line][-5:]
    for name in ("accuracy", "wrong_logit", "active", "coverage_cv2", "triplet"):
        values = [line[name] for line in last if name in line]
        result[f"train_{name}"] = statistics.mean(values) if values else None
    draft = result_path.with_suffix(".draft")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(result_path)
    return result


def halve(dataset: Dataset, train: int, seed: int) -> Split:
    """Some people train, all others are tested: camera 1 asks, camera 2 answers."""
    people = sorted({one.identity for one in dataset.tracklets})
    order = np.random.default_rng([seed, 77]).permutation(len(people))
    chosen = {people[place] for place in order[:train]}
    cameras = sorted({one.camera for one in dataset.tracklets})

    def seen(camera: str) -> tuple[Tracklet, ...]:
        return tuple(
            one for one in dataset.tracklets if one.camera == camera and one.identity not in chosen
        )

    training = tuple(one for one in dataset.tracklets if one.identity in chosen)
    return Split(str(seed), training, seen(cameras[0]), seen(cameras[1]), f"random, seed {seed}")


def measure(product: Path, split: Split, truth: Truth) -> dict[str, Any]:
    """Everything that the table needs to know of one trained network."""
    embedder = Embedder(load_checkpoint(product), device="cpu", precision="fp32")
    queries, maps, masks = embed(embedder, split.query, truth)
    gallery, more_maps, more_masks = embed(embedder, split.gallery, truth)
    distances = np.sqrt(((queries[:, None] - gallery[None]) ** 2).sum(axis=2, dtype=np.float64))
    measures = rank(distances, split)
    result: dict[str, Any] = {"rank_1": measures.rank_1, "rank_5": measures.rank_5}
    result["mAP"] = measures.mean_average_precision
    levels: dict[str, list[bool]] = defaultdict(list)
    for tracklet, first in zip(split.query, measures.ranks, strict=True):
        levels[str(truth.of(tracklet).level)].append(int(first) == 1)
    result["by_level"] = {
        level: {"queries": len(found), "rank_1": statistics.mean(found)}
        for level, found in sorted(levels.items(), key=lambda item: int(item[0]))
    }
    attention = np.concatenate(maps + more_maps)  # (N, 16, 8)
    labels = np.concatenate(masks + more_masks)  # (N, 16, 8, 3)
    result["mass"] = mass_on(attention, labels)
    occluded = labels[..., 2].sum(axis=(1, 2)) > 0
    result["mass_occluded"] = mass_on(attention[occluded], labels[occluded])
    result["area_occluded"] = labels[occluded].mean(axis=(0, 1, 2)).tolist()
    result["area"] = labels.mean(axis=(0, 1, 2)).tolist()
    result["effective_positions"] = float((1 / (attention**2).sum(axis=(1, 2))).mean())
    return result


def rank(distances: NDArray[np.float64], split: Split) -> Measures:
    """Rank the gallery for every query, as `passerby evaluate` does."""
    return rank_queries(
        distances,
        [one.identity for one in split.query],
        [one.identity for one in split.gallery],
        [one.camera for one in split.query],
        [one.camera for one in split.gallery],
    )


def embed(
    embedder: Embedder, tracklets: Sequence[Tracklet], truth: Truth
) -> tuple[NDArray[np.float32], list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Embeddings (N, D); per tracklet attention (T, 16, 8) and label shares (T, 16, 8, 3)."""
    embeddings, maps, masks = [], [], []
    for tracklet in tracklets:
        clip = read_clip(tracklet.frames, embedder.preprocessing, used=FRAMES)
        [one] = embedder.embed([clip], with_attention=True)
        embeddings.append(one.embedding)
        if one.attention is None:
            raise RuntimeError("expected attention, got none")
        maps.append(one.attention)
        chosen = choose_frames(len(tracklet.frames), FRAMES)
        shape = one.attention.shape[1:]
        masks.append(
            np.stack([cell_shares(truth.load_mask(tracklet.frames[n]), shape) for n in chosen])
        )
    return np.stack(embeddings), maps, masks


def cell_shares(mask: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """How much of each cell is background, person and occluder, (H, W, 3)."""
    rows, columns = shape
    planes = []
    for label in range(3):
        plane = Image.fromarray((mask == label).astype(np.float32))
        planes.append(np.asarray(plane.resize((columns, rows), Image.Resampling.BOX)))
    return np.stack(planes, axis=2)


def mass_on(attention: NDArray[np.float32], labels: NDArray[np.float32]) -> list[float]:
    """Attention mass on background, person and occluder."""
    weighed = attention[..., None] * labels
    return [float(share) for share in weighed.sum(axis=(1, 2)).mean(axis=0)]


def make_table(results: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    """The tables of docs/training.md, in Markdown."""
    by_row: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for result in results:
        by_row[result["row"]][result["seed"]] = result
    lines = [
        "| row | rank-1 | rank-5 | mAP | Δ rank-1 | Δ mAP | cells | person | occluder | rest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = by_row[row.name]
        cells = [row.label] + [spread(found, name, 100) for name in ("rank_1", "rank_5", "mAP")]
        cells += [beside(by_row, row, name) for name in ("rank_1", "mAP")]
        cells.append(f"{statistics.mean(one['effective_positions'] for one in found.values()):.1f}")
        masses = np.array([one["mass_occluded"] for one in found.values()]).mean(axis=0)
        cells += [f"{100 * masses[label]:.1f}" for label in (1, 2, 0)]
        lines.append(f"| {' | '.join(cells)} |")
    areas = np.array([one["area_occluded"] for one in results]).mean(axis=0)
    lines.append(
        f"\nArea of frames with an occluder, %: person {100 * areas[1]:.1f}, "
        f"occluder {100 * areas[2]:.1f}, background {100 * areas[0]:.1f}.\n"
    )
    return "\n".join(lines + level_table(by_row, rows) + training_table(by_row, rows)) + "\n"


def level_table(
    by_row: Mapping[str, Mapping[int, Mapping[str, Any]]], rows: Sequence[Row]
) -> list[str]:
    """Rank-1 by how much of the query was hidden."""
    names = {0: "nothing", 25: "up to 25 %", 50: "up to 50 %", 75: "more"}
    head = " | ".join(names[level] for level in LEVELS)
    lines = [f"\n| rank-1, hidden: | {head} |", "|---|" + "---|" * len(LEVELS)]
    for row in rows:
        cells = []
        for level in LEVELS:
            found = [one["by_level"].get(str(level)) for one in by_row[row.name].values()]
            hits = sum(one["rank_1"] * one["queries"] for one in found if one)
            count = sum(one["queries"] for one in found if one)
            cells.append(f"{100 * hits / count:.1f} ({count})" if count else "-")
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return lines


def training_table(
    by_row: Mapping[str, Mapping[int, Mapping[str, Any]]], rows: Sequence[Row]
) -> list[str]:
    """What the log says at the end of training."""
    names = ("accuracy", "wrong_logit", "active", "triplet", "coverage_cv2")
    lines = [f"\n| at the end of training | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for row in rows:
        cells = []
        for name in names:
            values = [one[f"train_{name}"] for one in by_row[row.name].values()]
            known = [value for value in values if value is not None]
            cells.append(f"{statistics.mean(known):.3g}" if known else "-")
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return lines


def spread(found: Mapping[int, Mapping[str, Any]], name: str, scale: float) -> str:
    """Mean and standard deviation over seeds."""
    values = [scale * one[name] for one in found.values()]
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


def beside(by_row: Mapping[str, Mapping[int, Mapping[str, Any]]], row: Row, name: str) -> str:
    """Mean difference to the row beside, over the seeds that both have, and its standard error."""
    if row.beside is None or not by_row.get(row.beside):
        return ""
    one, other = by_row[row.name], by_row[row.beside]
    gaps = [100 * (one[seed][name] - other[seed][name]) for seed in one if seed in other]
    error = statistics.stdev(gaps) / sqrt(len(gaps)) if len(gaps) > 1 else float("nan")
    return f"{statistics.mean(gaps):+.1f} ± {error:.1f}"


if __name__ == "__main__":
    main()
