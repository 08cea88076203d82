"""Proposals who of the unnamed tracklets belong together, for a person to accept or not."""

import json
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from index.gallery import Embeddings
from index.unnamed import UnnamedTracklets
from service.client import ClientError

Method = Literal["agglomerative", "hdbscan"]
# Both methods compare all with all: 20,000 take 3 GB and minutes.
MOST = 20_000


class ClusterError(ClientError):
    """Raised when tracklets cannot be grouped: a threshold is missing, or there are too many."""


@dataclass(frozen=True, slots=True)
class Group:
    """Tracklets that seem to show one person.

    Args:
        tracklet_ids: At least two, the one nearest to all others first.
        cameras: Where they were seen, sorted.
        widest: Greatest distance of two of them.
        mean: Mean distance of two of them.
    """

    tracklet_ids: tuple[str, ...]
    cameras: tuple[str, ...]
    widest: float
    mean: float


def propose_groups(
    tracklets: UnnamedTracklets,
    *,
    distance: float,
    method: Method = "agglomerative",
    smallest: int = 2,
) -> list[Group]:
    """Group tracklets by their embeddings.

    Args:
        tracklets: At most `MOST`.
        distance: Up to which two are taken for the same person; the calibrated threshold.
        method: Agglomerative clustering whose groups have a mean distance within ``distance``
            (average linkage), or HDBSCAN, whose groups may be of any shape and which leaves out
            what is in no dense place.
        smallest: Tracklets in a group at least.

    Returns:
        The largest group first, among equals the tightest.

    Raises:
        ClusterError: There are more than `MOST`, or scikit-learn is not installed.
    """
    if len(tracklets.tracklet_ids) > MOST:
        raise ClusterError(
            f"expected at most {MOST} unnamed tracklets at a time, got more: choose --camera"
        )
    if len(tracklets.tracklet_ids) < smallest:
        return []
    if find_spec("sklearn") is None:
        raise ClusterError("expected scikit-learn, got none: pip install 'passerby[cluster]'")
    distances = _distances(tracklets.embeddings)
    labels = _label(distances, distance, method, smallest)
    counts = Counter(label for label in labels.tolist() if label >= 0)
    groups = [
        _group(tracklets, distances, np.flatnonzero(labels == label))
        for label, count in counts.items()
        if count >= smallest
    ]
    return sorted(groups, key=lambda one: (-len(one.tracklet_ids), one.mean, one.tracklet_ids))


def _distances(embeddings: Embeddings) -> NDArray[np.float64]:
    """Euclidean distances of all pairs, (N, N)."""
    from sklearn.metrics import pairwise_distances

    found: NDArray[np.float64] = pairwise_distances(embeddings.astype(np.float64))
    return found


def _label(
    distances: NDArray[np.float64], distance: float, method: Method, smallest: int
) -> NDArray[np.int64]:
    """A group's number for each, (N,); -1 for none."""
    if method == "hdbscan":
        from sklearn.cluster import HDBSCAN

        clusterer = HDBSCAN(
            min_cluster_size=max(2, smallest),
            metric="precomputed",
            cluster_selection_epsilon=distance,
            allow_single_cluster=True,
            copy=True,
        )
    else:
        from sklearn.cluster import AgglomerativeClustering

        clusterer = AgglomerativeClustering(
            n_clusters=None, metric="precomputed", linkage="average", distance_threshold=distance
        )
    labels: NDArray[np.int64] = clusterer.fit_predict(distances)
    return labels


def _group(
    tracklets: UnnamedTracklets, distances: NDArray[np.float64], members: NDArray[np.int64]
) -> Group:
    inside = distances[np.ix_(members, members)]
    order = members[np.argsort(inside.sum(axis=1), kind="stable")]
    cameras = {camera for at in members if (camera := tracklets.cameras[at]) is not None}
    pairs = inside[np.triu_indices(len(members), k=1)]
    return Group(
        tuple(tracklets.tracklet_ids[at] for at in order),
        tuple(sorted(cameras)),
        float(pairs.max()),
        float(pairs.mean()),
    )


def write_proposals(
    groups: Sequence[Group], path: Path, *, distance: float, method: Method
) -> None:
    """Write proposals as JSON, as `read_proposals` takes them."""
    content = {
        "version": 1,
        "distance": distance,
        "method": method,
        "groups": [{"group": at, **asdict(one)} for at, one in enumerate(groups, start=1)],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_proposals(path: Path) -> dict[int, list[str]]:
    """The tracklet ids of each group, by its number.

    Raises:
        ClusterError: The file is not one of `write_proposals`.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != 1:
            raise ClusterError(f"expected proposals of version 1, got {content['version']!r}")
        return {
            int(one["group"]): [str(name) for name in one["tracklet_ids"]]
            for one in content["groups"]
        }
    except OSError as error:
        raise ClusterError(f"could not read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError("expected the proposals of `passerby cluster`, got another file") from (
            error
        )


def write_page(
    groups: Sequence[Group], strips: Mapping[str, bytes], path: Path, *, proposals: Path
) -> None:
    """Write a page that shows the film strips of each group; people are in it.

    Args:
        groups: In the order of their numbers.
        strips: JPEG bytes by tracklet id.
        path: Of the page.
        proposals: Of the same groups, for the command that the page names.
    """
    loader = PackageLoader("service", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    shown = {
        name: f"data:image/jpeg;base64,{b64encode(jpeg).decode()}" for name, jpeg in strips.items()
    }
    page = environment.get_template("clusters.html").render(
        groups=groups, strips=shown, proposals=proposals.name
    )
    path.write_text(page, encoding="utf-8")
