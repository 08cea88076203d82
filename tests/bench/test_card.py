"""The model card's figures are those of an evaluation."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import card
from bench.card import open_eye, standard_error
from model.checkpoint import load_checkpoint, make_checkpoint, save_checkpoint, untrained_checkpoint
from model.datasets.layouts import read_dataset
from model.datasets.splits import divide_unseen
from model.datasets.tracklets import Tracklet
from model.embedder import Embedder
from model.evaluation import ClipChoice, Comparison, evaluate_split
from model.frames import Preprocessing
from model.measures import rank_queries
from model.network import NetworkConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six people before three cameras, hard to tell apart."""
    root, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    for person in range(6):
        colour = rng.uniform(80, 140, 3)
        for camera in range(3):
            tint = rng.uniform(0.8, 1.2, 3)
            frames = root / f"p{person}" / f"c{camera}"
            frames.mkdir(parents=True)
            for number in range(4):
                pixels = colour * tint + rng.normal(0, 30, (64, 32, 3))
                picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                picture.save(frames / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = NetworkConfig(backbone="conv5", temporal="agreement", unit=True)
    untrained = untrained_checkpoint(0, network)
    made = make_checkpoint(untrained.network, Preprocessing(height=64, width=32))
    path = tmp_path_factory.mktemp("model") / "mine.safetensors"
    save_checkpoint(made, path)
    return path


def test_the_error_is_over_people_and_not_over_queries() -> None:
    people = [Tracklet(one, "1", "", ()) for one in "aabb"]
    gallery = [Tracklet(one, "2", "", ()) for one in "ab"]
    # Both queries of a find a first, both of b find a first, too.
    distances = np.array([[0.0, 1]] * 4)
    ids = [one.identity for one in people]
    measures = rank_queries(distances, ids, ["a", "b"], ["1"] * 4, ["2"] * 2)

    error = standard_error([Comparison("", tuple(people), tuple(gallery))], [measures])

    assert error == pytest.approx(np.std([1.0, 0.0], ddof=1) / 2**0.5)


def test_figures_are_those_of_an_evaluation(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["card", "--data", f"drawn={folder}", "--model", str(model), "--device", "cpu"]
    command += ["--beside", f"same={model}", "--beside", "nobody=random", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    card.main()

    results = json.loads((tmp_path / "card.json").read_text())
    split = divide_unseen(read_dataset(folder).tracklets, ())
    for frames in (1, 15):
        embedder = Embedder(load_checkpoint(model), device="cpu")
        choice = ClipChoice("even", frames, wraps=False)
        expected = evaluate_split(embedder, split, protocol="camera-pairs", choice=choice)
        [found] = [
            one
            for one in results
            if (one["model"], one["data"], one["reading"]) == ("mine", "drawn", "agreement")
            and one["frames"] == str(frames)
        ]
        assert found["rank_1"] == pytest.approx(100 * expected.rank_1)
        assert found["mAP"] == pytest.approx(100 * expected.mean_average_precision)
        assert np.mean(list(found["pairs"].values())) == pytest.approx(found["rank_1"])
    shown = [one for one in results if one["frames"] == "15" and one["data"] == "drawn"]
    by_model = {(one["model"], one["reading"]): one for one in shown}
    for reading in card.READINGS:
        mine, same = by_model["mine", reading], by_model["same", reading]
        assert {**mine, "model": ""} == {**same, "model": ""}
    assert ("nobody", "average") in by_model
    table = (tmp_path / "card.md").read_text()
    assert "| drawn (36 queries, gallery 6) | mine | agreement |" in table
    assert "mine, drawn, by pair: c0>c1" in table


def test_whoever_was_trained_on_stands_in_the_wide_gallery_alone(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    given = load_checkpoint(model)
    knows = {"data": {"train_identities": ["p0", "p1"], "layout": "folder", "fingerprint": "else"}}
    path = tmp_path / "trained.safetensors"
    save_checkpoint(make_checkpoint(given.network, given.preprocessing, knows), path)

    tested = card.read_tested("drawn", folder, path)

    assert {one.identity for one in tested.split.query} == {"p2", "p3", "p4", "p5"}
    assert {one.identity for one in tested.wide.gallery} == {f"p{n}" for n in range(6)}
    assert tested.wide.query == tested.split.query


def test_random_weights_take_frames_of_the_same_size(model: Path) -> None:
    like = load_checkpoint(model)
    like = replace(like, preprocessing=Preprocessing(height=96, width=48))

    assert open_eye("random", like, "cpu").preprocessing == like.preprocessing
