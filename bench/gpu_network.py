"""Ways to run the network on a GPU: each is timed once it gives what eager float32 gives."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.embed import FRAMES, tame
from bench.gpu_device import MATRIX_RATE, ROTATED, Plan, Rates, Row, check, median_ms, tell_failure
from model.checkpoint import Checkpoint, make_checkpoint, untrained_checkpoint
from model.embedder import Embedder
from model.frames import Clip, Preprocessing, normalise
from model.network import NetworkConfig, TrackletNet

# A way that is further from eager float32 than this, relative to its length, computes something
# else. TF32 keeps 10 bits of each factor, bf16 keeps 7.
LIMITS = {"fp32": 1e-3, "tf32": 5e-3, "bf16": 2e-2}

Run = Callable[[Tensor], Tensor]  # frames (B * T, height, width, 3) uint8 to embeddings (B, D)


class Way(NamedTuple):
    """One way to run the network; its precision decides how far it may be from float32."""

    name: str
    precision: Literal["fp32", "tf32", "bf16"]
    run: Run
    is_from_host: bool = False  # its frames lie in the host's memory


def make_ways(checkpoint: Checkpoint, device: str) -> Iterator[Way]:
    """The network as it is, as `Embedder` runs it, and as it might."""
    eager, how = copy.deepcopy(checkpoint.network).to(device), checkpoint.preprocessing
    exact = Embedder(checkpoint, device=device, precision="fp32", runtime="torch")
    rough = Embedder(checkpoint, device=device, precision="bf16", runtime="torch")
    run = pass_through(eager, lambda frames: normalise(frames, how).contiguous())
    yield Way("eager fp32", "fp32", run)
    run = pass_through(exact._network, lambda frames: normalise(frames, how))
    yield Way("Embedder fp32", "fp32", run)
    if device == "cuda":
        yield Way("Embedder fp32, TF32 convolutions", "tf32", run)
    run = pass_through(rough._network, lambda frames: normalise(frames, how).bfloat16())
    yield Way("Embedder bf16", "bf16", run)
    name = "Embedder.embed bf16, from and to the host"
    yield Way(name, "bf16", lambda frames: embed(rough, split(frames)), is_from_host=True)
    if device == "cuda":
        # `normalise` sends its constants to the card at each call, which no graph can hold.
        mean, std = (torch.tensor(one, device=device) for one in (how.mean, how.std))
        run = pass_through(
            rough._network,
            lambda frames: ((frames.float() / 255 - mean) / std).permute(0, 3, 1, 2).bfloat16(),
        )
        yield Way("bf16, CUDA graph", "bf16", record(run))
        torch.compiler.reset()  # or what was compiled for another size counts towards the limit
        compiled: Run = torch.compile(run, dynamic=False)
        yield Way("bf16, torch.compile", "bf16", compiled)
        yield Way("bf16, torch.compile, CUDA graph", "bf16", record(compiled))


def pass_through(network: TrackletNet, prepare: Run) -> Run:
    """From uint8 frames to tracklet embeddings; ``prepare`` makes what the backbone takes."""

    def run(frames: Tensor) -> Tensor:
        embeddings, _ = network.embed_frames(prepare(frames))  # (B * T, D)
        return network.embed_tracklets(embeddings.view(-1, FRAMES, network.dim))

    return run


def split(frames: Tensor) -> list[Clip]:
    """Clips of T frames each, on the host."""
    return list(frames.view(-1, FRAMES, *frames.shape[1:]).numpy())


def embed(embedder: Embedder, clips: Sequence[Clip]) -> Tensor:
    """(B, D) float32."""
    return torch.from_numpy(np.stack([one.embedding for one in embedder.embed(clips)]))


def record(run: Run) -> Run:
    """Record the kernels once for each shape, and replay them together from then on.

    What is returned is overwritten by the next call.
    """

    @cache
    def listen(shape: torch.Size) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given, graph = torch.zeros(shape, dtype=torch.uint8, device="cuda"), torch.cuda.CUDAGraph()
        # What happens only once, such as choosing algorithms, must not be recorded.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                run(given)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            result = run(given)
        return graph, given, result

    def replay(frames: Tensor) -> Tensor:
        graph, given, result = listen(frames.shape)
        given.copy_(frames)
        graph.replay()
        return result

    return replay


@torch.no_grad()  # compiling sees to the versions of tensors, which those of inference mode lack
def measure_network(
    plan: Plan, rates: Rates, make: Callable[[Checkpoint, str], Iterable[Way]] = make_ways
) -> Iterator[Row]:
    """A row for each way and size, without times where it failed or computes something else."""
    for size in plan.sizes:
        checkpoint = draw_checkpoint(plan, Preprocessing(*size))
        inputs, expected = draw_inputs(plan, checkpoint)
        flop = count_operations(checkpoint)
        for way in make(checkpoint, plan.device):
            row: Row = {"frames": f"{size[0]}x{size[1]}", "way": way.name}
            place = "cpu" if way.is_from_host else plan.device
            sets = {count: [one.to(place) for one in some] for count, some in inputs.items()}
            torch.backends.cudnn.allow_tf32 = way.precision == "tf32"
            with tell_failure(row):
                row |= check(worst_error(way.run, sets, expected), LIMITS[way.precision])
                if "differs" not in row:
                    times = {count: median_ms(way.run, some, plan) for count, some in sets.items()}
                    row |= speeds(times, flop, rates.get(MATRIX_RATE, float("nan")))
            torch.backends.cudnn.allow_tf32 = True  # torch's default
            torch.cuda.empty_cache()
            yield row


def draw_checkpoint(plan: Plan, preprocessing: Preprocessing, seed: int = 0) -> Checkpoint:
    """Seeded random weights, tamed."""
    network = untrained_checkpoint(seed, NetworkConfig(backbone=plan.backbone)).network
    tame(network)
    return make_checkpoint(network, preprocessing)


def draw_clips(preprocessing: Preprocessing, tracklets: int) -> Clip:
    """Coloured patches under noise, (tracklets, T, height, width, 3) uint8."""
    # Noise alone would have about the same embedding everywhere, and hide a way that mixes it up.
    rng = np.random.default_rng(0)
    height, width = preprocessing.height, preprocessing.width
    patches = rng.integers(0, 256, (tracklets, 1, 16, 8, 3))
    patches = patches.repeat(height // 16, axis=2).repeat(width // 8, axis=3)
    noise = rng.integers(-12, 13, (tracklets, FRAMES, height, width, 3))
    clips: Clip = np.clip(patches + noise, 0, 255).astype(np.uint8)
    return clips


def draw_inputs(plan: Plan, checkpoint: Checkpoint) -> tuple[dict[int, list[Tensor]], Tensor]:
    """Frames on the device, and what becomes of the first ones on the CPU.

    Returns:
        By tracklets in the batch, ROTATED sets of frames (B * T, height, width, 3) uint8, the first
        tracklet of set i the same in every batch; and of those the embeddings (ROTATED, D).
    """
    preprocessing, network = checkpoint.preprocessing, checkpoint.network
    clips = torch.from_numpy(draw_clips(preprocessing, ROTATED))
    inputs = {1: list(clips.to(plan.device))}
    for count in plan.batches:
        shape = (ROTATED, count * FRAMES, *clips.shape[2:])
        frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        frames[:, :FRAMES] = clips
        inputs[count] = list(frames.to(plan.device))
    run = pass_through(network, lambda frames: normalise(frames, preprocessing).contiguous())
    return inputs, torch.cat([run(clip) for clip in clips])


def count_operations(checkpoint: Checkpoint) -> int:
    """Floating-point operations for one frame."""
    frame = torch.zeros(1, 3, checkpoint.preprocessing.height, checkpoint.preprocessing.width)
    with FlopCounterMode(display=False) as counter:
        checkpoint.network.embed_frames(frame)
    return int(counter.get_total_flops())


def worst_error(run: Run, inputs: dict[int, list[Tensor]], expected: Tensor) -> float:
    """Largest relative error among the first tracklets of all sets; NaN stays NaN."""
    found = [torch.stack([run(frames)[0].cpu() for frames in sets]) for sets in inputs.values()]
    errors = (torch.stack(found) - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(errors.max())


def speeds(times: dict[int, float], flop: int, matrix_rate: float) -> Row:
    """Rates of milliseconds by tracklets in the batch, and shares of the matrix rate, TFLOP/s."""
    count = min(times.keys() - {1}, key=lambda count: times[count] / count)
    frames = count * FRAMES / times[count] * 1000  # a second
    return {
        "one tracklet, ms": times[1],
        "one, % of the matrix rate": 100 * FRAMES * flop / times[1] / 1e9 / matrix_rate,
        "frames a second": frames,
        "in batches of": count * FRAMES,
        "TFLOP/s": frames * flop / 1e12,
        "% of the matrix rate": 100 * frames * flop / 1e12 / matrix_rate,
    }
