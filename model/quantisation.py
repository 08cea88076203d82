"""Makes 8-bit checkpoints: rounds a trained network, calibrated on tracklets, without training it.

Each tensor's range is what calibration showed of it, each convolution's bias makes good the mean of
what rounding changed. Attention, pooling and a head stay float32. An 8-bit network is another
model, with a fingerprint of its own: its vectors differ from the original's by some percent.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from model.checkpoint import Checkpoint, make_checkpoint, save_checkpoint
from model.datasets.layouts import fingerprint_dataset, read_dataset
from model.datasets.synthetic import SyntheticSet, draw_set
from model.datasets.tracklets import Tracklet
from model.embedder import Embedder, fold_batch_norm
from model.errors import CheckpointError, ExportError
from model.evaluation import euclidean_distances
from model.frames import Clip, Preprocessing, choose_frames, normalise, prepare_frame, read_clip
from model.measures import rank_queries
from model.network import Backbone
from model.quantised import LEVELS, WEIGHT_LEVELS, QuantisedBackbone, Step, walk

FRAMES = 128
"""That ranges are taken from. All are in memory at once, at 256x128 about 2 GB."""
MOST_TRACKLETS = 120
"""That a model is compared on with the one it comes from."""
DRAWN = SyntheticSet(identities=24, cameras=2, seed=77)
"""Who is calibrated on where nobody says otherwise."""
# What is let pass: a file that is worse is not kept.
LARGEST_ERROR = 0.1
LARGEST_LOSS = 0.01
_STREAM = 41  # distinguishes these draws from others with the same seed
_LEAST_RANGE = 1e-6  # of a layer that is always zero
_USED = 15  # frames of a tracklet, as the service takes by default


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A tracklet to calibrate and compare on.

    Args:
        identity: Who.
        camera: Where.
        clip: (T, height, width, 3) uint8 RGB, of the checkpoint's preprocessing.
    """

    identity: str
    camera: str
    clip: Clip


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an 8-bit model compares with the one it comes from, on the same tracklets.

    Args:
        error: |a - b| / |b| of tracklet embeddings, the mean over tracklets.
        largest_error: Likewise, the largest.
        queries: Tracklets whose identity another camera saw, too.
        rank_1: Share of queries, in [0, 1], that the 8-bit model finds first; None without queries.
        rank_1_before: Likewise, that the original finds.
        mean_average_precision: mAP of the 8-bit model, in [0, 1]; None without queries.
        mean_average_precision_before: Likewise, of the original.
    """

    error: float
    largest_error: float
    queries: int = 0
    rank_1: float | None = None
    rank_1_before: float | None = None
    mean_average_precision: float | None = None
    mean_average_precision_before: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the 8-bit model is let pass."""
        loss = 0.0
        if self.mean_average_precision is not None and self.mean_average_precision_before:
            loss = self.mean_average_precision_before - self.mean_average_precision
        return self.error <= LARGEST_ERROR and loss <= LARGEST_LOSS


def quantise_file(
    checkpoint: Checkpoint, output: Path, *, data: Path | None = None, seed: int = 0
) -> tuple[Checkpoint, Agreement]:
    """Make an 8-bit checkpoint, compare it with the original, and write it only if it holds.

    Args:
        checkpoint: A checkpoint in float.
        output: The file, replaced where it exists.
        data: Folder of tracklets in a known layout to calibrate on; drawn people where None.
        seed: Decides which frames are calibrated on, and which tracklets of a large folder.

    Returns:
        The checkpoint as it will be loaded, and how it compares.

    Raises:
        CheckpointError: The checkpoint has 8 bits already, or the file cannot be written.
        DatasetError: The folder is not laid out as any layout.
        InvalidFramesError: A frame cannot be decoded.
        ExportError: The 8-bit model is too far from the original.
    """
    if data is None:
        samples = drawn_samples(checkpoint.preprocessing)
        source: dict[str, Any] = {"data": "drawn people", "seed": DRAWN.seed}
    else:
        dataset = read_dataset(data)
        samples = read_samples(dataset.tracklets, checkpoint.preprocessing, seed=seed)
        source = {"layout": dataset.layout, "fingerprint": fingerprint_dataset(dataset)}
    frames = choose_calibration(samples, seed=seed)
    source |= {"tracklets": len(samples), "frames": len(frames), "frames_seed": seed}
    made = quantise_checkpoint(checkpoint, frames, source)
    agreement = compare_models(checkpoint, made, samples)
    if not agreement.holds:
        raise ExportError(f"{output} not written: {_complaint(agreement)}")
    told = {**made.provenance["quantised"], "relative_error": round(agreement.error, 4)}
    made = replace(made, provenance={**made.provenance, "quantised": told})
    return save_checkpoint(made, output), agreement


def drawn_samples(preprocessing: Preprocessing, drawn: SyntheticSet = DRAWN) -> list[Sample]:
    """Draw people to calibrate on.

    Args:
        preprocessing: What their frames go through.
        drawn: Whom.
    """
    samples = []
    for tracklet in draw_set(drawn):
        places = choose_frames(len(tracklet.frames), _USED)
        pictures = (Image.fromarray(tracklet.frames[place]) for place in places)
        clip = np.stack([prepare_frame(picture, preprocessing) for picture in pictures])
        samples.append(Sample(str(tracklet.identity), str(tracklet.camera), clip))
    return samples


def read_samples(
    tracklets: Sequence[Tracklet], preprocessing: Preprocessing, *, seed: int = 0
) -> list[Sample]:
    """Read tracklets of whole identities, drawn where there are many.

    Args:
        tracklets: At least one.
        preprocessing: What their frames go through.
        seed: Of the draw.

    Returns:
        Of at most `MOST_TRACKLETS` tracklets, but at least of one identity's.

    Raises:
        InvalidFramesError: A frame cannot be decoded.
    """
    identities = sorted({one.identity for one in tracklets})
    order = np.random.default_rng([seed, _STREAM, 0]).permutation(len(identities))
    chosen: list[Tracklet] = []
    for place in order:
        own = [one for one in tracklets if one.identity == identities[place]]
        if chosen and len(chosen) + len(own) > MOST_TRACKLETS:
            break
        chosen += own
    return [
        Sample(one.identity, one.camera, read_clip(one.frames, preprocessing, used=_USED))
        for one in chosen
    ]


def choose_calibration(samples: Sequence[Sample], *, seed: int = 0) -> Clip:
    """Draw the frames that ranges are taken from: (N, height, width, 3) uint8, N <= `FRAMES`."""
    frames = np.concatenate([one.clip for one in samples])
    order = np.random.default_rng([seed, _STREAM, 1]).permutation(len(frames))
    return frames[np.sort(order[:FRAMES])]


def quantise_checkpoint(
    checkpoint: Checkpoint, frames: Clip, calibrated_on: Mapping[str, Any]
) -> Checkpoint:
    """Round a checkpoint's backbone to 8 bits.

    Args:
        checkpoint: In float; stays as it is.
        frames: To take ranges from, (N, height, width, 3) uint8 RGB of its preprocessing, N >= 1.
        calibrated_on: What they are of, as JSON, for the provenance; no path and no name.

    Returns:
        Another model with the same configuration, preprocessing and head. Its provenance is the
        original's, so that whom that was trained on goes on to count as seen, and "quantised".

    Raises:
        CheckpointError: The checkpoint has 8 bits already.
        InvalidFramesError: The frames are of another size.
    """
    original = checkpoint.network
    if isinstance(original.backbone, QuantisedBackbone):
        raise CheckpointError(
            f"expected a checkpoint in float, got {checkpoint.fingerprint}, which has 8 bits "
            "already; quantise the one that it was made of"
        )
    pixels = normalise(torch.from_numpy(frames), checkpoint.preprocessing).contiguous()
    network = copy.copy(original)
    network._modules = dict(original._modules)
    backbone = fold_batch_norm(original.backbone)
    made = quantise_backbone(backbone, original.config.backbone, pixels)
    network.set_submodule("backbone", made)
    told = {"of": checkpoint.fingerprint, "bits": 8, "calibrated_on": dict(calibrated_on)}
    provenance = {**checkpoint.provenance, "quantised": told}
    return make_checkpoint(network, checkpoint.preprocessing, provenance)


@torch.inference_mode()
def quantise_backbone(backbone: nn.Module, name: Backbone, frames: Tensor) -> QuantisedBackbone:
    """Round a backbone to 8 bits, layer by layer in one pass.

    Each layer is computed twice, as it was and of what the rounded layers before it made. The
    former says its range, the difference of the means of both corrects its bias.

    Args:
        backbone: Float32, its batch normalisations folded.
        name: Which one.
        frames: Normalised, (N, 3, height, width) float32.
    """
    made = QuantisedBackbone(name)
    modules = dict(backbone.named_modules())

    def compute(step: Step, sources: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if step.kind == "convolution":
            exact = modules[step.name](sources[0][0])
            _set_convolution(made, step, modules[step.name])
            rounded = made.compute(step, [sources[0][1]])
            shift = (exact - rounded).mean(dim=(0, 2, 3))  # (outputs,)
            made.convolution(step).bias += shift
            rounded += shift.view(1, -1, 1, 1)
        else:
            exact = made.compute(step, [source[0] for source in sources])
            rounded = made.compute(step, [source[1] for source in sources])
        _set_range(made, step, exact)
        return exact, made.round(step, rounded)

    walk(made.steps, (frames, frames), compute)
    return made


def _set_convolution(made: QuantisedBackbone, step: Step, original: nn.Module) -> None:
    weight, bias = original.weight, original.bias
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
        raise TypeError(f"expected a convolution with a bias, got {original}")
    largest = weight.abs().amax(dim=(1, 2, 3))  # (outputs,)
    scale = (largest / WEIGHT_LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    whole = (weight / scale.view(-1, 1, 1, 1)).round().clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS)
    convolution = made.convolution(step)
    convolution.weight, convolution.scale = whole.to(torch.int8), scale
    convolution.bias = bias.detach().clone()


def _set_range(made: QuantisedBackbone, step: Step, values: Tensor) -> None:
    """From the least to the largest value, and 0 in any case, which padding needs exactly.

    Clipping what is rare instead, as common tools do, doubles the error (docs/int8.md).
    """
    if step.rounded is None:
        return
    least, largest = (end.item() for end in values.aminmax())
    least, largest = min(least, 0.0), max(largest, 0.0)
    scale = max(largest - least, _LEAST_RANGE) / LEVELS
    made.scales[step.rounded] = scale
    made.zeros[step.rounded] = round(-least / scale)


def compare_models(before: Checkpoint, after: Checkpoint, samples: Sequence[Sample]) -> Agreement:
    """Embed the same tracklets by two models, as the service would, and search among them.

    Args:
        before: The original.
        after: What was made of it.
        samples: At least one.
    """
    exact, rounded = (_embed(one, samples) for one in (before, after))
    errors = np.linalg.norm(rounded - exact, axis=1)
    errors /= np.maximum(np.linalg.norm(exact, axis=1), np.finfo(np.float32).tiny)
    agreement = Agreement(float(errors.mean()), float(errors.max()))
    if not (queries := _queries(samples)):
        return agreement
    (rank_1, precision), (rank_1_before, precision_before) = (
        _search(vectors, samples, queries) for vectors in (rounded, exact)
    )
    return replace(
        agreement,
        queries=len(queries),
        rank_1=rank_1,
        rank_1_before=rank_1_before,
        mean_average_precision=precision,
        mean_average_precision_before=precision_before,
    )


def _embed(checkpoint: Checkpoint, samples: Sequence[Sample]) -> NDArray[np.float32]:
    """(N, D), one by one: an embedding is then to the bit what the service makes."""
    embedder = Embedder(checkpoint, device="cpu", precision="fp32")
    return np.stack([embedder.embed([one.clip])[0].embedding for one in samples])


def _queries(samples: Sequence[Sample]) -> list[int]:
    """Places of those whose identity another camera saw, too."""
    cameras: dict[str, set[str]] = {}
    for one in samples:
        cameras.setdefault(one.identity, set()).add(one.camera)
    if len(cameras) < 2:
        return []  # nobody to be mistaken for
    return [place for place, one in enumerate(samples) if len(cameras[one.identity]) > 1]


def _search(
    vectors: NDArray[np.float32], samples: Sequence[Sample], queries: Sequence[int]
) -> tuple[float, float]:
    """Rank-1 and mAP of queries among all samples, without those of their own camera."""
    asked = [samples[place] for place in queries]
    measures = rank_queries(
        euclidean_distances(vectors[list(queries)], vectors),
        [one.identity for one in asked],
        [one.identity for one in samples],
        [one.camera for one in asked],
        [one.camera for one in samples],
    )
    return float(measures.cmc[0]), measures.mean_average_precision


def _complaint(agreement: Agreement) -> str:
    text = (
        f"expected embeddings within {LARGEST_ERROR:.0%} of the original's and a loss of mAP of at "
        f"most {LARGEST_LOSS:.0%}, got {agreement.error:.1%}"
    )
    if agreement.mean_average_precision is None:
        return text
    before = agreement.mean_average_precision_before or 0.0
    return f"{text} and mAP {agreement.mean_average_precision:.1%} where it was {before:.1%}"
