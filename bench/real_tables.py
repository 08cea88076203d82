"""What `bench.real` found, as tables in Markdown and a picture."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from pathlib import Path

import numpy as np

from bench.real_rows import CHOICES, MEASURES, SCALES, SHOWN, Json, Row, Start
from model.files import written_aside


def write_json(path: Path, values: Json | list[Json]) -> None:
    """Write a file that appears whole or not at all."""
    with written_aside(path) as draft:
        draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def write_report(output: Path, results: Sequence[Json], rows: Sequence[Row]) -> None:
    """Write results.json, table.md and curves.png."""
    write_json(output / "results.json", list(results))
    with written_aside(output / "table.md") as draft:
        draft.write_text(make_tables(results, rows), encoding="utf-8")
    with written_aside(output / "curves.png") as draft:
        plot_curves(results, rows, draft)


class Found:
    """Results by row and division.

    Args:
        results: Of any rows and divisions.
        rows: Those that tables show; without those that have no result.
    """

    def __init__(self, results: Sequence[Json], rows: Sequence[Row]) -> None:
        self._by_row: dict[str, dict[str, Json]] = defaultdict(dict)
        for one in results:
            self._by_row[one["row"]][one["division"]] = one
        starts = ("teacher", "random", "imagenet")
        ordered = sorted(rows, key=lambda row: (starts.index(row.start), row.trained))
        self.rows = [row for row in ordered if row.name in self._by_row]
        self.parts = list(results[0]["measures"])
        self.divisions = len({one["division"] for one in results})

    def of(self, row: str) -> dict[str, Json]:
        """Results of a row by division; empty where there are none."""
        return self._by_row.get(row, {})

    def values(
        self, row: str, part: str, name: str, scale: str = "raw", choice: str = SHOWN
    ) -> dict[str, float]:
        """A measure by division, %."""
        return {
            division: 100 * one["measures"][part][scale][choice][name]
            for division, one in self.of(row).items()
        }


def make_tables(results: Sequence[Json], rows: Sequence[Row]) -> str:
    """All tables in Markdown, part by part."""
    found = Found(results, rows)
    legend = (
        f"Up to {found.divisions} divisions; mean ± deviation over them, in %. Δ is the paired "
        "difference to the row named, ± its standard error."
    )
    lines = [legend]
    for part in found.parts:
        first = results[0]["measures"][part]["raw"][SHOWN]
        lines.append(
            f"\n## {part}\n\nIn division 0 {first['queries']} queries; gallery of "
            f"{first['gallery']} tracklets.\n"
        )
        lines += [*main_table(found, part), ""]
        lines += [*frames_table(found, part, "rank_1"), "", *frames_table(found, part, "mAP"), ""]
        lines += curve_table(found, part)
    return "\n".join(lines) + "\n"


def main_table(found: Found, part: str) -> list[str]:
    """Each row at `SHOWN` frames, and beside another."""
    titles = ["start", f"row, {SHOWN} frames", "n", "rank-1", "rank-5", "mAP", "beside"]
    titles += ["Δ rank-1", "Δ mAP", "unit length: Δ rank-1"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in found.rows:
        cells = [row.start, row.label, str(len(found.of(row.name)))]
        cells += [spread(found.values(row.name, part, name).values()) for name in MEASURES]
        cells.append("" if row.beside is None else row.beside.removeprefix(f"{row.start}-"))
        for name in ("rank_1", "mAP"):
            other = found.values(row.beside, part, name) if row.beside else {}
            cells.append(paired(found.values(row.name, part, name), other))
        raw = found.values(row.name, part, "rank_1")
        cells.append(paired(found.values(row.name, part, "rank_1", "unit"), raw))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def frames_table(found: Found, part: str, name: str) -> list[str]:
    """Each row by how many frames are used; raw / unit."""
    title = f"{name.replace('_', '-')}, raw / unit"
    lines = [
        f"| start | {title}, frames: | {' | '.join(CHOICES)} |",
        "|---|---|" + "---|" * len(CHOICES),
    ]
    for row in found.rows:
        cells = []
        for choice in CHOICES:
            means = [
                statistics.mean(found.values(row.name, part, name, scale, choice).values())
                for scale in SCALES
            ]
            cells.append(" / ".join(f"{mean:.1f}" for mean in means))
        lines.append(f"| {row.start} | {row.label} | {' | '.join(cells)} |")
    return lines


def curve_table(found: Found, part: str) -> list[str]:
    """Rank-1 / mAP of the trained rows after each quarter, and the time of training."""
    rows = [row for row in found.rows if row.trained]
    if not rows:
        return []
    steps = [point["step"] for point in next(iter(found.of(rows[0].name).values()))["curve"]]
    lines = [
        f"| start | rank-1 / mAP after steps: | {' | '.join(map(str, steps))} | seconds |",
        "|---|---|" + "---|" * (len(steps) + 1),
    ]
    for row in rows:
        means = [mean_curve(found.of(row.name).values(), f"{part}/{name}")
                 for name in ("rank_1", "mAP")]  # fmt: skip
        cells = [f"{first:.1f} / {second:.1f}" for first, second in zip(*means, strict=True)]
        cells.append(
            f"{statistics.mean(one['train_s'] for one in found.of(row.name).values()):.0f}"
        )
        lines.append(f"| {row.start} | {row.label} | {' | '.join(cells)} |")
    return lines


def mean_curve(results: Iterable[Json], name: str) -> list[float]:
    """A measure after each quarter, %, the mean over divisions."""
    curves = [[100 * point[name] for point in one["curve"]] for one in results]
    mean: list[float] = np.mean(curves, axis=0).tolist()
    return mean


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over divisions."""
    every = list(values)
    mean = f"{statistics.mean(every):.1f}"
    return f"{mean} ± {statistics.stdev(every):.1f}" if len(every) > 1 else mean


def paired(one: Mapping[str, float], other: Mapping[str, float]) -> str:
    """Mean difference over the divisions that both have, and its standard error."""
    gaps = [one[division] - other[division] for division in one if division in other]
    if not gaps:
        return ""
    mean = f"{statistics.mean(gaps):+.1f}"
    return f"{mean} ± {statistics.stdev(gaps) / sqrt(len(gaps)):.1f}" if len(gaps) > 1 else mean


def plot_curves(results: Sequence[Json], rows: Sequence[Row], path: Path) -> None:
    """Draw rank-1 against steps, a picture for each part and start."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = Found(results, rows)
    starts: tuple[Start, Start] = ("random", "imagenet")
    figure = Figure(figsize=(14, 5 * len(found.parts)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(found.parts), len(starts), squeeze=False, sharey="row")
    styles = _line_styles(found.rows)
    lines = {}
    for part, pictures in zip(found.parts, axes, strict=True):
        for start, axis in zip(starts, pictures, strict=True):
            axis.set(title=f"{part}, {start} start", xlabel="steps", ylabel="rank-1, %")
            axis.grid(alpha=0.3)
            for row in found.rows:
                values = found.values(row.name, part, "rank_1").values()
                if row.start == start and row.trained:
                    one = next(iter(found.of(row.name).values()))
                    steps = [point["step"] for point in one["curve"]]
                    curve = mean_curve(found.of(row.name).values(), f"{part}/rank_1")
                    [lines[row.label]] = axis.plot(steps, curve, markersize=3, **styles[row.label])
                elif row.start == "teacher":
                    lines[row.label] = axis.axhline(statistics.mean(values), color="k", ls=":")
    if lines:
        figure.legend(list(lines.values()), list(lines), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)


def _line_styles(rows: Iterable[Row]) -> dict[str, dict[str, str]]:
    """How each trained row is drawn, alike in every picture and unlike every other."""
    labels = dict.fromkeys(row.label for row in rows if row.trained)
    return {
        label: {"color": f"C{number % 7}", "ls": ("-", "--", "-.")[number // 7 % 3], "marker": "o"}
        for number, label in enumerate(labels)
    }
