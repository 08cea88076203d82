"""The study on real tracklets: its rows, its steps, and what it measures."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import real
from bench.real import Bench, QuarterLoader, StepTrainer, read_curve
from bench.real_measuring import Ruler
from bench.real_rows import CHOICES, MEASURES, READINGS, Row, Study, all_rows, choose_rows
from bench.real_tables import make_tables, paired
from model.checkpoint import Checkpoint, make_checkpoint
from model.datasets.layouts import read_dataset
from model.datasets.mixed import MixedDataset
from model.datasets.presets import preset_set
from model.datasets.synthetic import write_set
from model.embedder import Embedder
from model.evaluation import evaluate_split, resolve_protocol
from model.experiment import Experiment, plan_experiment
from model.learner import start_network
from model.loading import ClipLoader
from model.runs import RunFolder
from model.training import Job, Listener, make_sampler

SMALL = {"backbone": "conv5", "height": 64, "width": 32, "identities": 2, "frames": 2}
DEFAULT = Row("random-default", "", "random")


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drawn sets side by side, with the same names in both."""
    root = tmp_path_factory.mktemp("mix")
    for seed, (name, layout) in enumerate({"a": "folder", "b": "market-1501"}.items()):
        config = preset_set("easy", "tiny", seed=seed)
        write_set(config, root / name, layout=layout, masks=False, jobs=1)  # type: ignore[arg-type]
    return root


def small_study(data: Path, output: Path, steps: int = 4) -> Study:
    return Study(data, output, steps=steps, layout="mixed", device="cpu", **SMALL)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def experiment(mix: Path) -> Experiment:
    return plan_experiment(small_study(mix, mix).recipe(DEFAULT), mix)


def untrained(experiment: Experiment, seed: int = 0) -> Checkpoint:
    network, _ = start_network(experiment.recipe, seed)
    return make_checkpoint(network, experiment.recipe.preprocessing)


def full_study() -> Study:
    return Study(Path("mix"), Path("out"), imagenet=Path("a.pth"), teacher=Path("t.xml"))


@pytest.mark.parametrize(
    "row", [row for row in all_rows() if row.start != "teacher"], ids=lambda row: row.name
)
def test_the_recipe_of_every_row_parses_and_has_as_many_frames_in_a_batch(row: Row) -> None:
    recipe = full_study().recipe(row)

    batch = recipe.batch
    assert batch.identities * batch.tracklets * batch.frames == 64
    assert (recipe.distillation is not None) == row.taught
    assert recipe.start == ("a.pth" if row.start == "imagenet" else "random")


def test_names_differ_and_every_row_is_beside_one_that_is_there() -> None:
    names = [row.name for row in all_rows()]

    assert len(set(names)) == len(names)
    assert {row.beside for row in all_rows()} - {None} <= set(names)


def test_both_starts_have_the_same_rows() -> None:
    rows = {
        start: {row.name.removeprefix(start) for row in all_rows() if row.start == start}
        for start in ("random", "imagenet")
    }

    assert rows["random"] == rows["imagenet"]
    assert len(rows["random"]) == len(READINGS) + 12


def test_rows_without_their_file_are_left_out() -> None:
    study = Study(Path("mix"), Path("out"))

    rows = choose_rows("*", study)

    assert rows
    assert all(row.start == "random" and not row.taught for row in rows)


def test_a_pattern_that_names_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="got randm-"):
        choose_rows("random-*,randm-*", full_study())


def test_quarters_have_the_batches_of_epochs_one_after_another(
    experiment: Experiment, tmp_path: Path
) -> None:
    """Whatever an epoch is, and wherever a quarter is taken up again."""
    job = Job(experiment.recipe, experiment.dataset.splits[0], {}, device="cpu", workers=2)
    trainer = StepTrainer(job, RunFolder(tmp_path / "run"), steps=20, listener=Listener())
    batch = experiment.recipe.batch
    sampler = make_sampler(trainer.tracklets, batch, 0, trainer.ranks)
    plain = ClipLoader(
        trainer.tracklets, sampler, trainer.store, batch, experiment.recipe.augmentation
    )
    epochs = itertools.chain.from_iterable(plain.epoch(number) for number in itertools.count())

    whole = [one for quarter in range(4) for one in trainer.loader.epoch(quarter)]
    again = list(trainer.loader.epoch(2, first=3))

    assert isinstance(trainer.loader, QuarterLoader)
    assert trainer.steps == len(whole) == 20
    assert len(plain) not in (5, 20)
    for made, expected in zip(whole, epochs, strict=False):
        assert np.array_equal(made.clips, expected.clips)
        assert made.tracklets == expected.tracklets
    assert [one.tracklets for one in again] == [one.tracklets for one in whole[13:15]]


def test_one_pass_over_frames_measures_as_evaluations_of_each_choice_do(
    experiment: Experiment,
) -> None:
    """In a mix whose parts share names, each part by its own protocol."""
    checkpoint = untrained(experiment)
    split = experiment.dataset.splits[1]
    ruler = Ruler(experiment, split, steps=4, device="cpu")
    assert isinstance(experiment.dataset, MixedDataset)

    measured = ruler.measure(checkpoint)

    for name, part in experiment.dataset.part_splits(split).items():
        protocol = resolve_protocol(experiment.dataset.parts[name].layout)
        for choice in ("1", "4", "all"):
            expected = evaluate_split(
                Embedder(checkpoint, device="cpu"), part, protocol=protocol, choice=CHOICES[choice]
            )
            found = measured[name]["raw"][choice]
            assert found["queries"] == expected.counted
            assert found["mAP"] == pytest.approx(expected.mean_average_precision, abs=1e-6)
            assert found["rank_1"] == expected.rank_1


def test_unit_length_changes_figures_only_where_lengths_differ(experiment: Experiment) -> None:
    ruler = Ruler(experiment, experiment.dataset.splits[0], steps=4, device="cpu")
    rng = np.random.default_rng(0)
    frames = {path: rng.random(8, dtype=np.float32) for path in ruler.frames}
    longer = {path: one * (1 + number % 7) for number, (path, one) in enumerate(frames.items())}
    alone = {path: one / np.float32(np.linalg.norm(one)) for path, one in frames.items()}

    one, other = ruler.measure_frames(longer, ["1"]), ruler.measure_frames(alone, ["1"])

    assert one["a"]["unit"]["1"] == other["a"]["unit"]["1"] == other["a"]["raw"]["1"]
    assert one["a"]["raw"]["1"] != one["a"]["unit"]["1"]


def test_a_study_goes_on_keeps_no_weights_and_refuses_another(mix: Path, tmp_path: Path) -> None:
    study = small_study(mix, tmp_path / "out")
    rows = choose_rows("random-untrained-zscore,random-default", study)
    first = Bench(study, rows, 1).run()
    made = {path: path.stat().st_mtime_ns for path in (study.output / "rows").iterdir()}

    results = Bench(study, rows, 2).run()

    assert results[:2] == first
    assert len(results) == 4
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert not list(study.output.rglob("*.safetensors"))
    with pytest.raises(SystemExit, match="its steps is 4 and now it would be 8"):
        Bench(small_study(mix, study.output, steps=8), rows, 1)


def test_the_curve_has_all_quarters_and_ends_at_the_figures_of_the_table(
    mix: Path, tmp_path: Path
) -> None:
    study = small_study(mix, tmp_path / "out")
    [result] = Bench(study, choose_rows("random-no-reg", study), 1).run()

    assert [point["step"] for point in result["curve"]] == [0, 1, 2, 3, 4]
    for part, values in result["measures"].items():
        for name in MEASURES:
            assert result["curve"][-1][f"{part}/{name}"] == values["raw"]["8"][name]
    assert "| random | without the temporal term | 1 |" in (study.output / "table.md").read_text()
    assert (study.output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_measuring_does_not_count_as_training_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step, time_s in enumerate((2.0, 14.0)):
        folder.log({"step": step, "time_s": time_s, "measured": step, "measure_s": 2.0, "a/mAP": 1})
        folder.log({"step": step, "time_s": time_s, "loss": 1.0})

    assert [(point["time_s"], point["a/mAP"]) for point in read_curve(folder)] == [(0, 1), (10, 1)]


def test_differences_are_paired_by_division() -> None:
    """Gaps of +1 and +3 in the two divisions that both have: 2 with a standard error of 1."""
    one, other = {"0": 11.0, "1": 53.0, "2": 70.0}, {"1": 50.0, "0": 10.0}

    assert paired(one, other) == "+2.0 ± 1.0"
    assert paired(one, {"2": 70.5}) == "-0.5"
    assert paired(one, {}) == ""


def test_tables_stand_with_rows_of_different_numbers_of_divisions() -> None:
    figures = {"rank_1": 0.5, "rank_5": 0.75, "mAP": 0.625, "queries": 8, "gallery": 4}
    measures = {"a": {scale: dict.fromkeys(CHOICES, figures) for scale in ("raw", "unit")}}
    names = {"random-untrained-zscore": "01", "random-untrained-l1": "0"}
    results = [
        {"row": name, "division": division, "measures": measures}
        for name, divisions in names.items()
        for division in divisions
    ]

    table = make_tables(results, all_rows())

    assert "| random | untrained, z-score | 2 | 50.0 ± 0.0 | 75.0 ± 0.0 | 62.5 ± 0.0 |" in table
    assert "| random | untrained, L1 | 1 | 50.0 | 75.0 | 62.5 | untrained-zscore | +0.0 |" in table


def test_the_command_says_what_it_expected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["bench.real", "--data", "d", "--output", "o", "--steps", "6"]
    monkeypatch.setattr(sys, "argv", given)

    with pytest.raises(SystemExit):
        real.main()

    assert "--steps: expected a multiple of 4, got 6" in capsys.readouterr().err


def test_a_mix_is_divided_as_its_recipe_says(mix: Path, tmp_path: Path) -> None:
    study = Study(mix, tmp_path, layout="mixed", test_share={"b": 0.25}, **SMALL)  # type: ignore[arg-type]

    recipe = study.recipe(DEFAULT)

    assert recipe.data.test_share == {"b": 0.25}
    assert json.loads(json.dumps(study.decisive("data-0")))["test_share"] == {"b": 0.25}
    split = read_dataset(mix, "mixed", test_share={"b": 0.25}).splits[0]
    assert len({one.identity for one in split.query if one.identity.startswith("b/")}) == 2
