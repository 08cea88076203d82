"""Pictures of a report: curves, histograms, film strips and attention laid over frames.

All of them are the same bytes for the same input: no date, no random id, no global state of
matplotlib.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.frames import choose_frames, to_rgb
from model.report_distances import Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32] | NDArray[np.float64]

CELL_WIDTH, CELL_HEIGHT = 64, 128  # of one frame in a strip, pixels: half the network's input
_GAP = 3  # between frames of a strip, pixels
_MAP_GAP = 8  # around nothing, before the sum map, pixels
_BASE = 27  # grey level between frames: dark film, on light pages and on dark ones
_JPEG_QUALITY = 88
_SHOWN_RANKS = 20


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a chart, one set for light pages and paper, one for dark pages.

    Args:
        suffix: Of the file name.
        ink: Text and axes.
        grid: Grid lines.
        ours: What was measured here; blue, from Okabe and Ito's colour-blind safe palette.
        other: What it is compared with; their vermilion.
    """

    suffix: str
    ink: str
    grid: str
    ours: str
    other: str


THEMES = (
    Theme("", ink="#24292f", grid="#d5dae0", ours="#0072b2", other="#d55e00"),
    Theme("-dark", ink="#d7dce2", grid="#3b434d", ours="#56b4e9", other="#ff9a4d"),
)


class Reference(NamedTuple):
    """Published points to lay over a curve.

    Args:
        label: For the legend.
        rates: Percent by rank.
    """

    label: str
    rates: dict[int, float]


def draw_cmc(
    curves: Sequence[Sequence[float]], folder: Path, reference: Reference | None = None
) -> set[Path]:
    """Draw CMC curves as ``cmc.svg`` and ``cmc-dark.svg``.

    Args:
        curves: One per split and seed, each the rates (0-1) at ranks 1, 2, ...; at least one.
        folder: Where to write.
        reference: Published points, where they may be compared.

    Returns:
        The two files.
    """
    length = min(_SHOWN_RANKS, *(len(curve) for curve in curves))
    rates = np.array([curve[:length] for curve in curves], np.float64) * 100  # (S, length)
    ranks = np.arange(1, length + 1)
    mean, deviation = rates.mean(axis=0), _deviation(rates)
    written = set()
    for theme in THEMES:
        figure, axes = _chart(theme, "rank k", "queries with a right match within k (%)")
        if len(rates) > 1:
            axes.plot(ranks, rates.T, color=theme.ours, linewidth=0.7, alpha=0.35)
            low, high = (mean - deviation).clip(0), (mean + deviation).clip(max=100)
            axes.fill_between(ranks, low, high, color=theme.ours, alpha=0.2, linewidth=0)
        label = f"mean of {len(rates)}" if len(rates) > 1 else "this evaluation"
        axes.plot(ranks, mean, "o-", color=theme.ours, linewidth=2, markersize=4, label=label)
        lowest = float(rates.min())
        if reference is not None:
            points = sorted(reference.rates.items())
            axes.plot(*zip(*points, strict=True), "D", color=theme.other, label=reference.label)
            lowest = min(lowest, *reference.rates.values())
        axes.set_xlim(0.5, max(length, 2) + 0.5)
        axes.set_ylim(max(0, 10 * np.floor(lowest / 10 - 0.5)), 101.5)
        axes.set_xticks([rank for rank in (1, 5, 10, 15, 20) if rank <= length])
        written.add(_save(figure, axes, folder / f"cmc{theme.suffix}.svg", theme, "above"))
    return written


def draw_distances(histogram: Histogram, folder: Path) -> set[Path]:
    """Draw how far apart same and different people lie, as ``distances.svg`` and a dark twin.

    Args:
        histogram: What to draw.
        folder: Where to write.

    Returns:
        The two files.
    """
    written = set()
    for theme in THEMES:
        figure, axes = _chart(theme, "Euclidean distance", "share of pairs (%)")
        for counts, colour, style, label in (
            (histogram.genuine, theme.ours, "-", "same person"),
            (histogram.impostor, theme.other, "--", "different people"),
        ):
            heights = counts * (100 / max(int(counts.sum()), 1))
            axes.stairs(heights, histogram.edges, fill=True, color=colour, alpha=0.25)
            axes.stairs(
                heights, histogram.edges, color=colour, linestyle=style, linewidth=1.8, label=label
            )
        axes.set_ylim(0)
        axes.margins(x=0)
        written.add(_save(figure, axes, folder / f"distances{theme.suffix}.svg", theme, "best"))
    return written


def _deviation(rates: Floats) -> Floats:
    """Return the sample standard deviation over rows, as the tables have it; 0 of a single row."""
    if len(rates) < 2:
        return np.zeros(rates.shape[1])
    return np.asarray(rates.std(axis=0, ddof=1))


def _chart(theme: Theme, x_label: str, y_label: str) -> tuple["Figure", "Axes"]:
    # Not pyplot: its figures live in global state, and its backend depends on the machine.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.9))
    figure.subplots_adjust(left=0.1, right=0.98, top=0.97, bottom=0.13)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(x_label, color=theme.ink)
    axes.set_ylabel(y_label, color=theme.ink)
    axes.tick_params(colors=theme.ink, which="both")
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)
    return figure, axes


def _save(
    figure: "Figure", axes: "Axes", path: Path, theme: Theme, place: Literal["best", "above"]
) -> Path:
    from matplotlib import rc_context

    if place == "best":
        axes.legend(frameon=False, labelcolor=theme.ink, loc="best")
    else:  # outside, where no curve is: low ones run along the bottom and high ones along the top
        figure.subplots_adjust(top=0.91)
        axes.legend(
            frameon=False,
            labelcolor=theme.ink,
            ncols=2,
            loc="lower right",
            bbox_to_anchor=(1, 1.0),
            borderaxespad=0,
        )
    # Ids in an SVG are random and its date is now, unless they are told otherwise.
    with rc_context({"svg.hashsalt": "passerby", "svg.fonttype": "path"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    return path


def read_cell(path: Path | None) -> Pixels | None:
    """Read one frame at the size of a strip.

    Args:
        path: An image file, or None where it is known to be out of reach.

    Returns:
        (CELL_HEIGHT, CELL_WIDTH, 3) uint8 RGB, or None where the file is gone or no image: data may
        move after they were evaluated, and a report must not fail for it.
    """
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            return np.asarray(to_rgb(image).resize((CELL_WIDTH, CELL_HEIGHT)), np.uint8)
    except (OSError, ValueError, SyntaxError):  # what Pillow's decoders raise
        return None


def placeholder() -> Pixels:
    """Draw what stands for a frame that is gone: grey with a cross, (height, width, 3) uint8."""
    rows, columns = np.mgrid[0:CELL_HEIGHT, 0:CELL_WIDTH]
    along = rows * (CELL_WIDTH - 1) / (CELL_HEIGHT - 1)
    crossed = (np.abs(along - columns) < 1) | (np.abs(CELL_WIDTH - 1 - along - columns) < 1)
    grey = np.where(crossed, 110, 170).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def write_strip(cells: Sequence[Pixels | None], path: Path) -> tuple[int, int]:
    """Write frames side by side as one JPEG.

    Args:
        cells: (CELL_HEIGHT, CELL_WIDTH, 3) uint8 RGB each, None for one that is gone; at least one.
        path: File to write.

    Returns:
        Width and height of the picture.
    """
    return _write_jpeg(_row([placeholder() if cell is None else cell for cell in cells]), path)


def write_attention(
    cells: Sequence[Pixels | None], attention: Floats, total: Floats, path: Path
) -> tuple[int, int]:
    """Write frames, the same frames under their attention, their mean and the sum map S.

    The colours of the frames share one scale, so that frames may be compared; S has its own.

    Args:
        cells: n frames, as in `write_strip`; at least one.
        attention: Of these frames, (n, H, W), non-negative.
        total: S = sum_n attention_n over all frames of the tracklet, (H, W).
        path: File to write, a JPEG.

    Returns:
        Width and height of the picture.
    """
    frames = [placeholder() if cell is None else cell for cell in cells]
    mean = np.mean(frames, axis=0).astype(np.uint8)
    laid = [
        _lay_over(frame, heat) for frame, heat in zip(frames, _fractions(attention), strict=True)
    ]
    # Cells, not a smooth surface: S is what Eq. 4 sees.
    summed = _coloured(_enlarged(_fractions(total), Image.Resampling.NEAREST))
    apart = np.full((CELL_HEIGHT, _MAP_GAP, 3), _BASE, np.uint8)
    top, bottom = _row([*frames, apart, mean]), _row([*laid, apart, summed])
    between = np.full((_GAP, top.shape[1], 3), _BASE, np.uint8)
    return _write_jpeg(np.concatenate([top, between, bottom]), path)


def spread(total: int, shown: int) -> list[int]:
    """Choose ``shown`` of ``total`` places evenly, all of them where there are fewer."""
    return choose_frames(total, shown)


def _fractions(heat: Floats) -> Floats:
    return heat / max(float(heat.max()), 1e-12)


def _lay_over(frame: Pixels, heat: Floats) -> Pixels:
    """Lay a heat map over a frame; where there is little attention, the frame shows through."""
    strength = _enlarged(heat, Image.Resampling.BILINEAR).clip(0, 1)
    # The eye needs the person under the colours: the frame in grey, never wholly hidden.
    grey = frame.mean(axis=2, keepdims=True) * 0.75
    opacity = (0.1 + 0.65 * strength)[:, :, None]
    mixed = grey * (1 - opacity) + _coloured(strength) * opacity
    return np.asarray(mixed.clip(0, 255), np.uint8)


def _coloured(strength: Floats) -> Pixels:
    from matplotlib import colormaps

    return np.asarray(colormaps["inferno"](strength, bytes=True), np.uint8)[..., :3]


def _enlarged(heat: Floats, resampling: Image.Resampling) -> Floats:
    image = Image.fromarray(np.asarray(heat, np.float32))
    return np.asarray(image.resize((CELL_WIDTH, CELL_HEIGHT), resampling), np.float32)


def _row(cells: Sequence[Pixels]) -> Pixels:
    gap = np.full((CELL_HEIGHT, _GAP, 3), _BASE, np.uint8)
    pieces = [piece for cell in cells for piece in (cell, gap)]
    return np.concatenate(pieces[:-1], axis=1)


def _write_jpeg(pixels: Pixels, path: Path) -> tuple[int, int]:
    Image.fromarray(pixels).save(path, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return pixels.shape[1], pixels.shape[0]
