"""How long a query takes at half and at four fifths of what the service can do.

    .venv/bin/python -m bench.latency --output latency.png

For a small gallery and a large one: first what a closed loop of clients gets (capacity), then
queries at given times (open loop, see `bench.sending`), whose latency counts from when each was
due. The galleries hold random unit vectors, put there before the service starts.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.sending import Answer, Entry
from bench.serving import (
    Loads,
    Uploads,
    add_arguments,
    describe_machine,
    draw_uploads,
    fill_gallery,
    gallery_shape,
    measure_capacity,
    median,
    percentile,
    print_table,
    read_settings,
    serving,
)
from service.loadtest_picture import BLUE, INK, ORANGE, RED, dress_axes, label_plainly
from service.loadtest_sending import draw_arrivals

LOADS = (0.5, 0.8)
COLOURS = (BLUE, ORANGE, RED, INK)


@dataclass(frozen=True, slots=True)
class Row:
    """Queries at one load of one gallery.

    Args:
        gallery: Tracklets in it.
        capacity: Queries a second that a closed loop got.
        load: Of that, offered.
        sent: How many queries counted.
        good: Those that were answered with 200.
    """

    gallery: int
    capacity: float
    load: float
    sent: int
    good: tuple[Answer, ...]

    @property
    def name(self) -> str:
        """For a legend."""
        return f"{self.gallery:,} tracklets, {self.load:.0%} of capacity"


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--galleries", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--clients", type=int, default=8, help="of the closed loop")
    parser.add_argument("--capacity-seconds", type=float, default=15.0)
    parser.add_argument("--warmup", type=float, default=5.0, help="seconds that do not count")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load")
    parser.add_argument("--tracklets", type=int, default=16, help="to ask for")
    parser.add_argument("--output", type=Path, help="picture to draw")
    arguments = parser.parse_args()

    print(f"{describe_machine()}, {arguments.seconds:g} s each, weights {arguments.weights}\n")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-latency-") as name:
        folder = Path(name)
        uploads = draw_uploads(folder / "uploads", arguments.tracklets, seed=arguments.seed)
        for tracklets in arguments.galleries:
            rows += measure(folder, uploads, tracklets, arguments)
    print_rows(rows)
    if arguments.output is not None:
        draw(rows, arguments.output)


def measure(
    folder: Path, uploads: Uploads, tracklets: int, arguments: argparse.Namespace
) -> list[Row]:
    """One gallery: capacity, then each load."""
    data_dir = folder / f"gallery-{tracklets}"
    dim, model = gallery_shape(arguments.weights)
    fill_gallery(data_dir, tracklets=tracklets, dim=dim, model=model, seed=arguments.seed)
    rows = []
    with serving(
        data_dir,
        folder / f"{tracklets}.log",
        weights=arguments.weights,
        settings=read_settings(arguments.set),
    ) as server:
        loads = Loads(server, uploads, folder / f"loads-{tracklets}")
        loads.closed("query", clients=arguments.clients, requests=2 * arguments.clients)
        capacity = measure_capacity(
            loads, "query", clients=arguments.clients, seconds=arguments.capacity_seconds
        )
        for load in LOADS:
            times = draw_arrivals(
                load * capacity, arguments.warmup, arguments.seconds, arguments.seed
            )
            entries = [Entry(due, "query", number) for number, due in enumerate(times)]
            answers = loads.open(entries).wait().answers
            counted = [one for one in answers if one.due_s >= arguments.warmup]
            good = tuple(one for one in counted if one.status == 200)
            rows.append(Row(tracklets, capacity, load, len(counted), good))
    shutil.rmtree(data_dir)
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    """A row for each gallery and load."""
    columns = (
        "gallery",
        "capacity/s",
        "load",
        "queries",
        "not 200",
        "p50, ms",
        "p99, ms",
        "max, ms",
    )
    stages = ("queue", "embed", "search")
    cells = []
    for row in rows:
        latencies = [1000 * one.latency_s for one in row.good]
        lags = [1000 * (one.sent_s - one.due_s) for one in row.good]
        cells.append(
            [
                f"{row.gallery:,}",
                f"{row.capacity:.2f}",
                f"{row.load:.0%}",
                row.sent,
                row.sent - len(row.good),
                *(f"{percentile(latencies, at):.0f}" for at in (50, 99, 100)),
                *(f"{median(one.timing_ms[name] for one in row.good):.1f}" for name in stages),
                f"{percentile(lags, 99):.1f}",
            ]
        )
    print_table((*columns, *(f"{name}, ms" for name in stages), "client's lag, p99"), cells)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw which share of the answers took how long."""
    from matplotlib.figure import Figure  # not pyplot, whose figures live in global state

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for row, colour in zip(rows, COLOURS, strict=False):
        latencies = sorted(1000 * one.latency_s for one in row.good)
        shares = [(rank + 1) / len(latencies) for rank in range(len(latencies))]
        dashes = "-" if row.load == LOADS[0] else "--"
        axes.step(latencies, shares, dashes, where="post", color=colour, label=row.name)
    axes.axhline(0.99, color=INK, linewidth=0.8, linestyle=":")
    axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    label_plainly(axes.xaxis)
    dress_axes(axes, "latency of a query, ms", "share of the answers")
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
