"""Few people of one's own: who is drawn, and that the table pairs what belongs together."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.own import BEFORE, Bench, Setting, draw_split, make_table, unseen
from model.checkpoint import make_checkpoint, save_checkpoint, untrained_checkpoint
from model.frames import Preprocessing
from model.network import NetworkConfig

SMALL = (
    "+network.backbone=conv5+network.head=8+preprocessing.height=64+preprocessing.width=32"
    "+optimiser.precision=fp32"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    for person in range(8):
        colour = rng.uniform(60, 180, 3)
        for camera in range(2):
            frames = root / f"p{person}" / f"c{camera}"
            frames.mkdir(parents=True)
            for number in range(3):
                pixels = colour * (0.7 + 0.4 * camera) + rng.normal(0, 25, (64, 32, 3))
                picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                picture.save(frames / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = NetworkConfig(backbone="conv5", head=8, temporal="agreement", unit=True)
    network = untrained_checkpoint(0, config).network
    path = tmp_path_factory.mktemp("model") / "mine.safetensors"
    save_checkpoint(make_checkpoint(network, Preprocessing(height=64, width=32)), path)
    return path


def test_people_are_nested_and_never_tested(folder: Path, model: Path) -> None:
    everybody, protocol = unseen(folder, model)
    few, more = (draw_split(everybody, 4, people, 0) for people in (2, 4))
    elsewhere = draw_split(everybody, 4, 2, 1)

    def people(tracklets: object) -> set[str]:
        return {one.identity for one in tracklets}  # type: ignore[attr-defined]

    assert protocol == "camera-pairs"
    assert people(few.train) < people(more.train)
    assert few.query == more.query
    assert not people(more.train) & people(more.query)
    assert len(people(more.train) | people(more.query)) == 8
    assert people(elsewhere.train) != people(few.train)
    with pytest.raises(SystemExit, match="at least 9 people"):
        draw_split(everybody, 7, 2, 0)


def test_rows_are_run_once_and_paired(folder: Path, model: Path, tmp_path: Path) -> None:
    setting = Setting(
        data=folder,
        rest=folder,
        model=model,
        output=tmp_path,
        people=(3,),
        draws=2,
        variants=(f"adapt{SMALL}", f"finetune{SMALL}+optimiser.epochs=1+batch.identities=2"),
        device="cpu",
    )

    results = Bench(setting).run()
    again = Bench(setting).run()

    assert again == results
    assert [one["variant"] for one in results[:3]] == [BEFORE, *setting.variants]
    assert results[0]["seconds"] == 0 < results[1]["seconds"]
    assert not list(tmp_path.glob("runs/*/model.safetensors"))
    head, _, before, adapted, _ = make_table(results).splitlines()
    assert head.startswith("| people | variant |")
    gain = np.mean([results[4]["mAP"] - results[3]["mAP"], results[1]["mAP"] - results[0]["mAP"]])
    assert gain != 0
    assert f"| 3 | {BEFORE} |" in before
    ranks = [results[n + 1]["rank_1"] - results[n]["rank_1"] for n in (0, 3)]
    assert f"{np.mean(ranks):+.1f} ±" in adapted
