"""The inference face of the network: prepared frames in, float32 embeddings out."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.checkpoint import Checkpoint, without_people
from model.cores import available_cores
from model.cuda_runtime import CudaRuntime
from model.errors import DeviceError, InvalidFramesError
from model.frames import Clip
from model.network import TrackletNet
from model.openvino_runtime import OpenVinoRuntime, build_graph
from model.quantised import QuantisedBackbone
from model.runtimes import DTYPES as DTYPES  # others look for it here
from model.runtimes import (
    Collect,
    FrameRuntime,
    Runtime,
    TorchRuntime,
    choose_runtime,
    is_out_of_memory,
)

log = logging.getLogger(__name__)
Precision = Literal["auto", "fp32", "bf16", "fp16"]
# Frames in one forward pass. On a CPU PyTorch gains nothing by more, which fall out of the caches,
# and OpenVINO a fortieth (bench/embed.py); a GPU is filled.
MAX_FRAMES = {"openvino": 32, "cpu": 16, "cuda": 512}


@dataclass(frozen=True, slots=True)
class TrackletEmbedding:
    """What the network makes of one tracklet.

    Args:
        embedding: (D,) float32.
        attention: (T, H, W) float32, each map sums to 1; None where it was not asked for.
        frame_distance: Mean Euclidean distance of its frames, each embedded as a tracklet of its
            own, to the embedding: large where a tracker has changed to another person on the way.
    """

    embedding: NDArray[np.float32]
    attention: NDArray[np.float32] | None = None
    frame_distance: float = 0.0


def choose_device(device: str) -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        DeviceError: It is none of these, or this machine does not have it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, _, number = device.partition(":")
    if name not in ("cpu", "cuda") or (number and not number.isdigit()) or device == "cpu:":
        raise DeviceError(f"expected auto, cpu, cuda or cuda:N, got {device!r}")
    if name == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"expected a device of this machine, got {device!r}: it has "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return torch.device(device)


def choose_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """Resolve ``auto`` to bf16 where the hardware multiplies it natively, to fp32 elsewhere.

    On a CPU without AVX-512 bf16 or AMX, bf16 is emulated: six to eight times slower than fp32.

    Raises:
        DeviceError: ``precision`` is not one of the four.
    """
    if precision not in get_args(Precision):
        raise DeviceError(f"expected precision {get_args(Precision)}, got {precision!r}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return "bf16" if native else "fp32"


def fold_batch_norm(
    backbone: nn.Sequential, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Sequential:
    """A copy of a backbone, with each batch normalisation folded into its convolution.

    The result is the same up to rounding: both are affine, so their product is one convolution.

    Args:
        backbone: In eval mode.
        device: Of the folded convolutions; theirs where None.
        dtype: Likewise.
    """
    # Folded and converted one by one, and only then copied around them: no weight is held twice on
    # the way. The last stage, whose convolutions are the largest, goes first, while least is held.
    instead: dict[int, Any] = {}
    for parent in reversed(list(backbone.modules())):
        for conv, norm in pairwise(parent.children()):
            # In torchvision's ResNet a normalisation always follows its convolution by name order.
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                folded = fuse_conv_bn_eval(conv, norm)
                instead[id(conv)] = folded.to(device, dtype).to(memory_format=torch.channels_last)
                instead[id(norm)] = nn.Identity()
    return copy.deepcopy(backbone, instead)


class Pending:
    """Tracklets whose embedding has begun; `Embedder.begin` makes it.

    Args:
        finish: Waits for it.
    """

    def __init__(self, finish: Callable[[], list[TrackletEmbedding]]) -> None:
        self._finish: Callable[[], list[TrackletEmbedding]] | None = finish
        self._made: list[TrackletEmbedding] = []

    def result(self) -> list[TrackletEmbedding]:
        """Wait for the embeddings, one per clip, in order; in the thread that began."""
        if self._finish is not None:
            self._made, self._finish = self._finish(), None
        return self._made


class Embedder:
    """Embeds tracklets with a checkpoint on one device. Not thread-safe: one worker owns it.

    Args:
        checkpoint: The model.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: Of the backbone; attention and pooling are always float32.
        runtime: What computes, see `model.runtimes.choose_runtime`.
        max_frames: Frames in one forward pass; by default what suits the device. Where the device's
            memory does not hold so many, half as many are tried, and that is remembered.
        threads: Of the processor, in the whole process; by default no more than there are, and
            than its container may use.

    Attributes:
        overlaps: Whether it computes while its caller does something else between `begin` and
            `Pending.result`.
        runtime: "torch" or "openvino".

    Raises:
        DeviceError: The device, the precision or the runtime is not to be had here.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        runtime: Runtime = "auto",
        max_frames: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.device = choose_device(device)
        self._is_quantised = isinstance(checkpoint.network.backbone, QuantisedBackbone)
        if self._is_quantised:
            precision = _precision_around_8_bits(precision, self.device)
        self.precision = choose_precision(precision, self.device)
        self.runtime = choose_runtime(runtime, self.device, self.precision)
        if self._is_quantised and self.runtime == "torch":
            log.warning("PyTorch computes 8-bit weights in float32; OpenVINO makes them fast")
        self.model = checkpoint.fingerprint
        self.preprocessing = checkpoint.preprocessing
        self.dim = checkpoint.network.dim
        kind = "openvino" if self.runtime == "openvino" else self.device.type
        self.max_frames = MAX_FRAMES[kind] if max_frames is None else max_frames
        if self.max_frames < 1:
            raise ValueError(f"max_frames: expected at least 1, got {max_frames}")
        self.threads = _set_threads(threads)
        self._provenance = dict(checkpoint.provenance)
        self._network = self._copy_network(checkpoint.network)
        self._runtime = self._make_runtime(checkpoint.network)
        self.overlaps = self._runtime.overlaps

    def _copy_network(self, network: TrackletNet) -> TrackletNet:
        """A shallow copy with parts of its own: the checkpoint's network stays as it was."""
        copied = copy.copy(network)
        copied._modules = dict(network._modules)
        for name in ("head", "neck"):
            part = copy.deepcopy(getattr(network, name)).eval().to(self.device)
            setattr(copied, name, part)
        if self.runtime == "torch":
            dtype = DTYPES[self.precision]
            backbone = fold_batch_norm(network.backbone, self.device, dtype)
            backbone = backbone.to(self.device, dtype)
            copied.backbone = backbone.to(memory_format=torch.channels_last)
        else:
            copied.backbone = nn.Sequential()  # OpenVINO has its own
        return copied

    def _make_runtime(self, original: TrackletNet) -> FrameRuntime:
        network, preprocessing = self._network, self.preprocessing
        if self.runtime == "openvino":
            backbone = original.backbone
            add = backbone.add_to_graph if isinstance(backbone, QuantisedBackbone) else None
            graph = build_graph(original, preprocessing, add)
            return OpenVinoRuntime(network, graph, self.precision, threads=self.threads)
        kind = CudaRuntime if self.device.type == "cuda" else TorchRuntime
        return kind(network, preprocessing, self.device, self.precision)

    def describe(self) -> dict[str, Any]:
        """The model as a JSON object: fingerprint, configuration, where and how it runs."""
        return {
            "fingerprint": self.model,
            "dim": self.dim,
            "network": asdict(self._network.config),
            "preprocessing": asdict(self.preprocessing),
            "provenance": without_people(self._provenance),
            "device": str(self.device),
            "precision": "int8" if self._is_quantised else self.precision,
            "runtime": self.runtime,
        }

    def warm_up(self) -> None:
        """Do what happens only once, then embed a grey frame; later calls do only the latter."""
        self._halve_until_it_fits(self._runtime.warm_up, self.max_frames)
        shape = (1, self.preprocessing.height, self.preprocessing.width, 3)
        self.embed([np.full(shape, 127, dtype=np.uint8)])

    def embed(
        self, clips: Sequence[Clip], *, with_attention: bool = False
    ) -> list[TrackletEmbedding]:
        """Embed tracklets; their frames share forward passes.

        Args:
            clips: For each tracklet (T, height, width, 3) uint8 RGB from `model.frames`, T >= 1.
            with_attention: Also return where each frame looked.

        Returns:
            One per clip, in order.

        Raises:
            InvalidFramesError: A clip has another shape or type, or no frame.
        """
        return self.begin(clips, with_attention=with_attention).result()

    def begin(self, clips: Sequence[Clip], *, with_attention: bool = False) -> Pending:
        """Begin to embed tracklets; on a GPU without waiting for what it computes.

        Several batches may be begun before the first one's result is asked for; each keeps what it
        needs. Where `overlaps` is False all is done when this returns.

        Args:
            clips: See `embed`; free to change once this has returned.
            with_attention: Likewise.

        Raises:
            InvalidFramesError: Likewise.
        """
        self._check(clips)
        counts = [len(clip) for clip in clips]
        launched = self._launch(clips)
        return Pending(lambda: self._finish(launched, counts, with_attention=with_attention))

    def _check(self, clips: Sequence[Clip]) -> None:
        expected = (self.preprocessing.height, self.preprocessing.width, 3)
        for clip in clips:
            if (
                clip.ndim != 4
                or clip.shape[1:] != expected
                or clip.dtype != np.uint8
                or not len(clip)
            ):
                raise InvalidFramesError(
                    f"expected a clip (T >= 1, {expected[0]}, {expected[1]}, 3) uint8, "
                    f"got {clip.shape} {clip.dtype}"
                )

    def _launch(self, clips: Sequence[Clip]) -> list[Collect]:
        """Begin with all frames, as many at a time as the device holds."""
        launched: list[Collect] = []
        waiting = list(clips)

        def launch(most: int) -> None:
            nonlocal waiting
            pieces, rest = _split(waiting, most)
            launched.append(self._runtime.launch(pieces))
            waiting = rest

        while waiting:
            self._halve_until_it_fits(launch, sum(len(clip) for clip in waiting))
        return launched

    def _halve_until_it_fits(self, run: Callable[[int], None], wanted: int) -> None:
        """Run something with as many of the wanted frames as the device is known to hold."""
        while True:
            most = min(self.max_frames, wanted)
            try:
                return run(most)
            except (RuntimeError, MemoryError) as error:
                if most == 1 or not is_out_of_memory(error):
                    raise
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                self.max_frames = most // 2
                log.warning(
                    "%s has no memory for %d frames at once, going on with %d",
                    self.device,
                    most,
                    self.max_frames,
                )

    @torch.inference_mode()
    def _finish(
        self, launched: Sequence[Collect], counts: Sequence[int], *, with_attention: bool
    ) -> list[TrackletEmbedding]:
        """Pool what was launched over time, (T, D) to (D,) for each tracklet."""
        if not launched:
            return []
        parts = [collect() for collect in launched]
        frames, attention = (torch.cat(ones) for ones in zip(*parts, strict=True))
        maps = torch.split(attention, list(counts)) if with_attention else [None] * len(counts)
        pooled = pool_tracklets(self._network, torch.split(frames, list(counts)))
        return [
            TrackletEmbedding(embedding.numpy(), None if one is None else one.numpy(), distance)
            for (embedding, distance), one in zip(pooled, maps, strict=True)
        ]


def _precision_around_8_bits(precision: Precision, device: torch.device) -> Precision:
    """Of what is not in 8 bits.

    Raises:
        DeviceError: Another one was asked for, or the device is not a CPU.
    """
    if precision not in ("auto", "fp32"):
        raise DeviceError(f"expected precision auto or fp32 around 8-bit weights, got {precision}")
    if device.type != "cpu":
        raise DeviceError(f"expected a CPU for 8-bit weights, got {device}")
    return "fp32"


def _set_threads(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    # Who asked PyTorch for less, by OMP_NUM_THREADS or by a call, meant it.
    chosen = threads or min(available_cores(), torch.get_num_threads())
    if chosen != torch.get_num_threads():
        torch.set_num_threads(chosen)
    return chosen


def _split(clips: Sequence[Clip], most: int) -> tuple[list[Clip], list[Clip]]:
    """The first ``most`` frames and the others, as views of the clips."""
    taken: list[Clip] = []
    for place, clip in enumerate(clips):
        if len(clip) > most:
            first = [*taken, clip[:most]] if most else taken
            return first, [clip[most:], *clips[place + 1 :]]
        taken.append(clip)
        most -= len(clip)
    return taken, []


def pool_tracklets(network: TrackletNet, tracklets: Sequence[Tensor]) -> list[tuple[Tensor, float]]:
    """Tracklet embeddings of frame embeddings; tracklets of as many frames are pooled together.

    Args:
        network: Says how.
        tracklets: (T, D) each.

    Returns:
        (D,) each, in order, and `TrackletEmbedding.frame_distance`.
    """
    places: dict[int, list[int]] = {}
    for place, frames in enumerate(tracklets):
        places.setdefault(len(frames), []).append(place)
    pooled: dict[int, tuple[Tensor, float]] = {}
    for count, alike in places.items():
        stacked = torch.stack([tracklets[place] for place in alike])  # (B, T, D)
        made = network.embed_tracklets(stacked)  # (B, D)
        alone = network.embed_tracklets(stacked.flatten(0, 1).unsqueeze(1))  # (B*T, D)
        apart = (alone.view(len(alike), count, -1) - made.unsqueeze(1)).norm(dim=2)  # (B, T)
        found = zip(made, apart.mean(dim=1).tolist(), strict=True)
        pooled.update(zip(alike, found, strict=True))
    return [pooled[place] for place in range(len(tracklets))]
