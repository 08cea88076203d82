"""Who is still found when frames of real tracklets are spoiled, and which temporal pooling helps.

    .venv/bin/python -m bench.spoiled --data WARD --model CHECKPOINT_OR_TEACHER.xml --output spoiled

Frames of query and gallery tracklets are spoiled alike:

    occluded  something that the generator draws (a pedestrian, furniture, a pillar, the picture's
              edge) is laid over the crop, another one for each frame
    blurred   motion, defocus, few pixels and JPEG, as the generator degrades its own frames
    replaced  each by a frame of another person from the same camera, as of a detector that errs
    switched  a run of frames by one such person, as of a tracker that switched
    mixed     each by one of the first three

"exact" spoils that share of each tracklet's frames, rounded; "independent" spoils each frame with
that chance, so that some tracklets keep no good frame at all. Each frame is embedded alone, once in
every state; all poolings then see the very same embeddings. Their results are scaled to length 1,
but for the rows "any length", and compared as `passerby evaluate` compares. "true frames alone"
knows which are spoiled: no pooling of frames can be asked for more. Embeddings are kept in the
output folder, and a second run goes on with them. A checkpoint is tested on those whom it was not
trained on.
"""

import argparse
import json
import math
import os
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, make_checkpoint
from model.datasets.degradations import draw_degradations, resized
from model.datasets.layers import planes_of
from model.datasets.layouts import fingerprint_dataset, read_dataset
from model.datasets.occluders import OCCLUDER_KINDS, Occluder, Passer, PictureEdge
from model.datasets.people import draw_identity
from model.datasets.splits import divide_unseen
from model.datasets.tracklets import Dataset, Split, Tracklet
from model.datasets.tubes import Floats
from model.embedder import Embedder
from model.evaluation import (
    compare,
    plan_comparisons,
    resolve_protocol,
    tested_tracklets,
    tracklet_name,
)
from model.evaluation_plan import EvaluationTask, plan_units
from model.frames import Clip, Preprocessing, choose_frames, prepare_frame, read_frame
from model.measures import average_measures
from model.network import TrackletNet, pool_frames, unit_length
from model.teacher import load_teacher

Kind = Literal["occluded", "blurred", "replaced", "switched", "mixed"]
Draw = Literal["exact", "independent"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DRAWS: tuple[Draw, ...] = get_args(Draw)
SHARES = (0.25, 0.5, 0.75)
LAID: tuple[Kind, ...] = ("occluded", "blurred")  # what changes pixels, so that it is embedded
STREAM = 41  # distinguishes these draws from others with the same seed
# Frames are spoiled at this size whatever the model takes, so that all models see the same.
SIZE = Preprocessing(height=256, width=128)
CHUNK = 64
Vectors = NDArray[np.float32]
Embed = Callable[[Clip], Vectors]


@dataclass(frozen=True, slots=True)
class Eye:
    """What embeds single frames: a teacher or a checkpoint.

    Args:
        name: Its fingerprint.
        preprocessing: The size that it takes.
        embed: From (N, height, width, 3) uint8 RGB to (N, D).
    """

    name: str
    preprocessing: Preprocessing
    embed: Embed


@dataclass(frozen=True, slots=True)
class Condition:
    """What is done to the tracklets in one comparison; a share of 0 is nothing."""

    kind: Kind
    draw: Draw
    share: float
    seed: int


@dataclass(frozen=True, slots=True)
class Bank:
    """Embeddings of every chosen frame in every state.

    Args:
        tracklets: N, all that are tested.
        states: N arrays (T, D) by name: "clean", and "occluded-0", "blurred-0", ... of each seed.
    """

    tracklets: Sequence[Tracklet]
    states: Mapping[str, list[Vectors]]


Spoiled = tuple[Vectors, NDArray[np.bool_]]
"""Frame embeddings (T, D) of a tracklet, and which of them are spoiled."""


# What is tried. Each maps the (T, D) frame embeddings of a tracklet to (D,).


def average(frames: Tensor) -> Tensor:
    """The paper's temporal average pooling."""
    return pool_frames(frames[None])[0]


def average_of_units(frames: Tensor) -> Tensor:
    """The average of directions."""
    return unit_length(frames).mean(dim=0)


def median(frames: Tensor) -> Tensor:
    """The median of each value."""
    return frames.median(dim=0).values


def geometric_median(frames: Tensor) -> Tensor:
    """The point with the least sum of distances to all directions: 10 steps of Weiszfeld."""
    units = unit_length(frames)
    point = units.mean(dim=0)
    for _ in range(10):
        weights = 1 / (units - point).norm(dim=1).clamp_min(1e-6)
        point = (weights[:, None] * units).sum(dim=0) / weights.sum()
    return point


def medoid(frames: Tensor) -> Tensor:
    """The frame that is most like all others."""
    units = unit_length(frames)
    return frames[(units @ units.T).sum(dim=1).argmax()]


def frame_softmax(frames: Tensor) -> Tensor:
    """A softmax over frames of how alike each is to the others on the mean, by z-scores."""
    units = unit_length(frames)
    likeness = (units @ units.sum(dim=0)) - 1
    scores = likeness / likeness.std(correction=0).clamp_min(1e-6)
    return scores.softmax(dim=0) @ frames


def densest(frames: Tensor) -> Tensor:
    """The mean of the quarter (at least 2) of all frames that lie closest together."""
    units = unit_length(frames)
    count = min(max(2, round(len(frames) / 4)), len(frames))
    nearest = (units @ units.T).topk(count, dim=1)
    return frames[nearest.indices[nearest.values.sum(dim=1).argmax()]].mean(dim=0)


def spectral(frames: Tensor) -> Tensor:
    """Weights from the first eigenvector of the fourth power of positive similarities."""
    units = unit_length(frames)
    likeness = (units @ units.T).clamp_min(0) ** 4
    weights = torch.ones(len(frames))
    for _ in range(30):
        weights = unit_length(likeness @ weights)
    return weights @ frames / weights.sum()


def agreement(frames: Tensor) -> Tensor:
    """The option of `model.network`: a softmax over pairs of frames, by z-scores."""
    return pool_frames(frames[None], None, "agreement")[0]


POOLINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "average": average,
    "average of unit frames": average_of_units,
    "median": median,
    "geometric median": geometric_median,
    "medoid": medoid,
    "softmax over frames": frame_softmax,
    "densest quarter": densest,
    "first eigenvector": spectral,
    "agreement": agreement,
}
ANY_LENGTH = ", any length"  # compared as it is, as the paper does
ORACLE = "true frames alone"
ROWS = (*POOLINGS, f"average{ANY_LENGTH}", f"agreement{ANY_LENGTH}", ORACLE)
PLOTTED = ("average", "median", "geometric median", "agreement", ORACLE)


def main() -> None:
    """Embed what is missing, measure everything, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a folder of real tracklets")
    parser.add_argument("--model", required=True, help="bundled, checkpoint, .xml or .onnx")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=15, help="even ones, of each tracklet")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    began = time.monotonic()
    dataset = read_dataset(arguments.data)
    eye, split = open_model(find_checkpoint(arguments.model), dataset, arguments.device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    folder = arguments.output / f"{eye.name}-{fingerprint_dataset(dataset)[-12:]}"
    bank = fill_bank(eye, split, folder, used=arguments.frames, seeds=arguments.seeds)
    protocol = resolve_protocol(dataset.layout)
    results = [
        one
        for condition in plan_conditions(arguments.seeds)
        for one in measure(bank, split, condition, protocol)
    ]
    about = {
        "model": eye.name,
        "frames": arguments.frames,
        "seeds": arguments.seeds,
        "identities": len({one.identity for one in split.query}),
        "tracklets": len(bank.tracklets),
        "protocol": protocol,
        "split": split.source,
    }
    stem = arguments.output / f"{eye.name}-{arguments.frames}"
    content = json.dumps({**about, "results": results}, indent=1)
    stem.with_suffix(".json").write_text(content + "\n")
    table = make_tables(results, about)
    stem.with_suffix(".md").write_text(table)
    plot(results, stem.with_suffix(".png"))
    print(table)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


def open_model(path: Path, dataset: Dataset, device: str) -> tuple[Eye, Split]:
    """A model that embeds frames, and those of a data set whom it was not trained on."""
    if path.suffix.lower() in (".xml", ".onnx"):
        return teacher_eye(path), divide_unseen(dataset.tracklets, ())
    return checkpoint_eye(load_checkpoint(path), device), unseen_split(dataset, path)


def unseen_split(dataset: Dataset, path: Path) -> Split:
    """Those of a data set whom a checkpoint was not trained on, as far as it says itself."""
    task = EvaluationTask(path, dataset, fingerprint_dataset(dataset), Path(), splits=("unseen",))
    [unit] = plan_units(task)
    return unit.split


def teacher_eye(path: Path) -> Eye:
    """A teacher, which takes frames as its file says and embeds each alone."""
    teacher = load_teacher(path)
    return Eye(teacher.fingerprint, teacher.preprocessing, teacher.embed)


def checkpoint_eye(checkpoint: Checkpoint, device: str) -> Eye:
    """A network of ours, which embeds each frame alone."""
    embedder = Embedder(frame_checkpoint(checkpoint), device=device)

    def embed(crops: Clip) -> Vectors:
        return np.stack([one.embedding for one in embedder.embed([crop[None] for crop in crops])])

    name = f"{checkpoint.fingerprint}-{embedder.precision}"
    return Eye(name, checkpoint.preprocessing, embed)


def frame_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The same network, but a tracklet of one frame has the embedding of that frame."""
    config = replace(checkpoint.network.config, unit=False, temporal="mean")
    network = TrackletNet(config)
    network.load_state_dict(checkpoint.network.state_dict())
    return make_checkpoint(network, checkpoint.preprocessing)


def fill_bank(eye: Eye, split: Split, folder: Path, *, used: int, seeds: int) -> Bank:
    """Embed every chosen frame in every state, or read what was embedded before."""
    tracklets = tested_tracklets([split])
    paths = [chosen_frames(one, used) for one in tracklets]
    flat = [path for one in paths for path in one]
    edges = np.cumsum([len(one) for one in paths])[:-1].tolist()
    states = {"clean": np.split(embed_state(eye, flat, folder, used, None, 0), edges)}
    for seed in range(seeds):
        for kind in LAID:
            embeddings = embed_state(eye, flat, folder, used, kind, seed)
            states[f"{kind}-{seed}"] = np.split(embeddings, edges)
    return Bank(tracklets, states)


def chosen_frames(tracklet: Tracklet, used: int) -> list[Path]:
    """The frames of a tracklet that an evaluation would use."""
    return [tracklet.frames[place] for place in choose_frames(len(tracklet.frames), used)]


def embed_state(
    eye: Eye, paths: Sequence[Path], folder: Path, used: int, kind: Kind | None, seed: int
) -> Vectors:
    """Embed all frames in one state, (N, D); kept under a name of its own when it is whole."""
    kept = folder / f"{used}-{len(paths)}-{kind or 'clean'}-{seed}.npy"
    if kept.exists():
        found: Vectors = np.load(kept)
        return found
    made: list[Vectors] = []
    for start in range(0, len(paths), CHUNK):
        chunk = paths[start : start + CHUNK]
        made.append(eye.embed(np.stack([show(eye, path, kind, seed) for path in chunk])))
        print(f"\r{kind or 'clean'} {seed}: {start + len(chunk)} of {len(paths)}", end="")
    print(flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    draft = kept.with_suffix(f".{os.getpid()}.draft")
    with draft.open("wb") as file:
        np.save(file, np.concatenate(made))
    draft.replace(kept)
    return np.concatenate(made)


def show(eye: Eye, path: Path, kind: Kind | None, seed: int) -> Clip:
    """Read a frame as a model takes it, spoiled where a kind is given: (height, width, 3)."""
    if kind is None:
        return read_frame(path, eye.preprocessing)
    # By its name: a frame is spoiled alike whoever else is tested.
    name = zlib.crc32("/".join(path.parts[-3:]).encode("utf-8", "surrogateescape"))
    rng = np.random.default_rng([seed, STREAM, KINDS.index(kind), name])
    crop = read_frame(path, SIZE)
    spoiled = occlude(crop, rng) if kind == "occluded" else blur(crop, rng)
    return prepare_frame(Image.fromarray(spoiled), eye.preprocessing)


def occlude(crop: Clip, rng: np.random.Generator) -> Clip:
    """Lay one of the generator's occluders over the middle of a (H, W, 3) crop."""
    kind = OCCLUDER_KINDS[int(rng.integers(len(OCCLUDER_KINDS)))]
    passer = draw_identity(rng)
    direction = 1 if rng.random() < 0.5 else -1
    person = passer if kind == "pedestrian" else None
    occluder = Occluder(kind, 0, 4, person, direction, lingers=True)
    number = int(rng.integers(1, 4))  # lingering, it is before the person then
    if kind == "truncation":
        cut = crop.copy()
        PictureEdge(occluder, crop.shape[:2], rng).fill(cut, number)
        return cut
    pitch, light = 0.15, (-0.46, -0.56, 0.69)
    layer = Passer(occluder, (pitch, light), crop.shape[:2], rng).layer(number, (0.0, 0.0))
    return _levels(layer.over(planes_of(Image.fromarray(crop))))


def blur(crop: Clip, rng: np.random.Generator) -> Clip:
    """Degrade a (H, W, 3) crop by all that the generator knows but exposure, at full strength."""
    drawn = replace(draw_degradations(rng, frames=1, share=1.0), strengths=(1.0,), gains=())
    angle = float(rng.uniform(0, math.pi))
    picture = drawn.blurred(planes_of(Image.fromarray(crop)), 0, angle)
    height, width = crop.shape[:2]
    rows, columns = round(height * drawn.resolution), round(width * drawn.resolution)
    picture = resized(resized(picture, rows, columns), height, width)
    return drawn.compressed(_levels(picture))


def _levels(picture: Floats) -> Clip:
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)


def plan_conditions(seeds: int) -> list[Condition]:
    """Everything that is compared: nothing spoiled first."""
    clean = [Condition("mixed", "exact", 0.0, 0)]
    return clean + [
        Condition(kind, draw, share, seed)
        for draw in DRAWS
        for kind in KINDS
        for share in SHARES
        for seed in range(seeds)
    ]


def spoil(bank: Bank, condition: Condition) -> list[Spoiled]:
    """Take the embeddings of every tracklet with some of its frames spoiled."""
    return [_spoil_one(bank, condition, number) for number in range(len(bank.tracklets))]


def _spoil_one(bank: Bank, condition: Condition, number: int) -> Spoiled:
    kind, draw = KINDS.index(condition.kind), DRAWS.index(condition.draw)
    share, seed = condition.share, condition.seed
    rng = np.random.default_rng([seed, STREAM, kind, draw, round(100 * share), number])
    frames = bank.states["clean"][number].copy()
    length = len(frames)
    if condition.draw == "exact":
        count = round(share * length)
    else:
        count = int((rng.random(length) < share).sum())
    places = rng.permutation(length)[:count]
    if condition.kind == "switched":
        start = int(rng.integers(length - count + 1))
        places = np.arange(start, start + count)
    spoiled = np.zeros(length, bool)
    spoiled[places] = True
    strangers = list(frames[places])  # of those kinds that need none
    if condition.kind not in LAID:
        strangers = draw_strangers(bank, number, count, rng, one=condition.kind == "switched")
    for place, stranger in zip(places.tolist(), strangers, strict=True):
        how = condition.kind
        if how == "mixed":
            how = KINDS[int(rng.integers(3))]
        frames[place] = bank.states[f"{how}-{seed}"][number][place] if how in LAID else stranger
    return frames, spoiled


def draw_strangers(
    bank: Bank, number: int, count: int, rng: np.random.Generator, *, one: bool
) -> list[Vectors]:
    """Draw clean frames (D,) of others whom the same camera saw.

    Args:
        bank: Of everybody.
        number: Of the tracklet that they are not of.
        count: How many frames.
        rng: Decides.
        one: Whether all are of one person, in their order; else of different people, as far as
            there are so many.
    """
    own = bank.tracklets[number]
    others = [
        place
        for place, other in enumerate(bank.tracklets)
        if other.camera == own.camera and other.identity != own.identity
    ]
    if not others:
        raise SystemExit(
            f"expected two tested people before camera {own.camera}, to put one in the other's "
            f"place, got {own.identity} alone"
        )
    clean = bank.states["clean"]
    if one:
        stranger = clean[int(rng.choice(others))]
        return [stranger[place % len(stranger)] for place in range(count)]
    chosen = rng.choice(others, count, replace=count > len(others)).tolist()
    return [clean[place][int(rng.integers(len(clean[place])))] for place in chosen]


def measure(bank: Bank, split: Split, condition: Condition, protocol: str) -> list[dict[str, Any]]:
    """Rank by every pooling under one condition."""
    spoiled = spoil(bank, condition)
    comparisons = plan_comparisons(split, protocol)
    results = []
    for pooling in ROWS:
        embeddings = {
            tracklet_name(tracklet): pool(pooling, frames, wrong)
            for tracklet, (frames, wrong) in zip(bank.tracklets, spoiled, strict=True)
        }
        measures = average_measures([compare(one, embeddings)[0] for one in comparisons])
        result = {
            "pooling": pooling,
            **asdict(condition),
            "rank_1": measures.rank_1,
            "rank_5": measures.rank_5,
            "mAP": measures.mean_average_precision,
        }
        results.append(result)
    return results


def pool(pooling: str, frames: Vectors, spoiled: NDArray[np.bool_]) -> Vectors:
    """Pool (T, D) frames to (D,), of length 1 unless the row says otherwise."""
    if pooling == ORACLE and not spoiled.all():  # where all are spoiled, nothing is to be known
        frames = frames[~spoiled]
    made = POOLINGS.get(pooling.removesuffix(ANY_LENGTH), average)(torch.from_numpy(frames))
    result: Vectors = (made if pooling.endswith(ANY_LENGTH) else unit_length(made)).numpy()
    return result


def make_tables(results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """A Markdown table for each kind and draw: rank-1 ± deviation over seeds, mAP in brackets."""
    head = f"{about['model']}: {about['frames']} even frames, {about['identities']} identities, "
    head += f"{about['tracklets']} tracklets, {about['seeds']} seeds, {about['protocol']}\n"
    lines = [head]
    for draw in DRAWS:
        for kind in KINDS:
            lines += [
                f"\n{kind}, {draw}\n",
                "| pooling | clean | 1/4 spoiled | 1/2 | 3/4 |",
                "|---|---|---|---|---|",
            ]
            for pooling in ROWS:
                cells = [
                    _cell(select(results, pooling, kind, draw, share)) for share in (0.0, *SHARES)
                ]
                lines.append(f"| {pooling} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def select(
    results: Sequence[Mapping[str, Any]], pooling: str, kind: Kind, draw: Draw, share: float
) -> list[Mapping[str, Any]]:
    """What was measured with every seed; with a share of 0 of any kind."""
    return [
        one
        for one in results
        if one["pooling"] == pooling
        and one["share"] == share
        and (share == 0 or (one["kind"], one["draw"]) == (kind, draw))
    ]


def _cell(found: Sequence[Mapping[str, Any]]) -> str:
    rank_1 = [100 * one["rank_1"] for one in found]
    precision = statistics.mean(100 * one["mAP"] for one in found)
    spread = f" ± {statistics.stdev(rank_1):.1f}" if len(rank_1) > 1 else ""
    return f"{statistics.mean(rank_1):.1f}{spread} ({precision:.1f})"


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw rank-1 over the share of frames that are spoiled, a panel for each kind."""
    from matplotlib.figure import Figure  # not pyplot, whose figures live in global state

    figure = Figure(figsize=(11, 5.4), layout="constrained")
    panels = figure.subplots(2, 5, sharex=True, sharey=True)
    shares = (0.0, *SHARES)
    for row, draw in zip(panels, DRAWS, strict=True):
        for panel, kind in zip(row, KINDS, strict=True):
            for pooling in PLOTTED:
                found = [select(results, pooling, kind, draw, share) for share in shares]
                height = [100 * statistics.mean(o["rank_1"] for o in one) for one in found]
                panel.plot(
                    [100 * share for share in shares],
                    height,
                    marker="o",
                    markersize=3,
                    linestyle=":" if pooling == ORACLE else "-",
                    color="grey" if pooling == ORACLE else None,
                    label=pooling,
                )
            panel.set_title(f"{kind}, {draw}", fontsize=9)
            panel.set_xticks([0, 25, 50, 75])
            panel.grid(alpha=0.3)
    figure.supxlabel("frames spoiled (%)", fontsize=9)
    figure.supylabel("rank-1 (%)", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
