"""TrackletNet: the network that turns the frames of a tracklet into one embedding.

Wang and Zhao, *Temporal Regularized Spatial Attention for Video-based Person Re-identification*,
section 2,
read top to bottom: ResNet-50 with its last stage at stride 1, spatial attention (Eq. 1-2),
weighted pooling
(Eq. 3), temporal average pooling. Shape letters: B tracklets, T frames, C channels, H W cells, D
embedding.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet50

from model.errors import InvalidFramesError

Attention = Literal["softmax", "mean", "l1", "none"]
Pool = Literal["sum", "mean"]
Temporal = Literal["mean", "agreement"]
Backbone = Literal["resnet50", "conv5"]
EMBEDDING_DIM = {"resnet50": 2048, "conv5": 256}
# Length below which an embedding counts as zero: it has no direction that could be compared.
TINY = 1e-12


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Which reading of the paper a network follows; saved in its checkpoint.

    Args:
        attention: How Eq. 1-2 are read, see `SpatialAttention`.
        temperature: What R is divided by before the softmax; 1 is the printed Eq. 2.
        pool: "sum" weighs the cells and adds them up; "mean" also divides by their number, as Fig.
        1 prints.
        backbone: "resnet50" is the paper's. "conv5" is a small stand-in for experiments on a CPU:
            five convolutions, 256 channels, stride 4 in all, so that 64x32 pixels make
            16x8 cells, too.
        neck: Whether embeddings pass a batch normalisation without bias ("BNNeck"). In training
            only the classifier sees its output; an embedding that is served or evaluated is
            the normalised one. Not in the paper.
        head: Length of the embeddings, made by a linear layer from the pooled features; 0 for the
            pooled features themselves, as in the paper. A head lets embeddings take signs, which
            a teacher's have and pooled features have not.
        temporal: "mean" is the paper's temporal average. "agreement" trusts a frame as far as
            others look like it, see `pool_frames`; what it helps is in docs/pooling.md. Not in
            the paper.
        unit: Whether a tracklet embedding that is served or evaluated has length 1, so that
            Euclidean distance and cosine rank alike, and what the triplet loss compares likewise.
            A zero vector stays zero. Not in the paper.
    """

    attention: Attention = "softmax"
    temperature: float | Literal["std"] = "std"
    pool: Pool = "sum"
    backbone: Backbone = "resnet50"
    neck: bool = False
    head: int = 0
    temporal: Temporal = "mean"
    unit: bool = False

    def __post_init__(self) -> None:
        if self.attention not in get_args(Attention):
            raise ValueError(f"attention: expected {get_args(Attention)}, got {self.attention!r}")
        if self.pool not in get_args(Pool):
            raise ValueError(f"pool: expected {get_args(Pool)}, got {self.pool!r}")
        if self.backbone not in get_args(Backbone):
            raise ValueError(f"backbone: expected {get_args(Backbone)}, got {self.backbone!r}")
        if self.temporal not in get_args(Temporal):
            raise ValueError(f"temporal: expected {get_args(Temporal)}, got {self.temporal!r}")
        if self.head < 0:
            raise ValueError(f"head: expected a length, or 0 for none, got {self.head}")
        if isinstance(self.temperature, str):
            positive = self.temperature == "std"
        else:
            positive = 0 < self.temperature < float("inf")
        if not positive:
            raise ValueError(
                f'temperature: expected a positive number or "std", got {self.temperature!r}'
            )


def build_backbone(name: Backbone = "resnet50") -> nn.Sequential:
    """What makes feature maps of frames.

    "resnet50" is that of torchvision up to its last feature map, with the last stage at stride 1.
    Children keep torchvision's names, so a torchvision state dict without ``fc`` loads as it is.

    Returns:
        A module from (B, 3, 256, 128) to (B, 2048, 16, 8), 23,508,032 parameters; for "conv5" from
        (B, 3, 64, 32) to (B, 256, 16, 8), 219,104 parameters. Features are non-negative.
    """
    if name == "conv5":
        return _build_conv5()
    resnet: ResNet = resnet50()
    # The stride of a bottleneck sits in its 3x3 convolution and in its shortcut.
    last_stage = resnet.layer4[0]
    last_stage.conv2.stride = (1, 1)
    last_stage.downsample[0].stride = (1, 1)
    kept = [
        (name, child) for name, child in resnet.named_children() if name not in ("avgpool", "fc")
    ]
    return nn.Sequential(OrderedDict(kept))


def _build_conv5() -> nn.Sequential:
    layers: list[tuple[str, nn.Module]] = []
    widths, strides, kernels = (3, 32, 64, 96, 128, 256), (2, 2, 1, 1, 1), (3, 3, 3, 3, 1)
    for number, (stride, kernel) in enumerate(zip(strides, kernels, strict=True), start=1):
        convolution = nn.Conv2d(
            widths[number - 1], widths[number], kernel, stride, kernel // 2, bias=False
        )
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [
            (f"conv{number}", convolution),
            (f"bn{number}", nn.BatchNorm2d(widths[number])),
            (f"relu{number}", nn.ReLU(inplace=True)),
        ]
    return nn.Sequential(OrderedDict(layers))


class SpatialAttention(nn.Module):
    """Where each frame looks: a parameter-free map over its feature cells.

    Wang and Zhao, Eq. 1-2, with a temperature:

        R(i, j) = sum_c f_c(i, j),    a = softmax_ij(R / temperature)

    Temperature 1 is the printed form. It saturates: on trained weights one cell of 128 takes 0.99
    of the mass.

    Args:
        temperature: A positive number, or "std" for each frame's own spatial deviation of R
        (scale-free).
        attention: "softmax" as above; "mean" is softmax(R / C); "l1" is R / sum(R), as the code of
        the
            paper's reference [16]; "none" is uniform, which makes the pooling a plain average.
    """

    def __init__(
        self, temperature: float | Literal["std"] = "std", attention: Attention = "softmax"
    ) -> None:
        super().__init__()
        NetworkConfig(attention=attention, temperature=temperature)  # refuses what is not a reading
        self.temperature = temperature
        self.attention = attention

    def forward(self, features: Tensor) -> Tensor:
        """Map features to attention.

        Args:
            features: Backbone output, (B, C, H, W), non-negative.

        Returns:
            Attention, (B, H, W) float32; each map is non-negative and sums to 1.
        """
        if features.ndim != 4:
            raise InvalidFramesError(
                f"expected features (B, C, H, W), got shape {tuple(features.shape)}"
            )
        with torch.autocast(features.device.type, enabled=False):
            saliency = features.float().sum(
                dim=1
            )  # (B, H, W); bfloat16 would round R in steps of 4
            weights = self._weights(saliency.flatten(1), channels=features.shape[1])  # (B, H*W)
            return weights.view_as(saliency)

    def _weights(self, saliency: Tensor, channels: int) -> Tensor:
        uniform = torch.full_like(saliency, 1 / saliency.shape[1])
        if self.attention == "none":
            return uniform
        if self.attention == "l1":
            mass = saliency.sum(dim=1, keepdim=True)
            return torch.where(mass > 0, saliency / mass.clamp_min(1e-12), uniform)
        if self.attention == "mean":
            return (saliency / channels).softmax(dim=1)
        return (saliency / self._temperature(saliency)).softmax(dim=1)

    def _temperature(self, saliency: Tensor) -> Tensor | float:
        if self.temperature != "std":
            return self.temperature
        deviation = saliency.std(dim=1, correction=0, keepdim=True)  # (B, 1)
        # A flat map has no deviation but rounding: a floor relative to R keeps it uniform, and the
        # map unchanged when all features are scaled. Real maps lie far above it (0.2 R and more).
        floor = 1e-4 * saliency.abs().mean(dim=1, keepdim=True)
        return torch.maximum(deviation, floor).clamp_min(1e-12)


def pool_cells(features: Tensor, attention: Tensor, pool: Pool = "sum") -> Tensor:
    """Weigh feature cells by attention and pool them: Eq. 3 and the GAP of Fig. 1.

        v_c = sum_ij f_c(i, j) a(i, j)

    Args:
        features: (B, C, H, W).
        attention: (B, H, W), each map sums to 1.
        pool: "mean" divides by H*W besides, as printed: the weights already sum to 1, so that
        shrinks
            embeddings 128 times.

    Returns:
        Frame embeddings, (B, C) float32.
    """
    with torch.autocast(features.device.type, enabled=False):
        cells = features.float().flatten(2)  # (B, C, H*W)
        pooled = torch.bmm(cells, attention.float().flatten(1).unsqueeze(2)).squeeze(2)  # (B, C)
        return pooled / cells.shape[2] if pool == "mean" else pooled


def pool_frames(frames: Tensor, mask: Tensor | None = None, temporal: Temporal = "mean") -> Tensor:
    """Pool the frames that exist over time.

    "mean" is the paper's temporal average pooling (TAP). "agreement" weighs frames by how far
    others agree with them, as the spatial attention weighs cells: a softmax without parameters
    whose temperature is the deviation of its own input.

        s(i, j) = cos(f_i, f_j),    p = softmax of s / std(s) over all pairs i != j
        w_i = sum_j p(i, j),        v = sum_i w_i f_i

    The scale of embeddings does not matter, nor whether all of them are much alike, as those of
    non-negative features are. Strangers agree with nobody, so a few frames of one person outweigh
    many of different ones; frames of one stranger agree with each other, and where they are the
    most they win. One or two frames are averaged.

    Args:
        frames: Frame embeddings, (B, T, D).
        mask: (B, T) bool, True where a frame exists; all exist where None.
        temporal: See above.

    Returns:
        Tracklet embeddings, (B, D).

    Raises:
        InvalidFramesError: The mask has another shape, or a tracklet has no frame.
    """
    if mask is None:
        if temporal == "mean":
            return frames.mean(dim=1)
        mask = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
    if mask.shape != frames.shape[:2]:
        raise InvalidFramesError(
            f"expected a mask {tuple(frames.shape[:2])}, got {tuple(mask.shape)}"
        )
    if not torch.compiler.is_compiling() and not mask.any(dim=1).all():
        raise InvalidFramesError("expected at least one frame in each tracklet, got one with none")
    # where, not a product: a padded frame may hold NaN, and NaN * 0 is NaN.
    kept = torch.where(mask.unsqueeze(2), frames, torch.zeros_like(frames))
    if temporal == "agreement":
        return _weigh(kept, frame_agreement(kept, mask))
    weight = mask.to(frames.dtype).unsqueeze(2)  # (B, T, 1)
    return kept.sum(dim=1) / weight.sum(dim=1)


def _weigh(frames: Tensor, weights: Tensor) -> Tensor:
    with torch.autocast(frames.device.type, enabled=False):
        return torch.bmm(weights.to(frames.dtype).unsqueeze(1), frames).squeeze(1)  # (B, D)


def frame_agreement(frames: Tensor, mask: Tensor) -> Tensor:
    """How far each frame is to be trusted: the weights w of `pool_frames`.

    Args:
        frames: Frame embeddings, (B, T, D), finite also where none exists.
        mask: (B, T) bool, True where a frame exists, at least once in each row.

    Returns:
        Weights, (B, T) float32, non-negative, of sum 1 in each row; 0 where no frame exists.
    """
    with torch.autocast(frames.device.type, enabled=False):
        directions = unit_length(frames.float())  # (B, T, D)
        similarity = torch.bmm(directions, directions.transpose(1, 2))  # (B, T, T)
        place = torch.arange(frames.shape[1], device=frames.device)
        exist = mask.unsqueeze(2) & mask.unsqueeze(1)
        pairs = exist & (place.unsqueeze(1) != place)  # (B, T, T)
        logits = _standardise(similarity, pairs).flatten(1)  # (B, T*T)
        share = logits.softmax(dim=1).view_as(similarity).sum(dim=2)  # (B, T)
        share = share * mask
        return share / share.sum(dim=1, keepdim=True)


def _standardise(values: Tensor, chosen: Tensor) -> Tensor:
    """Z-scores among the chosen of (B, T, T) values; the least finite number for the others.

    It is finite so that a row without any, a tracklet of one frame, has a softmax all the same.
    """
    count = chosen.sum(dim=(1, 2), keepdim=True).clamp_min(1)
    mean = torch.where(chosen, values, 0.0).sum(dim=(1, 2), keepdim=True) / count
    centred = torch.where(chosen, values - mean, 0.0)
    variance = centred.square().sum(dim=(1, 2), keepdim=True) / count
    # Below, similarities differ by rounding alone. It clamps before the root, whose slope at 0
    # is infinite.
    scores = centred / variance.clamp_min(1e-12).sqrt()
    return torch.where(chosen, scores, torch.finfo(scores.dtype).min)


def unit_length(embeddings: Tensor) -> Tensor:
    """Scale embeddings (..., D) to length 1; a zero vector stays zero, with a gradient of zero."""
    length = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
    is_zero = length <= TINY  # and not "> TINY" turned round: NaN must stay NaN
    safe = torch.where(is_zero, torch.ones_like(length), length)
    return torch.where(is_zero, torch.zeros_like(embeddings), embeddings / safe)


class Encoded(NamedTuple):
    """Everything that training wants to know of a batch of clips.

    Args:
        embeddings: Tracklet embeddings before any neck, (B, D) float32, of any length.
        frames: Frame embeddings before any neck, (B, T, D) float32.
        attention: (B, T, H, W) float32, each map sums to 1.
    """

    embeddings: Tensor
    frames: Tensor
    attention: Tensor


class TrackletNet(nn.Module):
    """Frames of tracklets in, one embedding each out.

    Frames are treated independently until the last step, so frames of many tracklets may share a
    batch
    and an embedding does not depend on what it shared the batch with.

    Args:
        config: Which reading of the paper to follow.
    """

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config or NetworkConfig()
        channels = EMBEDDING_DIM[self.config.backbone]
        self.dim = self.config.head or channels
        self.backbone = build_backbone(self.config.backbone)
        self.attention = SpatialAttention(self.config.temperature, self.config.attention)
        self.head: nn.Module = nn.Identity()
        if self.config.head:
            # Without a bias a frame without features has an embedding without length.
            self.head = nn.Linear(channels, self.dim, bias=False)
        self.neck: nn.Module = nn.Identity()
        if self.config.neck:
            self.neck = nn.BatchNorm1d(self.dim)
            self.neck.bias.requires_grad = False

    def embed_frames(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Embed single frames, whichever tracklets they belong to.

        Args:
            frames: (N, 3, height, width), RGB, normalised by `model.frames`.

        Returns:
            Frame embeddings (N, D) float32 and attention (N, H, W) float32.
        """
        embeddings, attention = self._pool(frames)  # (N, D), (N, H, W)
        # In eval mode the neck is affine, so it may as well stand before the temporal average;
        # agreement is then that of the embeddings that are compared.
        return embeddings if self.training else self.neck(embeddings), attention

    def _pool(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(frames)  # (N, D, H, W); ResNet-50: (N, 2048, height/16, width/16)
        attention = self.attention(features)  # (N, H, W)
        pooled = pool_cells(features, attention, self.config.pool)  # (N, channels)
        if self.config.head:  # torch.export cannot save a region in which nothing is computed
            with torch.autocast(frames.device.type, enabled=False):
                pooled = self.head(pooled)  # (N, D)
        return pooled, attention

    def encode(self, clips: Tensor, mask: Tensor | None = None) -> Encoded:
        """Encode clips for training: all that the losses see, before any neck.

        Args:
            clips: (B, T, 3, height, width), RGB, normalised by `model.frames`.
            mask: (B, T) bool, True where a frame exists; all exist where None.

        Raises:
            InvalidFramesError: ``clips`` or ``mask`` has another shape, or a tracklet has no frame.
        """
        _check_clips(clips)
        frames, attention = self._pool(clips.flatten(0, 1))  # (B*T, D), (B*T, H, W)
        per_tracklet = clips.shape[:2]
        frames = frames.view(*per_tracklet, -1)  # (B, T, D)
        attention = attention.view(*per_tracklet, *attention.shape[1:])  # (B, T, H, W)
        return Encoded(pool_frames(frames, mask, self.config.temporal), frames, attention)

    def embed_tracklets(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """Make tracklet embeddings of frame embeddings, as the configuration says.

        Args:
            frames: (B, T, D), of `embed_frames`.
            mask: (B, T) bool, True where a frame exists; all exist where None.

        Returns:
            (B, D); of length 1 in eval mode where the configuration says so.

        Raises:
            InvalidFramesError: The mask has another shape, or a tracklet has no frame.
        """
        embeddings = pool_frames(frames, mask, self.config.temporal)
        is_unit = self.config.unit and not self.training
        return unit_length(embeddings) if is_unit else embeddings

    @overload
    def forward(self, clips: Tensor, mask: Tensor | None = None) -> Tensor: ...

    @overload
    def forward(
        self, clips: Tensor, mask: Tensor | None = None, *, return_attention: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, clips: Tensor, mask: Tensor | None = None, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed tracklets.

        Args:
            clips: (B, T, 3, height, width), RGB, normalised by `model.frames`.
            mask: (B, T) bool, True where a frame exists; all exist where None. What stands in the
            others
                changes nothing (in training, batch statistics see them: there, repeat frames
                instead).
            return_attention: Also return where each frame looked.

        Returns:
            Tracklet embeddings (B, D) float32; with ``return_attention`` also attention maps
            (B, T, H, W) float32.

        Raises:
            InvalidFramesError: ``clips`` or ``mask`` has another shape, or a tracklet has no frame.
        """
        _check_clips(clips)
        frames, attention = self.embed_frames(clips.flatten(0, 1))  # (B*T, D), (B*T, H, W)
        per_tracklet = clips.shape[:2]
        embeddings = self.embed_tracklets(frames.view(*per_tracklet, -1), mask)  # (B, D)
        if return_attention:
            return embeddings, attention.view(*per_tracklet, *attention.shape[1:])  # (B, T, H, W)
        return embeddings


def _check_clips(clips: Tensor) -> None:
    if clips.ndim != 5 or clips.shape[2] != 3 or clips.shape[1] == 0:
        raise InvalidFramesError(
            f"expected clips (B, T >= 1, 3, height, width), got shape {tuple(clips.shape)}"
        )
