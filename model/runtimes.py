"""What computes frame embeddings for `model.embedder`: PyTorch, or another runtime beside it.

A runtime is given a few frames at a time and need not have finished when it answers, so that a GPU
may compute while the next frames are on their way to it.
"""

import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from model.errors import DeviceError
from model.frames import Clip, Preprocessing, make_constants, normalise
from model.network import TrackletNet

Runtime = Literal["auto", "torch", "openvino"]
RuntimeName = Literal["torch", "openvino"]
Resolved = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What is left to do for frames that a runtime was given: wait, and take what it made of them.
Collect = Callable[[], tuple[Tensor, Tensor]]
# How a RuntimeError says on a CPU that memory ran out, each provoked: PyTorch's allocator and
# OpenVINO's layers; OpenVINO's buffers; its compiler; a layer of it that waited for a thread that
# found none; and oneDNN, which says no more than this. What only begins so, "could not create a
# primitive descriptor", is something else.
_NO_MEMORY = re.compile(
    r"can't alloc|Failed to allocate \d+ bytes of memory|std::bad_alloc"
    r"|std::future_error: Broken promise|\Acould not create a primitive\Z"
)


class FrameRuntime(Protocol):
    """Makes frame embeddings; one thread uses it."""

    @property
    def overlaps(self) -> bool:
        """Whether it computes while the caller does something else."""

    def warm_up(self, max_frames: int) -> None:
        """Do what happens only once; later calls do nothing.

        Raises:
            RuntimeError: Perhaps that memory does not hold so many frames at once, which
                `is_out_of_memory` tells.
            MemoryError: Likewise.
        """

    def launch(self, pieces: Sequence[Clip]) -> Collect:
        """Begin with some frames.

        Args:
            pieces: N frames in all, (n, height, width, 3) uint8 each; free to change once this has
                returned.

        Returns:
            What waits for frame embeddings (N, D) and attention (N, H, W), float32 on the CPU.

        Raises:
            RuntimeError: See `warm_up`.
            MemoryError: Likewise.
        """


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of a runtime says that memory, a device's or the machine's, ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def choose_runtime(runtime: Runtime, device: torch.device, precision: Resolved) -> RuntimeName:
    """Resolve ``auto`` to OpenVINO on a CPU, where it is installed, and to PyTorch elsewhere.

    Raises:
        DeviceError: ``runtime`` is not one of the three, is not installed, or does not compute on
            this device or in this precision.
    """
    if runtime not in get_args(Runtime):
        raise DeviceError(f"expected runtime {get_args(Runtime)}, got {runtime!r}")
    is_installed = find_spec("openvino") is not None
    is_fit = device.type == "cpu" and precision != "fp16"
    if runtime == "auto":
        return "openvino" if is_installed and is_fit else "torch"
    if runtime == "openvino" and not is_fit:
        raise DeviceError(
            f"expected a CPU and fp32 or bf16 for OpenVINO, got {device} and {precision}"
        )
    if runtime == "openvino" and not is_installed:
        raise DeviceError("expected openvino, got none: pip install 'passerby[openvino]'")
    return runtime


class TorchRuntime:
    """PyTorch, kernel after kernel.

    Args:
        network: In eval mode, with its backbone in ``precision``, on ``device``.
        preprocessing: Of its frames.
        device: Where it computes.
        precision: Of the backbone.
    """

    overlaps = False

    def __init__(
        self,
        network: TrackletNet,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: Resolved,
    ) -> None:
        self._network = network
        self._preprocessing = preprocessing
        self._device = device
        self._dtype = DTYPES[precision]
        self._constants = make_constants(preprocessing, device)

    def warm_up(self, max_frames: int) -> None:
        """Nothing: what PyTorch does once, it does at the first call."""

    @torch.no_grad()
    def launch(self, pieces: Sequence[Clip]) -> Collect:
        """See `FrameRuntime.launch`."""
        frames = torch.from_numpy(np.concatenate(pieces)).to(self._device)
        embeddings, attention = self.step(frames)
        return lambda: (embeddings.cpu(), attention.cpu())

    def step(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (N, height, width, 3) uint8 to embeddings (N, D) and attention (N, H, W)."""
        pixels = normalise(frames, self._preprocessing, self._constants).to(self._dtype)
        return self._network.embed_frames(pixels)
