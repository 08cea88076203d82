"""What few people of one's own teach the bundled weights, and what is forgotten of the rest.

    .venv/bin/python -m bench.own --data WARD --rest MARKET --output own [--people 3,6,9]

Of whom --model was not trained on, each draw takes some as one's own people, nested: 6 are the 3
and 3 more. The same others are tested for every number, by pairs of cameras, and people of --rest
whom the model was not trained on, too. A variant is a recipe, with settings laid over it after plus
signs: "finetune+optimiser.epochs=5". Finished rows are kept in --output, and the same command goes
on after them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.spoiled import unseen_split
from model.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from model.datasets.layouts import read_dataset
from model.datasets.tracklets import Split, Tracklet
from model.embedder import Embedder
from model.evaluation import evaluate_split, resolve_protocol
from model.experiment import Experiment, ask_teacher, make_job, plan_experiment
from model.recipe import load_recipe
from model.runs import RunFolder
from model.training import Listener, Trainer

Json = dict[str, Any]
STREAM = 43  # distinguishes these draws from others with the same seed
BEFORE = "before"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked for; see the command's help."""

    data: Path
    rest: Path | None
    model: Path
    output: Path
    people: tuple[int, ...]
    draws: int
    variants: tuple[str, ...]
    device: str


def unseen(folder: Path, model: Path) -> tuple[Split, str]:
    """Whom of a folder a model was not trained on, and the protocol that tests them."""
    dataset = read_dataset(folder)
    return unseen_split(dataset, model), resolve_protocol(dataset.layout)


def draw_split(everybody: Split, most: int, people: int, draw: int) -> Split:
    """Some people to learn from, and the others that every number of people is tested on.

    Args:
        everybody: Whom the model was not trained on.
        most: The largest number of people; all others are tested.
        people: How many are learned from.
        draw: Which draw.
    """
    names = sorted({one.identity for one in everybody.query})
    if len(names) < most + 2:
        raise SystemExit(f"expected at least {most + 2} people to draw from, got {len(names)}")
    order = np.random.default_rng([draw, STREAM]).permutation(names).tolist()
    own, others = set(order[:people]), set(order[most:])
    return Split(
        name=f"{people}-{draw}",
        train=_of(everybody.gallery, own),
        query=_of(everybody.query, others),
        gallery=_of(everybody.gallery, others),
        source=f"{people} people, draw {draw}",
    )


def _of(tracklets: Iterable[Tracklet], people: set[str]) -> tuple[Tracklet, ...]:
    return tuple(one for one in tracklets if one.identity in people)


class Bench:
    """Runs what is missing."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.everybody, self.protocol = unseen(setting.data, setting.model)
        self.rest = None if setting.rest is None else unseen(setting.rest, setting.model)
        self._known: dict[tuple[str, str], Json] = {}

    def run(self) -> list[Json]:
        """All rows, those of an earlier run included."""
        results = []
        for draw in range(self.setting.draws):
            for people in self.setting.people:
                split = draw_split(self.everybody, max(self.setting.people), people, draw)
                for variant in (BEFORE, *self.setting.variants):
                    results.append(self._row(variant, people, draw, split))
                    print(describe(results[-1]), flush=True)
        return results

    def _row(self, variant: str, people: int, draw: int, split: Split) -> Json:
        path = self.setting.output / "rows" / f"{variant}-{people}-{draw}.json"
        if path.exists():
            kept: Json = json.loads(path.read_text())
            return kept
        checkpoint, seconds = load_checkpoint(self.setting.model), 0.0
        if variant != BEFORE:
            checkpoint, seconds = self._teach(variant, split, draw)
        row = {"variant": variant, "people": people, "draw": draw, "seconds": seconds}
        row |= self._measure(checkpoint, split, draw)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row) + "\n")
        return row

    def _teach(self, variant: str, split: Split, draw: int) -> tuple[Checkpoint, float]:
        name, *changes = variant.split("+")
        start = f"start={json.dumps(str(self.setting.model))}"
        recipe = load_recipe(name, [start, "monitor.every_epochs=0", *changes])
        planned = plan_experiment(recipe, self.setting.data)
        experiment = replace(planned, dataset=replace(planned.dataset, splits=(split,)))
        folder = RunFolder(self.setting.output / "runs" / f"{variant}-{split.name}")
        began = time.monotonic()
        product = self._train(experiment, split, folder, draw)
        seconds = time.monotonic() - began
        checkpoint = load_checkpoint(product)
        product.unlink()
        return checkpoint, round(seconds, 1)

    def _train(self, experiment: Experiment, split: Split, folder: RunFolder, seed: int) -> Path:
        listener = Listener()
        job = make_job(
            experiment,
            split,
            seed=seed,
            device=self.setting.device,
            listener=listener,
            save_every_s=60.0,
            teacher=ask_teacher(
                experiment,
                [split],
                self.setting.output / ".teacher",
                listener,
                self.setting.device,
            ),
        )
        trainer = Trainer(job, folder, listener=listener)
        product = trainer.run()
        if product is None:
            raise SystemExit(128 + trainer.stopped_by)
        return product

    def _measure(self, checkpoint: Checkpoint, split: Split, draw: int) -> Json:
        key = (checkpoint.fingerprint, str(draw))
        if key not in self._known:
            embedder = Embedder(checkpoint, device=self.setting.device)
            found = evaluate_split(embedder, split, protocol=self.protocol)
            self._known[key] = {
                "rank_1": 100 * found.rank_1,
                "mAP": 100 * found.mean_average_precision,
            }
            if self.rest is not None:
                kept = evaluate_split(embedder, self.rest[0], protocol=self.rest[1])
                self._known[key]["rest_rank_1"] = 100 * kept.rank_1
                self._known[key]["rest_mAP"] = 100 * kept.mean_average_precision
        return self._known[key]


def describe(row: Mapping[str, Any]) -> str:
    """One row in a line."""
    told = (
        f"draw {row['draw']}, {row['people']} people, {row['variant']}: rank-1 {row['rank_1']:.1f}"
    )
    if "rest_rank_1" in row:
        told += f", of the rest {row['rest_rank_1']:.1f}"
    return f"{told}, {row['seconds']:.0f} s"


def make_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Means over draws, and the mean gain over "before" with its standard error."""
    lines = [
        "| people | variant | rank-1, % | gain | mAP, % | rank-1 of the rest, % | gain | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    begun = {(one["people"], one["draw"]): one for one in results if one["variant"] == BEFORE}
    for people, variant in dict.fromkeys((one["people"], one["variant"]) for one in results):
        rows = [one for one in results if (one["people"], one["variant"]) == (people, variant)]
        cells = [str(people), variant, *_with_gain("rank_1", rows, begun), _mean("mAP", rows)]
        cells += _with_gain("rest_rank_1", rows, begun) if "rest_rank_1" in rows[0] else ["", ""]
        lines.append(f"| {' | '.join([*cells, _mean('seconds', rows)])} |")
    return "\n".join(lines) + "\n"


def _mean(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{statistics.mean(one[name] for one in rows):.1f}"


def _with_gain(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    begun: Mapping[tuple[int, int], Mapping[str, Any]],
) -> list[str]:
    gains = [one[name] - begun[one["people"], one["draw"]][name] for one in rows]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    is_before = rows[0]["variant"] == BEFORE
    told = "" if is_before else f"{statistics.mean(gains):+.1f} ± {error:.1f}"
    return [_mean(name, rows), told]


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rest", type=Path)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--people", default="3,6,9")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--variants", default="adapt,finetune")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    setting = Setting(
        data=arguments.data,
        rest=arguments.rest,
        model=find_checkpoint(arguments.model).absolute(),
        output=arguments.output,
        people=tuple(sorted(int(one) for one in arguments.people.split(","))),
        draws=arguments.draws,
        variants=tuple(arguments.variants.split(",")),
        device=arguments.device,
    )
    results = Bench(setting).run()
    table = make_table(results)
    (setting.output / "own.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
