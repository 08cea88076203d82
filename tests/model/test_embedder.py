"""The inference face gives what the network gives, whatever the batch, the order and the chunks."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint import (
    BUNDLED_FILE,
    Checkpoint,
    load_checkpoint,
    make_checkpoint,
    untrained_checkpoint,
)
from model.datasets.folder import read_folder
from model.embedder import Embedder, Precision, choose_device, choose_precision, fold_batch_norm
from model.errors import DeviceError, InvalidFramesError
from model.frames import Clip, Preprocessing, normalise, read_clip
from model.measures import Measures, rank_queries
from model.network import NetworkConfig, TrackletNet
from model.runtimes import Runtime, is_out_of_memory

SIZE = Preprocessing(height=64, width=32)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """A network whose batch normalisations do something, at a size that is quick."""
    network = untrained_checkpoint(seed=0).network
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                assert tensor is not None
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (module.bias.data, module.running_mean):
                assert tensor is not None
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return make_checkpoint(network, SIZE)


def clip(frames: int, seed: int = 0) -> Clip:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, 64, 32, 3), dtype=np.uint8)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def network_says(checkpoint: Checkpoint, pixels: Clip) -> np.ndarray:
    with torch.inference_mode():
        frames = normalise(torch.from_numpy(pixels), SIZE)
        return np.asarray(checkpoint.network(frames[None])[0].numpy())


def test_it_gives_what_the_network_gives(checkpoint: Checkpoint) -> None:
    pixels = clip(5)
    embedder = Embedder(checkpoint, device="cpu", precision="fp32")

    [result] = embedder.embed([pixels])

    assert result.embedding.shape == (2048,)
    assert result.embedding.dtype == np.float32
    assert result.attention is None
    assert relative(result.embedding, network_says(checkpoint, pixels)) < 1e-5


@pytest.fixture(scope="module")
def with_everything() -> Checkpoint:
    """A small network with a head, a neck that does something, agreement, and unit embeddings."""
    config = NetworkConfig(backbone="conv5", head=24, neck=True, temporal="agreement", unit=True)
    network = untrained_checkpoint(seed=0, config=config).network
    generator = torch.Generator().manual_seed(0)
    assert isinstance(network.neck, torch.nn.BatchNorm1d)
    network.neck.weight.data.copy_(0.5 + torch.rand(24, generator=generator))
    network.neck.running_mean.copy_(0.1 * torch.randn(24, generator=generator))  # type: ignore[union-attr]
    return make_checkpoint(network, SIZE)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_it_has_the_head_the_pooling_and_the_length_of_the_network(
    with_everything: Checkpoint, frames: int
) -> None:
    pixels = clip(frames)
    embedder = Embedder(with_everything, device="cpu", precision="fp32")

    [result, _] = embedder.embed([pixels, clip(3, seed=1)])

    assert embedder.dim == 24
    assert result.embedding.shape == (24,)
    assert result.embedding.min() < 0
    assert np.linalg.norm(result.embedding) == pytest.approx(1, abs=1e-6)
    assert relative(result.embedding, network_says(with_everything, pixels)) < 1e-5


def test_a_head_stays_in_float32_beside_a_bf16_backbone(with_everything: Checkpoint) -> None:
    pixels = clip(4)
    [exact] = Embedder(with_everything, device="cpu", precision="fp32").embed([pixels])
    [rough] = Embedder(with_everything, device="cpu", precision="bf16").embed([pixels])

    assert rough.embedding.dtype == np.float32
    assert relative(rough.embedding, exact.embedding) < 5e-2


def test_its_description_says_how_frames_are_pooled(with_everything: Checkpoint) -> None:
    said = Embedder(with_everything, device="cpu", precision="fp32").describe()["network"]

    assert (said["temporal"], said["unit"], said["head"]) == ("agreement", True, 24)


def test_the_checkpoints_network_stays_as_it_was(checkpoint: Checkpoint) -> None:
    before = network_says(checkpoint, clip(2))

    Embedder(checkpoint, device="cpu", precision="bf16")

    assert np.array_equal(network_says(checkpoint, clip(2)), before)


def test_tracklets_that_share_a_batch_do_not_touch_one_another(checkpoint: Checkpoint) -> None:
    """Tracklets of 1 to 7 frames in chunks of 4: alone or together, the embedding is the same."""
    embedder = Embedder(checkpoint, device="cpu", precision="fp32", max_frames=4)
    tracklets = [clip(frames, seed=frames) for frames in (3, 1, 7, 2)]

    together = embedder.embed(tracklets, with_attention=True)

    for pixels, result in zip(tracklets, together, strict=True):
        [alone] = embedder.embed([pixels], with_attention=True)
        assert relative(result.embedding, alone.embedding) < 1e-5
        assert result.attention is not None
        assert result.attention.shape == (len(pixels), 4, 2)
        assert result.attention.sum(axis=(1, 2)) == pytest.approx(1)


def test_frame_order_does_not_matter(checkpoint: Checkpoint) -> None:
    embedder = Embedder(checkpoint, device="cpu", precision="fp32")
    pixels = clip(6)

    [forward] = embedder.embed([pixels])
    [backward] = embedder.embed([pixels[::-1].copy()])

    assert relative(forward.embedding, backward.embedding) < 1e-5


def test_bf16_stays_near_fp32(checkpoint: Checkpoint) -> None:
    pixels = clip(4)
    [exact] = Embedder(checkpoint, device="cpu", precision="fp32").embed([pixels])
    [rough] = Embedder(checkpoint, device="cpu", precision="bf16").embed([pixels])

    assert rough.embedding.dtype == np.float32
    assert relative(rough.embedding, exact.embedding) < 2e-2


def test_folding_leaves_no_batch_normalisation_and_changes_nothing(checkpoint: Checkpoint) -> None:
    frames = normalise(torch.from_numpy(clip(2)), SIZE)
    folded = fold_batch_norm(checkpoint.network.backbone)

    with torch.inference_mode():
        ours, theirs = folded(frames), checkpoint.network.backbone(frames)
    assert relative(ours.numpy(), theirs.numpy()) < 1e-5
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())


def test_an_empty_call_is_an_empty_answer(checkpoint: Checkpoint) -> None:
    assert Embedder(checkpoint, device="cpu").embed([]) == []


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((0, 64, 32, 3), np.uint8),
        np.zeros((2, 32, 64, 3), np.uint8),
        np.zeros((64, 32, 3), np.uint8),
        np.zeros((2, 64, 32, 3), np.float32),
    ],
)
def test_a_clip_of_another_shape_is_refused(checkpoint: Checkpoint, wrong: Clip) -> None:
    with pytest.raises(InvalidFramesError, match="expected a clip"):
        Embedder(checkpoint, device="cpu", precision="fp32").embed([clip(1), wrong])


@pytest.mark.parametrize("device", ["tpu", "cpu:", "cuda:x", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(DeviceError, match="expected"):
        choose_device(device)


def test_auto_precision_is_bf16_only_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    for capabilities, expected in (
        ({"avx2": True}, "fp32"),
        ({"avx2": True, "avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert choose_precision("auto", cpu) == expected
    assert choose_precision("fp16", cpu) == "fp16"
    with pytest.raises(DeviceError, match="precision"):
        choose_precision("int8", cpu)  # type: ignore[arg-type]


def test_served_and_evaluated_embeddings_are_equal_to_the_bit(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """What the service decodes from bytes and what an evaluation reads from files is one path."""
    from service.settings import LimitSettings
    from service.uploads import FrameChoice, decode

    rng = np.random.default_rng(0)
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"{number}.jpg")
        Image.fromarray(rng.integers(0, 256, (201, 76, 3), dtype=np.uint8)).save(paths[-1])
    choice = FrameChoice(15, "even", SIZE)

    served = decode("frames", [path.read_bytes() for path in paths], choice, LimitSettings())
    evaluated = read_clip(paths, SIZE, used=15)

    assert np.array_equal(served.clip, evaluated)
    embedder = Embedder(checkpoint, device="cpu", precision="fp32")
    a, b = embedder.embed([served.clip]), embedder.embed([evaluated])
    assert np.array_equal(a[0].embedding, b[0].embedding)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_a_gpu_embeds_like_the_cpu(
    checkpoint: Checkpoint, precision: Precision, tolerance: float
) -> None:
    pixels = [clip(15, seed) for seed in range(4)]
    on_cpu = Embedder(checkpoint, device="cpu", precision="fp32").embed(pixels)
    on_gpu = Embedder(checkpoint, device="cuda", precision=precision).embed(pixels)

    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert relative(ours.embedding, theirs.embedding) < tolerance


class Cramped:
    """Lets a device hold so many frames and no more.

    Args:
        embedder: Its network is to be replaced by this.
        most: How many frames.
        error: What it says to more.
    """

    def __init__(self, embedder: Embedder, most: int, error: Exception | None = None) -> None:
        self.tried: list[int] = []
        self._most = most
        self._error = error or torch.OutOfMemoryError("expected more memory")
        self._embed = embedder._network.embed_frames

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.tried.append(len(pixels))
        if len(pixels) > self._most:
            raise self._error
        return self._embed(pixels)


def test_a_batch_that_memory_does_not_hold_is_halved_and_that_is_remembered(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = [clip(15, seed) for seed in range(2)]
    wanted = Embedder(checkpoint, device="cpu", precision="fp32").embed(pixels)
    embedder = Embedder(checkpoint, device="cpu", precision="fp32", runtime="torch", max_frames=16)
    cramped = Cramped(embedder, most=5)
    monkeypatch.setattr(embedder._network, "embed_frames", cramped)

    for made, other in zip(embedder.embed(pixels), wanted, strict=True):
        assert relative(made.embedding, other.embedding) < 1e-5
    assert cramped.tried == [16, 8, *[4] * 7, 2]
    assert "no memory for 16 frames at once, going on with 8" in caplog.text
    cramped.tried.clear()
    embedder.embed(pixels[:1])

    assert cramped.tried == [4, 4, 4, 3]


# What the libraries said when memory was taken from them; numbers, names and lines may differ.
NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError("Unable to allocate 12.0 MiB for an array with shape (512, 128, 64, 3)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 50331648 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("could not create a primitive"),
    RuntimeError(
        "Exception from src/plugins/intel_cpu/src/node.cpp:823:\n"
        "[CPU] Convolution node with name 'Convolution_107' can't alloc\n"
    ),
    RuntimeError(
        "[CPU] MulAdd node with name 'Multiply_4321' Check 'ptr' failed at "
        "src/plugins/intel_cpu/src/cpu_memory.cpp:257:\n"
        "Failed to allocate 98304000 bytes of memory\n"
    ),
    RuntimeError("Exception from src/inference/src/dev/plugin.cpp:54:\nstd::bad_alloc\n"),
    RuntimeError("[CPU] Transpose node with name 'T' std::future_error: Broken promise\n"),
]
OTHER = [
    RuntimeError("the device is poisoned"),
    RuntimeError("could not create a primitive descriptor for a convolution"),
    RuntimeError("expected a tensor whose memory is contiguous, got another"),
    ValueError("can't allocate memory"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: str(error)[-30:])
def test_however_a_lack_of_memory_is_told_the_batch_is_halved_down_to_one_frame(
    with_everything: Checkpoint, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    embedder = Embedder(with_everything, device="cpu", runtime="torch", max_frames=8)
    cramped = Cramped(embedder, 0, error)
    monkeypatch.setattr(embedder._network, "embed_frames", cramped)

    with pytest.raises(type(error)) as raised:
        embedder.embed([clip(8)])

    assert raised.value is error
    assert cramped.tried == [8, 4, 2, 1]


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_another_failure_halves_nothing(
    with_everything: Checkpoint, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    embedder = Embedder(with_everything, device="cpu", runtime="torch", max_frames=8)
    cramped = Cramped(embedder, 0, error)
    monkeypatch.setattr(embedder._network, "embed_frames", cramped)

    with pytest.raises(type(error)):
        embedder.embed([clip(8)])

    assert not is_out_of_memory(error)
    assert cramped.tried == [8]
    assert embedder.max_frames == 8


# 1024 frames at once need far more than the 64 MiB that are left, 8 far less.
CRAMPED = """
import logging, resource, sys
from pathlib import Path
import numpy as np
from model.checkpoint import make_checkpoint, untrained_checkpoint
from model.embedder import Embedder
from model.frames import Preprocessing
from model.network import NetworkConfig

runtime, threads = sys.argv[1], int(sys.argv[2])
network = untrained_checkpoint(seed=0, config=NetworkConfig(backbone="conv5")).network
checkpoint = make_checkpoint(network, Preprocessing(height=64, width=32))
frames = np.random.default_rng(0).integers(0, 256, (1024, 64, 32, 3), dtype=np.uint8)
clips = np.split(frames, 128)
how = {"device": "cpu", "precision": "fp32", "runtime": runtime, "threads": threads}
roomy, cramped = (Embedder(checkpoint, **how, max_frames=most) for most in (8, 1024))
expected = [one.embedding for one in roomy.embed(clips)]
cramped.embed(clips[-1:])

pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
logging.basicConfig(stream=sys.stdout, format="%(message)s")
pending = cramped.begin(clips)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
made = [one.embedding for one in pending.result()]  # pooling is not what is halved

assert 8 <= cramped.max_frames < 1024, cramped.max_frames
np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)
np.testing.assert_allclose(
    [one.embedding for one in cramped.embed(clips[::-1])], expected[::-1], rtol=1e-4, atol=1e-4
)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's limit of address space")
@pytest.mark.parametrize(("runtime", "threads"), [("torch", 1), ("openvino", 1), ("openvino", 2)])
def test_where_memory_really_runs_out_the_same_is_made_of_smaller_batches(
    runtime: str, threads: int
) -> None:
    """On one thread OpenVINO does not say so: what it answers then is of the call before."""
    if runtime == "openvino":
        pytest.importorskip("openvino")
    command = [sys.executable, "-c", CRAMPED, runtime, str(threads)]
    # Or glibc keeps, for a thread or for later, addresses that are free and that others need.
    frugal = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = os.environ | frugal

    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert "cpu has no memory for 1024 frames at once, going on with 512" in done.stdout


def test_a_description_counts_those_who_were_trained_on() -> None:
    """Their names stay in the checkpoint: they may be those of people."""
    data = {"split": "0", "train_identities": ["anna", "ben"]}
    provenance = {"data": {"parts": [data]}, "start": {"data": data}, "steps": 5}
    checkpoint = make_checkpoint(
        TrackletNet(NetworkConfig(backbone="conv5")), provenance=provenance
    )

    told = Embedder(checkpoint, device="cpu").describe()["provenance"]

    counted = {"split": "0", "train_identities": 2}
    assert told == {"data": {"parts": [counted]}, "start": {"data": counted}, "steps": 5}
    assert checkpoint.provenance == provenance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_models_on_one_gpu_embed_as_each_does_alone(
    checkpoint: Checkpoint, with_everything: Checkpoint
) -> None:
    pixels = [clip(15, seed) for seed in range(4)]
    both = (checkpoint, with_everything)
    alone = [Embedder(one, device="cuda", precision="fp32").embed(pixels) for one in both]

    embedders = [Embedder(one, device="cuda", precision="fp32") for one in both]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(Embedder.embed, embedders, [pixels, pixels]))

    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert relative(one.embedding, other.embedding) < 1e-5


SHARED = Path(os.environ.get("SHARED", Path(__file__).parents[3] / "shared"))
WARD = SHARED / "data" / "ward"


@cache  # fp32 is what all others are held to
def embed_ward(
    device: str, precision: Precision, runtime: Runtime = "auto"
) -> tuple[np.ndarray, Measures]:
    """Each of 105 tracklets among those of the other cameras, by the weights that ship."""
    embedder = Embedder(
        load_checkpoint(BUNDLED_FILE), device=device, precision=precision, runtime=runtime
    )
    embedder.warm_up()
    tracklets = read_folder(WARD)
    clips = [read_clip(one.frames, embedder.preprocessing, used=8) for one in tracklets]
    embeddings = np.stack([one.embedding for one in embedder.embed(clips)]).astype(np.float64)
    distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=2)
    identities = [one.identity for one in tracklets]
    cameras = [one.camera for one in tracklets]
    return embeddings, rank_queries(distances, identities, identities, cameras, cameras)


@pytest.mark.slow
@pytest.mark.dataset
@pytest.mark.skipif(not WARD.is_dir(), reason=f"needs WARD in {SHARED}")
@pytest.mark.parametrize(
    ("precision", "runtime", "tolerance"),
    [("fp32", "openvino", 1e-4), ("bf16", "openvino", 2e-2), ("bf16", "torch", 2e-2)],
)
def test_every_path_on_the_cpu_ranks_real_people_as_fp32_does(
    precision: Precision, runtime: Runtime, tolerance: float
) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    embeddings, exact = embed_ward("cpu", "fp32", "torch")
    rounded, rough = embed_ward("cpu", precision, runtime)

    errors = [relative(ours, right) for ours, right in zip(rounded, embeddings, strict=True)]
    told = (rough.rank_1, exact.rank_1, rough.mean_average_precision, exact.mean_average_precision)
    print(f"worst error {max(errors):.1e}, rank-1 and mAP", *told)  # noqa: T201 shown with pytest -s
    assert max(errors) < tolerance
    assert rough.rank_1 == exact.rank_1
    assert rough.mean_average_precision == pytest.approx(exact.mean_average_precision, abs=0.002)


@pytest.mark.gpu
@pytest.mark.dataset
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(not WARD.is_dir(), reason=f"needs WARD in {SHARED}")
def test_bf16_on_a_gpu_ranks_real_people_as_fp32_on_the_cpu_does() -> None:
    embeddings, exact = embed_ward("cpu", "fp32", "torch")
    rounded, rough = embed_ward("cuda", "bf16")

    assert exact.counted == 105
    assert all(
        relative(ours, right) < 2e-2 for ours, right in zip(rounded, embeddings, strict=True)
    )
    # Two people may be as far from a third one as bf16 can tell: one query of 105 is forgiven.
    assert rough.rank_1 == pytest.approx(exact.rank_1, abs=0.01)
    assert rough.mean_average_precision == pytest.approx(exact.mean_average_precision, abs=0.002)
