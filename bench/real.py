r"""What helps on real tracklets: starts, readings, losses, a teacher, frames, length of embeddings.

    mkdir mix; ln -s .../ward mix/ward; ln -s .../market1501-train mix/market1501
    .venv/bin/python -m bench.real --data mix --output real --test-share market1501=0.2 \
        --imagenet resnet50.safetensors --teacher person-reidentification-retail-0277.xml

Each row is a recipe; each division draws other identities to test, other weights and other batches,
the same ones for every row, so that rows are compared in pairs. Every row takes as many steps of as
many frames. Tested are people whom no row has seen, by the protocol of each part of the data, at
the start and after each quarter of the run; at the end with 1, 2, ... frames of a tracklet, as the
embeddings are and scaled to unit length. Everything of division 0 comes first, then division 1, and
so on: an interrupted study is complete for fewer divisions, and the same command goes on with it.
Rows whose file is not given are left out. Trained weights are removed once they are measured,
because an ImageNet file may forbid to ship what comes of it; those of an interrupted row are kept
beside its log until it is finished.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

from bench.real_measuring import Ruler
from bench.real_rows import (
    QUARTERS,
    SHOWN,
    Json,
    Row,
    Study,
    all_rows,
    choose_rows,
)
from bench.real_tables import make_tables, write_json, write_report
from model.checkpoint import load_checkpoint, make_checkpoint
from model.datasets.tracklets import Split
from model.embedder import choose_device
from model.errors import ModelError
from model.experiment import make_job, plan_experiment
from model.learner import start_network
from model.loading import Batch, ClipLoader
from model.runs import RunFolder
from model.teacher import load_teacher
from model.teacher_cache import TeacherEmbeddings, cache_embeddings
from model.training import Job, Listener, Trainer, make_sampler

# Frames are averaged here as they are, and all rows share one pass of the teacher.
NOT_MEASURED = ("network.unit", "network.temporal", "distillation.")
SAVE_EVERY_S = 60.0
TELL_EVERY_S = 20.0


class QuarterLoader(ClipLoader):
    """The batches of a run, counted in quarters of it instead of passes over the data.

    Rows draw different things, so their epochs differ; their steps must not. Batches are the very
    ones that epochs would have.

    Args:
        trainer: Whose batches they are.
        steps: In a quarter.
    """

    def __init__(self, trainer: Trainer, steps: int) -> None:
        recipe, job = trainer.recipe, trainer.job
        sampler = make_sampler(trainer.tracklets, recipe.batch, job.seed, trainer.ranks)
        super().__init__(
            trainer.tracklets,
            sampler,
            trainer.store,
            recipe.batch,
            recipe.augmentation,
            teacher=job.teacher,
            workers=job.workers,
        )
        self._steps = steps
        self._whole = len(sampler)

    def __len__(self) -> int:
        """Batches in a quarter."""
        return self._steps

    def epoch(self, epoch: int, first: int = 0) -> Generator[Batch]:
        """The batches of a quarter, from one of them on."""
        place, end = epoch * self._steps + first, (epoch + 1) * self._steps
        while place < end:
            number, begin = divmod(place, self._whole)
            with closing(super().epoch(number, begin)) as batches:
                for batch in islice(batches, end - place):
                    yield batch
                    place += 1


class StepTrainer(Trainer):
    """Trains for a number of steps: the epochs of its recipe are the quarters of the run.

    Args:
        job: See `Trainer`.
        folder: See `Trainer`.
        steps: In all, a multiple of four.
        listener: See `Trainer`.
    """

    def __init__(self, job: Job, folder: RunFolder, *, steps: int, listener: Listener) -> None:
        super().__init__(job, folder, listener=listener)
        self.loader = QuarterLoader(self, steps // QUARTERS)


class Teller(Listener):
    """Tells of a run on the console.

    Args:
        name: Of the row.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._told_at = time.monotonic()

    def loaded(self, done: int, total: int) -> None:
        """While frames are looked at: now and then."""
        if time.monotonic() - self._told_at > TELL_EVERY_S:
            self._told_at = time.monotonic()
            self.said(f"{done} of {total} frames")

    def said(self, text: str) -> None:
        """Something worth a line."""
        print(f"    {self._name}: {text.replace('after epoch', 'after quarter')}", flush=True)

    def warned(self, text: str) -> None:
        """Something worth a warning."""
        self.said(f"warning: {text}")


class Bench:
    """Runs what is missing of a study.

    Args:
        study: What is asked for.
        rows: In the order of work.
        divisions: How many.
    """

    def __init__(self, study: Study, rows: Sequence[Row], divisions: int) -> None:
        self.study, self.rows = study, rows
        recipe = study.recipe(Row("default", "", "random"))
        self.experiment = plan_experiment(recipe, study.data)
        splits = self.experiment.dataset.splits
        if divisions > len(splits):
            raise SystemExit(f"expected at most {len(splits)} divisions, got {divisions}")
        self.splits = splits[:divisions]
        self._refuse_another_study()
        self._teacher: TeacherEmbeddings | None = None
        self._ruler: tuple[str, Ruler] | None = None

    def _refuse_another_study(self) -> None:
        """Figures of other steps or other data must not stand in one table."""
        path = self.study.output / "study.json"
        asked = self.study.decisive(self.experiment.fingerprint)
        known: Json = json.loads(path.read_text()) if path.exists() else {}
        for name, value in asked.items():
            if value != (before := known.get(name, value)) and None not in (value, before):
                raise SystemExit(
                    f"expected to go on with the study in {self.study.output}, but its {name} is "
                    f"{before} and now it would be {value}; give another --output"
                )
        known |= {name: value for name, value in asked.items() if value is not None}
        write_json(path, known)

    def run(self) -> list[Json]:
        """Run every row of every division that is not there, and write tables as it goes.

        Returns:
            All results.
        """
        work = [(split, row) for split in self.splits for row in self.rows]
        results = {one: known for one in work if (known := self._read(*one)) is not None}
        print(f"{len(results)} of {len(work)} rows are there already", flush=True)
        for split, row in work:
            if (split, row) in results:
                self._forget(split, row)  # what an interruption may have left
                continue
            results[split, row] = self._run_row(split, row)
            write_report(self.study.output, list(results.values()), self.rows)
            left = seconds_left([one[1] for one in work if one not in results], results.values())
            print(
                f"[{len(results)}/{len(work)}] division {split.name}, {row.name}: "
                f"{describe(results[split, row])}; {left / 60:.0f} min left",
                flush=True,
            )
        return list(results.values())

    def _path(self, split: Split, row: Row) -> Path:
        return self.study.output / "rows" / f"{row.name}-{split.name}.json"

    def _folder(self, split: Split, row: Row) -> RunFolder:
        return RunFolder(self.study.output / "runs" / f"{row.name}-{split.name}")

    def _read(self, split: Split, row: Row) -> Json | None:
        path = self._path(split, row)
        if not path.exists():
            return None
        result: Json = json.loads(path.read_text())
        return result

    def _run_row(self, split: Split, row: Row) -> Json:
        began = time.monotonic()
        result: Json = {"row": row.name, "kind": row.kind, "division": split.name}
        if row.start == "teacher":
            ruler = self._measurer(split)
            frames = {path: self._teach().of(path) for path in ruler.frames}
            result["measures"] = ruler.measure_frames(frames)
        elif row.trained:
            result |= self._train(split, row)
        else:
            recipe = self.study.recipe(row)
            network, _ = start_network(recipe, int(split.name))
            checkpoint = make_checkpoint(network, recipe.preprocessing)
            result["measures"] = self._measurer(split).measure(checkpoint)
        result["row_s"] = round(time.monotonic() - began, 1)
        write_json(self._path(split, row), result)
        self._forget(split, row)
        return result

    def _train(self, split: Split, row: Row) -> Json:
        recipe, folder, listener = (
            self.study.recipe(row),
            self._folder(split, row),
            Teller(row.name),
        )
        job = make_job(
            replace(self.experiment, recipe=recipe),
            split,
            seed=int(split.name),
            device=self.study.device,
            listener=listener,
            save_every_s=SAVE_EVERY_S,
            teacher=self._teach() if row.taught else None,
        )
        job = replace(job, measure=self._measurer(split))
        trainer = StepTrainer(job, folder, steps=self.study.steps, listener=listener)
        product = trainer.run()
        if product is None:
            raise SystemExit(128 + trainer.stopped_by)
        measures = self._measurer(split).measure(load_checkpoint(product))
        curve = read_curve(folder)
        return {"measures": measures, "curve": curve, "train_s": curve[-1]["time_s"]}

    def _measurer(self, split: Split) -> Ruler:
        if self._ruler is None or self._ruler[0] != split.name:
            study = self.study
            ruler = Ruler(self.experiment, split, steps=study.steps, device=study.device)
            self._ruler = (split.name, ruler)
        return self._ruler[1]

    def _teach(self) -> TeacherEmbeddings:
        """What the teacher makes of all frames: divisions share one pass; none trains on another's.

        A row asks for those of its training frames only.
        """
        if self._teacher is None:
            config = self.study.recipe(next(row for row in all_rows() if row.taught)).distillation
            if config is None:
                raise RuntimeError("expected a teacher in the recipe of a row that has one")
            teacher = load_teacher(
                config.teacher,
                channels=config.channels,
                precision=config.precision,
                device=choose_device(self.study.device),
            )
            if teacher.dim != self.study.dim:
                raise SystemExit(
                    f"expected --dim {teacher.dim}, the teacher's, got {self.study.dim}"
                )
            frames = [path for one in self.experiment.dataset.tracklets for path in one.frames]
            print(f"    the teacher sees {len(frames)} frames, once", flush=True)
            folder = self.study.output / "teacher"
            self._teacher = cache_embeddings(teacher, frames, folder, Teller("teacher").loaded)
        return self._teacher

    def _forget(self, split: Split, row: Row) -> None:
        """Remove trained weights: their figures are kept."""
        if not self.study.keep:
            folder = self._folder(split, row)
            folder.product.unlink(missing_ok=True)
            folder.drop_state()


def read_curve(folder: RunFolder) -> list[Json]:
    """The measured points of a run, what was kept last; ``time_s`` without that of measuring."""
    curve, measuring = {}, 0.0
    for line in folder.read_log():
        if "measured" not in line:
            continue
        measuring += line["measure_s"]
        values = {name: value for name, value in line.items() if "/" in name}
        time_s = round(max(0.0, line["time_s"] - measuring), 1)
        # A run that ends by normalising its head is measured at its last step once more.
        curve[line["step"]] = {"step": line["step"], "time_s": time_s, **values}
    return list(curve.values())


def seconds_left(rows: Iterable[Row], results: Iterable[Json]) -> float:
    """Guess how long rows will take by how long those of the same kind took."""
    known: dict[str, list[float]] = defaultdict(list)
    for one in results:
        known[one["kind"]].append(one["row_s"])
    every = [seconds for kind in known.values() for seconds in kind]
    return sum(statistics.mean(known.get(row.kind) or every) for row in rows)


def describe(result: Json) -> str:
    """What a row found, in short."""
    found = (
        f"{part} rank-1 {100 * values['raw'][SHOWN]['rank_1']:.1f}"
        for part, values in result["measures"].items()
    )
    return ", ".join(found)


def make_parser() -> argparse.ArgumentParser:
    """What the command understands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a mix, or any data set")
    parser.add_argument("--output", type=Path, required=True, help="the same again goes on")
    parser.add_argument("--layout", default="auto")
    parser.add_argument(
        "--test-share", action="append", default=[], metavar="PART=SHARE",
        help="of a mix, how many identities of a part are tested; a half without it",
    )  # fmt: skip
    parser.add_argument("--imagenet", type=Path, help="a ResNet-50 to begin with")
    parser.add_argument("--teacher", type=Path, help=".onnx or .xml, takes BGR from 0 to 255")
    parser.add_argument("--teacher-precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--dim", type=int, default=256, help="length of the teacher's embeddings")
    parser.add_argument("--rows", default="*", help="names or patterns, such as 'random-*,teacher'")
    parser.add_argument("--divisions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of each row, a multiple of 4")
    parser.add_argument("--identities", type=int, default=8, help="P; K is 2")
    parser.add_argument("--frames", type=int, default=4, help="T")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--backbone", choices=("resnet50", "conv5"), default="resnet50")
    parser.add_argument("--rate-random", type=float, default=1e-3)
    parser.add_argument("--rate-imagenet", type=float, default=3e-4)
    parser.add_argument("--set", action="append", default=[], help="change every row's recipe")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep", action="store_true", help="keep trained weights")
    return parser


def read_study(arguments: argparse.Namespace) -> Study:
    """Take the command's arguments apart.

    Raises:
        ValueError: One cannot be read, or is out of range.
    """
    if arguments.steps < QUARTERS or arguments.steps % QUARTERS:
        raise ValueError(f"--steps: expected a multiple of {QUARTERS}, got {arguments.steps}")
    shares = {}
    for text in arguments.test_share:
        part, equals, share = text.partition("=")
        if not part or not equals:
            raise ValueError(f"--test-share: expected PART=SHARE, got {text!r}")
        shares[part] = float(share)
    alike = ["data", "output", "layout", "imagenet", "teacher", "teacher_precision", "steps"]
    alike += ["identities", "frames", "height", "width", "backbone", "dim", "device", "keep"]
    return Study(
        **{name: getattr(arguments, name) for name in alike},
        test_share=shares,
        rates={"random": arguments.rate_random, "imagenet": arguments.rate_imagenet},
        changes=tuple(arguments.set),
    )


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = make_parser()
    arguments = parser.parse_args()
    for setting in arguments.set:
        if setting.startswith(NOT_MEASURED):
            parser.error(f"--set: expected none of {', '.join(NOT_MEASURED)}, got {setting}")
    try:
        study = read_study(arguments)
        rows = choose_rows(arguments.rows, study)
    except ValueError as error:
        parser.error(str(error))
    if not rows:
        parser.error("expected --imagenet or --teacher for these rows, got neither")
    try:
        results = Bench(study, rows, arguments.divisions).run()
    except KeyboardInterrupt:  # outside of training, which saves its state first
        raise SystemExit(130) from None
    except ModelError as error:
        raise SystemExit(str(error)) from error
    write_report(study.output, results, rows)
    print(make_tables(results, rows))


if __name__ == "__main__":
    main()
