"""How long the network takes for one 15-frame tracklet and for batches of them, side by side.

    .venv/bin/python -m bench.embed
    .venv/bin/python -m bench.embed --size bundled
    .venv/bin/python -m bench.embed --device cuda

Every way to run the network takes its turn in each round, so that a machine that slows down slows
down all of them; medians over rounds, ratios within the same round. Peers that are not installed,
and precisions that the processor emulates, are left out with a word (--emulated keeps the latter).
The first call counts from the network as it is loaded: conversion, compilation and all.
"""

import argparse
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model.checkpoint import (
    BUNDLED_FILE,
    Checkpoint,
    load_checkpoint,
    make_checkpoint,
    untrained_checkpoint,
)
from model.cores import available_cores
from model.cuda_runtime import CudaRuntime
from model.embedder import Embedder, choose_precision, fold_batch_norm
from model.frames import Clip, Preprocessing, normalise
from model.network import TrackletNet
from model.runtimes import choose_runtime

FRAMES = 15
BARE = "OpenVINO bf16, bare"
BARE_FP32 = "OpenVINO fp32, bare"
GOAL = 1.05
Run = Callable[[Clip], object]


class Subject(NamedTuple):
    """What is measured."""

    checkpoint: Checkpoint
    emulated: bool
    threads: int

    @property
    def network(self) -> TrackletNet:
        """Of the checkpoint."""
        return self.checkpoint.network

    def prepare(self, clip: Clip) -> Tensor:
        """(T, height, width, 3) uint8 to what the network takes."""
        return normalise(torch.from_numpy(clip), self.checkpoint.preprocessing)

    def precisions(self) -> tuple[Literal["fp32", "bf16"], ...]:
        """Those worth measuring here."""
        return ("fp32", "bf16") if self.emulated or native_bf16() else ("fp32",)


class FrameNetwork(nn.Module):
    """What the peers are given: normalised frames in, frame embeddings out."""

    def __init__(self, network: TrackletNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        """(N, 3, height, width) float32 to (N, D)."""
        return self.network.embed_frames(frames)[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tracklets", type=int, default=4, help="tracklets in the large batch")
    parser.add_argument("--size", choices=("256x128", "128x64", "bundled"), default="256x128")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--emulated", action="store_true", help="also bf16 where it is emulated")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    subject = Subject(choose_checkpoint(arguments.size), arguments.emulated, arguments.threads)
    if arguments.device == "cuda":
        measure_card(subject, arguments.rounds)
        return
    clip = draw_clip(subject.checkpoint.preprocessing)
    batch = np.concatenate([clip] * arguments.tracklets)
    with TemporaryDirectory() as folder, torch.inference_mode():
        ways, first = make_ways(subject, Path(folder), clip)
        check_agreement(subject, ways, clip)
        one = measure(ways, clip, arguments.rounds)
        many = measure(ways, batch, max(arguments.rounds // 2, 3))
    print_table(subject, one, many, first, arguments.tracklets)
    print_goal(one)


def choose_checkpoint(size: str) -> Checkpoint:
    """The weights that ship, or random ones for frames of another size."""
    if size == "bundled":
        return load_checkpoint(BUNDLED_FILE)
    height, width = map(int, size.split("x"))
    network = untrained_checkpoint().network
    tame(network)
    return make_checkpoint(network, Preprocessing(height, width))


def draw_clip(size: Preprocessing) -> Clip:
    """(T, height, width, 3) uint8."""
    shape = (FRAMES, size.height, size.width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def make_ways(
    subject: Subject, folder: Path, clip: Clip
) -> tuple[dict[str, Run], dict[str, float]]:
    """Each way that works here, and seconds from the loaded network to its first result."""
    ways, first = {}, {}
    started = time.perf_counter()
    for name, run in all_ways(subject, folder):
        try:
            run(clip)
        except Exception as error:
            # Whatever a peer lacks, the others are measured all the same.
            if not name.startswith(("torch.", "ONNX")):
                raise
            print(f"left out: {name}: {str(error).splitlines()[0]}")
        else:
            ways[name], first[name] = run, time.perf_counter() - started
        started = time.perf_counter()
    return ways, first


def all_ways(subject: Subject, folder: Path) -> Iterator[tuple[str, Run]]:
    """Name and function of each way; functions take a (T, height, width, 3) uint8 clip."""
    network, prepare = subject.network, subject.prepare
    yield "eager fp32", lambda clip: network.embed_frames(prepare(clip).contiguous())[0].numpy()
    fast = TrackletNet(network.config).eval()
    fast.load_state_dict(network.state_dict())
    fast = fast.to(memory_format=torch.channels_last)
    yield "channels-last fp32", lambda clip: fast.embed_frames(prepare(clip))[0].numpy()
    yield from embedders(subject)
    yield from traced(subject)
    yield from compiled(subject)
    if find_spec("openvino") is None:
        print("left out: OpenVINO, which is not installed")
    else:
        yield from openvino_ways(subject)
    yield from onnx_ways(subject, folder)


def embedders(subject: Subject) -> Iterator[tuple[str, Run]]:
    """What the service runs, in each runtime."""
    default = (choose_runtime("auto", torch.device("cpu"), choose_default()), choose_default())
    for runtime in ("torch", "openvino"):
        if find_spec(runtime) is None:
            continue
        for precision in subject.precisions():
            embedder = Embedder(
                subject.checkpoint,
                device="cpu",
                precision=precision,
                runtime=runtime,
                threads=subject.threads,
            )
            mark = " (the default here)" if (runtime, precision) == default else ""
            yield f"Embedder, {runtime} {precision}{mark}", partial(embed_one, embedder)


def embed_one(embedder: Embedder, clip: Clip) -> object:
    """What the service does."""
    return embedder.embed([clip])


def tame(network: TrackletNet) -> None:
    """Scale random weights so that activations stay in the range of trained ones."""
    for name, module in network.named_modules():
        if name.endswith("bn3") and isinstance(module, nn.BatchNorm2d):
            module.weight.data.fill_(0.3)


def native_bf16() -> bool:
    """Whether the processor multiplies bf16 itself."""
    return choose_default() == "bf16"


def choose_default() -> Literal["fp32", "bf16", "fp16"]:
    """What `auto` means on this processor."""
    return choose_precision("auto", torch.device("cpu"))


def fold(network: TrackletNet, dtype: torch.dtype) -> TrackletNet:
    """A network as `Embedder` has it."""
    whole = TrackletNet(network.config).eval()
    whole.load_state_dict(network.state_dict())
    whole.backbone = fold_batch_norm(network.backbone).to(dtype)
    whole.backbone = whole.backbone.to(memory_format=torch.channels_last)
    return whole


def traced(subject: Subject) -> Iterator[tuple[str, Run]]:
    """torch.jit with frozen weights, which PyTorch calls deprecated; needs nothing at run time."""
    size = subject.checkpoint.preprocessing
    for precision in subject.precisions():
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        backbone = fold(subject.network, dtype).backbone
        example = torch.zeros(FRAMES, 3, size.height, size.width, dtype=dtype)
        example = example.to(memory_format=torch.channels_last)
        for kind in ("frozen", "optimised"):
            if kind == "optimised" and precision == "bf16":
                continue  # its layers of oneDNN take no bf16
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                jit: Any = torch.jit
                function = jit.freeze(jit.trace(backbone, example))
                if kind == "optimised":
                    function = jit.optimize_for_inference(function)
            whole = fold(subject.network, dtype)
            whole.backbone = function
            yield f"torch.jit, {kind}, {precision}", partial(run_network, whole, subject, dtype)


def run_network(network: TrackletNet, subject: Subject, dtype: torch.dtype, clip: Clip) -> object:
    """Frame embeddings of a network whose backbone takes a type."""
    return network.embed_frames(subject.prepare(clip).to(dtype))[0].numpy()


def compiled(subject: Subject) -> Iterator[tuple[str, Run]]:
    """torch.compile with frozen weights; needs a C++ compiler at run time."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    for precision in subject.precisions():
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        function = torch.compile(fold(subject.network, dtype).embed_frames)

        def run(
            clip: Clip,
            function: Callable[[Tensor], tuple[Tensor, Tensor]] = function,
            dtype: torch.dtype = dtype,
        ) -> object:
            return function(subject.prepare(clip).to(dtype))[0].numpy()

        yield f"torch.compile, frozen, {precision}", run


def openvino_ways(subject: Subject) -> Iterator[tuple[str, Run]]:
    """OpenVINO as a plain script has it: the traced network, frames normalised before it."""
    import openvino

    size = subject.checkpoint.preprocessing
    core = openvino.Core()
    for precision, name in (("fp32", BARE_FP32), ("bf16", BARE)):
        if precision not in subject.precisions():
            continue
        example = torch.zeros(FRAMES, 3, size.height, size.width)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it traces, which PyTorch calls deprecated
            converted = openvino.convert_model(
                FrameNetwork(subject.network).eval(), example_input=example
            )
        converted.reshape([-1, 3, size.height, size.width])
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": subject.threads,
        }
        request = core.compile_model(converted, "CPU", options)

        def run(clip: Clip, request: Any = request) -> object:
            return request(subject.prepare(clip).contiguous().numpy())[0]

        yield name, run


def onnx_ways(subject: Subject, folder: Path) -> Iterator[tuple[str, Run]]:
    """ONNX Runtime, where installed."""
    if find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
        print("left out: ONNX Runtime, which is not installed")
        return
    import onnxruntime

    path, size = folder / "network.onnx", subject.checkpoint.preprocessing
    frames = torch.export.Dim("frames", min=2, max=4096)
    torch.onnx.export(
        FrameNetwork(subject.network).eval(),
        (torch.zeros(FRAMES, 3, size.height, size.width),),
        path,
        dynamo=True,
        dynamic_shapes=({0: frames},),
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = subject.threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    yield (
        "ONNX Runtime fp32",
        lambda clip: session.run(None, {name: subject.prepare(clip).contiguous().numpy()})[0],
    )


def check_agreement(subject: Subject, ways: dict[str, Run], clip: Clip) -> None:
    """Refuse to time a way that computes something else."""
    expected = tracklet_embedding(subject, ways["eager fp32"](clip))
    for name, run in ways.items():
        got = tracklet_embedding(subject, run(clip))
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        limit = 2e-2 if "bf16" in name else 1e-3
        if not error < limit:
            raise SystemExit(f"{name}: expected a relative error under {limit}, got {error:.1e}")


def tracklet_embedding(subject: Subject, result: Any) -> Any:
    """(D,) of whatever a way returns."""
    if isinstance(result, list):
        return result[0].embedding
    return subject.network.embed_tracklets(torch.tensor(result)[None])[0].numpy()


def measure(ways: dict[str, Run], clip: Clip, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run(clip)
    for _ in range(rounds):
        for name, run in ways.items():
            started = time.perf_counter()
            run(clip)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def print_table(
    subject: Subject,
    one: dict[str, list[float]],
    many: dict[str, list[float]],
    first: dict[str, float],
    tracklets: int,
) -> None:
    """Markdown, ready for docs/performance.md."""
    size = subject.checkpoint.preprocessing
    # At 256x128 a frame is 4.053 GMAC, and all but the head grows with the cells.
    gflop = 2 * 4.053 * FRAMES * size.height * size.width / (256 * 128)
    print(
        f"\n{size.height}x{size.width}, {subject.checkpoint.fingerprint}; "
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{subject.threads} threads, torch {version('torch')}, "
        f"Python {platform.python_version()}; median of {len(one['eager fp32'])} rounds; "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB at most\n"
    )
    batch = f"batch of {tracklets}, s each"
    print(f"| way | one tracklet, s | times eager fp32 | GFLOP/s | {batch} | first call, s |")
    print("|---|---|---|---|---|---|")
    for name, seconds in one.items():
        ratio = median_ratio(one["eager fp32"], seconds)
        median = statistics.median(seconds)
        each = statistics.median(many[name]) / tracklets
        cells = f"{median:.3f} | {ratio:.2f} | {gflop / median:.0f} | {each:.3f}"
        print(f"| {name} | {cells} | {first[name]:.2f} |")


def print_goal(one: dict[str, list[float]]) -> None:
    """The default against OpenVINO alone, whichever precision it has here."""
    [default] = [name for name in one if name.endswith("(the default here)")]
    bare = BARE if "bf16" in default else BARE_FP32
    if bare not in one:
        print(f"\nleft out: the default over {bare}, which was not measured")
        return
    ratio = median_ratio(one[default], one[bare])
    said = "reached" if ratio <= GOAL else "missed"
    print(f"\n{default} over {bare}: {ratio:.3f} (goal: at most {GOAL}, {said})")


def median_ratio(above: list[float], below: list[float]) -> float:
    """Of two ways in the same rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def measure_card(subject: Subject, rounds: int) -> None:
    """What the service runs on a GPU, from the host's memory and back, in each way."""
    clip = draw_clip(subject.checkpoint.preprocessing)
    counts = (1, 4, 8, 34)  # tracklets; 34 fill what is recorded for 512 frames
    print(f"\n{torch.cuda.get_device_name()}, torch {version('torch')}; bf16, {rounds} rounds\n")
    ones = " | ".join(f"{count} tracklets, ms" for count in counts)
    print(f"| way | warm-up, s | {ones} | frames a second | overlapped | MiB held |")
    print("|---|---|" + "---|" * (len(counts) + 3))
    for way in ("cold", "fused", "plain"):
        embedder = Embedder(subject.checkpoint, device="cuda", precision="bf16")
        started = time.perf_counter()
        if way != "cold":
            warm_up_as(embedder, way)
        warm_s = time.perf_counter() - started
        if way != "cold" and embedder._runtime.way != way:  # type: ignore[attr-defined]
            print(f"left out: {way}, which cannot be recorded here")
            continue
        ms = [1000 * time_batch(embedder, [clip] * count, 5 * rounds) for count in counts]
        rate = 1000 * counts[-1] * FRAMES / ms[-1]
        overlapped = time_overlapped(embedder, [clip] * counts[-1], 3 * rounds)
        cells = " | ".join(f"{one:.2f}" for one in ms)
        held = torch.cuda.memory_reserved() / 2**20
        print(f"| {way} | {warm_s:.1f} | {cells} | {rate:.0f} | {overlapped:.0f} | {held:.0f} |")
        del embedder
        torch.cuda.empty_cache()


def warm_up_as(embedder: Embedder, way: str) -> None:
    """Warm up in one way, or plainly where that one fails."""
    runtime = embedder._runtime
    assert isinstance(runtime, CudaRuntime)  # noqa: S101 what a GPU's embedder has
    ways = runtime._make_ways()
    chosen = {name: ways[name] for name in dict.fromkeys((way, "plain")) if name in ways}
    runtime._make_ways = lambda: chosen  # type: ignore[method-assign]
    embedder.warm_up()


def time_batch(embedder: Embedder, clips: list[Clip], times: int) -> float:
    """Seconds of one batch, the median."""
    seconds = []
    for _ in range(times + 2):
        started = time.perf_counter()
        embedder.embed(clips)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def time_overlapped(embedder: Embedder, clips: list[Clip], times: int) -> float:
    """Frames a second where each batch begins before the result of the last is asked for."""
    begun = embedder.begin(clips)
    started = time.perf_counter()
    for _ in range(times):
        following = embedder.begin(clips)
        begun.result()
        begun = following
    begun.result()
    return times * sum(map(len, clips)) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
