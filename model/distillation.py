"""Learning from another network: what a recipe says of its teacher, and the loss that it adds.

Ideas: a student learns from a teacher's outputs (Hinton, Vinyals and Dean, arXiv:1503.02531), here
embeddings and not class probabilities, because the two know no common classes; and from how similar
the teacher finds the members of a batch (Tung and Mori, arXiv:1907.09682; Park et al.,
arXiv:1904.05068). The teacher itself is `model.teacher`.
"""

from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.errors import TeacherError
from model.teacher import (
    START,
    TINY,
    Channels,
    Computation,
    PixelRange,
    Triple,
    require_teacher_name,
)


@dataclass(frozen=True, slots=True)
class DistillationConfig:
    """What a recipe says of its teacher: the table ``[distillation]``.

    The teacher takes ``(pixel / scale - mean) / std`` of pixels from 0 to 255. The defaults are
    what the networks of Open Model Zoo take, BGR as it is; one trained on ImageNet by PyTorch takes
    "rgb", scale 255 and ImageNet's mean and deviation. A wrong one raises no error and teaches
    badly.

    Args:
        teacher: Path of an ``.onnx`` file, or of an OpenVINO ``.xml`` with its ``.bin`` beside it.
            Or "start": the weights that the run begins with, so that it does not forget what they
            knew; they take pixels as they always do, and the next five do not count.
        channels: Order in which the teacher takes them.
        scale: What pixels are divided by first.
        mean: Per channel R, G, B, whatever the order that the teacher takes.
        std: Likewise.
        precision: In which it computes. "bf16" is twice as fast where the processor multiplies it,
            needs OpenVINO, and is not the same to the last bit on every machine.
        similarity_weight: Of the similarity term of `DistillationLoss`.
        embedding_weight: Of its embedding term.
        projection: Whether the embedding term compares through a linear layer, which belongs to
            training; without it the student's embeddings must be as long as the teacher's, and
            come to stand where the teacher's do.
        views: How many looks of each frame the teacher sees: the frame itself, and others of
            `model.views`. A student is shown one of them at a time.
        plain: How often a frame is shown as it is, in [0, 1]; None for as often as any other of its
            looks.
        live: Whether the teacher runs beside the student and is asked about every crop as the
            student sees it, augmentation and all, see `model.live_teacher`; an ``.xml`` computes on
            the student's GPU. Nothing is cached, so ``views`` may be as many as one likes.
        cache: Folder for the teacher's embeddings; None leaves it to the caller.
    """

    teacher: str
    channels: Channels = "bgr"
    scale: float = 1.0
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    precision: Computation = "fp32"
    similarity_weight: float = 1.0
    embedding_weight: float = 1.0
    projection: bool = True
    views: int = 1
    plain: float | None = None
    live: bool = False
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.teacher != START:
            require_teacher_name(self.teacher)
        PixelRange(self.channels, self.scale, self.mean, self.std)  # refuses what is none
        if self.precision not in get_args(Computation):
            raise ValueError(f"precision: expected {get_args(Computation)}, got {self.precision!r}")
        for name in ("similarity_weight", "embedding_weight"):
            weight = getattr(self, name)
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name}: expected 0 or more, got {weight}")
        if self.similarity_weight == self.embedding_weight == 0:
            raise ValueError(
                "distillation: expected a similarity_weight or an embedding_weight, got 0 for both"
            )
        if self.views < 1:
            raise ValueError(f"views: expected at least 1, the frame itself, got {self.views}")
        if self.plain is not None and not 0 <= self.plain <= 1:
            raise ValueError(f"plain: expected a share in [0, 1], got {self.plain}")
        if self.plain is not None and self.views == 1:
            raise ValueError("plain: expected distillation.views of 2 or more, got 1")
        if self.live and self.teacher == START:
            raise ValueError('live: expected a teacher\'s file, got the teacher "start"')
        if self.cache is not None and not self.cache:
            raise ValueError("cache: expected a folder, got an empty path")


class DistillationTerms(NamedTuple):
    """What the teacher adds to the loss.

    Args:
        total: The weighted sum, a scalar with a graph.
        similarity: Without its weight, a scalar; only for the log.
        embedding: Likewise.
    """

    total: Tensor
    similarity: Tensor
    embedding: Tensor


class DistillationLoss(nn.Module):
    """How far the frame embeddings of a batch are from the teacher's.

    With s_n and t_n the student's and the teacher's embedding of frame n of N in the batch:

        similarity = 1 / N^2 sum_nm (cos(s_n, s_m) - cos(t_n, t_m))^2
        embedding  = 1 / N   sum_n  (1 - cos(P s_n, t_n))

    The similarity term acts on the student's own embeddings, so that the space that serves takes
    the teacher's geometry. Tung and Mori (arXiv:1907.09682) compare G = A A^T of activations with
    its rows scaled to unit length, by the same mean of squares; here the entries are cosines, which
    do not depend on what else is in the batch. Park et al. (arXiv:1904.05068) compare distances,
    scaled by their mean, and angles. The embedding term needs the projection P because the two
    spaces have other axes; it belongs to training and is in no checkpoint. A student with
    embeddings of the teacher's length may do without, P the identity. Cosines, because
    teachers of this kind are compared by them; so the length of the student's embeddings stays
    free.

    The projection's weights are drawn from PyTorch's generator, which the caller seeds.

    Args:
        dim: Length of the student's embeddings, D.
        teacher_dim: Of the teacher's, D_t.
        config: Says the weights of the two terms.
    """

    def __init__(self, dim: int, teacher_dim: int, config: DistillationConfig) -> None:
        super().__init__()
        self.dim, self.teacher_dim = dim, teacher_dim
        self.similarity_weight = config.similarity_weight
        self.embedding_weight = config.embedding_weight
        if not config.projection and dim != teacher_dim:
            raise TeacherError(
                f"expected embeddings as long as the teacher's without a projection, "
                f"{teacher_dim}, got {dim}: set network.head"
            )
        self.projection: nn.Module = nn.Identity()
        if config.projection:
            self.projection = nn.Linear(dim, teacher_dim)

    def forward(self, frame_embeddings: Tensor, teacher: Tensor) -> DistillationTerms:
        """Compare a batch with what the teacher says of it.

        Args:
            frame_embeddings: The student's, (B, T, D).
            teacher: The teacher's of the same frames, (B, T, D_t).

        Returns:
            Scalars, float32 whatever the autocast.

        Raises:
            TeacherError: A shape is another one.
        """
        self._check(frame_embeddings, teacher)
        with torch.autocast(frame_embeddings.device.type, enabled=False):
            student = frame_embeddings.float().flatten(0, 1)  # (B*T, D)
            projected = _unit(self.projection(student))  # (B*T, D_t)
            student, target = _unit(student), _unit(teacher.float().flatten(0, 1))
            similarity = functional.mse_loss(student @ student.T, target @ target.T)
            embedding = 1 - (projected * target).sum(dim=1).mean()
            total = self.similarity_weight * similarity + self.embedding_weight * embedding
        return DistillationTerms(total, similarity.detach(), embedding.detach())

    def _check(self, frame_embeddings: Tensor, teacher: Tensor) -> None:
        if frame_embeddings.ndim != 3 or frame_embeddings.shape[2] != self.dim:
            raise TeacherError(
                f"expected frame embeddings (B, T, {self.dim}), got {tuple(frame_embeddings.shape)}"
            )
        expected = (*frame_embeddings.shape[:2], self.teacher_dim)
        if tuple(teacher.shape) != expected:
            raise TeacherError(
                f"expected the teacher's embeddings {expected}, got {tuple(teacher.shape)}"
            )


def _unit(embeddings: Tensor) -> Tensor:
    # Not the customary 1e-12: a frame without features would get a gradient of that order.
    return functional.normalize(embeddings, dim=1, eps=TINY)
