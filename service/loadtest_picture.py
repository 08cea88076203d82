"""The picture of a load test: latency over time at one rate, or against several."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from service.figures import save_figure
from service.loadtest_report import PERCENTILES, Summary, summarise
from service.loadtest_sending import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, GRID = "#24292f", "#d5dae0"
# Okabe and Ito's blue, orange and vermilion, which the colour-blind can tell apart.
BLUE, ORANGE, RED = "#0072b2", "#e69f00", "#d55e00"
_COLOURS = dict(zip(PERCENTILES, (BLUE, ORANGE, RED), strict=True))


def draw_latency(runs: Sequence[Run], path: Path) -> None:
    """Write the picture of one run or of several.

    Args:
        runs: At least one.
        path: The picture; the suffix decides its format.

    Raises:
        ClientError: It cannot be written.
    """
    # Not pyplot: its figures live in global state, and its backend depends on the machine.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    if len(runs) == 1:
        _draw_one(figure, runs[0])
    else:
        _draw_curve(figure, [summarise(run) for run in runs])
    save_figure(figure, path)


def _draw_one(figure: "Figure", run: Run) -> None:
    over_time, spread = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    summary = summarise(run)
    good = [one for one in run.samples if one.status == 200]
    bad = [one for one in run.samples if one.status not in (0, 200)]
    for samples, colour, label in (
        (good, BLUE, f"answered with 200 ({len(good)})"),
        (bad, RED, f"answered otherwise ({len(bad)})"),
    ):
        if samples:
            times = [one.due_s for one in samples]
            latencies = [1000 * one.latency_s for one in samples]
            over_time.plot(times, latencies, ".", color=colour, markersize=4, label=label)
    failed = [one.due_s for one in run.samples if one.outcome not in ("answered", "cut off")]
    if failed:
        label = f"no answer, or not sent ({len(failed)})"
        over_time.plot(failed, [0] * len(failed), "x", color=INK, markersize=4, label=label)
    if run.warmup_s:
        over_time.axvspan(0, run.warmup_s, color=GRID, alpha=0.5, linewidth=0)
        over_time.text(run.warmup_s / 2, 0.98, "warm-up", **_inside(over_time))
    dress_axes(over_time, "seconds since the beginning", "latency, ms")
    over_time.set_title(f"{run.rate:g} requests a second", loc="left", color=INK)
    over_time.set_ylim(bottom=0)
    counted = [1000 * one.latency_s for one in good if one.due_s >= run.warmup_s]
    if counted:
        spread.hist(counted, bins=40, orientation="horizontal", color=BLUE, alpha=0.6)
        for at in PERCENTILES:
            value = summary.latency_ms[f"p{at}"]
            label = f"p{at}: {value:.0f} ms"
            spread.axhline(value, color=_COLOURS[at], linewidth=1.5, label=label)
        spread.legend(frameon=False, labelcolor=INK, fontsize=9)
    dress_axes(spread, "answers", "")
    spread.xaxis.get_major_locator().set_params(integer=True, nbins=4)
    if over_time.get_legend_handles_labels()[1]:
        over_time.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper right")


def _draw_curve(figure: "Figure", summaries: Sequence[Summary]) -> None:
    latency, answers = figure.subplots(1, 2)
    measured = [one for one in summaries if one.latency_ms]
    for at in PERCENTILES:
        latency.plot(
            [one.rate for one in measured],
            [one.latency_ms[f"p{at}"] for one in measured],
            marker="o",
            markersize=4,
            color=_COLOURS[at],
            label=f"p{at}",
        )
    if measured:
        latency.set_yscale("log")
        label_plainly(latency.yaxis)
        latency.legend(frameon=False, labelcolor=INK)
    dress_axes(latency, "requests a second, offered", "latency of answers with 200, ms")
    rates = [one.rate for one in summaries]
    answers.plot(rates, rates, "--", color=INK, linewidth=1, label="all answered")
    answers.plot(
        rates,
        [one.achieved for one in summaries],
        marker="o",
        markersize=4,
        color=BLUE,
        label="answered with 200",
    )
    dress_axes(answers, "requests a second, offered", "a second")
    answers.set_ylim(bottom=0)
    answers.legend(frameon=False, labelcolor=INK)


def label_plainly(axis: "Axis") -> None:
    """Write 200 at a tick of a logarithmic axis, not 2 x 10^2."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _inside(axes: "Axes") -> dict[str, object]:
    return {
        "transform": axes.get_xaxis_transform(),
        "ha": "center",
        "va": "top",
        "color": INK,
        "fontsize": 9,
    }


def dress_axes(axes: "Axes", x_label: str, y_label: str) -> None:
    """Give a panel its labels, and the looks of all of them."""
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(colors=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
