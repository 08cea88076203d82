"""The picture of a calibration: what lies how far apart, and what every threshold would do."""

from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.calibration import Calibration, CalibrationCurves
from service.figures import save_figure
from service.loadtest_picture import BLUE, INK, ORANGE, RED, dress_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Floats = NDArray[np.float64]
LineStyle = str | tuple[float, tuple[float, float]]
_TICKS = (1e-6, 1e-5, 1e-4, 0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 0.999)
_APART = 0.07  # of an axis, between ticks
_DASHES = (0, (4, 1.5))
_ROOM = 1.15  # above the highest bar, for the threshold's label


class _Line(NamedTuple):
    """One DET curve with its operating point.

    Args:
        across: (m,) rates of false matches.
        up: (m,) rates of misses.
        x: Value and interval of the former at the threshold.
        y: Likewise of the latter.
        looks: Colour, line and marker.
        label: For the legend.
    """

    across: Floats
    up: Floats
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    looks: tuple[str, LineStyle, str]
    label: str


def draw_calibration(calibration: Calibration, curves: CalibrationCurves, path: Path) -> None:
    """Write the picture of a calibration, 1200 x 500 pixels.

    Args:
        calibration: What was chosen.
        curves: Of the same tracklets.
        path: The picture; the suffix decides its format.

    Raises:
        ClientError: It cannot be written.
    """
    # Not pyplot: its figures live in global state, and its backend depends on the machine.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 25 / 6), layout="constrained")
    distances, errors = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_distances(distances, calibration, curves)
    _draw_errors(errors, calibration, curves)
    handles, labels = distances.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=3,
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )
    save_figure(figure, path)


def _draw_distances(axes: "Axes", calibration: Calibration, curves: CalibrationCurves) -> None:
    highest = 0.0
    for counts, colour, style, filled, label in (
        (curves.genuine, BLUE, "-", True, f"same person, {calibration.genuine_pairs:,} pairs"),
        (curves.impostor, RED, "-", True, f"two people, {calibration.impostor_pairs:,} pairs"),
        (curves.nearest, ORANGE, _DASHES, False, "nearest other person of each query"),
    ):
        density = counts / max(counts.sum(), 1) / np.diff(curves.edges)
        highest = max(highest, float(density.max()))
        if filled:
            axes.stairs(density, curves.edges, fill=True, color=colour, alpha=0.25)
        axes.stairs(
            density, curves.edges, color=colour, linewidth=1.6, linestyle=style, label=label
        )
    axes.axvline(calibration.threshold, color=INK, linewidth=1.5)
    middle = (curves.edges[0] + curves.edges[-1]) / 2
    on_the_left = calibration.threshold > middle
    axes.annotate(
        f"threshold {calibration.threshold:.4g}",
        (calibration.threshold, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if on_the_left else 5, -4),
        textcoords="offset points",
        ha="right" if on_the_left else "left",
        va="top",
        color=INK,
        fontsize=9,
    )
    axes.set_ylim(0, _ROOM * highest)
    where = "across cameras" if calibration.across_cameras else "of all cameras"
    dress_axes(axes, f"Euclidean distance of two tracklets {where}", "share, per unit of distance")


def _draw_errors(axes: "Axes", calibration: Calibration, curves: CalibrationCurves) -> None:
    lines = _lines(calibration, curves)
    left, right = _ends([end for line in lines for end in (*line.x, *line.across[line.up > 0])])
    bottom, top = _ends([end for line in lines for end in (*line.y, *line.up[line.across > 0])])
    for line in lines:
        colour, style, marker = line.looks
        shown = line.across > 0
        across, up = _probit(line.across[shown], left, right), _probit(line.up[shown], bottom, top)
        axes.plot(across, up, color=colour, linestyle=style, linewidth=1.6)
        x, *x_ends = _probit(np.array(line.x), left, right)
        y, *y_ends = _probit(np.array(line.y), bottom, top)
        axes.errorbar(
            [x],
            [y],
            xerr=[[x - x_ends[0]], [x_ends[1] - x]],
            yerr=[[y - y_ends[0]], [y_ends[1] - y]],
            color=colour,
            marker=marker,
            markersize=6,
            capsize=3,
            linewidth=1.2,
            clip_on=False,
            label=line.label,
        )
    dress_axes(axes, "false matches, %", "misses, %")
    _scale(axes.xaxis, left, right)
    _scale(axes.yaxis, bottom, top, lowest="\N{LESS-THAN OR EQUAL TO} ")
    level = f"{100 * calibration.confidence:g} %"
    axes.legend(
        frameon=False,
        labelcolor=INK,
        fontsize=9,
        loc="upper right",
        title=f"at the threshold, with {level} intervals",
        title_fontsize=9,
        alignment="left",
    )


def _lines(calibration: Calibration, curves: CalibrationCurves) -> tuple["_Line", "_Line"]:
    pairs = _Line(
        curves.false_match_rates,
        curves.false_non_match_rates,
        (calibration.measured_false_match_rate, *calibration.interval),
        (calibration.false_non_match_rate, *calibration.false_non_match_interval),
        (INK, "-", "o"),
        "of pairs (FMR, FNMR)",
    )
    queries = _Line(
        curves.false_positive_identification_rates,
        curves.false_negative_identification_rates,
        (
            calibration.false_positive_identification_rate,
            *calibration.false_positive_identification_interval,
        ),
        (
            calibration.false_negative_identification_rate,
            *calibration.false_negative_identification_interval,
        ),
        (ORANGE, _DASHES, "s"),
        "of queries (FPIR, FNIR)",
    )
    return pairs, queries


def _ends(rates: list[float]) -> tuple[float, float]:
    """The ticks around all rates but 0; what lies outside is drawn at them."""
    above_zero = [rate for rate in rates if rate > 0]
    least, greatest = min(above_zero, default=0.01), max(above_zero, default=0.2)
    low = max((tick for tick in _TICKS if tick <= min(least, 0.01)), default=_TICKS[0])
    high = min((tick for tick in _TICKS if tick >= max(greatest, 0.2)), default=_TICKS[-1])
    return low, high


def _scale(axis: "Axis", low: float, high: float, lowest: str = "") -> None:
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    places = _probit(np.array(ticks), low, high).tolist()
    named = [f"{100 * tick:g}" for tick in ticks]
    named[0] = lowest + named[0]
    # Where there are many, those of the smallest rates would run into each other.
    apart = _APART * (places[-1] - places[0])
    shown = [0]
    for number, at in enumerate(places):
        if at - places[shown[-1]] >= apart:
            shown.append(number)
    axis.set_ticks([places[one] for one in shown], [named[one] for one in shown])
    axis.set_view_interval(places[0], places[-1], ignore=True)


def _probit(rates: Floats, low: float, high: float) -> Floats:
    """Rates on an axis where normal distributions make straight lines, as DET curves have it."""
    normal = NormalDist()
    return np.array([normal.inv_cdf(min(max(float(rate), low), high)) for rate in rates])
