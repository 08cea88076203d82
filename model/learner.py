"""The network with what training alone needs: a classifier, and a projection towards a teacher."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.checkpoint import (
    IMAGENET,
    backbone_checkpoint,
    find_checkpoint,
    is_checkpoint,
    load_checkpoint,
)
from model.distillation import DistillationLoss, DistillationTerms
from model.errors import CheckpointError
from model.frames import normalise
from model.losses import focal_sigmoid_bias
from model.network import Encoded, NetworkConfig, TrackletNet
from model.quantised import QuantisedBackbone
from model.recipe import RANDOM_START, Recipe

CLASSIFIER_STD = 1e-3  # small logits at first: every identity as likely as every other


class Learned(NamedTuple):
    """What the losses of one batch are made of.

    Args:
        encoded: Embeddings and attention.
        logits: (B, identities), or None without an identity loss.
        distilled: What the teacher says, or None without one.
    """

    encoded: Encoded
    logits: Tensor | None
    distilled: DistillationTerms | None


class Learner(nn.Module):
    """Clips in, everything that the losses need out, in one call, as data parallelism wants it.

    Args:
        network: What is trained and kept.
        recipe: Which losses there are.
        identities: Of the training set.
        teacher_dim: Length of the teacher's embeddings; None without a teacher.
    """

    def __init__(
        self, network: TrackletNet, recipe: Recipe, identities: int, teacher_dim: int | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = recipe.preprocessing
        self.classifier: nn.Linear | None = None
        if recipe.loss.identity != "none":
            # After a neck, whose output is centred, a bias has nothing to do.
            self.classifier = nn.Linear(network.dim, identities, bias=not recipe.network.neck)
            nn.init.normal_(self.classifier.weight, std=CLASSIFIER_STD)
            if self.classifier.bias is not None:
                prior = focal_sigmoid_bias() if recipe.loss.identity == "focal_sigmoid" else 0.0
                nn.init.constant_(self.classifier.bias, prior)
        self.distillation: DistillationLoss | None = None
        if recipe.distillation is not None and teacher_dim is not None:
            self.distillation = DistillationLoss(network.dim, teacher_dim, recipe.distillation)

    def forward(self, clips: Tensor, teacher: Tensor | None = None) -> Learned:
        """Encode a batch.

        Args:
            clips: (B, T, H, W, 3) uint8 RGB.
            teacher: (B, T, D_t) float32, the teacher's embeddings of the same frames.
        """
        frames = normalise(clips.flatten(0, 1), self.preprocessing)  # (B*T, 3, H, W)
        encoded = self.network.encode(frames.view(*clips.shape[:2], *frames.shape[1:]))
        with torch.autocast(clips.device.type, enabled=False):
            logits = None
            if self.classifier is not None:
                logits = self.classifier(self.network.neck(encoded.embeddings))  # (B, identities)
            distilled = None
            if self.distillation is not None and teacher is not None:
                distilled = self.distillation(encoded.frames, teacher)
        return Learned(encoded, logits, distilled)


def start_network(recipe: Recipe, seed: int) -> tuple[TrackletNet, dict[str, Any]]:
    """The network that training begins with, and where its weights come from.

    Args:
        recipe: Says where its weights come from.
        seed: Of random weights: all, or those that the given ones do not have.

    Raises:
        CheckpointError: The weights cannot be had, or belong to another architecture.
    """
    with torch.random.fork_rng(devices=[]):
        # Also around given weights: a head that they do not have is drawn.
        torch.manual_seed(seed)
        return _start_network(recipe, seed)


def _start_network(recipe: Recipe, seed: int) -> tuple[TrackletNet, dict[str, Any]]:
    if recipe.start == RANDOM_START:
        return TrackletNet(recipe.network), {"weights": RANDOM_START, "seed": seed}
    path = find_checkpoint(recipe.start)
    if recipe.start != IMAGENET and is_checkpoint(path):
        given = load_checkpoint(path)
        # What its weights were trained on goes on to count as seen.
        origin = {name: given.provenance[name] for name in ("data", "start", "backbone")
                  if name in given.provenance}  # fmt: skip
        return _adopt(given.network, recipe.network, path), {
            "checkpoint": given.fingerprint,
            **origin,
        }
    if recipe.network.backbone != "resnet50":
        raise CheckpointError(
            f'start: expected "{RANDOM_START}" or a checkpoint of a {recipe.network.backbone} '
            f"network, got {recipe.start}"
        )
    given = backbone_checkpoint(recipe.start, recipe.network)
    return given.network, dict(given.provenance)


def _adopt(given: TrackletNet, config: NetworkConfig, path: Path) -> TrackletNet:
    if given.config.backbone != config.backbone:
        raise CheckpointError(
            f"start: expected a checkpoint of a {config.backbone} network, "
            f"got {path} of a {given.config.backbone} network"
        )
    if isinstance(given.backbone, QuantisedBackbone):
        raise CheckpointError(f"start: expected weights in float, got {path} in 8 bits")
    network = TrackletNet(config)
    network.backbone.load_state_dict(given.backbone.state_dict())
    if config.head and config.head == given.config.head:
        network.head.load_state_dict(given.head.state_dict())
    if config.neck and given.config.neck and network.dim == given.dim:
        network.neck.load_state_dict(given.neck.state_dict())
    return network
