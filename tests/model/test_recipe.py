"""Recipes: one typed schema, nothing unknown, nothing converted."""

import tomllib
from pathlib import Path

import pytest

from model.errors import RecipeError
from model.recipe import (
    BUNDLED,
    OptimiserConfig,
    bundled_recipes,
    format_recipe,
    load_recipe,
    parse_recipe,
    recipe_values,
    without_places,
)

MINIMAL = {"name": "mine"}


@pytest.mark.parametrize("data", ["ilids-vid", "prid-2011", "mars", "folder"])
@pytest.mark.parametrize("kind", ["", "-paper", "-strong"])
def test_every_data_set_has_three_recipes(data: str, kind: str) -> None:
    recipe = load_recipe(data + kind)

    assert recipe.name == data + kind
    assert recipe.data.layout == data
    assert (recipe.batch.identities, recipe.batch.tracklets, recipe.batch.frames) == (8, 2, 15)
    assert (recipe.preprocessing.height, recipe.preprocessing.width) == (256, 128)


@pytest.mark.parametrize("data", ["ilids-vid", "prid-2011", "mars", "folder"])
def test_the_paper_recipes_are_the_equations_as_printed(data: str) -> None:
    recipe = load_recipe(f"{data}-paper")

    network, loss = recipe.network, recipe.loss
    assert (network.attention, network.temperature, network.pool) == ("softmax", 1.0, "mean")
    assert (loss.identity, loss.gamma, loss.triplet, loss.margin) == (
        "focal_literal",
        2.0,
        True,
        0.3,
    )
    assert (loss.regulariser, loss.regulariser_weight) == ("printed", 1.0)
    assert (recipe.optimiser.rate, recipe.optimiser.decay) == (3e-4, 5e-4)
    assert recipe.augmentation.flip_per == "frame"


@pytest.mark.parametrize("kind", ["", "-paper"])
def test_what_only_practice_knows_is_off_in_the_recipes_of_the_paper(kind: str) -> None:
    for data in ("ilids-vid", "prid-2011", "mars", "folder"):
        recipe = load_recipe(data + kind)

        assert not recipe.network.neck
        assert recipe.augmentation.erase == recipe.augmentation.pad == 0
        assert recipe.optimiser.ema == recipe.optimiser.warmup_epochs == 0
        assert recipe.loss.identity != "ce_smooth"


def test_the_strong_recipes_switch_it_on() -> None:
    for data in ("ilids-vid", "prid-2011", "mars", "folder"):
        recipe = load_recipe(f"{data}-strong")

        assert recipe.network.neck
        assert recipe.augmentation.erase > 0
        assert recipe.optimiser.ema > 0
        assert recipe.optimiser.warmup_epochs > 0
        assert recipe.loss.identity == "ce_smooth"


def test_the_rate_falls_as_in_the_paper() -> None:
    """3e-4, then 3e-5 from epoch 200 and 3e-6 from 400 (paper/review.md, 3.8, test 13)."""
    config = load_recipe("ilids-vid").optimiser

    rates = [config.rate_at(epoch) for epoch in (0, 199, 200, 399, 400, 599)]

    assert config.epochs == 600
    assert rates == pytest.approx([3e-4, 3e-4, 3e-5, 3e-5, 3e-6, 3e-6])


def test_warm_up_rises_from_a_tenth_within_its_epochs() -> None:
    config = OptimiserConfig(rate=1.0, warmup_epochs=10, milestones=(20,))

    assert config.rate_at(0) == pytest.approx(0.1)
    assert config.rate_at(5) == pytest.approx(0.55)
    assert config.rate_at(9, 0.5) == pytest.approx(0.1 + 0.9 * 0.95)
    assert config.rate_at(10) == pytest.approx(1.0)


def test_a_cosine_falls_to_nothing_along_half_a_wave() -> None:
    config = OptimiserConfig(rate=2.0, epochs=10, schedule="cosine", milestones=(5,))

    assert config.rate_at(0) == pytest.approx(2.0)
    assert config.rate_at(5) == pytest.approx(1.0)
    assert config.rate_at(2, 0.5) == pytest.approx(1 + 0.5**0.5)
    assert config.rate_at(9, 0.999) < 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["batch.draw=clips"], "identities.* for the triplet loss, which needs positives"),
        (["distillation.teacher=t.onnx", "distillation.views=2"], "expected 1 beside an identity"),
    ],
)
def test_what_cannot_be_learned_together_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("folder", settings)


@pytest.mark.parametrize("name", bundled_recipes())
def test_a_recipe_comes_back_from_what_is_written(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "again.toml"
    path.write_text(format_recipe(recipe), encoding="utf-8")

    assert load_recipe(path) == recipe
    assert parse_recipe(recipe_values(recipe)) == recipe


def test_a_teacher_comes_back_too(tmp_path: Path) -> None:
    recipe = parse_recipe(
        {"name": "mine", "distillation": {"teacher": "a 'quoted' \\ \x7f file.xml"}}
    )
    path = tmp_path / "again.toml"
    path.write_text(format_recipe(recipe), encoding="utf-8")

    assert load_recipe(path) == recipe


def test_an_unknown_key_is_named_with_those_that_exist() -> None:
    with pytest.raises(RecipeError, match=r"'optimiser.epoch'.* epochs"):
        parse_recipe({"name": "mine", "optimiser": {"epoch": 3}})


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"name": "mine", "los": {}, "batch": {"identitys": 4}})

    assert "'los'" in str(caught.value)
    assert "'batch.identitys'" in str(caught.value)


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("optimiser", "epochs", "600"),
        ("optimiser", "epochs", 1.5),
        ("optimiser", "epochs", 0),
        ("optimiser", "rate", -1.0),
        ("optimiser", "ema", 1.0),
        ("optimiser", "blend", 1.0),
        ("optimiser", "milestones", [400, 200]),
        ("optimiser", "milestones", [-5]),
        ("optimiser", "factor", 0.0),
        ("monitor", "every_epochs", -1),
        ("monitor", "frames", 0),
        ("optimiser", "precision", "bf17"),
        ("batch", "tracklets", 1),
        ("batch", "sampling", "dense"),
        ("network", "attention", "zscore"),
        ("network", "temperature", "auto"),
        ("network", "neck", "yes"),
        ("preprocessing", "height", 8),
        ("augmentation", "flip", 2.0),
        ("data", "layout", "ilids"),
        ("loss", "identity", "focal"),
        ("loss", "margin", -0.1),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(table: str, key: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"{table}.*(expected|Input should)"):
        parse_recipe({"name": "mine", table: {key: value}})


def test_a_whole_number_may_stand_for_a_fraction() -> None:
    recipe = parse_recipe({"name": "mine", "network": {"temperature": 2}})

    assert recipe.network.temperature == 2.0


@pytest.mark.parametrize("value", ["inf", "nan", "1979-05-27"])
def test_what_no_recipe_can_hold_is_refused(value: str) -> None:
    with pytest.raises(RecipeError, match="expected finite numbers"):
        load_recipe("ilids-vid", [f"optimiser.clip_norm={value}"])


def test_a_folder_of_the_same_name_does_not_hide_a_bundled_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mars").mkdir()
    monkeypatch.chdir(tmp_path)

    assert load_recipe("mars").name == "mars"


def test_a_neck_that_nothing_would_train_is_refused() -> None:
    with pytest.raises(RecipeError, match="expected an identity loss to train it"):
        parse_recipe({"name": "x", "network": {"neck": True}, "loss": {"identity": "none"}})


def test_a_run_without_any_loss_is_refused() -> None:
    with pytest.raises(RecipeError, match="an identity loss, a triplet loss or a teacher"):
        parse_recipe({"name": "mine", "loss": {"identity": "none", "triplet": False}})


def test_settings_are_laid_over_a_file() -> None:
    overrides = ["optimiser.epochs=3", "loss.identity=ce", "network.temperature=1.0", "start=x.pth"]

    recipe = load_recipe("ilids-vid", overrides)

    assert recipe.optimiser.epochs == 3
    assert recipe.loss.identity == "ce"
    assert recipe.network.temperature == 1.0
    assert recipe.start == "x.pth"


@pytest.mark.parametrize("override", ["optimiser.epochs", "=3", "name.x=3"])
def test_a_setting_that_is_none_is_refused(override: str) -> None:
    with pytest.raises(RecipeError, match="expected"):
        load_recipe("ilids-vid", [override])


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="ilids-vid-paper"):
        load_recipe("ilids")
    with pytest.raises(RecipeError, match="could not read"):
        load_recipe(tmp_path / "missing.toml")


def test_what_is_not_toml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("name = \n")

    with pytest.raises(RecipeError, match="expected TOML"):
        load_recipe(path)


def test_bundled_files_say_what_is_not_obvious_and_hold_no_other_key() -> None:
    for path in BUNDLED.glob("*.toml"):
        values = tomllib.loads(path.read_text(encoding="utf-8"))

        assert values["name"] == path.stem
        assert values["description"]


def test_a_recipe_without_places_names_files_and_no_folders() -> None:
    settings = ["start=/home/me/w.safetensors", "distillation.teacher=/data/t.onnx"]
    recipe = load_recipe("folder", [*settings, "distillation.cache=/data/cache"])

    told = without_places(recipe)

    assert told.start == "w.safetensors"
    assert told.distillation is not None
    assert (told.distillation.teacher, told.distillation.cache) == ("t.onnx", None)
    assert without_places(load_recipe("folder")) == load_recipe("folder")


def test_weights_are_not_blended_with_random_ones() -> None:
    with pytest.raises(RecipeError, match="expected 0 where a run begins with random weights"):
        load_recipe("finetune", ["start=random", "distillation.teacher=t.onnx"])
