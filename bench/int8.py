"""What 8 bits cost and gain on a CPU: time, distance from fp32, and who is found, side by side.

    .venv/bin/python -m bench.int8 --data WARD --data MARKET
    .venv/bin/python -m bench.int8 --nncf       # also OpenVINO's own quantiser, where installed
    .venv/bin/python -m bench.int8 --full-size  # 256x128 and random weights: times alone

All ways run in OpenVINO and are calibrated on the same drawn people. Ways take turns within each
round, so that a machine that slows down slows down all of them; medians over rounds, of which each
ratio is taken within its own. Tested are people of each folder whom the checkpoint never saw, and
drawn ones. To see a processor without instructions for 8 bits, set
ONEDNN_MAX_CPU_ISA=AVX512_CORE; bf16 is emulated there and left out.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    untrained_checkpoint,
)
from model.cores import available_cores
from model.datasets.layouts import fingerprint_dataset, read_dataset
from model.datasets.presets import Preset, preset_set
from model.embedder import Embedder, TrackletEmbedding, choose_device, choose_precision
from model.evaluation import (
    EmbedsClips,
    compare,
    embed_tracklets,
    plan_comparisons,
    tested_tracklets,
    tracklet_name,
)
from model.evaluation_plan import EvaluationTask, plan_units
from model.frames import Clip
from model.measures import average_measures
from model.openvino_runtime import OpenVinoRuntime, build_graph
from model.quantisation import (
    Sample,
    choose_calibration,
    compare_models,
    drawn_samples,
    quantise_checkpoint,
)

FRAMES = 15
PRESETS: tuple[Preset, ...] = ("easy", "occluded", "blur", "clutter", "full")
PEOPLE, SEED = 80, 1004  # neither trained nor calibrated on
Vectors = Mapping[str, NDArray[np.float32]]
# What is neither a convolution nor between two: our own quantiser leaves it in float32, too.
_TAIL = ["Subtract", "Multiply", "Divide", "ReduceSum", "ReduceMean", "Transpose", "Softmax"]


class NncfEmbedder:
    """The network as OpenVINO's quantiser makes it.

    Args:
        checkpoint: In float.
        frames: To calibrate on, (N, height, width, 3) uint8.
        preset: "mixed" or "performance".
        fast: Whether biases are corrected the fast way.
    """

    def __init__(self, checkpoint: Checkpoint, frames: Clip, preset: str, *, fast: bool) -> None:
        os.environ["NNCF_CI"] = "1"  # or it tells its makers that it was used
        nncf: Any = import_module("nncf")
        self.preprocessing = checkpoint.preprocessing
        self._network = checkpoint.network
        nncf.set_log_level("ERROR")
        graph = nncf.quantize(
            build_graph(checkpoint.network, checkpoint.preprocessing),
            nncf.Dataset([frame[None] for frame in frames]),
            preset=nncf.QuantizationPreset(preset),
            subset_size=len(frames),
            fast_bias_correction=fast,
            ignored_scope=nncf.IgnoredScope(types=_TAIL, validate=False),
        )
        threads = available_cores()
        self._runtime = OpenVinoRuntime(checkpoint.network, graph, "fp32", threads=threads)

    def embed(
        self, clips: Sequence[Clip], *, with_attention: bool = False
    ) -> list[TrackletEmbedding]:
        """See `model.embedder.Embedder.embed`."""
        made = []
        for clip in clips:
            frames, attention = self._runtime.launch([clip])()
            vector = self._network.embed_tracklets(frames[None])[0].detach().numpy()
            made.append(TrackletEmbedding(vector, attention.numpy() if with_attention else None))
        return made


def make_8_bits(checkpoint: Checkpoint, samples: Sequence[Sample]) -> Checkpoint:
    """Round a checkpoint, and print how long that took."""
    began = time.process_time()
    made = quantise_checkpoint(checkpoint, choose_calibration(samples), {"data": "drawn people"})
    print(f"made in {time.process_time() - began:.0f} s of processor time")
    return made


def all_ways(
    checkpoint: Checkpoint, made: Checkpoint, nncf_frames: Clip | None = None
) -> Iterator[tuple[str, EmbedsClips]]:
    """Name and embedder of each way, the exact one first."""
    yield "fp32", Embedder(checkpoint, device="cpu", precision="fp32", runtime="openvino")
    if choose_precision("auto", choose_device("cpu")) == "bf16" and not _is_held_back():
        yield "bf16", Embedder(checkpoint, device="cpu", precision="bf16", runtime="openvino")
    yield "8 bits", Embedder(made, device="cpu", runtime="openvino")
    if nncf_frames is not None:
        for preset in ("mixed", "performance"):
            for fast in (True, False):
                name = f"NNCF {preset}, {'fast' if fast else 'full'} bias correction"
                yield name, NncfEmbedder(checkpoint, nncf_frames, preset, fast=fast)


def _is_held_back() -> bool:
    return "ONEDNN_MAX_CPU_ISA" in os.environ


def measure_times(ways: Mapping[str, EmbedsClips], rounds: int) -> None:
    """Print milliseconds for one tracklet."""
    first = next(iter(ways.values()))
    size = (FRAMES, first.preprocessing.height, first.preprocessing.width, 3)
    clip = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, embedder in ways.items():
            began = time.perf_counter()
            embedder.embed([clip])
            if number:  # the first one compiles
                times[name].append(time.perf_counter() - began)
    print(
        f"\n| {size[1]}x{size[2]} | one tracklet, ms | times fp32 | times bf16 |\n|---|---|---|---|"
    )
    for name, own in times.items():
        ratios = [_ratio(times.get(other), own) for other in ("fp32", "bf16")]
        print(f"| {name} | {1000 * statistics.median(own):.0f} | {' | '.join(ratios)} |")


def _ratio(others: Sequence[float] | None, own: Sequence[float]) -> str:
    if others is None:
        return ""
    return f"{statistics.median(b / a for a, b in zip(own, others, strict=True)):.2f}"


def measure_folder(ways: Mapping[str, EmbedsClips], source: Path, data: Path) -> None:
    """Print who is found among people whom the checkpoint never saw."""
    dataset = read_dataset(data)
    task = EvaluationTask(
        source, dataset, fingerprint_dataset(dataset), Path("unused"), splits=("unseen",)
    )
    [unit] = plan_units(task)
    tracklets = tested_tracklets([unit.split])
    print(f"\n| {dataset.layout}, {len(tracklets)} tracklets | off by | at most | rank-1 | mAP |")
    print("|---|---|---|---|---|")
    exact: Vectors = {}
    for name, embedder in ways.items():
        with closing(embed_tracklets(embedder, tracklets)) as stream:
            vectors = {tracklet_name(one): vector for one, vector in stream}
        exact = exact or vectors
        errors = [_error(vectors[one], exact[one]) for one in vectors]
        measures = average_measures(
            [compare(one, vectors)[0] for one in plan_comparisons(unit.split, task.protocol)]
        )
        _print_row(name, errors, measures.rank(1), measures.mean_average_precision)


def measure_drawn(checkpoint: Checkpoint, made: Checkpoint) -> None:
    """Print who is found among drawn people, of whom not nearly all are."""
    print("\n| drawn | frames | off by | at most | rank-1, fp32 / 8 bits | mAP, fp32 / 8 bits |")
    print("|---|---|---|---|---|---|")
    for preset in PRESETS:
        drawn = preset_set(preset, identities=PEOPLE, frames_max=28, seed=SEED)
        samples = drawn_samples(checkpoint.preprocessing, drawn)
        middle = [replace(one, clip=one.clip[len(one.clip) // 2 :][:1]) for one in samples]
        for frames, chosen in ((FRAMES, samples), (1, middle)):
            found = compare_models(checkpoint, made, chosen)
            pairs = (
                (found.rank_1_before, found.rank_1),
                (found.mean_average_precision_before, found.mean_average_precision),
            )
            shares = [f"{100 * (a or 0):.1f} / {100 * (b or 0):.1f}" for a, b in pairs]
            print(
                f"| {preset} | {frames} | {found.error:.3f} | {found.largest_error:.3f} | "
                f"{' | '.join(shares)} |",
                flush=True,
            )


def _error(made: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(made - exact) / np.linalg.norm(exact))


def _print_row(name: str, errors: Sequence[float], *shares: float) -> None:
    cells = [f"{statistics.mean(errors):.4f}", f"{max(errors):.4f}"]
    cells += [f"{100 * share:.2f}" for share in shares]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, action="append", default=[], help="repeatable")
    parser.add_argument("--model", default="bundled", help="a checkpoint in float")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--nncf", action="store_true", help="OpenVINO's quantiser beside ours")
    parser.add_argument("--full-size", action="store_true", help="256x128, random weights")
    arguments = parser.parse_args()
    source = find_checkpoint(arguments.model)
    checkpoint = untrained_checkpoint() if arguments.full_size else load_checkpoint(source)
    samples = drawn_samples(checkpoint.preprocessing)
    made = make_8_bits(checkpoint, samples)
    frames = choose_calibration(samples) if arguments.nncf else None
    ways = dict(all_ways(checkpoint, made, frames))
    measure_times(ways, arguments.rounds)
    if arguments.full_size:
        return
    measure_drawn(checkpoint, made)
    for data in arguments.data:
        measure_folder(ways, source, data)


if __name__ == "__main__":
    main()
