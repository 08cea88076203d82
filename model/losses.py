"""What training lowers: temporal regularisation, batch-hard triplet, identity loss, their sum.

Wang and Zhao, Eq. 4-9. Everything is float32 whatever the autocast around it: bfloat16 resolves
distances near 450 in steps of 2, and the squares of Eq. 4 no better. Shape letters: B tracklets, T
frames (the paper's N), H W cells, D embedding, C identities.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

IdentityLoss = Literal["focal_softmax", "focal_sigmoid", "focal_literal", "ce", "ce_smooth", "none"]
Regulariser = Literal["printed", "cv", "consistency", "none"]


@dataclass(frozen=True, slots=True)
class LossConfig:
    """Which losses are added up, and how each equation is read.

    Args:
        identity: The identity loss, see `identity_loss`.
        gamma: Focusing exponent of the focal ones, 0 or more.
        smoothing: Of "ce_smooth", in [0, 1).
        triplet: Whether the batch-hard triplet loss (Eq. 6) is added.
        margin: Its margin m, 0 or more.
        regulariser: "printed" is Eq. 4; "cv" is the same up to scale and a constant, see
            `coverage_cv2`; "consistency" is what the text says, see `consistency_regulariser`.
        regulariser_weight: The lambda of Eq. 5, 0 or more.
    """

    identity: IdentityLoss = "focal_softmax"
    gamma: float = 2.0
    smoothing: float = 0.1
    triplet: bool = True
    margin: float = 0.3
    regulariser: Regulariser = "printed"
    regulariser_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.identity not in get_args(IdentityLoss):
            raise ValueError(f"identity: expected {get_args(IdentityLoss)}, got {self.identity!r}")
        if self.regulariser not in get_args(Regulariser):
            raise ValueError(
                f"regulariser: expected {get_args(Regulariser)}, got {self.regulariser!r}"
            )
        if not isinstance(self.triplet, bool):
            raise ValueError(f"triplet: expected True or False, got {self.triplet!r}")
        for name in ("gamma", "margin", "regulariser_weight"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number, 0 or more, got {value!r}")
        if not _is_number(self.smoothing) or not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing: expected a share in [0, 1), got {self.smoothing!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class TripletTerms(NamedTuple):
    """The triplet loss, and what tells whether it works; all scalars.

    Args:
        loss: Eq. 6.
        active: Share of the anchors, 0-1, with a positive hinge.
        positive: Mean distance to the hardest positive.
        negative: Mean distance to the hardest negative.
    """

    loss: Tensor
    active: Tensor
    positive: Tensor
    negative: Tensor


class LossTerms(NamedTuple):
    """The sum and its parts, all scalars; a part that is switched off is 0.

    Args:
        total: Eq. 9 plus lambda times the regulariser (Eq. 5).
        identity: L_f.
        triplet: L_v, or None where it is switched off.
        regulariser: Reg, before its weight.
    """

    total: Tensor
    identity: Tensor
    triplet: TripletTerms | None
    regulariser: Tensor


def total_loss(
    config: LossConfig,
    embeddings: Tensor,
    logits: Tensor | None,
    labels: Tensor,
    attention: Tensor,
    mask: Tensor | None = None,
) -> LossTerms:
    """Everything that one batch is trained on: L = L_f + L_v + lambda Reg, Eq. 5 and 9.

    Args:
        config: Which terms there are.
        embeddings: Tracklet embeddings, (B, D), not normalised.
        logits: (B, C), or None without an identity loss.
        labels: (B,) int64 in [0, C).
        attention: (B, T, H, W), each map sums to 1.
        mask: (B, T) bool, True where a frame exists; all exist where None.

    Raises:
        ValueError: A shape does not fit, or the identity loss has no logits.
    """
    if len(attention) != len(labels):
        raise ValueError(
            f"expected attention of {len(labels)} tracklets, as there are labels, "
            f"got {len(attention)}"
        )
    identity = attention.new_zeros((), dtype=torch.float32)
    if config.identity != "none":
        if logits is None:
            raise ValueError(f"expected logits for the identity loss {config.identity}, got none")
        identity = identity_loss(logits, labels, config)
    triplet = batch_hard_triplet(embeddings, labels, config.margin) if config.triplet else None
    regulariser = _regulariser(config.regulariser, attention, mask)
    # All of them float32 scalars, which no autocast makes smaller when it adds them.
    total = identity + config.regulariser_weight * regulariser
    if triplet is not None:
        total = total + triplet.loss
    return LossTerms(total, identity, triplet, regulariser)


def _regulariser(reading: Regulariser, attention: Tensor, mask: Tensor | None) -> Tensor:
    if reading == "printed":
        return temporal_regulariser(attention, mask)
    if reading == "cv":
        return coverage_cv2(attention, mask)
    if reading == "consistency":
        return consistency_regulariser(attention, mask)
    return attention.new_zeros((), dtype=torch.float32)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """In here, what has been made float32 stays float32."""
    return torch.autocast(tensor.device.type, enabled=False)


def temporal_regulariser(attention: Tensor, mask: Tensor | None = None) -> Tensor:
    """Temporal regularisation as printed, averaged over tracklets.

    Wang and Zhao, Eq. 4:

        Reg = sum_ij (1 - sum_n a_n(i, j))^2 = HW - 2N + ||S||^2,    S = sum_n a_n

    It spreads attention over cells and frames: smallest, HW (1 - N/HW)^2, where S is even; HW - N
    for one-hot maps on different cells; HW - 2N + N^2 where all look at one cell. That is the
    opposite of the sentence before it, for which see `consistency_regulariser`. The 1 could be any
    number: sum S = N is fixed, so the gradient is the same. For one-hot attention, to which the
    printed Eq. 2 saturates, the gradient is exactly 0.

    Args:
        attention: (B, T, H, W), each map sums to 1.
        mask: (B, T) bool, True where a frame exists; all exist where None.

    Returns:
        Scalar float32.

    Raises:
        ValueError: A shape does not fit, or a tracklet has no frame.
    """
    with _no_autocast(attention):
        maps, _ = _existing(attention, mask)  # (B, T, H*W)
        return (1 - maps.sum(dim=1)).square().sum(dim=1).mean()


def regulariser_excess(attention: Tensor, mask: Tensor | None = None) -> Tensor:
    """How far Eq. 4 is above its minimum, ||S - N/HW||^2, averaged over tracklets.

    Arguments and result as for `temporal_regulariser`.
    """
    with _no_autocast(attention):
        maps, frames = _existing(attention, mask)
        even = frames / maps.shape[2]  # (B, 1)
        return (maps.sum(dim=1) - even).square().sum(dim=1).mean()


def coverage_cv2(attention: Tensor, mask: Tensor | None = None) -> Tensor:
    """How unevenly a tracklet's attention covers its cells, averaged over tracklets.

    The squared coefficient of variation of S: (HW / N^2) ||S||^2 - 1. 0 where S is even, HW - 1
    where one cell has all of it. Free of scale, unlike Eq. 4; the lambda of Eq. 5 corresponds to
    lambda N^2 / HW here. Arguments and result as for `temporal_regulariser`.
    """
    with _no_autocast(attention):
        maps, frames = _existing(attention, mask)
        coverage = maps.sum(dim=1) / frames  # (B, H*W), sums to 1
        return (maps.shape[2] * coverage.square().sum(dim=1) - 1).mean()


def consistency_regulariser(attention: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the text before Eq. 4 asks for: that frames look at the same cells.

        (1/N) sum_n ||a_n - mean a||^2

    0 where all frames have the same map, whatever it is. Arguments and result as for
    `temporal_regulariser`.
    """
    with _no_autocast(attention):
        maps, frames = _existing(attention, mask)
        mean = maps.sum(dim=1, keepdim=True) / frames.unsqueeze(2)  # (B, 1, H*W)
        apart = (maps - mean).square().sum(dim=2)  # (B, T)
        if mask is not None:
            apart = torch.where(mask, apart, 0)
        return (apart.sum(dim=1, keepdim=True) / frames).mean()


def effective_positions(attention: Tensor) -> Tensor:
    """How many cells a map really looks at, 1 / sum a^2, averaged over maps.

    Args:
        attention: (..., H, W), each map sums to 1.

    Returns:
        Scalar float32 without a graph, from 1 (one cell) to H*W (all alike).
    """
    with _no_autocast(attention):
        maps = attention.detach().float().flatten(-2)
        return (1 / maps.square().sum(dim=-1)).mean()


def _existing(attention: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Maps with those of frames that do not exist set to 0, (B, T, H*W); their count, (B, 1)."""
    if attention.ndim != 4:
        raise ValueError(f"expected attention (B, T, H, W), got {tuple(attention.shape)}")
    maps = attention.float().flatten(2)
    if mask is None:
        return maps, maps.new_full((len(maps), 1), maps.shape[1])
    if mask.shape != maps.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"expected a bool mask {tuple(maps.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if not mask.any(dim=1).all():
        raise ValueError("expected at least one frame in each tracklet, got one with none")
    # where, not a product: a padded frame may hold NaN, and NaN * 0 is NaN.
    return torch.where(mask.unsqueeze(2), maps, 0), mask.sum(dim=1, keepdim=True).float()


def pairwise_distances(embeddings: Tensor, others: Tensor | None = None) -> Tensor:
    """Euclidean distances, from differences.

    Never by |x|^2 + |y|^2 - 2xy, which leaves nothing of a small distance between long vectors.

    Args:
        embeddings: (N, D).
        others: (M, D); the same as ``embeddings`` where None.

    Returns:
        (N, M) float32; the gradient of a distance that is 0 is 0.

    Raises:
        ValueError: A shape does not fit.
    """
    others = embeddings if others is None else others
    if embeddings.ndim != 2 or others.ndim != 2 or embeddings.shape[1] != others.shape[1]:
        raise ValueError(
            "expected embeddings (N, D) and others (M, D), got "
            f"{tuple(embeddings.shape)} and {tuple(others.shape)}"
        )
    with _no_autocast(embeddings):
        # Left to itself, cdist takes the expansion from 26 rows on.
        return torch.cdist(
            embeddings.float(), others.float(), compute_mode="donot_use_mm_for_euclid_dist"
        )


def batch_hard_triplet(embeddings: Tensor, labels: Tensor, margin: float = 0.3) -> TripletTerms:
    """Batch-hard triplet loss, averaged over all anchors, those without a loss included.

    Wang and Zhao, Eq. 6, after Hermans et al., arXiv:1703.07737; the print repeats its outer index
    and lets negatives have the anchor's identity, both slips:

        L_v = 1/(PK) sum_a [m + max_p D(v_a, v_p) - min_n D(v_a, v_n)]_+

    D is Euclidean and not squared. A loss that stays at m means that all embeddings are one point.

    Args:
        embeddings: (B, D), not normalised.
        labels: (B,) int64; each identity has at least two rows, and there are at least two.
        margin: m.

    Raises:
        ValueError: A shape does not fit, or an anchor has no positive or no negative.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"expected embeddings (B, D) and labels (B,), got {tuple(embeddings.shape)} and "
            f"{tuple(labels.shape)}"
        )
    identities, members = torch.unique(labels, return_counts=True)
    if len(identities) < 2 or int(members.min()) < 2:
        raise ValueError(
            "expected at least two identities with at least two tracklets each, got tracklets "
            f"{members.tolist()} of identities {identities.tolist()}"
        )
    same = labels.unsqueeze(0) == labels.unsqueeze(1)  # (B, B)
    with _no_autocast(embeddings):
        distances = pairwise_distances(embeddings)
        # The anchor itself is among its positives, at distance 0, and harms nothing for K >= 2.
        positive = distances.masked_fill(~same, -math.inf).amax(dim=1)
        negative = distances.masked_fill(same, math.inf).amin(dim=1)
        hinge = (margin + positive - negative).clamp_min(0)
        return TripletTerms(
            hinge.mean(),
            (hinge > 0).float().mean().detach(),
            positive.mean().detach(),
            negative.mean().detach(),
        )


def identity_loss(logits: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """Who is it, among the training identities; averaged over the batch.

    Args:
        logits: (B, C).
        labels: (B,) int64 in [0, C).
        config: ``identity`` chooses

            - "ce", "ce_smooth": softmax cross-entropy, the latter with label smoothing;
            - "focal_softmax": Eq. 8 with p the softmax of the true class, -(1-p)^g log p;
            - "focal_sigmoid": the focal loss of Lin et al., arXiv:1708.02002, without its alpha:
              summed over all classes, each a question of its own;
            - "focal_literal": Eq. 7-8 as printed, with p the sigmoid of the true logit alone. It is
              degenerate: no wrong logit is in it, so dL/dz_j = 0 for j != c; and with all logits t,
              for whatever features, L = (1 - s(t))^g log(1 + e^-t), which goes to 0 as t grows;
            - "none": 0.

    Returns:
        Scalar float32.

    Raises:
        ValueError: A shape does not fit.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits (B, C) and labels (B,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    with _no_autocast(logits):
        return _identity_loss(logits.float(), labels, config)


def _identity_loss(logits: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    if config.identity == "none":
        return logits.new_zeros(())
    if config.identity in ("ce", "ce_smooth"):
        smoothing = config.smoothing if config.identity == "ce_smooth" else 0.0
        return functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    true = labels.unsqueeze(1)
    if config.identity == "focal_softmax":
        log_p = logits.log_softmax(dim=1).gather(1, true)  # (B, 1)
        # 1 - p without cancellation, and never 0, where a power below 1 has an infinite slope.
        log_miss = (-log_p.expm1()).clamp_min(torch.finfo(log_p.dtype).tiny).log()
        return -((config.gamma * log_miss).exp() * log_p).mean()
    if config.identity == "focal_literal":
        logits = logits.gather(1, true)  # (B, 1)
        sign = torch.ones_like(logits)
    else:
        sign = torch.full_like(logits, -1.0).scatter(1, true, 1.0)  # (B, C)
    # 1 - sigmoid(z) is sigmoid(-z); in logarithms nothing overflows.
    log_p, log_miss = functional.logsigmoid(sign * logits), functional.logsigmoid(-sign * logits)
    return -((config.gamma * log_miss).exp() * log_p).sum(dim=1).mean()


def focal_sigmoid_bias(prior: float = 0.01) -> float:
    """Bias of a classifier whose sigmoids begin at ``prior``, in (0, 1): Lin et al., 3.3."""
    if not 0 < prior < 1:
        raise ValueError(f"prior: expected a probability in (0, 1), got {prior}")
    return -math.log((1 - prior) / prior)


def identity_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the rows, 0-1, whose largest logit is the true one; arguments as `identity_loss`."""
    return (logits.detach().argmax(dim=1) == labels).float().mean()


def wrong_logit_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean logit of the wrong identities: one that keeps rising betrays a degenerate loss.

    Args:
        logits: (B, C).
        labels: (B,) int64 in [0, C).

    Returns:
        Scalar float32 without a graph; 0 where there is no wrong identity.
    """
    logits = logits.detach().float()
    true = logits.gather(1, labels.unsqueeze(1)).sum()
    return (logits.sum() - true) / max(logits.numel() - len(labels), 1)
