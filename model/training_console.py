"""Training as a command: one run after another, with a bar on a terminal and lines elsewhere."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from model.datasets.tracklets import Split
from model.errors import TrainingError
from model.experiment import Experiment, ask_teacher, make_job, run_folders, tell_oddities
from model.live_teacher import LiveTeacher
from model.ranks import Ranks, joined_ranks
from model.runs import RECIPE
from model.teacher_cache import TeacherEmbeddings
from model.training import Listener, Trainer, make_sampler, usable_tracklets
from model.training import Progress as Done

LINE_EVERY_S = 30.0


class ConsoleListener(Listener):
    """Shows a training run on a console.

    Args:
        console: Where to.
        title: Which run it is.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._title = title
        self._task: TaskID | None = None
        self._next_line = time.monotonic() + LINE_EVERY_S

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def loaded(self, done: int, total: int) -> None:
        """While frames are decoded before the first step."""
        self._show(f"{self._title}: decoding", done, total, f"{done}/{total} frames")

    def normalised(self, done: int, total: int) -> None:
        """While frames are embedded for the normalisation of the head, after the last step."""
        self._show(f"{self._title}: normalising", done, total, f"{done}/{total} frames")

    def progress(self, progress: Done) -> None:
        """After each step."""
        facts = (
            f"step {progress.step}/{progress.steps}, epoch {progress.epoch + 1}, "
            f"loss {progress.loss:.3f}, {progress.frames_per_s:.0f} frames/s, "
            f"{readable_time(progress.left_s)} left"
        )
        self._show(self._title, progress.step, progress.steps, facts)
        last = progress.step == progress.steps
        if not self._console.is_terminal and (last or time.monotonic() > self._next_line):
            self.said(facts)
            self._next_line = time.monotonic() + LINE_EVERY_S

    def said(self, text: str) -> None:
        """Something worth a line."""
        self._console.print(f"{self._title}: {text}", highlight=False, soft_wrap=True, markup=False)

    def warned(self, text: str) -> None:
        """Something worth a warning."""
        self._console.print("[yellow]warning:[/]", end=" ")
        self.said(text)

    def _show(self, title: str, done: int, total: int, facts: str) -> None:
        if self._task is None:
            self._task = self._bar.add_task(title, total=total, facts=facts)
        self._bar.update(self._task, description=title, completed=done, total=total, facts=facts)


def readable_time(seconds: float) -> str:
    """Seconds as people say them: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def train_all(
    experiment: Experiment,
    splits: Sequence[Split],
    seeds: Sequence[int],
    output: Path,
    console: Console,
    *,
    device: str,
    save_every_s: float,
) -> int | None:
    """Train every run of an experiment, in order; finished ones are left as they are.

    Args:
        experiment: What is trained on what.
        splits: One run for each of these
        seeds: and each of these.
        output: The run folder, or the folder of several.
        console: Where to show it.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        save_every_s: Seconds between saved states.

    Returns:
        The number of the signal that stopped it; None where all are finished.

    Raises:
        ModelError: A run cannot begin or go on, see `model.training.Trainer`.
    """
    folders = run_folders(output, splits, seeds)
    if len(folders) > 1 and (output / RECIPE).exists():
        raise TrainingError(f"expected a folder of runs, got {output}, which is a run itself")
    with joined_ranks(device) as ranks:
        with _listening(console, "data", ranks) as listener:
            tell_oddities(experiment, listener)
        for split in splits:  # rather now than after a teacher has seen every frame
            usable = usable_tracklets(split, Listener())
            make_sampler(usable, experiment.recipe.batch, 0, ranks)
        # Beside the run, which begins in an empty folder.
        cache = output.absolute().parent / ".teacher"
        teacher = _ask_teacher(experiment, splits, cache, console, ranks, device)
        for split, seed in product(splits, seeds):
            folder = folders[split.name, seed]
            with _listening(console, folder.path.name, ranks) as listener:
                job = make_job(
                    experiment,
                    split,
                    seed=seed,
                    device=device,
                    listener=listener,
                    save_every_s=save_every_s,
                    teacher=teacher,
                )
                trainer = Trainer(job, folder, ranks=ranks, listener=listener)
                made = trainer.run()
                listener.said("stopped; the same command goes on" if made is None else f"{made}")
            if made is None:
                return trainer.stopped_by
    return None


@contextmanager
def _listening(console: Console, title: str, ranks: Ranks) -> Iterator[Listener]:
    """The listener of this process: rank 0 speaks for all."""
    if not ranks.is_first:
        yield Listener()
        return
    with ConsoleListener(console, title) as listener:
        yield listener


def _ask_teacher(
    experiment: Experiment,
    splits: Sequence[Split],
    folder: Path,
    console: Console,
    ranks: Ranks,
    device: str,
) -> TeacherEmbeddings | LiveTeacher | None:
    if not ranks.is_first:
        ranks.wait()  # until rank 0 has asked, and what it was told is on the disk
    with _listening(console, "teacher", ranks) as listener:
        teacher = ask_teacher(experiment, splits, folder, listener, device)
    if ranks.is_first:
        ranks.wait()
    return teacher
