"""Real tracklets through HTTP give the very figures of a direct evaluation."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from index.embedded import EmbeddedGallery
from model.checkpoint import backbone_checkpoint
from model.datasets.folder import read_folder
from model.datasets.tracklets import Tracklet
from model.embedder import Embedder
from model.frames import read_clip
from service.app import create_app
from service.settings import Settings

SHARED = Path(os.environ.get("SHARED", Path(__file__).parent.parent.parent / "shared"))
WARD = SHARED / "data" / "ward"
WEIGHTS = SHARED / "weights" / "resnet50-imagenet-pqf-fp16.safetensors"
USED = 8  # of 10 to 64 frames; fewer than the default keeps CI short
needs_data = pytest.mark.skipif(
    not (WARD.is_dir() and WEIGHTS.is_file()), reason=f"needs WARD and the ResNet-50 in {SHARED}"
)


def measures(rankings: Sequence[tuple[str, list[str]]]) -> dict[str, float]:
    """Rank-1, rank-5 and mAP where each identity stands once in the gallery (mAP is the MRR)."""
    ranks = np.array([ranked.index(identity) + 1 for identity, ranked in rankings])
    return {
        "rank-1": float((ranks <= 1).mean()),
        "rank-5": float((ranks <= 5).mean()),
        "mAP": float((1 / ranks).mean()),
    }


def rank_directly(
    queries: Sequence[tuple[str, NDArray[np.float32]]],
    gallery: Sequence[tuple[str, NDArray[np.float32]]],
) -> list[tuple[str, list[str]]]:
    stored = np.stack([embedding for _, embedding in gallery]).astype(np.float64)
    rankings = []
    for identity, embedding in queries:
        distances = np.sqrt(((stored - embedding.astype(np.float64)) ** 2).sum(axis=1))
        order = np.argsort(distances, kind="stable")
        rankings.append((identity, [gallery[i][0] for i in order]))
    return rankings


def rank_through_http(
    app: TestClient, queries: Sequence[Tracklet], gallery: Sequence[Tracklet]
) -> list[tuple[str, list[str]]]:
    def upload(tracklet: Tracklet) -> list[tuple[str, tuple[str, bytes]]]:
        return [("frames", (path.name, path.read_bytes())) for path in tracklet.frames]

    for tracklet in gallery:
        fields = {"identity": tracklet.identity, "camera": tracklet.camera}
        assert app.post("/gallery", files=upload(tracklet), data=fields).status_code == 201
    rankings = []
    for tracklet in queries:
        answer = app.post("/query", params={"top_k": 500}, files=upload(tracklet)).json()
        ranked = [match["identity"] for match in answer["matches"]]
        rankings.append((tracklet.identity, ranked))
    return rankings


@pytest.mark.slow
@pytest.mark.dataset
@needs_data
def test_the_service_ranks_real_people_as_a_direct_evaluation_does(tmp_path: Path) -> None:
    """A wrong colour order or normalisation would show at once: expect about 40 %."""
    tracklets = read_folder(WARD)
    gallery = [one for one in tracklets if one.camera == "cam_1"]
    queries = [one for one in tracklets if one.camera == "cam_2"]
    embedder = Embedder(backbone_checkpoint(WEIGHTS), device="cpu")

    def embed(chosen: Sequence[Tracklet]) -> list[tuple[str, NDArray[np.float32]]]:
        clips = [read_clip(one.frames, embedder.preprocessing, used=USED) for one in chosen]
        results = embedder.embed(clips)
        return [(one.identity, r.embedding) for one, r in zip(chosen, results, strict=True)]

    direct = rank_directly(embed(queries), embed(gallery))
    settings = Settings(frames_per_tracklet=USED)
    app = create_app(embedder, EmbeddedGallery(tmp_path / "data"), settings)
    with TestClient(app) as client:
        served = rank_through_http(client, queries, gallery)

    assert served == direct  # every list of 35, so every measure of them
    assert measures(served) == measures(direct)
    assert len(gallery) == len(queries) == 35
    assert measures(served)["rank-1"] >= 0.3
    print(measures(served))  # noqa: T201 shown with pytest -s
