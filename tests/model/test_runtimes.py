"""Every runtime gives what the network gives; a GPU's staging is tried on a card that lags."""

import gc
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import cuda_runtime, runtimes
from model.checkpoint import Checkpoint, make_checkpoint, untrained_checkpoint
from model.cuda_runtime import (
    Card,
    CudaRuntime,
    Lanes,
    choose_sizes,
    without_tf32,
)
from model.embedder import Embedder, Precision
from model.errors import DeviceError
from model.frames import Clip, Preprocessing
from model.network import NetworkConfig
from model.openvino_runtime import build_graph
from model.runtimes import choose_runtime

SIZE = Preprocessing(height=64, width=32)
ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make(seed: int = 0, **config: object) -> Checkpoint:
    """A small network whose batch normalisations do something."""
    chosen = NetworkConfig(**{"backbone": "conv5", **config})  # type: ignore[arg-type]
    network = untrained_checkpoint(seed, chosen).network
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
            shift = 0.2 * torch.randn(module.num_features, generator=generator)
            module.running_mean.copy_(shift)
            module.weight.data.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return make_checkpoint(network, SIZE)


def clip(frames: int, seed: int = 0) -> Clip:
    """Patches under noise: noise alone would have about the same embedding everywhere."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (frames, 8, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    noise = rng.integers(-12, 13, (frames, 64, 32, 3))
    drawn: Clip = np.clip(patches + noise, 0, 255).astype(np.uint8)
    return drawn


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def exact(checkpoint: Checkpoint) -> Embedder:
    return Embedder(checkpoint, device="cpu", precision="fp32", runtime="torch")


def test_auto_is_openvino_on_a_cpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda _: object())
    assert choose_runtime("auto", CPU, "bf16") == "openvino"
    assert choose_runtime("auto", CPU, "fp32") == "openvino"
    assert choose_runtime("auto", CPU, "fp16") == "torch"
    assert choose_runtime("auto", CUDA, "bf16") == "torch"
    assert choose_runtime("torch", CPU, "bf16") == "torch"
    monkeypatch.setattr(runtimes, "find_spec", lambda _: None)
    assert choose_runtime("auto", CPU, "bf16") == "torch"


def test_a_runtime_that_is_not_to_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda _: object())
    with pytest.raises(DeviceError, match="expected a CPU and fp32 or bf16 for OpenVINO, got cuda"):
        choose_runtime("openvino", CUDA, "bf16")
    with pytest.raises(DeviceError, match="got cpu and fp16"):
        choose_runtime("openvino", CPU, "fp16")
    with pytest.raises(DeviceError, match=r"expected runtime .*, got 'onnx'"):
        choose_runtime("onnx", CPU, "fp32")  # type: ignore[arg-type]
    monkeypatch.setattr(runtimes, "find_spec", lambda _: None)
    with pytest.raises(DeviceError, match=r"expected openvino, got none: .*passerby\[openvino\]"):
        choose_runtime("openvino", CPU, "fp32")


def test_a_runtime_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda _: None)
    with pytest.raises(DeviceError, match="expected openvino, got none"):
        Embedder(make(), device="cpu", precision="fp32", runtime="openvino")


def test_an_embedder_says_what_computes() -> None:
    embedder = exact(make())

    assert (embedder.runtime, embedder.describe()["runtime"]) == ("torch", "torch")
    assert embedder.overlaps is False


def test_threads_are_those_that_were_asked_for() -> None:
    before = torch.get_num_threads()
    try:
        assert Embedder(make(), device="cpu", threads=1).threads == 1
        assert torch.get_num_threads() == 1
        with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
            Embedder(make(), device="cpu", threads=0)
    finally:
        torch.set_num_threads(before)


READINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 3.0, "pool": "mean"},
    {"attention": "mean"},
    {"attention": "l1"},
    {"attention": "none"},
    {"head": 24, "neck": True, "temporal": "agreement", "unit": True},
]


@pytest.fixture
def _openvino() -> None:
    pytest.importorskip("openvino")


@pytest.mark.usefixtures("_openvino")
@pytest.mark.parametrize("config", READINGS, ids=str)
def test_openvino_gives_what_the_network_gives(config: dict[str, Any]) -> None:
    checkpoint, clips = make(**config), [clip(5), clip(1, seed=1)]
    embedder = Embedder(checkpoint, device="cpu", precision="fp32", runtime="openvino")

    got = embedder.embed(clips, with_attention=True)

    for one, right in zip(got, exact(checkpoint).embed(clips, with_attention=True), strict=True):
        assert one.embedding.dtype == np.float32
        assert relative(one.embedding, right.embedding) < 1e-5
        assert one.attention is not None
        assert right.attention is not None
        assert one.attention.shape == right.attention.shape
        assert relative(one.attention, right.attention) < 1e-5


@pytest.mark.usefixtures("_openvino")
@pytest.mark.parametrize("attention", ["softmax", "l1"])
def test_openvino_looks_nowhere_in_particular_where_features_are_flat(attention: str) -> None:
    """A map without deviation, or without mass, is uniform and not NaN."""
    checkpoint = make(attention=attention)
    [*_, last] = [
        one for one in checkpoint.network.backbone if isinstance(one, torch.nn.BatchNorm2d)
    ]
    last.weight.data.zero_()
    last.bias.data.fill_(-1.0 if attention == "l1" else 2.0)
    embedder = Embedder(checkpoint, device="cpu", precision="fp32", runtime="openvino")

    [result] = embedder.embed([clip(2)], with_attention=True)

    assert result.attention == pytest.approx(1 / 128)
    assert np.isfinite(result.embedding).all()


@pytest.mark.usefixtures("_openvino")
def test_openvino_in_bf16_rounds_the_backbone_and_not_the_attention() -> None:
    """The deeper network: its map is a sum over 2048 channels, which bf16 would round to a step."""
    network = untrained_checkpoint(seed=0).network
    for name, module in network.named_modules():
        if name.endswith("bn3") and isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.fill_(0.3)  # activations in the range of trained ones
    checkpoint, clips = make_checkpoint(network, SIZE), [clip(3)]
    [right] = exact(checkpoint).embed(clips, with_attention=True)
    embedder = Embedder(checkpoint, device="cpu", precision="bf16", runtime="openvino")

    [got] = embedder.embed(clips, with_attention=True)

    assert relative(got.embedding, right.embedding) < 2e-2
    assert got.attention is not None
    assert right.attention is not None
    assert relative(got.attention, right.attention) < 2e-2
    assert got.attention.sum(axis=(1, 2)) == pytest.approx(1, abs=1e-6)


@pytest.mark.usefixtures("_openvino")
def test_fp32_is_never_bf16_unasked() -> None:
    """On a processor that multiplies bf16 OpenVINO would take that by itself."""
    checkpoint = make(head=24)
    [rough] = Embedder(checkpoint, device="cpu", precision="bf16", runtime="openvino").embed(
        [clip(4)]
    )
    [fine] = Embedder(checkpoint, device="cpu", precision="fp32", runtime="openvino").embed(
        [clip(4)]
    )
    [right] = exact(checkpoint).embed([clip(4)])

    assert relative(fine.embedding, right.embedding) < 1e-5
    if torch.cpu.get_capabilities().get("avx512_bf16"):
        assert relative(rough.embedding, right.embedding) > 1e-4


@pytest.mark.usefixtures("_openvino")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_openvino_embeds_a_frame_alike_in_every_company(precision: Precision) -> None:
    embedder = Embedder(make(), device="cpu", precision=precision, runtime="openvino", max_frames=4)
    tracklets = [clip(frames, seed=frames) for frames in (3, 1, 7, 2)]

    together = embedder.embed(tracklets, with_attention=True)

    for pixels, result in zip(tracklets, together, strict=True):
        [alone] = embedder.embed([pixels], with_attention=True)
        assert np.array_equal(alone.embedding, result.embedding)
        assert np.array_equal(alone.attention, result.attention)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_openvino")
def test_openvino_keeps_nothing_of_a_checkpoint_that_changes_later() -> None:
    checkpoint = make()
    [right] = exact(checkpoint).embed([clip(2)])
    embedder = Embedder(checkpoint, device="cpu", precision="fp32", runtime="openvino")
    for parameter in checkpoint.network.parameters():
        parameter.data.zero_()

    [got] = embedder.embed([clip(2)])

    assert relative(got.embedding, right.embedding) < 1e-5
    assert not list(embedder._network.backbone.parameters())  # no second copy of the weights


@pytest.mark.usefixtures("_openvino")
def test_openvino_runs_in_a_thread_of_its_own() -> None:
    embedder = Embedder(make(), device="cpu", precision="fp32", runtime="openvino")
    before = {thread.name for thread in threading.enumerate()}
    embedder.warm_up()
    embedder.warm_up()

    added = [one.name for one in threading.enumerate() if one.name not in before]
    assert len([name for name in added if name.startswith("openvino")]) <= 1


@pytest.mark.usefixtures("_openvino")
def test_signals_stay_safe_after_embedders_have_come_and_gone() -> None:
    """OpenVINO moves the signal stack of the thread that runs it, and frees it with the network."""
    code = """
import gc, signal
import numpy as np
from model.checkpoint import make_checkpoint, untrained_checkpoint
from model.embedder import Embedder
from model.frames import Preprocessing
from model.network import NetworkConfig
signal.signal(signal.SIGTERM, lambda *_: print("handled", flush=True))
network = untrained_checkpoint(0, NetworkConfig(backbone="conv5")).network
checkpoint = make_checkpoint(network, Preprocessing(height=64, width=32))
both = [Embedder(checkpoint, device="cpu", runtime="openvino") for _ in range(2)]
for one in both:
    one.embed([np.zeros((1, 64, 32, 3), np.uint8)])
del one
while both:
    both.pop()
    gc.collect()
signal.raise_signal(signal.SIGTERM)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )

    assert (answer.returncode, answer.stdout.split()) == (0, ["handled"]), answer.stderr


@pytest.mark.usefixtures("_openvino")
def test_another_backbone_may_take_the_networks_place() -> None:
    """Such as one in 8 bits: it is given pixels and gives features, attention stays as it is."""
    import openvino
    from openvino import opset13 as ops

    def double_red(pixels: object) -> object:
        red = ops.gather(pixels, ops.constant(np.array([0])), ops.constant(1))
        return ops.relu(ops.multiply(red, ops.constant(np.float32(2))))

    graph = build_graph(make(attention="none").network, SIZE, double_red)
    pooled, attention = openvino.compile_model(graph, "CPU")([clip(2)]).values()

    red = (clip(2)[..., 0] / 255 - SIZE.mean[0]) / SIZE.std[0]
    assert pooled == pytest.approx(2 * red.clip(0).mean(axis=(1, 2))[:, None], rel=1e-4)
    assert attention.shape == (2, 64, 32)


@pytest.mark.usefixtures("_openvino")
def test_a_layer_that_is_not_known_is_refused() -> None:
    network = make().network
    network.backbone = torch.nn.Sequential(torch.nn.GELU())

    with pytest.raises(TypeError, match="expected a layer of a backbone, got GELU"):
        build_graph(network, SIZE)


def test_tracklets_of_as_many_frames_are_pooled_in_one_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embedder = exact(make(temporal="agreement", unit=True, head=24))
    counts = (3, 5, 3, 1, 5, 3)
    tracklets = [clip(count, seed) for seed, count in enumerate(counts)]
    alone = [embedder.embed([one])[0] for one in tracklets]
    pool, shapes = embedder._network.embed_tracklets, []

    def listen(frames: Tensor) -> Tensor:
        shapes.append(tuple(frames.shape))
        return pool(frames)

    monkeypatch.setattr(embedder._network, "embed_tracklets", listen)
    together = embedder.embed(tracklets)

    pooled, alone_shapes = shapes[::2], shapes[1::2]
    assert pooled == [(3, 3, 24), (2, 5, 24), (1, 1, 24)]
    assert alone_shapes == [(9, 1, 24), (10, 1, 24), (1, 1, 24)]
    for one, other in zip(together, alone, strict=True):
        assert relative(one.embedding, other.embedding) < 1e-6


def test_begun_batches_keep_their_own_results() -> None:
    embedder = exact(make())
    first, second = embedder.begin([clip(2)]), embedder.begin([clip(3, seed=1), clip(1, seed=2)])

    [right] = embedder.embed([clip(2)])
    assert len(second.result()) == 2
    [got] = first.result()
    assert np.array_equal(got.embedding, right.embedding)
    assert first.result()[0] is got  # asked twice


class LaggingCard(Card):
    """Keeps what it was told to do until somebody waits, so that memory reused too early shows."""

    def __init__(self, *, breaks: str = "") -> None:
        self.todo: list[Callable[[], None]] = []
        self.recorded: list[int] = []
        self._breaks = breaks

    def allocate(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    pin = allocate

    def upload(self, source: Tensor, target: Tensor) -> None:
        def copy() -> None:
            target.copy_(source)

        self.todo.append(copy)

    def enqueue(self, work: Callable[[], None]) -> None:
        self.todo.append(work)

    def mark(self) -> Callable[[], None]:
        count = len(self.todo)
        waited: list[bool] = []

        def wait() -> None:
            if not waited:
                todo, self.todo = self.todo[:count], self.todo[count:]
                for work in todo:
                    work()
                waited.append(True)

        return wait

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self._breaks == "recording":
            raise RuntimeError("operation not permitted when stream is capturing")
        work()
        self.recorded.append(len(self.recorded))
        return work


def cuda_like(checkpoint: Checkpoint, max_frames: int, **card: str) -> tuple[Embedder, LaggingCard]:
    """An embedder of a lagging card; all of it but the card is a GPU's."""
    embedder, lagging = exact(checkpoint), LaggingCard(**card)
    embedder.max_frames = max_frames
    embedder._runtime = CudaRuntime(embedder._network, SIZE, CPU, "fp32", lagging)
    return embedder, lagging


@pytest.fixture
def warm() -> tuple[Embedder, LaggingCard, Embedder]:
    checkpoint = make(head=24, temporal="agreement", unit=True)
    embedder, card = cuda_like(checkpoint, 32)
    embedder.warm_up()
    return embedder, card, exact(checkpoint)


Warm = tuple[Embedder, LaggingCard, Embedder]


def test_sizes_grow_by_half_at_most_and_end_at_the_most() -> None:
    assert choose_sizes(512) == (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    assert choose_sizes(100) == (16, 24, 32, 48, 64, 96, 100)
    assert choose_sizes(16) == (16,)
    assert choose_sizes(5) == (5,)
    for most in range(1, 700):
        sizes = choose_sizes(most)
        assert sizes[-1] == most
        assert all(larger <= 1.5 * size for size, larger in pairwise(sizes))


def test_warming_up_records_each_size_once(warm: Warm) -> None:
    embedder, card, _ = warm
    embedder.warm_up()
    for frames in (1, 15, 16, 17, 31, 32, 70):
        embedder.embed([clip(frames)])

    assert len(card.recorded) == len(choose_sizes(32)) == 3


@pytest.mark.parametrize("frames", [1, 5, 16, 17, 31, 32, 33, 70])
def test_padding_and_splitting_change_nothing(warm: Warm, frames: int) -> None:
    embedder, _, right = warm
    [expected] = right.embed([clip(frames)], with_attention=True)
    [got] = embedder.embed([clip(frames)], with_attention=True)

    assert relative(got.embedding, expected.embedding) < 1e-5
    assert relative(got.attention, expected.attention) < 1e-5  # type: ignore[arg-type]


def test_batches_in_flight_do_not_touch_one_another(warm: Warm) -> None:
    """More of them than there are lanes, asked for in another order, one of them never."""
    embedder, _, right = warm
    batches = [[clip(7, seed), clip(20 + seed, seed + 50)] for seed in range(5)]
    begun = [embedder.begin(batch) for batch in batches]

    for place in (3, 0, 4, 1):
        expected = right.embed(batches[place])
        for one, other in zip(begun[place].result(), expected, strict=True):
            assert relative(one.embedding, other.embedding) < 1e-5


def test_frames_may_change_once_a_batch_is_begun(warm: Warm) -> None:
    embedder, _, right = warm
    pixels = clip(9)
    begun = embedder.begin([pixels])
    pixels[:] = 0

    [got] = begun.result()
    [expected] = right.embed([clip(9)])
    assert relative(got.embedding, expected.embedding) < 1e-5


def test_results_stay_as_they_are_when_the_next_batch_comes(warm: Warm) -> None:
    embedder, _, _ = warm
    [first] = embedder.embed([clip(4)], with_attention=True)
    assert first.attention is not None
    kept = first.embedding.copy(), first.attention.copy()
    for seed in range(1, 6):
        embedder.embed([clip(4, seed)])

    assert np.array_equal(first.embedding, kept[0])
    assert np.array_equal(first.attention, kept[1])


def test_nothing_is_waited_for_before_a_result_is_asked_for(warm: Warm) -> None:
    embedder, card, _ = warm
    assert CudaRuntime.overlaps

    first = embedder.begin([clip(15)])
    second = embedder.begin([clip(15, seed=1)])

    assert len(card.todo) == 4  # two uploads, two passes
    first.result()
    assert len(card.todo) == 2
    second.result()
    assert not card.todo


def test_what_cannot_be_recorded_computes_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = make()
    embedder, _ = cuda_like(checkpoint, 32, breaks="recording")
    with caplog.at_level(logging.WARNING):
        embedder.warm_up()
        embedder.warm_up()
    assert isinstance(embedder._runtime, CudaRuntime)
    assert embedder._runtime.way == "unrecorded"
    assert caplog.text.count("could not be recorded") == 1

    [got] = embedder.embed([clip(40)])
    [expected] = exact(checkpoint).embed([clip(40)])
    assert relative(got.embedding, expected.embedding) < 1e-5


def lanes(ways: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]) -> Lanes:
    made = {name: (lambda step=step: step) for name, step in ways.items()}
    return Lanes(LaggingCard(), made, (2, 2, 3), max_frames=20, limit=1e-3)  # type: ignore[arg-type]


def plain_step(frames: Tensor) -> tuple[Tensor, Tensor]:
    values = frames.float().flatten(1)
    return values, values.view(-1, 4, 3)


def test_the_first_way_that_works_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    def no_kernel(_: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no such kernel")

    with caplog.at_level(logging.WARNING):
        chosen = lanes({"fused": no_kernel, "plain": plain_step})

    assert chosen.way == "plain"
    assert "fused: no such kernel" in caplog.text


class ForgetfulCard(LaggingCard):
    """Remembers addresses, as a graph does, and not whose they were."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return lambda: None


def test_what_is_recorded_keeps_the_memory_that_it_reads() -> None:
    """A graph knows addresses: weights or constants that are freed would be read all the same."""

    class Step:
        def __call__(self, frames: Tensor) -> tuple[Tensor, Tensor]:
            return plain_step(frames)

    made: list[weakref.ref[Step]] = []

    def make_step() -> Step:
        step = Step()
        made.append(weakref.ref(step))
        return step

    ways: dict[str, Callable[[], cuda_runtime.Step]] = {
        "fused": make_step,
        "plain": lambda: plain_step,
    }
    chosen = Lanes(ForgetfulCard(), ways, (2, 2, 3), max_frames=20, limit=1e-3)
    gc.collect()

    assert chosen.way == "fused"
    assert made[0]() is not None


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_way_that_computes_something_else_is_not_taken(
    wrong: float, caplog: pytest.LogCaptureFixture
) -> None:
    def off(frames: Tensor) -> tuple[Tensor, Tensor]:
        values, maps = plain_step(frames)
        return values * wrong, maps

    with caplog.at_level(logging.WARNING):
        chosen = lanes({"fused": off, "plain": plain_step})

    assert chosen.way == "plain"
    assert "expected a relative error under 0.001 of fused" in caplog.text


class CrampedCard(LaggingCard):
    """Records no more than so many frames."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def allocate(self, *shape: int, dtype: torch.dtype) -> Tensor:
        if shape[0] > self._most:
            raise torch.OutOfMemoryError("expected more memory")
        return super().allocate(*shape, dtype=dtype)


def test_a_card_that_holds_fewer_frames_is_warmed_up_with_half_as_many(
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint = make()
    embedder, _ = cuda_like(checkpoint, 64)
    embedder._runtime = CudaRuntime(embedder._network, SIZE, CPU, "fp32", CrampedCard(most=20))

    embedder.warm_up()

    assert embedder.max_frames == 16
    assert "no memory for 64 frames at once, going on with 32" in caplog.text
    [got] = embedder.embed([clip(40)])
    [expected] = exact(checkpoint).embed([clip(40)])
    assert relative(got.embedding, expected.embedding) < 1e-5


def test_fp32_is_exact_within_and_as_it_was_outside() -> None:
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    assert conv.fp32_precision == "tf32"  # PyTorch's default
    with without_tf32("fp32"):
        assert conv.fp32_precision == "ieee"
    with without_tf32("bf16"):
        assert conv.fp32_precision == "tf32"
    assert torch.backends.cudnn.allow_tf32  # the older switch answers again


@pytest.fixture(scope="module")
def deep() -> Checkpoint:
    """ResNet-50 with activations in the range of trained ones, and all that may follow it."""
    config = NetworkConfig(head=192, neck=True, temporal="agreement", unit=True)
    network = untrained_checkpoint(seed=0, config=config).network
    for name, module in network.named_modules():
        if name.endswith("bn3") and isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.fill_(0.3)
    return make_checkpoint(network, SIZE)


@pytest.fixture(scope="module")
def on_gpu(deep: Checkpoint) -> dict[str, Embedder]:
    made = {}
    for precision in ("fp32", "bf16"):
        made[precision] = Embedder(deep, device="cuda", precision=precision)
        made[precision].warm_up()
    return made


TOLERANCES = [("fp32", 1e-3), ("bf16", 2e-2)]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("precision", "tolerance"), TOLERANCES)
def test_a_warm_gpu_embeds_like_the_cpu(
    deep: Checkpoint, on_gpu: dict[str, Embedder], precision: str, tolerance: float
) -> None:
    clips = [clip(15, seed) for seed in range(4)] + [clip(3, 9), clip(1, 10), clip(40, 11)]
    got = on_gpu[precision].embed(clips, with_attention=True)

    for one, right in zip(got, exact(deep).embed(clips, with_attention=True), strict=True):
        assert relative(one.embedding, right.embedding) < tolerance
        assert relative(one.attention, right.attention) < tolerance  # type: ignore[arg-type]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_is_recorded(on_gpu: dict[str, Embedder], precision: str) -> None:
    runtime = on_gpu[precision]._runtime

    assert isinstance(runtime, CudaRuntime)
    assert runtime.way in ("fused", "plain")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_what_is_recorded_gives_what_plain_kernels_give(
    deep: Checkpoint, on_gpu: dict[str, Embedder], precision: Precision, tolerance: float
) -> None:
    cold = Embedder(deep, device="cuda", precision=precision)

    for frames in (1, 15, 16, 100):
        [got] = on_gpu[precision].embed([clip(frames)])
        [plain] = cold.embed([clip(frames)])
        assert relative(got.embedding, plain.embedding) < tolerance


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("way", ["fused", "plain"])
def test_each_way_can_be_recorded(
    deep: Checkpoint, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure here is no error in service, where the next way is taken, but slower."""
    every = CudaRuntime._make_ways

    def only(self: CudaRuntime) -> dict[str, Callable[[], cuda_runtime.Step]]:
        ways = every(self)
        return {name: ways[name] for name in dict.fromkeys((way, "plain"))}

    monkeypatch.setattr(CudaRuntime, "_make_ways", only)
    embedder = Embedder(deep, device="cuda", precision="bf16", max_frames=64)
    embedder.warm_up()

    assert isinstance(embedder._runtime, CudaRuntime)
    assert embedder._runtime.way == way


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("precision", "tolerance"), TOLERANCES)
def test_every_number_of_frames_from_1_to_600_is_embedded(
    deep: Checkpoint, on_gpu: dict[str, Embedder], precision: str, tolerance: float
) -> None:
    """And each frame as in every other company: one long tracklet is cut at every place."""
    frames = clip(600)
    [whole] = on_gpu[precision].embed([frames], with_attention=True)
    singles = on_gpu[precision].embed(list(frames[:, None]))
    assert whole.attention is not None
    [first] = exact(deep).embed([frames[:1]])
    assert relative(singles[0].embedding, first.embedding) < tolerance

    for count in range(1, 601):
        *_, last = on_gpu[precision].embed([frames[:count], frames[count - 1 : count]])
        assert relative(last.embedding, singles[count - 1].embedding) < tolerance


@pytest.mark.gpu
@needs_gpu
def test_batches_in_flight_on_a_gpu_do_not_touch_one_another(on_gpu: dict[str, Embedder]) -> None:
    batches = [[clip(15, 8 * seed + place) for place in range(8)] for seed in range(6)]
    right = [on_gpu["bf16"].embed(batch) for batch in batches]

    for _ in range(5):
        begun = [on_gpu["bf16"].begin(batch) for batch in batches]
        for pending, expected in zip(begun, right, strict=True):
            for one, other in zip(pending.result(), expected, strict=True):
                assert np.array_equal(one.embedding, other.embedding)


@pytest.mark.gpu
@needs_gpu
def test_nothing_is_recorded_or_compiled_in_service(
    on_gpu: dict[str, Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("recorded after warm_up")

    monkeypatch.setattr(Card, "record", refuse)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    before = torch.cuda.memory_reserved()
    for frames in (1, 15, 16, 17, 100, 511, 512, 513, 600):
        on_gpu["bf16"].embed([clip(frames)])
    on_gpu["bf16"].warm_up()

    assert torch.cuda.memory_reserved() == before


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_without_room_goes_on_with_fewer_frames(
    deep: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """A real allocator refuses: half as many frames at once, and the same embeddings."""
    size = Preprocessing(256, 128)
    embedder = Embedder(make_checkpoint(deep.network, size), device="cuda", precision="bf16")
    clips = [np.tile(clip(15, seed), (1, 4, 4, 1)) for seed in range(3)]
    right = Embedder(make_checkpoint(deep.network, size), device="cpu", precision="fp32")
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 1.2e9
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        with caplog.at_level(logging.WARNING):
            embedder.warm_up()
            got = embedder.embed(clips)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert 16 <= embedder.max_frames < 512
    assert "has no memory for 512 frames at once, going on with 256" in caplog.text
    for one, expected in zip(got, right.embed(clips), strict=True):
        assert relative(one.embedding, expected.embedding) < 2e-2


@pytest.mark.gpu
@needs_gpu
def test_two_warm_models_on_one_gpu_embed_as_each_does_alone(deep: Checkpoint) -> None:
    embedders = [Embedder(one, device="cuda", precision="bf16") for one in (deep, make(head=24))]
    with ThreadPoolExecutor(2) as threads:  # also warmed up at the same time
        list(threads.map(Embedder.warm_up, embedders))
        clips = [clip(15, seed) for seed in range(4)]
        alone = [embedder.embed(clips) for embedder in embedders]
        for _ in range(5):
            together = list(threads.map(Embedder.embed, embedders, [clips, clips]))
            for ours, theirs in zip(together, alone, strict=True):
                for one, other in zip(ours, theirs, strict=True):
                    assert relative(one.embedding, other.embedding) < 1e-3
