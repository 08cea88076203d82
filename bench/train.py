"""How fast the training loop is beside a bare forward and backward pass, and what a frame costs.

    .venv/bin/python -m bench.train
    .venv/bin/python -m bench.train --backbone conv5 --identities 8 --frames 15

Both do the same steps on the same batch sizes, in turn: the loop reads JPEG files, augments, moves,
computes, steps its optimiser, logs and saves; the bare one runs the same module and the same losses
on tensors that lie in memory. The ratio is taken within each round, so that a machine that slows
down slows down both. Peak memory a frame is the slope between two batch sizes, each measured in a
process of its own.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from model.datasets.folder import read_folder
from model.datasets.synthetic import SyntheticSet, write_folder
from model.datasets.tracklets import Split
from model.embedder import DTYPES
from model.losses import total_loss
from model.recipe import Recipe, load_recipe
from model.runs import RunFolder
from model.training import Job, Listener, Progress, Trainer

SIZES = {"resnet50": (256, 128), "conv5": (64, 32)}


class Clock(Listener):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def progress(self, progress: Progress) -> None:  # noqa: ARG002 only the time counts
        """After each step."""
        self.ended.append(time.perf_counter())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=sorted(SIZES), default="resnet50")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed steps in a round")
    parser.add_argument("--identities", type=int, default=4, help="P; K is 2")
    parser.add_argument("--frames", type=int, default=4, help="T")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    recipe = bench_recipe(arguments)
    if arguments.peak_of is not None:
        print(json.dumps({"peak_bytes": peak_of(recipe, arguments.peak_of)}))
        return
    with TemporaryDirectory() as folder:
        split = drawn_split(Path(folder) / "tracklets", recipe)
        rounds = []
        for number in range(arguments.rounds):
            run = RunFolder(Path(folder) / f"run-{number}")
            rounds.append(one_round(recipe, split, run, arguments))
    print_table(recipe, rounds, peak_per_frame(arguments))


def bench_recipe(arguments: argparse.Namespace) -> Recipe:
    """The default reading at the size asked for, from random weights."""
    height, width = SIZES[arguments.backbone]
    overrides = [
        "start=random",
        f"network.backbone={arguments.backbone}",
        f"preprocessing.height={height}",
        f"preprocessing.width={width}",
        f"batch.identities={arguments.identities}",
        f"batch.frames={arguments.frames}",
        f"optimiser.precision={arguments.precision}",
        f"optimiser.epochs={arguments.steps + 1}",
        "optimiser.milestones=[]",
    ]
    return load_recipe("folder", overrides)


def drawn_split(root: Path, recipe: Recipe) -> Split:
    """As many drawn people as one batch takes, so that an epoch is a step."""
    config = SyntheticSet(
        identities=recipe.batch.identities,
        height=recipe.preprocessing.height,
        width=recipe.preprocessing.width,
    )
    write_folder(config, root)
    train = tuple(read_folder(root))
    return Split("0", train, (), (), "drawn")


def one_round(
    recipe: Recipe, split: Split, folder: RunFolder, arguments: argparse.Namespace
) -> tuple[float, float]:
    """Frames a second of the loop and of the bare passes, one after the other.

    Both begin with a step that is not timed.
    """
    clock = Clock()
    trainer = Trainer(Job(recipe, split, {}, device=arguments.device), folder, listener=clock)
    trainer.run()
    batch = recipe.batch
    frames = arguments.steps * batch.identities * batch.tracklets * batch.frames
    loop = frames / (clock.ended[-1] - clock.ended[0])
    return loop, frames / bare_seconds(trainer, arguments.steps)


def bare_seconds(trainer: Trainer, steps: int) -> float:
    """Seconds of forward and backward passes over batches in memory."""
    batches = [next(trainer.loader.epoch(epoch)) for epoch in range(steps + 1)]
    began = 0.0
    for number, batch in enumerate(batches):
        if number == 1:
            began = time.perf_counter()
        bare_step(trainer, batch.clips, batch.labels)
    return time.perf_counter() - began


def bare_step(trainer: Trainer, clips: Tensor, labels: Tensor) -> None:
    """One forward and backward pass, waited for."""
    learner, device = trainer.learner, trainer.device
    learner.zero_grad(set_to_none=True)
    precision = trainer.precision
    with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
        learned = learner(clips.to(device))
    encoded = learned.encoded
    terms = total_loss(
        trainer.recipe.loss,
        encoded.embeddings,
        learned.logits,
        labels.to(device),
        encoded.attention,
    )
    terms.total.backward()  # type: ignore[no-untyped-call]
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_of(recipe: Recipe, frames: int) -> int:
    """Peak memory of two bare steps, bytes: of the GPU where there is one, else of the process."""
    recipe = replace(recipe, batch=replace(recipe.batch, identities=2, frames=frames))
    with TemporaryDirectory() as folder:
        split = drawn_split(Path(folder) / "tracklets", recipe)
        trainer = Trainer(Job(recipe, split, {}), RunFolder(Path(folder) / "run"))
        bare_seconds(trainer, steps=1)
    if trainer.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    # Not getrusage: its peak is that of the process that started this one, where that was larger.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024


def peak_per_frame(arguments: argparse.Namespace) -> float:
    """Bytes that one more frame in a batch takes."""
    few, many = 2, 10  # frames of each of the four clips
    peaks = []
    for frames in (few, many):
        command = [sys.executable, "-m", "bench.train", "--peak-of", str(frames)]
        command += ["--backbone", arguments.backbone, "--precision", arguments.precision]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(json.loads(answer.stdout.splitlines()[-1])["peak_bytes"])
    return float(peaks[1] - peaks[0]) / (4 * (many - few))


def print_table(recipe: Recipe, rounds: list[tuple[float, float]], peak: float) -> None:
    """The table, as docs/performance.md shows it."""
    loops, bares = zip(*rounds, strict=True)
    ratio = statistics.median(loop / bare for loop, bare in rounds)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    size = f"{recipe.preprocessing.height}x{recipe.preprocessing.width}"
    print(
        f"{recipe.network.backbone} at {size}, {recipe.optimiser.precision}: {len(rounds)} rounds"
    )
    print("| | frames a second (median) | of bare |\n|---|---|---|")
    print(f"| bare forward and backward | {statistics.median(bares):.1f} | 1 |")
    print(f"| the whole loop | {statistics.median(loops):.1f} | {ratio:.3f} |")
    print(f"\npeak memory a frame: {peak / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
