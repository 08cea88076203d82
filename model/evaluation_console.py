"""What a person sees of an evaluation: a bar with the time left, then a table."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from model.evaluation_plan import EvaluationListener, EvaluationTask
from model.evaluation_runner import evaluate
from model.report import write_report

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


def run_task(task: EvaluationTask, console: Console) -> bool:
    """Evaluate, write the report and show what was measured.

    Args:
        task: What to evaluate.
        console: Where to show it.

    Returns:
        Whether it came to its end; False where Ctrl-C stopped it.

    Raises:
        ModelError: See `model.evaluation_runner.evaluate`.
    """
    try:
        with ConsoleListener(console) as listener:
            results = evaluate(task, listener)
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on from what is in {task.output}")
        return False
    console.print(tabulate(results))
    console.print(f"report: {write_report(task.output)}", highlight=False, soft_wrap=True)
    return True


def tabulate(results: Mapping[str, Any]) -> Table:
    """Make a table of what was measured: each unit, then the mean and deviation, in per cent.

    Args:
        results: From `model.evaluation_runner.evaluate`.
    """
    table = Table(
        "split",
        "seed",
        *(title for _, title in _COLUMNS),
        "queries",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for unit in results["units"]:
        figures = [f"{100 * unit[name]:.1f}" for name, _ in _COLUMNS]
        table.add_row(unit["split"], str(unit["seed"]), *figures, str(unit["queries"]))
    table.add_section()
    table.add_row("mean", "", *(_with_deviation(results, name) for name, _ in _COLUMNS), "")
    protocol, frames = results["options"]["protocol"], results["options"]["choice"]["frames"]
    table.title = f"{results['data']['layout']}, {protocol}, frames {frames}, in %"
    table.caption = "; ".join(results["sources"])
    if results["seen_identities"]:
        table.caption += f"; up to {results['seen_identities']} tested identities were TRAINED ON"
    return table


def _with_deviation(results: Mapping[str, Any], name: str) -> str:
    mean, deviation = results["mean"][name], results["std"][name]
    return f"{100 * mean:.1f}" + ("" if deviation is None else f"±{100 * deviation:.1f}")
