"""How long the network takes for one 15-frame tracklet and for batches of them, side by side.

    .venv/bin/python -m bench.embed

Every way to run the network takes its turn in each round, so that a machine that slows down slows
down all of them; medians over rounds, ratios against eager fp32 within the same round. Peers that
are not installed, and precisions that the processor emulates, are left out with a word (--emulated
keeps the latter).
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.checkpoint import untrained_checkpoint
from model.embedder import Embedder, choose_precision, fold_batch_norm
from model.frames import Clip, normalise
from model.network import TrackletNet

FRAMES = 15
GFLOP_PER_FRAME = 2 * 4.053
Run = Callable[[Clip], object]


class FrameNetwork(nn.Module):
    """What the peers are given: normalised frames in, frame embeddings out."""

    def __init__(self, network: TrackletNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        """(N, 3, 256, 128) float32 to (N, 2048)."""
        return self.network.embed_frames(frames)[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tracklets", type=int, default=4, help="tracklets in the large batch")
    parser.add_argument("--emulated", action="store_true", help="also bf16 where it is emulated")
    arguments = parser.parse_args()
    clip = np.random.default_rng(0).integers(0, 256, (FRAMES, 256, 128, 3), dtype=np.uint8)
    batch = np.concatenate([clip] * arguments.tracklets)
    with TemporaryDirectory() as folder, torch.inference_mode():
        ways = dict(all_ways(Path(folder), emulated=arguments.emulated))
        check_agreement(ways, clip)
        one = measure(ways, clip, arguments.rounds)
        many = measure(ways, batch, max(arguments.rounds // 2, 3))
    print_table(one, many, arguments.tracklets)


def all_ways(folder: Path, *, emulated: bool) -> Iterator[tuple[str, Run]]:
    """Name and function of each way; functions take a (T, 256, 128, 3) uint8 clip."""
    checkpoint = untrained_checkpoint()
    network = checkpoint.network
    tame(network)

    def prepared(clip: Clip) -> Tensor:
        return normalise(torch.from_numpy(clip), checkpoint.preprocessing)

    yield "eager fp32", lambda clip: network.embed_frames(prepared(clip).contiguous())[0].numpy()
    fast = TrackletNet(network.config).eval()
    fast.load_state_dict(network.state_dict())
    fast = fast.to(memory_format=torch.channels_last)
    yield "channels-last fp32", lambda clip: fast.embed_frames(prepared(clip))[0].numpy()
    for precision in ("fp32", "bf16"):
        if precision == "bf16" and not (emulated or native_bf16()):
            print("left out: bf16, which this processor emulates")
            continue
        embedder = Embedder(checkpoint, device="cpu", precision=precision)
        default = " (the default here)" if precision == choose_default() else ""
        yield f"embedder {precision}{default}", partial(embed_one, embedder)
    yield from compiled(network, prepared, emulated=emulated)
    yield from peers(network, prepared, folder, emulated=emulated)


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


def choose_default() -> str:
    """What `auto` means on this processor."""
    return choose_precision("auto", torch.device("cpu"))


def compiled(
    network: TrackletNet, prepared: Callable[[Clip], Tensor], *, emulated: bool
) -> Iterator[tuple[str, Run]]:
    """torch.compile with frozen weights; needs a C++ compiler at run time."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and not (emulated or native_bf16()):
            continue
        backbone = fold_batch_norm(network.backbone).to(dtype)
        backbone = backbone.to(memory_format=torch.channels_last)
        whole = TrackletNet(network.config).eval()
        whole.backbone = backbone
        function = torch.compile(whole.embed_frames)

        def run(
            clip: Clip,
            function: Callable[[Tensor], tuple[Tensor, Tensor]] = function,
            dtype: torch.dtype = dtype,
        ) -> object:
            return function(prepared(clip).to(dtype))[0].numpy()

        name = "bf16" if dtype == torch.bfloat16 else "fp32"
        yield f"torch.compile, frozen, {name}", run


def peers(
    network: TrackletNet, prepared: Callable[[Clip], Tensor], folder: Path, *, emulated: bool
) -> Iterator[tuple[str, Run]]:
    """OpenVINO and ONNX Runtime, where installed."""
    example = torch.zeros(FRAMES, 3, 256, 128)
    module = FrameNetwork(network).eval()
    if find_spec("openvino") is None:
        print("left out: OpenVINO, which is not installed")
    else:
        yield from openvino_ways(module, prepared, example, emulated=emulated)
    if find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
        print("left out: ONNX Runtime, which is not installed")
        return
    import onnxruntime

    path = folder / "network.onnx"
    frames = torch.export.Dim("frames", min=2, max=4096)
    torch.onnx.export(
        module, (example,), path, dynamo=True, dynamic_shapes=({0: frames},), verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    yield (
        "ONNX Runtime fp32",
        lambda clip: session.run(None, {name: prepared(clip).contiguous().numpy()})[0],
    )


def openvino_ways(
    module: nn.Module, prepared: Callable[[Clip], Tensor], example: Tensor, *, emulated: bool
) -> Iterator[tuple[str, Run]]:
    """OpenVINO in fp32 and bf16."""
    import openvino

    converted = openvino.convert_model(module, example_input=example)
    converted.reshape([-1, 3, 256, 128])
    core = openvino.Core()
    for hint, name in (("f32", "fp32"), ("bf16", "bf16")):
        if name == "bf16" and not (emulated or native_bf16()):
            continue
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = core.compile_model(converted, "CPU", options)

        def run(clip: Clip, request: Any = request) -> object:
            return request(prepared(clip).contiguous().numpy())[0]

        yield f"OpenVINO {name}", run


def check_agreement(ways: dict[str, Run], clip: Clip) -> None:
    """Refuse to time a way that computes something else."""
    expected = tracklet_embedding(ways["eager fp32"](clip))
    for name, run in ways.items():
        got = tracklet_embedding(run(clip))
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        limit = 2e-2 if "bf16" in name else 1e-3
        if not error < limit:
            raise SystemExit(f"{name}: expected a relative error under {limit}, got {error:.1e}")


def tracklet_embedding(result: Any) -> Any:
    """(D,) of whatever a way returns."""
    return result[0].embedding if isinstance(result, list) else result.mean(axis=0)


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


def print_table(one: dict[str, list[float]], many: dict[str, list[float]], tracklets: int) -> None:
    """Markdown, ready for docs/performance.md."""
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"\n{platform.machine()}, {capability}, {torch.get_num_threads()} threads, "
        f"torch {version('torch')}, Python {platform.python_version()}; "
        f"median of {len(one['eager fp32'])} rounds\n"
    )
    print(f"| way | one tracklet, s | times eager fp32 | GFLOP/s | batch of {tracklets}, s each |")
    print("|---|---|---|---|---|")
    for name, seconds in one.items():
        ratio = statistics.median(
            base / ours for base, ours in zip(one["eager fp32"], seconds, strict=True)
        )
        median = statistics.median(seconds)
        each = statistics.median(many[name]) / tracklets
        rate = GFLOP_PER_FRAME * FRAMES / median
        print(f"| {name} | {median:.3f} | {ratio:.2f} | {rate:.0f} | {each:.3f} |")


if __name__ == "__main__":
    main()
