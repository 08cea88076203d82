"""What a person sees of an evaluation: a bar with the time left, then a table."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from model.evaluation_plan import EvaluationListener, EvaluationTask
from model.evaluation_runner import evaluate
from model.report import write_report
from model.report_facts import describe_left_out

_COLUMNS = (
    ("rank_1", "rank-1"),
    ("rank_5", "rank-5"),
    ("rank_10", "rank-10"),
    ("rank_20", "rank-20"),
    ("mAP", "mAP"),
)


class ConsoleListener(EvaluationListener):
    """Shows an evaluation on a console.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("embedding tracklets", total=None)

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

    def progress(self, done: int, total: int) -> None:
        """After each tracklet that had to be embedded."""
        self._bar.update(self._task, completed=done, total=total)

    def said(self, text: str) -> None:
        """Something worth a line."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


class _TerminatedError(KeyboardInterrupt):
    """Raised at SIGTERM, so that it saves as Ctrl-C does."""


@contextmanager
def _terminating() -> Iterator[None]:
    """Let the first SIGTERM end the block as Ctrl-C does; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only there can signals be handled
        return
    before = signal.getsignal(signal.SIGTERM)

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        raise _TerminatedError

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_task(task: EvaluationTask, console: Console) -> int | None:
    """Evaluate, write the report and show what was measured.

    Args:
        task: What to evaluate.
        console: Where to show it.

    Returns:
        The number of the signal that stopped it, SIGINT or SIGTERM; None where it came to its end.

    Raises:
        ModelError: See `model.evaluation_runner.evaluate`.
    """
    try:
        with _terminating():
            with ConsoleListener(console) as listener:
                results = evaluate(task, listener)
            page = write_report(task.output)
    except KeyboardInterrupt as stopped:
        console.print(f"stopped; the same command goes on from what is in {task.output}")
        return signal.SIGTERM if isinstance(stopped, _TerminatedError) else signal.SIGINT
    console.print(tabulate(results))
    if left_out := results["pairs_left_out"]:
        console.print(describe_left_out(left_out), highlight=False, soft_wrap=True, markup=False)
    console.print(f"report: {page}", highlight=False, soft_wrap=True, markup=False)
    return None


def tabulate(results: Mapping[str, Any]) -> Table:
    """Make a table of what was measured: each unit, then the mean and deviation, in per cent.

    Args:
        results: From `model.evaluation_runner.evaluate`.
    """
    seeds = [
        (name, title)
        for name, title in (("seed", "seed"), ("frame_seed", "frame seed"))
        if any(unit[name] is not None for unit in results["units"])
    ]
    table = Table(
        "split",
        *(title for _, title in seeds),
        *(title for _, title in _COLUMNS),
        "queries",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for unit in results["units"]:
        figures = [f"{100 * unit[name]:.1f}" for name, _ in _COLUMNS]
        numbers = ["" if unit[name] is None else str(unit[name]) for name, _ in seeds]
        table.add_row(unit["split"], *numbers, *figures, str(unit["queries"]))
    table.add_section()
    means = (_with_deviation(results, name) for name, _ in _COLUMNS)
    table.add_row("mean", *("" for _ in seeds), *means, "")
    options = results["options"]
    table.title = (
        f"{results['data']['layout']}, {options['protocol']}, "
        f"frames {options['choice']['frames']}, {options['precision']}, in %"
    )
    table.caption = "; ".join(results["sources"])
    if results["seen_identities"]:
        table.caption += f"; up to {results['seen_identities']} tested identities were TRAINED ON"
    return table


def _with_deviation(results: Mapping[str, Any], name: str) -> str:
    mean, deviation = results["mean"][name], results["std"][name]
    return f"{100 * mean:.1f}" + ("" if deviation is None else f"±{100 * deviation:.1f}")
