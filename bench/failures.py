"""Where a checkpoint fails, shown on drawn people: its worst answer under each difficulty.

    .venv/bin/python -m bench.failures --output failures.png [--model bundled]

People of each preset of `passerby synth` are drawn with a seed that no training used. Camera 2 asks
among camera 1. A row has the query whose right answer came last: frames of it, of whom it was taken
for, and of who it was. Nobody in the picture exists.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.checkpoint import find_checkpoint, load_checkpoint
from model.datasets.presets import Preset, preset_set
from model.datasets.synthetic import DrawnTracklet, draw_set
from model.embedder import Embedder
from model.evaluation import euclidean_distances
from model.frames import choose_frames, prepare_frame
from model.measures import rank_queries

SEED = 1004  # training drew its people with others
FRAMES, SHOWN = 15, 4
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Failure:
    """The worst answer under one difficulty.

    Args:
        preset: Which.
        rank_1: Of all queries, 0-1.
        queries: How many there were.
        rank: Where the right answer stood, from 1; 1 where nothing failed.
        query: Who asked.
        taken_for: The first answer.
        right: The right one.
    """

    preset: str
    rank_1: float
    queries: int
    rank: int
    query: DrawnTracklet
    taken_for: DrawnTracklet
    right: DrawnTracklet


def find_failure(embedder: Embedder, preset: Preset, people: int) -> Failure:
    """Draw people, search one camera's in the other's, and take the worst answer."""
    drawn = list(draw_set(preset_set(preset, identities=people, frames_max=28, seed=SEED)))
    gallery = [one for one in drawn if one.camera == 1]
    queries = [one for one in drawn if one.camera == 2]
    distances = euclidean_distances(embed(embedder, queries), embed(embedder, gallery))
    measures = rank_queries(
        distances,
        [str(one.identity) for one in queries],
        [str(one.identity) for one in gallery],
        ["2"] * len(queries),
        ["1"] * len(gallery),
    )
    worst = int(measures.ranks.argmax())
    right = next(one for one in gallery if one.identity == queries[worst].identity)
    taken_for = gallery[int(distances[worst].argmin())]
    rank = int(measures.ranks[worst])
    return Failure(preset, measures.rank_1, len(queries), rank, queries[worst], taken_for, right)


def embed(embedder: Embedder, tracklets: Sequence[DrawnTracklet]) -> NDArray[np.float32]:
    """Embed drawn tracklets as the service embeds uploaded ones, (N, D)."""
    made = []
    for one in tracklets:
        chosen = choose_frames(len(one.frames), FRAMES)
        pictures = [Image.fromarray(one.frames[place]) for place in chosen]
        clip = np.stack([prepare_frame(picture, embedder.preprocessing) for picture in pictures])
        made.append(embedder.embed([clip])[0].embedding)
    return np.stack(made)


def draw_failures(failures: Sequence[Failure], path: Path) -> None:
    """Draw a row for each difficulty."""
    from matplotlib.figure import Figure  # not pyplot, whose figures live in global state

    figure = Figure(figsize=(10.5, 1.75 * len(failures)), layout="constrained")
    rows = figure.subplots(len(failures), 3, squeeze=False)
    for row, failure in zip(rows, failures, strict=True):
        shown = (failure.query, failure.taken_for, failure.right)
        titles = ("query, camera 2", "ranked first, camera 1", f"right one, ranked {failure.rank}")
        for panel, tracklet, title in zip(row, shown, titles, strict=True):
            panel.imshow(_strip(tracklet))
            panel.set_title(title, fontsize=8)
            panel.set_xticks([])
            panel.set_yticks([])
        label = f"{failure.preset}\nrank-1 {100 * failure.rank_1:.0f} %"
        row[0].set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=90, metadata={"Software": None})


def _strip(tracklet: DrawnTracklet) -> Pixels:
    places = choose_frames(len(tracklet.frames), SHOWN)
    return np.concatenate([tracklet.frames[place] for place in places], axis=1)


def main() -> None:
    """Draw, search, print and paint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--people", type=int, default=48, help="of each preset")
    parser.add_argument("--output", type=Path, required=True, help="a picture")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(find_checkpoint(arguments.model))
    embedder = Embedder(checkpoint, device=arguments.device)
    failures = []
    for preset in get_args(Preset):
        failures.append(find_failure(embedder, preset, arguments.people))
        print(
            f"{preset}: rank-1 {100 * failures[-1].rank_1:.1f} % of {failures[-1].queries}, the "
            f"worst right answer at {failures[-1].rank}",
            flush=True,
        )
    draw_failures(failures, arguments.output)


if __name__ == "__main__":
    main()
