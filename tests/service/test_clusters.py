"""Unnamed tracklets are grouped as proposals, which a person accepts."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from index.embedded import EmbeddedGallery
from index.gallery import Enrolment, TrackletRecord
from index.unnamed import UnnamedTracklets, read_unnamed
from service.cli import app
from service.clusters import (
    ClusterError,
    Method,
    propose_groups,
    read_proposals,
    write_proposals,
)
from tests.service.making import picture

PEOPLE, EACH = 4, 3


def drawn(seed: int = 0) -> UnnamedTracklets:
    """Three tracklets each of four people, far apart, and one of somebody else."""
    rng = np.random.default_rng(seed)
    centres = 10 * np.eye(PEOPLE + 1, 8)
    places = np.concatenate([np.repeat(centres[:PEOPLE], EACH, axis=0), centres[PEOPLE:]])
    vectors = (places + 0.1 * rng.normal(size=places.shape)).astype(np.float32)
    names = [f"t{at}" for at in range(len(vectors))]
    return UnnamedTracklets(names, ["c1", "c2", None] * PEOPLE + ["c1"], vectors, {})


@pytest.mark.parametrize("method", ["agglomerative", "hdbscan"])
def test_who_belongs_together_is_proposed_together(method: Method) -> None:
    groups = propose_groups(drawn(), distance=2.0, method=method)

    found = {frozenset(group.tracklet_ids) for group in groups}
    assert found == {
        frozenset(f"t{EACH * person + at}" for at in range(EACH)) for person in range(PEOPLE)
    }
    assert all(group.cameras == ("c1", "c2") for group in groups)


def test_distances_of_a_group_are_those_of_its_pairs() -> None:
    tracklets = drawn()

    group = propose_groups(tracklets, distance=2.0)[0]

    members = [tracklets.tracklet_ids.index(name) for name in group.tracklet_ids]
    vectors = tracklets.embeddings[members].astype(float)
    pairs = [np.linalg.norm(vectors[i] - vectors[j]) for i in range(EACH) for j in range(i)]
    assert group.widest == pytest.approx(max(pairs), rel=1e-6)
    assert group.mean == pytest.approx(np.mean(pairs), rel=1e-6)


def test_a_small_distance_or_a_large_minimum_leaves_all_alone() -> None:
    assert propose_groups(drawn(), distance=1e-6) == []
    assert propose_groups(drawn(), distance=2.0, smallest=EACH + 1) == []
    empty = UnnamedTracklets([], [], np.empty((0, 0), np.float32), {})
    assert propose_groups(empty, distance=2.0) == []


def test_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.clusters.MOST", 5)

    with pytest.raises(ClusterError, match="at most 5 unnamed"):
        propose_groups(drawn(), distance=2.0)


def test_proposals_come_back_as_they_were(tmp_path: Path) -> None:
    groups = propose_groups(drawn(), distance=2.0)
    path = tmp_path / "clusters.json"

    write_proposals(groups, path, distance=2.0, method="agglomerative")

    assert read_proposals(path) == {
        at: list(group.tracklet_ids) for at, group in enumerate(groups, start=1)
    }


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"version": 1, "groups": [{}]}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "clusters.json"
    path.write_text(text)

    with pytest.raises(ClusterError, match="expected"):
        read_proposals(path)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A gallery of the drawn tracklets and a named one, with film strips."""
    tracklets = drawn()
    with EmbeddedGallery(tmp_path / "data") as gallery:
        for at, name in enumerate([*tracklets.tracklet_ids, "named"]):
            record = TrackletRecord(
                tracklet_id=name,
                identity="p1" if name == "named" else None,
                camera=None,
                start_time=None,
                end_time=None,
                metadata={},
                frames_received=1,
                frames_used=1,
                model="trsa-fake",
                created_at=datetime.now(UTC),
                content="",
            )
            vector = tracklets.embeddings[min(at, len(tracklets.embeddings) - 1)]
            gallery.add([Enrolment(record, vector, picture() if at % 2 else None)])
    return tmp_path / "data"


def test_only_unnamed_tracklets_are_read_also_beside_who_has_the_gallery_open(
    stored: Path,
) -> None:
    with EmbeddedGallery(stored):
        found = read_unnamed(stored, most=100)

    assert found.tracklet_ids == drawn().tracklet_ids
    assert np.array_equal(found.embeddings, drawn().embeddings)
    assert found.strips == {}


def test_the_command_writes_proposals_and_a_page(stored: Path, tmp_path: Path) -> None:
    output, page = tmp_path / "clusters.json", tmp_path / "clusters.html"
    options = ["--data-dir", str(stored), "--output", str(output), "--page", str(page)]

    done = CliRunner().invoke(app, ["cluster", *options, "--distance", "2"])

    assert done.exit_code == 0, done.output
    assert [one["group"] for one in json.loads(output.read_text())["groups"]] == [1, 2, 3, 4]
    html = page.read_text()
    assert html.count("<figure>") == PEOPLE * EACH
    assert "data:image/jpeg;base64," in html
    assert "no film strip kept" in html


def test_without_a_threshold_the_command_says_what_it_needs(stored: Path) -> None:
    done = CliRunner().invoke(app, ["cluster", "--data-dir", str(stored)])

    assert isinstance(done.exception, ClusterError)
    assert "passerby calibrate" in str(done.exception)


def test_a_group_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clusters.json"
    write_proposals([], path, distance=1.0, method="agglomerative")

    done = CliRunner().invoke(app, ["accept", str(path), "--group", "1", "--identity", "p1"])

    assert isinstance(done.exception, ClusterError)
