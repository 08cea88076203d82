"""Within-class covariance normalisation: how a person differs between cameras counts less.

Hatch, Kajarekar and Stolcke, "Within-class covariance normalization for SVM-based speaker
recognition", Interspeech 2006. There sessions of a speaker, here cameras that saw a person. Not in
the paper. It is linear, so a network with a head carries it in the head's weights: nothing is added
to what serves.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.datasets.mixed import part_of
from model.datasets.tracklets import Tracklet
from model.embedder import Embedder
from model.errors import DatasetError
from model.frames import Clip, choose_frames
from model.network import TrackletNet

Matrix = NDArray[np.float64]
CHUNK_FRAMES = 256


@dataclass(frozen=True, slots=True)
class WithinClassConfig:
    """What a recipe says of the normalisation that ends a run: the table ``[within_class]``.

    Args:
        ridge: Added to the variance in every direction, as a share of the largest, in (0, 1]: a
            direction that people never differ in between cameras keeps its length, the one that
            they differ in most is shortened to ``sqrt(ridge / (1 + ridge))`` of it.
        frames: Of each tracklet, evenly.
    """

    ridge: float = 0.1
    frames: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.ridge <= 1:
            raise ValueError(f"ridge: expected a share in (0, 1], got {self.ridge}")
        if self.frames < 1:
            raise ValueError(f"frames: expected at least 1, got {self.frames}")


def twice_seen(tracklets: Sequence[Tracklet]) -> dict[str, list[Tracklet]]:
    """The tracklets of people whom at least two cameras saw, by the part of a mix they belong to.

    Args:
        tracklets: Of any people.

    Returns:
        By the part's name, ``""`` outside of a mix; parts without such people are left out.

    Raises:
        DatasetError: Nobody was seen by two cameras.
    """
    cameras: dict[str, set[str]] = defaultdict(set)
    for one in tracklets:
        cameras[one.identity].add(one.camera)
    parts: dict[str, list[Tracklet]] = defaultdict(list)
    for one in tracklets:
        if len(cameras[one.identity]) > 1:
            parts[part_of(one.identity)].append(one)
    if not parts:
        raise DatasetError(
            "within_class: expected training identities that at least two cameras saw, got "
            f"{len(cameras)} identities with one camera each"
        )
    return dict(parts)


def within_class_covariance(
    embeddings: Matrix, identities: Sequence[str], cameras: Sequence[str]
) -> Matrix:
    """How a person's embedding varies between cameras, pooled over people.

    With m_ic the mean embedding of identity i in camera c, m_i the mean of those over its C_i
    cameras, and the sums over identities with C_i > 1::

        S = sum_i sum_c (m_ic - m_i) (m_ic - m_i)^T  /  sum_i (C_i - 1)

    Args:
        embeddings: (N, D), of frames or of tracklets.
        identities: N names.
        cameras: N names.

    Returns:
        (D, D), symmetric, without negative eigenvalues.

    Raises:
        ValueError: No identity has two cameras.
    """
    rows: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, (identity, camera) in enumerate(zip(identities, cameras, strict=True)):
        rows[identity][camera].append(row)
    scatter, freedom = np.zeros((embeddings.shape[1], embeddings.shape[1])), 0
    for by_camera in rows.values():
        if len(by_camera) > 1:
            means = np.stack([embeddings[seen].mean(axis=0) for seen in by_camera.values()])
            apart = means - means.mean(axis=0)  # (C_i, D)
            scatter += apart.T @ apart
            freedom += len(means) - 1
    if not freedom:
        raise ValueError("expected an identity with two cameras, got none")
    return scatter / freedom


def discount(covariance: Matrix, ridge: float) -> Matrix:
    """The linear map that makes a within-class covariance nearly the same in every direction.

    With S = V diag(s) V^T it is V diag(s / (ridge * max(s)) + 1)^(-1/2) V^T, which is symmetric:
    it turns nothing and lengthens nothing.

    Args:
        covariance: S, (D, D).
        ridge: In (0, 1], see `WithinClassConfig`.

    Returns:
        (D, D); the identity where S is zero.
    """
    variances, directions = np.linalg.eigh(covariance)
    variances = np.maximum(variances, 0.0)  # what is below is rounding
    largest = variances.max(initial=0.0)
    if not largest:
        return np.eye(len(covariance))
    lengths = (variances / (ridge * largest) + 1) ** -0.5
    discounted: Matrix = (directions * lengths) @ directions.T
    return discounted


def normalise_head(
    network: TrackletNet,
    embedder: Embedder,
    tracklets: Sequence[Tracklet],
    config: WithinClassConfig,
    read: Callable[[Tracklet, int], Clip],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Fold the normalisation into the head of a network.

    Every part of a mix counts the same, however many people it has.

    Args:
        network: With a head, which is changed.
        embedder: Of that network as it is before.
        tracklets: Of people whom it may learn from.
        config: How.
        read: Gives frame number n of a tracklet, prepared.
        progress: Told of frames done and in all.

    Returns:
        How many people it was learned from, by part.

    Raises:
        DatasetError: Nobody was seen by two cameras.
        InvalidFramesError: A frame cannot be decoded.
    """
    if not isinstance(network.head, nn.Linear):
        raise ValueError("expected a network with a head")
    parts = twice_seen(tracklets)
    chosen = {
        part: [(one, n) for one in seen for n in choose_frames(len(one.frames), config.frames)]
        for part, seen in parts.items()
    }
    done, total = 0, sum(len(frames) for frames in chosen.values())
    covariances = []
    for frames in chosen.values():
        embeddings = []
        for start in range(0, len(frames), CHUNK_FRAMES):
            chunk = frames[start : start + CHUNK_FRAMES]
            # Each frame alone: means over frames are then means of what unit embeddings say.
            made = embedder.embed([read(one, n)[None] for one, n in chunk])
            embeddings += [one.embedding for one in made]
            done += len(chunk)
            if progress is not None:
                progress(done, total)
        covariances.append(_covariance_of(embeddings, [one for one, _ in frames]))
    turned = discount(np.mean(covariances, axis=0), config.ridge)
    weight = network.head.weight
    changed = turned @ weight.detach().double().numpy()
    with torch.no_grad():
        weight.copy_(torch.from_numpy(changed))
    return _people(parts)


def _covariance_of(
    embeddings: Sequence[NDArray[np.float32]], tracklets: Sequence[Tracklet]
) -> Matrix:
    rows = np.stack(embeddings).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(lengths > 0, lengths, 1)
    identities = [one.identity for one in tracklets]
    return within_class_covariance(rows, identities, [one.camera for one in tracklets])


def _people(parts: Mapping[str, Sequence[Tracklet]]) -> dict[str, int]:
    return {part: len({one.identity for one in seen}) for part, seen in parts.items()}
