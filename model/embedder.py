"""The inference face of the network: prepared frames in, float32 embeddings out."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.checkpoint import Checkpoint, without_people
from model.errors import DeviceError, InvalidFramesError
from model.frames import Clip, normalise

log = logging.getLogger(__name__)
Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Frames in one forward pass. On a CPU a larger batch gains nothing and falls out of the caches
# (bench/embed.py); on a GPU it fills the card.
MAX_FRAMES = {"cpu": 16, "cuda": 512}


@dataclass(frozen=True, slots=True)
class TrackletEmbedding:
    """What the network makes of one tracklet.

    Args:
        embedding: (D,) float32.
        attention: (T, H, W) float32, each map sums to 1; None where it was not asked for.
    """

    embedding: NDArray[np.float32]
    attention: NDArray[np.float32] | None = None


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


class Embedder:
    """Embeds tracklets with a checkpoint on one device. Not thread-safe: one worker owns it.

    Args:
        checkpoint: The model.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: Of the backbone; attention and pooling are always float32.
        max_frames: Frames in one forward pass; by default what suits the device. Where the device's
            memory does not hold so many, half as many are tried, and that is remembered.

    Raises:
        DeviceError: The device or the precision is not to be had here.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        max_frames: int | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.model = checkpoint.fingerprint
        self.preprocessing = checkpoint.preprocessing
        self.dim = checkpoint.network.dim
        self.max_frames = max_frames or MAX_FRAMES[self.device.type]
        if self.max_frames < 1:
            raise ValueError(f"max_frames: expected at least 1, got {max_frames}")
        self._provenance = dict(checkpoint.provenance)
        # A shallow copy with its own backbone: the checkpoint's network stays as it was.
        self._network = copy.copy(checkpoint.network)
        self._network._modules = dict(checkpoint.network._modules)
        dtype = DTYPES[self.precision]
        backbone = fold_batch_norm(checkpoint.network.backbone, self.device, dtype)
        backbone = backbone.to(self.device, dtype)
        self._network.backbone = backbone.to(memory_format=torch.channels_last)
        for name in ("head", "neck"):
            part = copy.deepcopy(getattr(checkpoint.network, name)).eval().to(self.device)
            setattr(self._network, name, part)

    def describe(self) -> dict[str, Any]:
        """The model as a JSON object: fingerprint, configuration, where and how it runs."""
        return {
            "fingerprint": self.model,
            "dim": self.dim,
            "network": asdict(self._network.config),
            "preprocessing": asdict(self.preprocessing),
            "provenance": without_people(self._provenance),
            "device": str(self.device),
            "precision": self.precision,
        }

    def warm_up(self) -> None:
        """Embed a grey frame, so that the first request does not pay for what happens only once."""
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
        self._check(clips)
        if not clips:
            return []
        frames, attention = self._embed_frames(np.concatenate(clips))
        results, start = [], 0
        for clip in clips:
            stop = start + len(clip)
            embedding = self._network.embed_tracklets(frames[None, start:stop])[0]
            maps = attention[start:stop].numpy() if with_attention else None
            results.append(TrackletEmbedding(embedding.numpy(), maps))
            start = stop
        return results

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

    @torch.inference_mode()
    def _embed_frames(self, frames: Clip) -> tuple[Tensor, Tensor]:
        embeddings, maps = [], []
        start = 0
        while start < len(frames):
            chunk = frames[start : start + self.max_frames]
            try:
                embedding, attention = self._embed_chunk(chunk)
            except torch.OutOfMemoryError:
                if len(chunk) == 1:
                    raise
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                self.max_frames = len(chunk) // 2
                log.warning(
                    "%s has no memory for %d frames at once, going on with %d",
                    self.device,
                    len(chunk),
                    self.max_frames,
                )
                continue
            embeddings.append(embedding)
            maps.append(attention)
            start += len(chunk)
        return torch.cat(embeddings), torch.cat(maps)

    def _embed_chunk(self, frames: Clip) -> tuple[Tensor, Tensor]:
        chunk = torch.from_numpy(frames).to(self.device)
        pixels = normalise(chunk, self.preprocessing).to(DTYPES[self.precision])
        embedding, attention = self._network.embed_frames(pixels)
        return embedding.cpu(), attention.cpu()
