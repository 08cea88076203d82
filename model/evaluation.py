"""Who is found: test tracklets embedded as the service embeds them, compared, and measured.

One path for all: training calls `evaluate_split` to watch its curve, and `model.evaluation_runner`
does the same over splits and seeds and keeps the outcome.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from model.datasets.tracklets import Split, Tracklet, natural_key
from model.embedder import TrackletEmbedding
from model.errors import EvaluationError
from model.frames import Clip, Preprocessing, choose_frames, read_frame
from model.measures import Measures, average_measures, rank_queries
from model.reranking import rerank

Frames = Literal["even", "all", "random"]
ProtocolName = Literal["auto", "camera-pairs", "pooled"]
Vectors = NDArray[np.float32]
# Distinguishes these draws from others with the same seed.
STREAM = 31
MOST_THREADS = 8


class EmbedsClips(Protocol):
    """What is evaluated: `model.embedder.Embedder`, or another that answers as it does."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What frames must go through."""

    def embed(
        self, clips: Sequence[Clip], *, with_attention: bool = False
    ) -> list[TrackletEmbedding]:
        """Embed clips, see `model.embedder.Embedder.embed`."""


@dataclass(frozen=True, slots=True)
class ClipChoice:
    """Which frames of a test tracklet make its embedding.

    Args:
        frames: "even" takes ``clip_frames`` of them evenly, as the service does by default. "all"
            cuts the tracklet into clips of ``clip_frames``, of which the last one goes on with
            the tracklet's first frames, and averages them. "random" draws ``clip_frames``.
        clip_frames: Frames of a clip, >= 1; the paper's N.
        wraps: Whether what is too short begins again. To an average that changes little; a frame
            that is there twice agrees with itself perfectly, so a network that weighs frames by
            agreement is shown each once.
    """

    frames: Frames = "even"
    clip_frames: int = 15
    wraps: bool = True

    def __post_init__(self) -> None:
        if self.frames not in get_args(Frames):
            raise ValueError(f"frames: expected {get_args(Frames)}, got {self.frames!r}")
        if self.clip_frames < 1:
            raise ValueError(f"clip_frames: expected at least 1, got {self.clip_frames}")

    def positions(self, tracklet: Tracklet, seed: int = 0) -> list[int]:
        """Choose the frames of one tracklet.

        Clips are of equal length, so the mean over clips is the mean over this one list, and the
        embedder needs not know of clips.

        Args:
            tracklet: Whose frames.
            seed: Decides "random" draws, together with who the tracklet is: which others are
                evaluated beside it changes nothing.

        Returns:
            Indices into its frames, ascending but for the wrapped ones.
        """
        chosen = self._choose(tracklet, seed)
        return chosen if self.wraps else list(dict.fromkeys(chosen))

    def _choose(self, tracklet: Tracklet, seed: int) -> list[int]:
        received = len(tracklet.frames)
        if self.frames == "all":
            clips = -(-received // self.clip_frames)
            return [place % received for place in range(clips * self.clip_frames)]
        if self.frames == "even":
            return choose_frames(received, self.clip_frames, "even")
        name = hashlib.sha256(tracklet_name(tracklet).encode("utf-8", "surrogateescape")).digest()
        rng = np.random.default_rng([seed, STREAM, int.from_bytes(name[:8], "big")])
        return choose_frames(received, self.clip_frames, "random", rng)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Queries and the gallery that they are searched in.

    Args:
        name: "" where a split has one comparison, "cam_1>cam_2" for a pair of cameras.
        query: Tracklets that are searched with.
        gallery: Tracklets that are searched in.
    """

    name: str
    query: tuple[Tracklet, ...]
    gallery: tuple[Tracklet, ...]


def tracklet_name(tracklet: Tracklet) -> str:
    """Name a tracklet within its data set: ``identity/camera`` or ``identity/camera/name``."""
    return f"{tracklet.identity}/{tracklet.camera}/{tracklet.name}".rstrip("/")


def resolve_protocol(layout: str, protocol: ProtocolName = "auto") -> str:
    """What "auto" means: the published protocol of a benchmark, camera pairs for a folder.

    Returns:
        "published", "camera-pairs" or "pooled".
    """
    if protocol not in get_args(ProtocolName):
        raise ValueError(f"protocol: expected {get_args(ProtocolName)}, got {protocol!r}")
    if protocol != "auto":
        return protocol
    return "camera-pairs" if layout == "folder" else "published"


def plan_comparisons(split: Split, protocol: str) -> list[Comparison]:
    """Say what is compared with what.

    Args:
        split: Its query and gallery.
        protocol: "published" and "pooled" search the whole gallery with each query, without what
            has the query's identity and camera (which leaves out the query itself, too). That is
            the protocol of iLIDS-VID and PRID-2011 (query in one camera, gallery in the other),
            and of MARS and Market-1501. "camera-pairs" searches the queries of each camera in
            each other camera, for a mean over the pairs. A pair is left out where no query has its
            identity in the gallery, or where the gallery holds one identity only, which any
            network finds; see `left_out_pairs`.

    Raises:
        EvaluationError: No query could be answered.
        ValueError: There is no such protocol.
    """
    if protocol not in ("published", "pooled", "camera-pairs"):
        raise ValueError(f"expected published, pooled or camera-pairs, got {protocol!r}")
    comparisons = [Comparison("", split.query, split.gallery)]
    among = ""
    if protocol == "camera-pairs":
        comparisons = [one for one in _pairs(split) if _says_something(one)]
        among = ", beside somebody else"
    answerable = [one for one in comparisons if _is_answerable(one)]
    if not answerable:
        cameras = _cameras(split.query + split.gallery)
        raise EvaluationError(
            f"split {split.name}: expected an identity that is searched for in one camera and "
            f"stands in the gallery of another{among}, got {len(split.query)} query and "
            f"{len(split.gallery)} gallery tracklets of {len(cameras)} camera(s) without one"
        )
    return answerable


def left_out_pairs(split: Split, protocol: str) -> list[str]:
    """Name the camera pairs that `plan_comparisons` leaves out; none for another protocol."""
    if protocol != "camera-pairs":
        return []
    planned = {one.name for one in plan_comparisons(split, protocol)}
    return [one.name for one in _pairs(split) if one.name not in planned]


def embed_tracklets(
    embedder: EmbedsClips,
    tracklets: Sequence[Tracklet],
    choice: ClipChoice | None = None,
    *,
    seed: int = 0,
    threads: int | None = None,
) -> Generator[tuple[Tracklet, Vectors]]:
    """Embed tracklets one after another, decoding ahead in threads.

    Each tracklet is one call of the embedder, so its embedding is to the bit what the service
    makes of it alone.

    Args:
        embedder: Makes embeddings.
        tracklets: What to embed, N.
        choice: Which of their frames; 15 evenly by default.
        seed: Of random draws.
        threads: That decode; by default as many as cores, at most 8.

    Yields:
        Each tracklet in order with its embedding, (D,) float32, finite.

    Raises:
        InvalidFramesError: A frame cannot be decoded; it is named.
        EvaluationError: An embedding holds NaN or infinity; the tracklet is named.
    """
    choice = choice or ClipChoice()
    count = threads or min(os.cpu_count() or 1, MOST_THREADS)
    waiting: deque[tuple[Tracklet, Future[Clip]]] = deque()
    with ThreadPoolExecutor(count) as pool:

        def finish() -> tuple[Tracklet, Vectors]:
            tracklet, clip = waiting.popleft()
            return tracklet, _embed(embedder, tracklet, clip.result())

        try:
            for tracklet in tracklets:
                positions = choice.positions(tracklet, seed)
                future = pool.submit(_read, tracklet, positions, embedder.preprocessing)
                waiting.append((tracklet, future))
                if len(waiting) > count:
                    yield finish()
            while waiting:
                yield finish()
        finally:
            for _, future in waiting:
                future.cancel()


def embed_with_attention(
    embedder: EmbedsClips, tracklet: Tracklet, choice: ClipChoice, seed: int = 0
) -> NDArray[np.float32]:
    """Return where the embedder looks in each different frame that it uses, (T, H, W) float32."""
    used = used_frames(tracklet, choice, seed)
    clip = _read(tracklet, used, embedder.preprocessing)
    attention = embedder.embed([clip], with_attention=True)[0].attention
    if attention is None:
        raise EvaluationError("expected attention maps from the embedder, got none")
    return attention


def used_frames(tracklet: Tracklet, choice: ClipChoice, seed: int = 0) -> list[int]:
    """Return the positions of the different frames that make an embedding."""
    return replace(choice, wraps=False).positions(tracklet, seed)


def euclidean_distances(queries: Vectors, gallery: Vectors) -> NDArray[np.float64]:
    """Euclidean distances by differences: exactly 0 for equal vectors, equal for equal pairs.

    The product form |a|^2 + |b|^2 - 2ab would lose what is near zero and, worse here, would break
    ties by rounding: a constant embedding must tie with itself.

    Args:
        queries: (M, D).
        gallery: (N, D).

    Returns:
        (M, N) float64.
    """
    a = torch.from_numpy(np.asarray(queries, dtype=np.float64))
    b = torch.from_numpy(np.asarray(gallery, dtype=np.float64))
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    result: NDArray[np.float64] = distances.numpy()
    return result


def compare(
    comparison: Comparison, embeddings: Mapping[str, Vectors], *, reranked: bool = False
) -> tuple[Measures, NDArray[np.float64]]:
    """Measure one comparison.

    Args:
        comparison: What is searched in what.
        embeddings: (D,) by `tracklet_name`, of all its tracklets.
        reranked: Whether distances are replaced by those of `model.reranking`.

    Returns:
        Measures, and the distances (M, N) that they are of.
    """
    query = np.stack([embeddings[tracklet_name(one)] for one in comparison.query])
    gallery = np.stack([embeddings[tracklet_name(one)] for one in comparison.gallery])
    distances = euclidean_distances(query, gallery)
    if reranked:
        among_queries = euclidean_distances(query, query)
        distances = rerank(distances, among_queries, euclidean_distances(gallery, gallery))
    measures = rank_queries(
        distances,
        [one.identity for one in comparison.query],
        [one.identity for one in comparison.gallery],
        [one.camera for one in comparison.query],
        [one.camera for one in comparison.gallery],
    )
    return measures, distances


def evaluate_split(
    embedder: EmbedsClips,
    split: Split,
    *,
    protocol: str,
    choice: ClipChoice | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Measures:
    """Embed the test tracklets of a split and measure them, keeping nothing.

    Args:
        embedder: Makes embeddings.
        split: Its query and gallery.
        protocol: See `plan_comparisons`, and `resolve_protocol` for that of a layout.
        choice: Which frames; 15 evenly by default.
        seed: Of random draws.
        progress: Called after each tracklet with how many are done, and how many there are.

    Raises:
        InvalidFramesError: A frame cannot be decoded.
        EvaluationError: No query could be answered, or an embedding is not finite.
    """
    comparisons = plan_comparisons(split, protocol)
    tracklets = tested_tracklets([split])
    embeddings = {}
    with closing(embed_tracklets(embedder, tracklets, choice, seed=seed)) as stream:
        for tracklet, embedding in stream:
            embeddings[tracklet_name(tracklet)] = embedding
            if progress is not None:
                progress(len(embeddings), len(tracklets))
    return average_measures([compare(one, embeddings)[0] for one in comparisons])


def tested_tracklets(splits: Sequence[Split]) -> list[Tracklet]:
    """Return what must be embedded to evaluate splits, each tracklet once."""
    found = {tracklet_name(one): one for split in splits for one in split.query + split.gallery}
    return list(found.values())


def _read(tracklet: Tracklet, positions: Sequence[int], preprocessing: Preprocessing) -> Clip:
    """Decode each frame once, however often it is used."""
    frames = {place: read_frame(tracklet.frames[place], preprocessing) for place in set(positions)}
    return np.stack([frames[place] for place in positions])


def _embed(embedder: EmbedsClips, tracklet: Tracklet, clip: Clip) -> Vectors:
    embedding = embedder.embed([clip])[0].embedding
    if not np.isfinite(embedding).all():
        raise EvaluationError(
            f"expected finite embeddings, got NaN or infinity for {tracklet_name(tracklet)}"
        )
    return embedding


def _pairs(split: Split) -> list[Comparison]:
    return [
        Comparison(f"{a}>{b}", _seen_by(a, split.query), _seen_by(b, split.gallery))
        for a, b in product(_cameras(split.query), _cameras(split.gallery))
        if a != b
    ]


def _says_something(comparison: Comparison) -> bool:
    """Whether the gallery holds somebody to be mistaken for the right one."""
    return len({one.identity for one in comparison.gallery}) > 1


def _seen_by(camera: str, tracklets: Sequence[Tracklet]) -> tuple[Tracklet, ...]:
    return tuple(one for one in tracklets if one.camera == camera)


def _cameras(tracklets: Sequence[Tracklet]) -> list[str]:
    return sorted({one.camera for one in tracklets}, key=natural_key)


def _is_answerable(comparison: Comparison) -> bool:
    """Whether a query has its identity in another camera of the gallery."""
    cameras: dict[str, set[str]] = {}
    for one in comparison.gallery:
        cameras.setdefault(one.identity, set()).add(one.camera)
    return any(cameras.get(one.identity, set()) - {one.camera} for one in comparison.query)
