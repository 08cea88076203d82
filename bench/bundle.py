"""The bundled weights, and what the documentation shows of their training, from finished runs.

    .venv/bin/python -m bench.bundle run-1 run-2 --data mix

The runs are the stages in order; the last one's checkpoint is stored in half precision. Its
embeddings are turned so that --dim numbers keep as much of their length as they can, on frames of
--data that it was trained on, and the rest is left out. Into the folder of --docs go the log of all
stages, one JSON object a line, and a picture of their curves.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from model.checkpoint import Checkpoint, load_checkpoint, make_checkpoint, save_checkpoint
from model.datasets.layouts import read_dataset
from model.embedder import Embedder
from model.frames import choose_frames, read_frame
from model.network import TrackletNet
from model.runs import RunFolder, versions

LIMIT_BYTES = 48_000_000
DIGITS = 5


def read_stages(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """The logs of stages as one, each line with its stage; times go on from stage to stage.

    Returns:
        Plain values; numbers are rounded to `DIGITS` significant digits.
    """
    logs = [RunFolder(run).read_log() for run in runs]
    ends = accumulate([0.0, *(max(row["time_s"] for row in log) for log in logs)])
    joined = []
    for stage, (log, began) in enumerate(zip(logs, ends, strict=False), start=1):
        for row in log:
            told = {name: _rounded(value) for name, value in row.items()}
            joined.append({"stage": stage, **told, "time_s": round(began + row["time_s"])})
    return joined


def describe_run(run: RunFolder) -> dict[str, Any]:
    """What decided a run beside its recipe and data: seed, teacher and versions."""
    facts = run.read_facts()
    return {"seed": facts["seed"], "teacher": facts["teacher"], **facts["versions"]}


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def shorten_head(
    checkpoint: Checkpoint, frames: Sequence[Path], dim: int
) -> tuple[Checkpoint, float]:
    """Keep the directions of embeddings that hold most of their length.

    With the eigenvectors V of the largest eigenvalues of the second moment of unit frame
    embeddings, the head W becomes V^T W. A rotation keeps every distance; what is left out is the
    smallest part that can be.

    Args:
        checkpoint: With a head of at least ``dim`` numbers.
        frames: Image files; of people it was trained on, so that nothing is learned of others.
        dim: Numbers that are kept.

    Returns:
        The checkpoint, and which share of the squared length it keeps, in [0, 1].
    """
    # In fp32, so that the same weights make the same file on every processor.
    embedder = Embedder(checkpoint, device="cpu", precision="fp32")
    clips = [read_frame(path, checkpoint.preprocessing)[None] for path in frames]
    embeddings = np.stack([one.embedding for one in embedder.embed(clips)]).astype(np.float64)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    shares, directions = np.linalg.eigh(embeddings.T @ embeddings / len(embeddings))
    state = checkpoint.network.state_dict()
    weight = state["head.weight"].double().numpy()  # (256, 2048)
    turned = directions[:, ::-1][:, :dim].T @ weight  # (dim, 2048)
    shorter = TrackletNet(dataclasses.replace(checkpoint.network.config, head=dim))
    shorter.load_state_dict(state | {"head.weight": torch.from_numpy(turned).float()})
    share = float(shares[::-1][:dim].sum() / shares.sum())
    packed = {"dim": dim, "of": len(shares), "squared_length_kept": round(share, 4)}
    provenance = {**checkpoint.provenance, "packed": packed}
    return make_checkpoint(shorter, checkpoint.preprocessing, provenance), share


def training_frames(provenance: Mapping[str, Any], data: Path, most: int) -> list[Path]:
    """Frames of those whom a checkpoint says it was trained on, evenly among all of them."""
    trained = set(provenance["data"]["train_identities"])
    tracklets = read_dataset(data, provenance["data"]["layout"]).tracklets
    frames = [path for one in tracklets if one.identity in trained for path in one.frames]
    return [frames[place] for place in choose_frames(len(frames), most)]


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the loss, and what was measured on people held out, over the time of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    is_long = max(row["time_s"] for row in rows) > 2 * 3600
    unit, seconds = ("hours", 3600) if is_long else ("minutes", 60)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    losses = [row for row in rows if "embedding" in row]
    times = [row["time_s"] / seconds for row in losses]
    left.plot(times, [row["embedding"] for row in losses], linewidth=1)
    left.set(xlabel=f"{unit} of training", ylabel="1 - cosine to the teacher", ylim=(0, None))
    measured = [row for row in rows if "measured" in row]
    names = sorted({name for row in measured for name in row if name.endswith(("rank_1", "mAP"))})
    for name in names:
        known = [row for row in measured if name in row]
        shares = [100 * row[name] for row in known]
        right.plot([row["time_s"] / seconds for row in known], shares, marker=".", label=name)
    right.set(xlabel=f"{unit} of training", ylabel="held-out people, %", ylim=(0, 102))
    right.legend()
    first_rows = [next(row for row in rows if row["stage"] == n) for n in _stages(rows)[1:]]
    for axes in (left, right):
        axes.grid(alpha=0.3)
        for row in first_rows:
            axes.axvline(row["time_s"] / seconds, color="grey", linestyle=":")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _stages(rows: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({row["stage"] for row in rows})


def main() -> None:
    """Write the weights and the documentation's part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs, the stages in order")
    parser.add_argument("--output", type=Path, default=Path("weights/passerby.safetensors"))
    parser.add_argument("--data", type=Path, required=True, help="what the runs were trained on")
    parser.add_argument("--dim", type=int, default=192, help="numbers of an embedding")
    parser.add_argument("--frames", type=int, default=2000, help="of those trained on, to turn by")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    console = Console()

    trained = load_checkpoint(RunFolder(arguments.runs[-1]).product)
    frames = training_frames(trained.provenance, arguments.data, arguments.frames)
    shorter, kept = shorten_head(trained, frames, arguments.dim)
    saved = save_checkpoint(shorter, arguments.output, precision="fp16")
    size = arguments.output.stat().st_size
    if size > LIMIT_BYTES:
        raise SystemExit(f"expected at most {LIMIT_BYTES} bytes, got {size}: {arguments.output}")
    rows = read_stages(arguments.runs)
    facts = {
        "fingerprint": saved.fingerprint,
        "dim": arguments.dim,
        "squared_length_kept": round(kept, 4),
        "stages": [describe_run(RunFolder(run)) for run in arguments.runs],
        "packed_with": versions(),
    }
    lines = [json.dumps(facts), *(json.dumps(row) for row in rows)]
    (arguments.docs / "weights-log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_curves(rows, arguments.docs / "images" / "weights-curves.png")
    console.print(
        f"{saved.fingerprint}: {size / 1e6:.1f} MB in {arguments.output}, {arguments.dim} numbers "
        f"with {kept:.2%} of the squared length"
    )


if __name__ == "__main__":
    main()
