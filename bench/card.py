"""The figures of the model card: a checkpoint and others, on people it was not trained on.

    .venv/bin/python -m bench.card --data ward=WARD --data market1501=MARKET --output card
        [--model bundled] [--beside LABEL=random|CHECKPOINT|RESNET|TEACHER.xml ...]

Whom --model was not trained on is tested, by every model. Frames are embedded once each. "average"
is the paper's: their mean, of any length. "agreement" is what the bundled weights serve with: see
docs/pooling.md, of length 1. ± is a standard error over people, whose queries are not independent.
"among all" also puts those people into the gallery whom --model was trained on, as in a protocol of
the whole set. `passerby evaluate bundled --data FOLDER --splits unseen` gives the first figures
again.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.real_rows import CHOICES
from bench.spoiled import Eye, checkpoint_eye, teacher_eye, unseen_split
from model.checkpoint import (
    Checkpoint,
    backbone_checkpoint,
    find_checkpoint,
    is_checkpoint,
    load_checkpoint,
    make_checkpoint,
    untrained_checkpoint,
)
from model.datasets.layouts import read_dataset
from model.datasets.tracklets import Split, Tracklet
from model.evaluation import (
    Comparison,
    compare,
    plan_comparisons,
    resolve_protocol,
    tested_tracklets,
    tracklet_name,
)
from model.frames import read_frame
from model.measures import Measures, average_measures
from model.network import NetworkConfig, pool_frames, unit_length

Json = dict[str, Any]
Vectors = NDArray[np.float32]
READINGS = ("average", "agreement")
SHOWN = "15"
CHUNK = 256
SEED = 0  # of random weights


@dataclass(frozen=True, slots=True)
class Tested:
    """One data set, and whom of it the model was not trained on.

    Args:
        name: For the tables.
        split: Whom.
        protocol: See `model.evaluation.resolve_protocol`.
        everybody: All tracklets of the data set.
    """

    name: str
    split: Split
    protocol: str
    everybody: Sequence[Tracklet]

    @property
    def wide(self) -> Split:
        """The same queries among all people, whoever was trained on."""
        return replace(self.split, gallery=tuple(self.everybody))


def open_eye(source: str, like: Checkpoint, device: str) -> Eye:
    """What embeds frames: a teacher, a checkpoint, a ResNet-50, or random weights.

    Args:
        source: A path, or "random".
        like: Whose frame size the last two take.
        device: Where it runs.
    """
    if source.lower().endswith((".xml", ".onnx")):
        return teacher_eye(Path(source))
    if source == "random":
        untrained = untrained_checkpoint(SEED)
        return checkpoint_eye(make_checkpoint(untrained.network, like.preprocessing), device)
    path = find_checkpoint(source)
    if is_checkpoint(path):
        return checkpoint_eye(load_checkpoint(path), device)
    given = backbone_checkpoint(source, NetworkConfig())
    return checkpoint_eye(make_checkpoint(given.network, like.preprocessing), device)


def read_tested(name: str, folder: Path, model: Path) -> Tested:
    """Whom of a data set a model was not trained on."""
    dataset = read_dataset(folder)
    split = unseen_split(dataset, model)
    return Tested(name, split, resolve_protocol(dataset.layout), dataset.tracklets)


def embed_frames(eye: Eye, tracklets: Iterable[Tracklet]) -> dict[Path, Vectors]:
    """Embed every frame of tracklets once: (D,) by its path."""
    paths = sorted({path for one in tracklets for path in one.frames})
    frames: dict[Path, Vectors] = {}
    for start in range(0, len(paths), CHUNK):
        chunk = paths[start : start + CHUNK]
        crops = np.stack([read_frame(path, eye.preprocessing) for path in chunk])
        frames |= dict(zip(chunk, eye.embed(crops), strict=True))
    return frames


def pool(tracklet: Tracklet, choice: str, reading: str, frames: Mapping[Path, Vectors]) -> Vectors:
    """Embed a tracklet by the embeddings of some of its frames, (D,)."""
    places = dict.fromkeys(CHOICES[choice].positions(tracklet))
    chosen = torch.from_numpy(np.stack([frames[tracklet.frames[place]] for place in places]))
    if reading == "average":
        made = pool_frames(chosen[None])[0]
    else:
        made = unit_length(pool_frames(chosen[None], None, "agreement")[0])
    result: Vectors = made.numpy()
    return result


def measure(split: Split, protocol: str, embeddings: Mapping[str, Vectors]) -> Json:
    """Rank-1 with its standard error over people, rank-5 and mAP, in %, and rank-1 of each pair."""
    comparisons = plan_comparisons(split, protocol)
    measured = [compare(one, embeddings)[0] for one in comparisons]
    mean = average_measures(measured)
    return {
        "rank_1": 100 * mean.rank_1,
        "error": 100 * standard_error(comparisons, measured),
        "rank_5": 100 * mean.rank_5,
        "mAP": 100 * mean.mean_average_precision,
        "queries": mean.counted,
        "gallery": mean.gallery,
        "pairs": {
            one.name: 100 * found.rank_1
            for one, found in zip(comparisons, measured, strict=True)
            if one.name
        },
    }


def standard_error(comparisons: Sequence[Comparison], measured: Sequence[Measures]) -> float:
    """Of rank-1, over people: how far the shares of their queries differ."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for comparison, found in zip(comparisons, measured, strict=True):
        for query, rank in zip(comparison.query, found.ranks.tolist(), strict=True):
            if rank:
                hits[query.identity].append(rank == 1)
    shares = [float(np.mean(one)) for one in hits.values()]
    return float(np.std(shares, ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else 0.0


def measure_model(label: str, eye: Eye, tested: Sequence[Tested], *, whole: bool) -> list[Json]:
    """All figures of one model.

    Args:
        label: Its name in the tables.
        eye: It.
        tested: On whom.
        whole: Whether every number of frames is measured, and not 15 alone.
    """
    results = []
    for data in tested:
        is_paired = data.protocol == "camera-pairs"
        tracklets = tested_tracklets([data.wide if is_paired else data.split])
        frames = embed_frames(eye, tracklets)
        for reading in READINGS:
            for choice in CHOICES if whole else (SHOWN,):
                made = {tracklet_name(one): pool(one, choice, reading, frames) for one in tracklets}
                row: Json = {"model": label, "data": data.name, "reading": reading}
                row["frames"] = choice
                results.append(row | measure(data.split, data.protocol, made))
                if is_paired and choice == SHOWN:
                    wide = measure(data.wide, data.protocol, made)
                    results.append(row | wide | {"data": f"{data.name} among all"})
    return results


def make_tables(results: Sequence[Json], label: str) -> str:
    """Every model at 15 frames; then one model by frames, and by pair of cameras."""
    lines = [
        "| data | model | pooling | rank-1, % | rank-5, % | mAP, % |",
        "|---|---|---|---|---|---|",
        *(_line(one) for one in results if one["frames"] == SHOWN),
        "",
        f"| data | pooling | {' | '.join(CHOICES)} |",
        f"|---|---|{'---|' * len(CHOICES)}",
    ]
    own = [one for one in results if one["model"] == label]
    rows: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for one in own:
        rows[one["data"], one["reading"]][one["frames"]] = f"{one['rank_1']:.1f}"
    lines += [
        f"| {data} | {reading} | {' | '.join(cells[choice] for choice in CHOICES)} |"
        for (data, reading), cells in rows.items()
        if len(cells) == len(CHOICES)
    ]
    for one in results:
        if one["pairs"] and one["reading"] == "agreement" and one["frames"] == SHOWN:
            pairs = ", ".join(f"{name} {share:.1f}" for name, share in one["pairs"].items())
            lines += ["", f"{one['model']}, {one['data']}, by pair: {pairs}"]
    return "\n".join(lines) + "\n"


def _line(one: Json) -> str:
    return (
        f"| {one['data']} ({one['queries']} queries, gallery {one['gallery']}) | {one['model']} | "
        f"{one['reading']} | {one['rank_1']:.1f} ± {one['error']:.1f} | {one['rank_5']:.1f} | "
        f"{one['mAP']:.1f} |"
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=_pair, action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--model", default="bundled", help="decides who is tested")
    parser.add_argument("--beside", type=_pair, action="append", default=[], metavar="LABEL=MODEL")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    path = find_checkpoint(arguments.model)
    own = load_checkpoint(path)
    tested = [read_tested(name, Path(folder), path) for name, folder in arguments.data]
    label, results = Path(arguments.model).stem, []
    for name, source in [(label, arguments.model), *arguments.beside]:
        began = time.monotonic()
        eye = open_eye(source, own, arguments.device)
        results += measure_model(name, eye, tested, whole=name == label)
        print(f"{name}: {eye.name}, {time.monotonic() - began:.0f} s", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "card.json").write_text(json.dumps(results, indent=1) + "\n")
    table = make_tables(results, label)
    (arguments.output / "card.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
