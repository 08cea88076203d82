"""A teacher that answers while its student learns, about the very crops that the student is shown.

`model.teacher_cache` asks a teacher once about a few looks of each frame. One that runs beside its
student is asked about every crop after all augmentation, and no crop need come twice: what Beyer et
al. (arXiv:2106.05237) call a patient and consistent teacher. That pays where the teacher's network
costs little beside the student's forward and backward pass, as on a GPU.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.frames import Clip
from model.teacher import TINY, Teacher
from model.teacher_cache import Looks


class LiveTeacher:
    """A teacher beside its student.

    Args:
        teacher: Which; on a GPU its network should be on the student's.
        frames: All that may be shown, and that looks borrow from.
        cameras: Which camera each is of, see `model.teacher_cache.cache_embeddings`.
        views: How many looks of each frame there are, the frame itself the first.
    """

    def __init__(
        self, teacher: Teacher, frames: Sequence[Path], cameras: Mapping[Path, str], views: int
    ) -> None:
        self.teacher, self.dim, self.views = teacher.fingerprint, teacher.dim, views
        self._asked = teacher
        self._looks = Looks(sorted(frames), cameras)
        self._graphs: dict[tuple[int, ...], _Captured] = {}

    def show(self, frame: Path, view: int, read: Callable[[Path], Clip]) -> Clip:
        """A look of a frame, see `model.teacher_cache.TeacherEmbeddings.show`.

        Raises:
            TeacherError: It is none of its frames.
        """
        return self._looks.show(self._looks.row(frame), view, read)

    def see(self, clips: Tensor) -> Tensor:
        """What the teacher makes of crops.

        Args:
            clips: (B, T, H, W, 3) uint8 RGB, on any device; resized to what the teacher takes.

        Returns:
            (B, T, D_t) float32 of unit length, on that device.

        Raises:
            TeacherError: It fails. On a GPU an embedding that is not finite is left to whoever
                reads the loss: to look for one is to wait.
        """
        embeddings = self._embed(self._resized(clips.flatten(0, 1)))
        unit = functional.normalize(embeddings, dim=1, eps=TINY)
        return unit.view(*clips.shape[:2], self.dim)

    def _resized(self, crops: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 to (N, 3, H_t, W_t) float32 in 0 to 255."""
        size = (self._asked.preprocessing.height, self._asked.preprocessing.width)
        pixels = crops.permute(0, 3, 1, 2).float()
        if tuple(crops.shape[1:3]) == size:
            return pixels
        smaller = crops.shape[1] > size[0] or crops.shape[2] > size[1]
        return functional.interpolate(pixels, size, mode="bilinear", antialias=smaller)

    @torch.no_grad()
    def _embed(self, crops: Tensor) -> Tensor:
        if self._asked.network is None:
            taken = crops.permute(0, 2, 3, 1).round().clamp(0, 255).to(torch.uint8)
            return torch.from_numpy(self._asked.embed(np.ascontiguousarray(taken.cpu()))).to(
                crops.device
            )
        if crops.device.type != "cuda":
            return self._asked.embed_pixels(crops)
        shape = tuple(crops.shape)
        if shape not in self._graphs:
            self._graphs[shape] = _Captured(self._asked.embed_pixels, crops)
        return self._graphs[shape](crops)


class _Captured:
    """A function of one tensor on a GPU, recorded once as a CUDA graph and replayed.

    A teacher of a thousand small layers costs more in launching them than in computing.

    Args:
        function: Without side effects.
        example: Of the one shape that it is replayed for.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], example: Tensor) -> None:
        self._taken = example.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what allocates and tunes must be over before recording
            for _ in range(3):
                function(self._taken)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._made = function(self._taken)

    def __call__(self, value: Tensor) -> Tensor:
        """What the function makes of it; a copy, because the next replay overwrites."""
        self._taken.copy_(value)
        self._graph.replay()
        return self._made.clone()
