"""What is evaluated is what serves; splits, refusals, interruptions and sums are as they say."""

import json
import math
import os
import shutil
import signal
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from model.checkpoint import Checkpoint, make_checkpoint, save_checkpoint
from model.cli import app
from model.datasets.tracklets import Dataset, Split, Tracklet
from model.datasets.truth import TrackletTruth, write_truth
from model.embedder import Embedder, TrackletEmbedding
from model.errors import CheckpointError, EvaluationError, InvalidFramesError, ModelError
from model.evaluation import (
    ClipChoice,
    Frames,
    compare,
    embed_tracklets,
    euclidean_distances,
    evaluate_split,
    left_out_pairs,
    plan_comparisons,
    resolve_protocol,
    tracklet_name,
)
from model.evaluation_console import tabulate
from model.evaluation_files import EmbeddingCache
from model.evaluation_plan import (
    EvaluationListener,
    EvaluationOptions,
    EvaluationTask,
    describe_namesakes,
    find_subjects,
    plan_units,
    read_choice,
    read_seeds,
)
from model.evaluation_runner import _choice, evaluate
from model.frames import Clip, Preprocessing, read_clip
from model.network import NetworkConfig, Temporal, TrackletNet
from model.recipe import load_recipe, recipe_values

SIZE = Preprocessing(height=64, width=32)
DATA = "data-0123456789ab"


class MeanColour:
    """An embedder without a network: the mean of each channel."""

    preprocessing = SIZE

    def __init__(self) -> None:
        self.clips: list[Clip] = []

    def embed(
        self, clips: Sequence[Clip], *, with_attention: bool = False
    ) -> list[TrackletEmbedding]:
        assert not with_attention
        self.clips += clips
        return [TrackletEmbedding(one.mean(axis=(0, 1, 2), dtype=np.float32)) for one in clips]


def tracklet(identity: str, camera: str, frames: int = 3, name: str = "") -> Tracklet:
    paths = tuple(Path(identity) / camera / f"{number}.png" for number in range(frames))
    return Tracklet(identity, camera, name, paths)


def draw(root: Path, identity: int, camera: int, frames: int = 3) -> Tracklet:
    """Each identity has its own colours, each camera its own light, each frame its own noise."""
    rng = np.random.default_rng([identity])
    top, bottom = rng.integers(40, 200, (2, 3))
    folder = root / f"p{identity}" / f"cam_{camera}"
    folder.mkdir(parents=True)
    paths = []
    for number in range(frames):
        noise = np.random.default_rng([identity, camera, number]).integers(0, 25, (64, 32, 3))
        pixels = np.concatenate([np.tile(top, (32, 32, 1)), np.tile(bottom, (32, 32, 1))])
        paths.append(folder / f"{number}.png")
        Image.fromarray((pixels + noise + 10 * camera).astype(np.uint8)).save(paths[-1])
    return Tracklet(f"p{identity}", f"cam_{camera}", "", tuple(paths))


def divide(tracklets: Sequence[Tracklet], name: str, train: set[str]) -> Split:
    test = tuple(one for one in tracklets if one.identity not in train)
    trained = tuple(one for one in tracklets if one.identity in train)
    return Split(name, trained, test, test, "random half, seed 0")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eight people in two cameras; the halves of split 0 change places in split 1."""
    root = tmp_path_factory.mktemp("data")
    tracklets = tuple(
        draw(root, person, camera, frames=1 + person % 3)
        for person in range(8)
        for camera in (1, 2)
    )
    halves = ({f"p{one}" for one in range(4)}, {f"p{one}" for one in range(4, 8)})
    splits = tuple(divide(tracklets, str(n), half) for n, half in enumerate(halves))
    return Dataset("folder", root, tracklets, splits)


def network(seed: int = 0) -> TrackletNet:
    torch.manual_seed(seed)
    return TrackletNet(NetworkConfig(backbone="conv5"))


def trained_on(split: Split, seed: int = 0) -> dict[str, Any]:
    """What a run's checkpoint says about its data."""
    return {
        "recipe": {"name": "test"},
        "data": {
            "fingerprint": DATA,
            "layout": "folder",
            "split": split.name,
            "source": split.source,
            "seed": seed,
            "train_identities": sorted({one.identity for one in split.train}),
        },
    }


def save_run(folder: Path, split: Split, seed: int = 0, **changes: object) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text("{}")
    provenance = trained_on(split, seed) | changes
    checkpoint = make_checkpoint(network(seed), SIZE, provenance)
    return save_checkpoint(checkpoint, folder / "model.safetensors")


@pytest.fixture
def task(dataset: Dataset, tmp_path: Path) -> EvaluationTask:
    """A checkpoint that nobody trained, on both splits."""
    save_checkpoint(make_checkpoint(network(), SIZE), tmp_path / "net.safetensors")
    return EvaluationTask(
        tmp_path / "net.safetensors",
        dataset,
        DATA,
        tmp_path / "out",
        device="cpu",
        precision="fp32",
    )


def with_choice(task: EvaluationTask, choice: ClipChoice, **changes: Any) -> EvaluationTask:
    return replace(task, options=replace(task.options, choice=choice), **changes)


class Counter(EvaluationListener):
    """Counts what had to be embedded; stops where it is told to."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.done = self.total = 0
        self.lines: list[str] = []
        self._stop_at = stop_at

    def progress(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        if done == self._stop_at:
            raise KeyboardInterrupt

    def said(self, text: str) -> None:
        self.lines.append(text)


# Frames


@pytest.mark.parametrize("frames", ["all", "random", "even"])
def test_frames_that_are_weighed_by_agreement_are_shown_once(frames: Frames) -> None:
    """One that is there twice would agree with itself."""
    seen = tracklet("a", "1", 17)

    once = ClipChoice(frames, 20, wraps=False).positions(seen)

    assert sorted(once) == list(range(17))


def test_the_evaluation_knows_who_weighs_frames(task: EvaluationTask, tmp_path: Path) -> None:
    options = EvaluationOptions(ClipChoice("all"))
    torch.manual_seed(0)
    readings: tuple[Temporal, ...] = ("mean", "agreement")
    for temporal in readings:
        config = NetworkConfig(backbone="conv5", temporal=temporal)
        path = tmp_path / f"{temporal}.safetensors"
        save_checkpoint(make_checkpoint(TrackletNet(config), SIZE), path)
        [subject] = find_subjects(path, EvaluationListener())

        choice = _choice(replace(task, options=options), subject)

        assert choice.wraps == (temporal == "mean")


@pytest.mark.parametrize("received", [1, 14, 15, 16, 30, 31])
def test_all_frames_make_whole_clips_of_which_the_last_wraps(received: int) -> None:
    positions = ClipChoice("all").positions(tracklet("a", "1", received))

    clips = [positions[start : start + 15] for start in range(0, len(positions), 15)]
    assert len(clips) == math.ceil(received / 15)
    assert all(len(clip) == 15 for clip in clips)
    assert positions[:received] == list(range(received))
    assert positions[received:] == [place % received for place in range(len(positions) - received)]


def test_the_embedding_of_all_frames_is_the_mean_over_clips(tmp_path: Path) -> None:
    seen = draw(tmp_path, 1, 1, frames=31)
    embedder = Embedder(make_checkpoint(network(), SIZE), device="cpu", precision="fp32")

    [(_, found)] = embed_tracklets(embedder, [seen], ClipChoice("all"))

    wrapped = [*range(31), *range(14)]
    clips = [
        read_clip([seen.frames[place] for place in wrapped[start : start + 15]], SIZE)
        for start in (0, 15, 30)
    ]
    expected = np.mean([one.embedding for one in embedder.embed(clips)], axis=0)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("received", [3, 15, 20])
def test_an_evaluated_embedding_is_the_served_one_to_the_bit(tmp_path: Path, received: int) -> None:
    seen = [draw(tmp_path, person, 1, frames=received) for person in range(3)]
    embedder = Embedder(make_checkpoint(network(), SIZE), device="cpu", precision="fp32")

    found = list(embed_tracklets(embedder, seen))

    for (which, embedding), one in zip(found, seen, strict=True):
        [served] = embedder.embed([read_clip(one.frames, SIZE)])
        assert which == one
        assert np.array_equal(embedding, served.embedding)


def test_random_frames_depend_on_the_seed_and_the_tracklet_alone() -> None:
    one, other = tracklet("a", "1", 60), tracklet("b", "1", 60)
    choice = ClipChoice("random")

    assert choice.positions(one, seed=3) == choice.positions(one, seed=3)
    assert choice.positions(one, seed=3) != choice.positions(one, seed=4)
    assert choice.positions(one, seed=3) != choice.positions(other, seed=3)
    assert len(set(choice.positions(one, seed=3))) == 15


def test_any_number_of_threads_gives_the_same_in_the_same_order(dataset: Dataset) -> None:
    few = list(embed_tracklets(MeanColour(), dataset.tracklets, threads=1))
    many = list(embed_tracklets(MeanColour(), dataset.tracklets, threads=5))

    assert [one for one, _ in few] == [one for one, _ in many] == list(dataset.tracklets)
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(few, many, strict=True))


def test_settings_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="frames: expected"):
        ClipChoice("odd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip_frames: expected at least 1"):
        ClipChoice(clip_frames=0)
    with pytest.raises(ValueError, match="protocol: expected"):
        resolve_protocol("folder", "open")  # type: ignore[arg-type]


# Distances and protocols


def test_small_distances_of_long_vectors_survive() -> None:
    """The product form gives 1e-6 here in float32: everything is rounded away."""
    rng = np.random.default_rng(0)
    a = (10 * rng.random((1, 2048))).astype(np.float32)
    b = a.copy()
    b[0, :4] += 0.0225

    exact = math.dist(a[0].tolist(), b[0].tolist())
    assert euclidean_distances(a, b)[0, 0] == pytest.approx(exact, rel=1e-9)
    assert np.all(euclidean_distances(a.repeat(9, 0), a.repeat(40, 0)) == 0)


def test_a_constant_embedding_finds_nobody_in_any_protocol(dataset: Dataset) -> None:
    """Ties must be exact for pessimism to see them."""
    split = dataset.splits[0]
    vector = np.random.default_rng(0).normal(100, 50, 2048).astype(np.float32)
    embeddings = {tracklet_name(one): vector for one in dataset.tracklets}

    for protocol in ("pooled", "camera-pairs"):
        for reranked in (False, True):
            for comparison in plan_comparisons(split, protocol):
                measures, _ = compare(comparison, embeddings, reranked=reranked)
                assert measures.rank_1 == 0


def test_camera_pairs_search_each_camera_in_each_other() -> None:
    test = tuple(tracklet(identity, camera) for identity in "ab" for camera in "123")
    split = Split("0", (), test, test, "by hand")

    comparisons = plan_comparisons(split, "camera-pairs")

    assert [one.name for one in comparisons] == ["1>2", "1>3", "2>1", "2>3", "3>1", "3>2"]
    for one in comparisons:
        assert {query.camera for query in one.query} == {one.name[0]}
        assert {found.camera for found in one.gallery} == {one.name[2]}
        assert len(one.query) == len(one.gallery) == 2


def test_a_camera_pair_without_a_common_identity_is_left_out() -> None:
    test = tuple(tracklet(*one) for one in ("a1", "b1", "a2", "b2", "c3", "d3"))
    split = Split("0", (), test, test, "by hand")

    names = [one.name for one in plan_comparisons(split, "camera-pairs")]

    assert names == ["1>2", "2>1"]
    assert left_out_pairs(split, "camera-pairs") == ["1>3", "2>3", "3>1", "3>2"]


def test_a_camera_pair_in_whose_gallery_one_person_stands_is_left_out_and_named() -> None:
    """Any network finds that person: it would be a rank-1 of 100 %."""
    test = tuple(tracklet(*one) for one in ("a1", "a2", "b3", "b1"))
    split = Split("0", (), test, test, "by hand")

    names = [one.name for one in plan_comparisons(split, "camera-pairs")]

    assert names == ["2>1", "3>1"]
    assert left_out_pairs(split, "camera-pairs") == ["1>2", "1>3", "2>3", "3>2"]
    assert left_out_pairs(split, "pooled") == []
    alone = Split("0", (), test[:2], test[:2], "by hand")
    with pytest.raises(EvaluationError, match="in the gallery of another, beside somebody else"):
        plan_comparisons(alone, "camera-pairs")


@pytest.mark.parametrize("protocol", ["published", "pooled", "camera-pairs"])
def test_one_camera_only_is_refused(protocol: str) -> None:
    test = (tracklet("a", "1", name="x"), tracklet("a", "1", name="y"), tracklet("b", "1"))

    with pytest.raises(EvaluationError, match=r"split 0: expected an identity .* 1 camera"):
        plan_comparisons(Split("0", (), test, test, "by hand"), protocol)


def test_a_benchmark_has_its_published_protocol_and_a_folder_camera_pairs() -> None:
    assert resolve_protocol("ilids-vid") == resolve_protocol("mars") == "published"
    assert resolve_protocol("folder") == "camera-pairs"
    assert resolve_protocol("folder", "pooled") == "pooled"


def test_a_split_is_measured_as_by_hand(dataset: Dataset) -> None:
    """Every pair, one at a time: the mean over two directions of the mean reciprocal rank."""
    split = dataset.splits[0]
    calls: list[tuple[int, int]] = []

    found = evaluate_split(
        MeanColour(), split, protocol="camera-pairs", progress=lambda *call: calls.append(call)
    )

    colours = {
        one: read_clip(one.frames, SIZE).mean(axis=(0, 1, 2), dtype=np.float32)
        for one in split.query
    }
    reciprocal: dict[str, list[float]] = {"cam_1": [], "cam_2": []}
    for query in split.query:
        others = [one for one in split.gallery if one.camera != query.camera]
        others.sort(key=lambda one: float(np.linalg.norm(colours[one] - colours[query])))
        place = [one.identity for one in others].index(query.identity) + 1
        reciprocal[query.camera].append(1 / place)
    expected = statistics.mean(statistics.mean(one) for one in reciprocal.values())
    assert found.mean_average_precision == pytest.approx(expected)
    assert calls == [(done, 8) for done in range(1, 9)]


def test_an_embedding_that_is_not_finite_names_the_tracklet(dataset: Dataset) -> None:
    class Broken(MeanColour):
        def embed(
            self, clips: Sequence[Clip], *, with_attention: bool = False
        ) -> list[TrackletEmbedding]:
            [found] = super().embed(clips, with_attention=with_attention)
            wrong = np.float32(np.nan if len(self.clips) == 3 else 0)
            return [TrackletEmbedding(found.embedding + wrong)]

    with pytest.raises(EvaluationError, match="NaN or infinity for p1/cam_1"):
        list(embed_tracklets(Broken(), dataset.tracklets))


# The runner


def test_results_are_the_mean_and_deviation_over_splits(task: EvaluationTask) -> None:
    results = evaluate(task)

    units = results["units"]
    assert [unit["split"] for unit in units] == ["0", "1"]
    for name in ("rank_1", "rank_5", "rank_10", "rank_20", "mAP"):
        values = [unit[name] for unit in units]
        assert results["mean"][name] == pytest.approx(statistics.mean(values))
        assert results["std"][name] == pytest.approx(statistics.stdev(values))
    assert json.loads((task.output / "results.json").read_text()) == results
    assert results["options"]["protocol"] == "camera-pairs"
    assert results["sources"] == ["random half, seed 0"]
    assert (results["splits"], results["seeds"], results["frame_seeds"]) == (2, 0, 0)
    assert (results["namesakes"], results["pairs_left_out"]) == (0, [])


def test_a_unit_tells_what_each_query_found(task: EvaluationTask) -> None:
    results = evaluate(replace(task, splits=["1"]))

    [summary] = results["units"]
    unit = json.loads((task.output / summary["file"]).read_text())
    assert results["std"]["rank_1"] is None
    assert set(unit["pairs"]) == {"cam_1>cam_2", "cam_2>cam_1"}
    assert (unit["queries"], unit["skipped"], unit["gallery"]) == (8, 0, 4)
    assert unit["pairs_left_out"] == []
    assert len(unit["rankings"]) == 8
    assert unit["rank_1"] == pytest.approx(
        statistics.mean(one["rank"] == 1 for one in unit["rankings"])
    )
    for ranking in unit["rankings"]:
        places = [match["correct"] for match in ranking["top"]]
        assert places.index(True) + 1 == ranking["rank"]
        distances = [match["distance"] for match in ranking["top"]]
        assert distances == sorted(distances)
        for one in (ranking["query"], *ranking["top"]):
            assert all((task.dataset.root / frame).is_file() for frame in one["frames"])


def test_attention_of_the_best_and_the_worst_is_kept(task: EvaluationTask) -> None:
    results = evaluate(task)

    kinds = [one["kind"] for one in results["attention"]]
    assert 1 <= len(kinds) <= 8
    for one in results["attention"]:
        with np.load(task.output / one["file"], allow_pickle=False) as file:
            attention = file["attention"]
        assert attention.shape == (len(one["query"]["frames"]), 16, 8)
        assert attention.sum(axis=(1, 2)) == pytest.approx(1, abs=1e-5)
        assert (one["rank"] == 1) == (one["kind"] == "best")


def test_splits_share_one_pass_and_a_second_evaluation_embeds_nothing(
    task: EvaluationTask,
) -> None:
    first, second, third = Counter(), Counter(), Counter()

    one = evaluate(task, first)
    again = evaluate(task, second)
    evaluate(replace(task, options=replace(task.options, unit=True)), third)

    assert first.total == first.done == len(task.dataset.tracklets)
    assert second.total == third.total == 0
    assert second.lines == ["2 of 2 units are there already"]
    assert {**again, "duration_s": 0} == {**one, "duration_s": 0}
    assert third.lines == []


@pytest.mark.parametrize("stop_at", [5, 16])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    task: EvaluationTask, stop_at: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(task, Counter(stop_at))
    rest = Counter()

    resumed = evaluate(task, rest)

    whole = evaluate(replace(task, output=task.output.parent / "whole"))
    assert rest.total == 16 - stop_at
    assert {**resumed, "duration_s": 0} == {**whole, "duration_s": 0}


def test_a_unit_of_another_checkpoint_is_made_again(task: EvaluationTask) -> None:
    evaluate(task)
    save_checkpoint(make_checkpoint(network(1), SIZE), task.source)
    heard = Counter()

    results = evaluate(task, heard)

    assert heard.total == 16
    assert [one["checkpoint"] for one in results["units"]] == [
        one["fingerprint"] for one in results["checkpoints"] * 2
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "data-ffffffffffff"},
        {"options": EvaluationOptions(ClipChoice(clip_frames=1))},
        {"precision": "bf16"},
    ],
)
def test_a_unit_of_other_data_or_options_is_made_again(
    task: EvaluationTask, changes: dict[str, Any]
) -> None:
    task = replace(task, splits=["0"])
    evaluate(task)
    heard = Counter()

    evaluate(replace(task, **changes), heard)

    assert heard.total == 8
    assert heard.lines == []


@pytest.mark.parametrize("file", ["units/net-split-0.json", "embeddings"])
def test_a_damaged_file_is_made_again(task: EvaluationTask, file: str) -> None:
    whole = evaluate(task)
    path = task.output / file
    for one in [path] if path.is_file() else path.iterdir():
        one.write_bytes(one.read_bytes()[: one.stat().st_size // 2])
    (task.output / "units" / "net-split-1.json").unlink()

    again = evaluate(task)

    assert {**again, "duration_s": 0} == {**whole, "duration_s": 0}


def test_a_frame_that_cannot_be_decoded_is_named_and_loses_nothing(
    task: EvaluationTask, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    split = task.dataset.splits[0]
    broken = replace(split.query[-1], frames=(bad,))
    changed = replace(split, query=(*split.query[:-1], broken), gallery=split.gallery)
    changed = replace(changed, gallery=changed.query)
    dataset = replace(task.dataset, splits=(changed,))

    with pytest.raises(InvalidFramesError, match=r"bad\.jpg"):
        evaluate(replace(task, dataset=dataset))

    [kept] = (task.output / "embeddings").glob("*.npz")
    assert len(EmbeddingCache(kept).embeddings) == len(changed.query) - 1


def test_several_seeds_draw_several_times(task: EvaluationTask) -> None:
    drawn = with_choice(task, ClipChoice("random", clip_frames=2), seeds=(0, 1, 2))

    results = evaluate(drawn)

    assert len(results["units"]) == 6
    assert (results["seeds"], results["frame_seeds"]) == (0, 3)
    assert results["over_frame_seeds"]["count"] == 3
    assert {unit["frame_seed"] for unit in results["units"]} == {0, 1, 2}
    assert results["over_splits"]["count"] == 2
    assert [column.header for column in tabulate(results).columns][:3] == [
        "split",
        "frame seed",
        "rank-1",
    ]
    with pytest.raises(EvaluationError, match="expected one seed, got 2"):
        evaluate(with_choice(task, ClipChoice("even"), seeds=(0, 1)))


def test_a_seed_is_shown_where_there_is_one_and_the_precision_always(
    task: EvaluationTask, tmp_path: Path
) -> None:
    save_run(tmp_path / "run", task.dataset.splits[1], seed=5)

    plain = tabulate(evaluate(replace(task, splits=["0"])))
    run = tabulate(evaluate(replace(task, source=tmp_path / "run", output=tmp_path / "other")))

    assert [column.header for column in plain.columns][:2] == ["split", "rank-1"]
    assert [column.header for column in run.columns][:2] == ["split", "seed"]
    assert "fp32" in str(plain.title)


@pytest.mark.parametrize("frames", ["even", "all", "random"])
def test_every_choice_of_frames_and_every_option_runs(task: EvaluationTask, frames: Frames) -> None:
    options = EvaluationOptions(ClipChoice(frames, 2), "pooled", rerank=True, unit=True)

    results = evaluate(replace(task, options=options))

    assert results["options"]["protocol"] == "pooled"
    assert all(unit["reranked"] and unit["unit"] for unit in results["units"])
    assert "pairs" not in json.loads((task.output / results["units"][0]["file"]).read_text())


def test_a_drawn_set_is_measured_by_what_its_queries_hide(task: EvaluationTask) -> None:
    """People of odd number are half hidden; their truth lies beside the frames."""
    root = task.dataset.root
    truths = {
        one.identity + one.camera: TrackletTruth(
            f"{one.identity}/{one.camera}", 1, 1, 1, hidden=(0.4 * (int(one.identity[1:]) % 2),)
        )
        for one in task.dataset.tracklets
    }
    write_truth(root, truths.values(), {})
    try:
        evaluate(task)
    finally:
        shutil.rmtree(root / ".truth")

    unit = json.loads((task.output / "units" / "net-split-0.json").read_text())
    ranks: dict[str, list[int]] = {}
    for one in unit["rankings"]:
        level = truths[one["query"]["identity"] + one["query"]["camera"]].level
        ranks.setdefault(str(level), []).append(one["rank"])
    assert len(ranks) == len(unit["occlusion"]) == 2
    for name, found in unit["occlusion"].items():
        assert found["queries"] == len(ranks[name]) == 4
        assert found["rank_1"] == pytest.approx(statistics.mean(one == 1 for one in ranks[name]))


def test_unit_vectors_rank_as_cosines(task: EvaluationTask) -> None:
    evaluate(replace(task, options=EvaluationOptions(unit=True, protocol="pooled")))

    [path] = (task.output / "embeddings").glob("*.npz")
    embeddings = EmbeddingCache(path).embeddings
    unit = json.loads((task.output / "units" / "net-split-0.json").read_text())
    for ranking in unit["rankings"]:
        query = embeddings["{identity}/{camera}".format(**ranking["query"])]
        for match in ranking["top"]:
            found = embeddings["{identity}/{camera}".format(**match)]
            cosine = query @ found / np.linalg.norm(query) / np.linalg.norm(found)
            assert match["distance"] ** 2 == pytest.approx(2 - 2 * cosine, abs=1e-4)


# What may be evaluated on what


def test_a_checkpoint_that_knows_who_is_tested_is_refused(
    task: EvaluationTask, tmp_path: Path
) -> None:
    save_run(tmp_path, task.dataset.splits[0])
    file = replace(task, source=tmp_path / "model.safetensors")

    with pytest.raises(EvaluationError, match="trained on 4 of the 4 identities that split 1"):
        evaluate(file)
    assert not (tmp_path / "out").exists()

    allowed = evaluate(replace(file, options=EvaluationOptions(allow_seen=True)))
    assert [unit["seen_identities"] for unit in allowed["units"]] == [0, 4]
    assert allowed["seen_identities"] == 4


def test_a_copy_of_published_data_with_another_fingerprint_is_refused_as_well(
    task: EvaluationTask, tmp_path: Path
) -> None:
    provenance = trained_on(task.dataset.splits[0])
    save_run(tmp_path, task.dataset.splits[0], data=provenance["data"] | {"layout": "mars"})
    file = replace(task, source=tmp_path / "model.safetensors", fingerprint="data-ffffffffffff")
    heard = Counter()

    with pytest.raises(EvaluationError, match="trained on 4"):
        plan_units(replace(file, dataset=replace(task.dataset, layout="mars")))
    assert len(plan_units(file, heard)) == 2
    assert heard.lines == []


@pytest.mark.parametrize("is_start", [False, True])
def test_names_that_occur_in_another_folder_are_told_and_not_refused(
    task: EvaluationTask, tmp_path: Path, is_start: bool
) -> None:
    """Everybody calls somebody p1; only the very same data are the same people."""
    known = trained_on(task.dataset.splits[0])
    saved = {"data": {}, "start": known} if is_start else known
    save_run(tmp_path, task.dataset.splits[0], **saved)
    file = replace(task, source=tmp_path / "model.safetensors")
    heard = Counter()

    with pytest.raises(EvaluationError, match="trained on 4"):
        plan_units(file)
    results = evaluate(replace(file, fingerprint="data-ffffffffffff"), heard)

    assert [unit["namesakes"] for unit in results["units"]] == [0, 4]
    assert (results["namesakes"], results["seen_identities"]) == (4, 0)
    assert heard.lines == [f"note: {describe_namesakes(4)}"]


def test_runs_whose_names_differ_in_letters_of_other_scripts_have_their_own_files(
    task: EvaluationTask, tmp_path: Path
) -> None:
    for name in ("läufe", "lüufe", "plain"):
        save_run(tmp_path / "runs" / name, task.dataset.splits[0])

    units = plan_units(replace(task, source=tmp_path / "runs"))

    files = [unit.file for unit in units]
    assert len(set(files)) == 3
    assert "plain-split-0.json" in files
    assert all(file.isascii() for file in files)


def test_frames_that_changed_and_kept_their_size_are_embedded_again(
    task: EvaluationTask,
) -> None:
    evaluate(task)
    frame = task.dataset.tracklets[0].frames[0]
    times = frame.stat()
    heard = Counter()

    os.utime(frame, ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000_000))
    evaluate(replace(task), heard)  # a new task, as of a new process

    os.utime(frame, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert heard.total == 16


def test_a_run_is_evaluated_on_its_own_split_alone(task: EvaluationTask, tmp_path: Path) -> None:
    save_run(tmp_path / "run", task.dataset.splits[1], seed=5)

    results = evaluate(replace(task, source=tmp_path / "run"))

    assert [(unit["split"], unit["seed"]) for unit in results["units"]] == [("1", 5)]
    with pytest.raises(EvaluationError, match="expected runs on the splits 0, got none"):
        evaluate(replace(task, source=tmp_path / "run", splits=["0"]))


def test_runs_are_averaged_over_splits_and_seeds(task: EvaluationTask, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for split in task.dataset.splits:
        for seed in (0, 1):
            save_run(runs / f"split-{split.name}-seed-{seed}", split, seed)
    unfinished = runs / "split-1-seed-2"
    unfinished.mkdir()
    (unfinished / "run.json").write_text("{}")
    heard = Counter()

    results = evaluate(replace(task, source=runs), heard)

    units = {(unit["split"], unit["seed"]): unit["mAP"] for unit in results["units"]}
    assert sorted(units) == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    assert results["mean"]["mAP"] == pytest.approx(statistics.mean(units.values()))
    by_seed = [statistics.mean([units["0", seed], units["1", seed]]) for seed in (0, 1)]
    assert results["over_seeds"]["std"]["mAP"] == pytest.approx(statistics.stdev(by_seed))
    assert len(results["checkpoints"]) == 4
    assert any("split-1-seed-2" in line for line in heard.lines)


def test_runs_of_two_recipes_are_not_averaged(task: EvaluationTask, tmp_path: Path) -> None:
    first, second = task.dataset.splits
    save_run(tmp_path / "runs" / "a", first)
    save_run(tmp_path / "runs" / "b", second, recipe={"name": "other"})

    with pytest.raises(EvaluationError, match="expected runs of one recipe"):
        evaluate(replace(task, source=tmp_path / "runs"))


def test_a_recipe_written_before_a_setting_existed_is_the_same_recipe(
    task: EvaluationTask, tmp_path: Path
) -> None:
    values = recipe_values(load_recipe("folder"))
    older = {**values, "network": {k: v for k, v in values["network"].items() if k != "unit"}}
    first, second = task.dataset.splits
    save_run(tmp_path / "runs" / "a", first, recipe=values)
    save_run(tmp_path / "runs" / "b", second, recipe={**older, "start": "/home/me/IMAGENET1K_V1"})

    units = plan_units(replace(task, source=tmp_path / "runs"))

    assert len(units) == 2


def test_a_run_on_a_split_that_is_not_here_is_refused(task: EvaluationTask, tmp_path: Path) -> None:
    save_run(tmp_path / "run", replace(task.dataset.splits[0], source="random half, seed 7"))

    with pytest.raises(EvaluationError, match=r"expected the split .* seed 7.* seed 0"):
        evaluate(replace(task, source=tmp_path / "run"))


def unseen(task: EvaluationTask, source: Path, **changes: Any) -> EvaluationTask:
    return replace(task, source=source, splits=["unseen"], **changes)


@pytest.mark.parametrize("is_run", [False, True])
def test_everybody_whom_a_checkpoint_was_not_trained_on_is_tested(
    task: EvaluationTask, tmp_path: Path, is_run: bool
) -> None:
    save_run(tmp_path / "run", task.dataset.splits[0])
    source = tmp_path / "run" / ("" if is_run else "model.safetensors")

    results = evaluate(unseen(task, source))
    as_split = evaluate(replace(task, source=source, splits=["0"], output=tmp_path / "as-split"))

    [unit] = results["units"]
    assert (unit["split"], unit["seen_identities"], unit["queries"]) == ("unseen", 0, 8)
    assert unit["source"] == "the 4 identities that the checkpoint was not trained on"
    assert results["mean"] == as_split["mean"]


def test_whom_the_start_of_a_checkpoint_saw_is_not_unseen(
    task: EvaluationTask, tmp_path: Path
) -> None:
    first, second = task.dataset.splits
    start = {"data": {**trained_on(second)["data"], "train_identities": ["p4", "p5"]}}
    save_run(tmp_path / "run", first, start=start)

    [unit] = plan_units(unseen(task, tmp_path / "run"))

    assert {one.identity for one in unit.split.query} == {"p6", "p7"}


def test_who_may_be_known_from_another_folder_is_not_called_unseen(
    task: EvaluationTask, tmp_path: Path
) -> None:
    """A folder to which somebody was added is another one, but people stay who they are."""
    save_run(tmp_path / "run", task.dataset.splits[0])
    other = unseen(task, tmp_path / "run", fingerprint="data-ffffffffffff")

    [unit] = plan_units(other)

    assert {one.identity for one in unit.split.query} == {"p4", "p5", "p6", "p7"}
    assert {one.identity for one in unit.split.gallery} == {"p4", "p5", "p6", "p7"}
    assert unit.split.source.endswith("was not trained on, without 4 who may be")


def test_namesakes_are_tested_when_that_is_said(task: EvaluationTask, tmp_path: Path) -> None:
    save_run(tmp_path / "run", task.dataset.splits[0])
    heard, allow = Counter(), EvaluationOptions(allow_seen=True)
    other = unseen(task, tmp_path / "run", fingerprint="data-ffffffffffff", options=allow)

    [unit] = plan_units(other, heard)

    assert len({one.identity for one in unit.split.query}) == 8
    assert heard.lines == [f"note: {describe_namesakes(4)}"]


def test_a_folder_of_nothing_but_namesakes_is_refused_with_the_way_out(
    task: EvaluationTask, tmp_path: Path
) -> None:
    everybody = {"train_identities": [f"p{number}" for number in range(8)]}
    data = {**trained_on(task.dataset.splits[0])["data"], **everybody}
    save_run(tmp_path / "run", task.dataset.splits[0], data=data)

    with pytest.raises(EvaluationError, match=r"8 more have the name .* say --allow-seen"):
        plan_units(unseen(task, tmp_path / "run", fingerprint="data-ffffffffffff"))


def test_crops_of_a_benchmark_are_unseen_by_name_wherever_they_lie(
    task: EvaluationTask, tmp_path: Path
) -> None:
    data = trained_on(task.dataset.splits[0])["data"] | {"layout": "market-1501"}
    save_run(tmp_path / "run", task.dataset.splits[0], data=data)
    crops = replace(task.dataset, layout="market-1501")

    [unit] = plan_units(
        unseen(task, tmp_path / "run", dataset=crops, fingerprint="data-ffffffffffff")
    )

    assert {one.identity for one in unit.split.query} == {"p4", "p5", "p6", "p7"}


def test_runs_trained_on_other_people_are_not_averaged_over_the_unseen(
    task: EvaluationTask, tmp_path: Path
) -> None:
    first, second = task.dataset.splits
    save_run(tmp_path / "runs" / "a", first)
    save_run(tmp_path / "runs" / "b", first, seed=1)

    units = plan_units(unseen(task, tmp_path / "runs"))
    save_run(tmp_path / "runs" / "c", second)

    assert [unit.seed for unit in units] == [0, 1]
    with pytest.raises(EvaluationError, match=r"trained on the same people.* in c than in a"):
        plan_units(unseen(task, tmp_path / "runs"))


def test_unseen_people_are_refused_where_a_protocol_names_who_is_tested(
    task: EvaluationTask, tmp_path: Path
) -> None:
    market = replace(task.dataset, layout="market-1501", root=tmp_path)
    (tmp_path / "query").mkdir()

    for dataset in (replace(task.dataset, layout="mars"), market):
        with pytest.raises(
            EvaluationError, match=r"expected a folder .*, got m.*\(0, 1: random half, seed 0\)"
        ):
            plan_units(unseen(task, task.source, dataset=dataset))


def test_unseen_people_are_refused_beside_other_splits(task: EvaluationTask) -> None:
    with pytest.raises(EvaluationError, match="expected 'unseen' without other splits"):
        plan_units(replace(task, splits=["0", "unseen"]))


def test_a_checkpoint_that_knows_everybody_has_nobody_unseen(
    task: EvaluationTask, tmp_path: Path
) -> None:
    everybody = replace(task.dataset.splits[0], train=task.dataset.tracklets)
    save_run(tmp_path / "run", everybody)

    with pytest.raises(EvaluationError, match=r"run on .*not trained on, got 0 of 8 identities"):
        plan_units(unseen(task, tmp_path / "run"))


def missing_file(path: Path) -> Path:
    return path / "none.safetensors"


def other_file(path: Path) -> Path:
    (path / "other.safetensors").write_bytes(b"something else")
    return path / "other.safetensors"


def unfinished_run(path: Path) -> Path:
    (path / "run").mkdir()
    (path / "run" / "run.json").write_text("{}")
    return path / "run"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (missing_file, CheckpointError, "expected a weights file, got nothing"),
        (other_file, CheckpointError, "other.safetensors"),
        (unfinished_run, EvaluationError, "expected a finished run"),
        (lambda path: path, EvaluationError, "expected a checkpoint, a run folder"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    task: EvaluationTask,
    tmp_path: Path,
    make: Callable[[Path], Path],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        evaluate(replace(task, source=make(tmp_path)))


def test_splits_that_are_not_there_are_refused(task: EvaluationTask) -> None:
    with pytest.raises(EvaluationError, match="expected splits among 0, 1, got 2, x"):
        evaluate(replace(task, splits=["0", "2", "x"]))
    with pytest.raises(EvaluationError, match="empty choice"):
        evaluate(replace(task, splits=[]))


def test_a_long_choice_of_splits_that_are_not_there_is_shortened(task: EvaluationTask) -> None:
    with pytest.raises(EvaluationError, match="got 2, 3, 4, 5, 6 and 999,993 more;"):
        plan_units(replace(task, splits=read_choice("0-999999")))


def test_choices_are_read_as_numbers_ranges_and_names() -> None:
    assert read_choice("0-3") == ["0", "1", "2", "3"]
    assert read_choice("4, 0-1,1,official") == ["4", "0", "1", "official"]
    for empty in ("", ",", "3-1"):
        with pytest.raises(EvaluationError, match="expected a choice like"):
            read_choice(empty)


def test_seeds_are_numbers() -> None:
    assert read_seeds("0-2,7") == [0, 1, 2, 7]
    with pytest.raises(EvaluationError, match="expected seeds like"):
        read_seeds("0,x")


def test_the_command_evaluates_writes_a_report_and_shows_a_table(
    task: EvaluationTask, tmp_path: Path
) -> None:
    arguments = ["evaluate", str(task.source), "--data", str(task.dataset.root), "--splits", "0-1"]

    outcome = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--precision", "fp32"])

    assert outcome.exit_code == 0, outcome.output
    assert "±" in outcome.output
    assert (tmp_path / "net-evaluation" / "index.html").is_file()
    results = json.loads((tmp_path / "net-evaluation" / "results.json").read_text())
    assert [unit["split"] for unit in results["units"]] == ["0", "1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--splits", "12"], "expected splits among 0, 1, 2"),
        (["--seeds", "0,1"], "expected one seed"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_the_command_refuses_what_is_not_there(
    task: EvaluationTask, changes: list[str], message: str
) -> None:
    arguments = ["evaluate", str(task.source), "--data", str(task.dataset.root), *changes]

    outcome = CliRunner().invoke(app, arguments)

    assert isinstance(outcome.exception, ModelError)
    assert message in str(outcome.exception)


def test_ctrl_c_says_that_the_same_command_goes_on(
    task: EvaluationTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("model.evaluation_console.evaluate", stop)
    arguments = ["evaluate", str(task.source), "--data", str(task.dataset.root)]

    outcome = CliRunner().invoke(app, arguments)

    assert outcome.exit_code == 130
    assert "the same command goes on" in outcome.output


def test_sigterm_saves_as_ctrl_c_does(
    task: EvaluationTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a scheduler sends; the status is that of a process which it ended."""
    add, before = EmbeddingCache.add, signal.getsignal(signal.SIGTERM)

    def add_five(cache: EmbeddingCache, name: str, embedding: NDArray[np.float32]) -> None:
        add(cache, name, embedding)
        if len(cache.embeddings) == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(EmbeddingCache, "add", add_five)
    arguments = ["evaluate", str(task.source), "--data", str(task.dataset.root)]

    outcome = CliRunner().invoke(app, arguments)

    assert outcome.exit_code == 143
    assert "the same command goes on" in outcome.output
    [kept] = (task.source.parent / "net-evaluation" / "embeddings").glob("*.npz")
    assert len(EmbeddingCache(kept).embeddings) == 5
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    task: EvaluationTask, below: str
) -> None:
    task.output.write_text("a file stands in the way")
    heard = Counter()

    with pytest.raises(EvaluationError, match="expected a folder that can be written") as caught:
        evaluate(replace(task, output=task.output / below), heard)
    assert "before" not in str(caught.value)
    assert (heard.done, heard.lines) == (0, [])
    assert not list(task.source.parent.glob(".aside-*"))
