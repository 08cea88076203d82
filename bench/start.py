"""From starting the process to being ready, and how much memory that takes.

    .venv/bin/python -m bench.start

With an empty gallery and with a full one, of the default weights' embeddings and of untrained ones,
which are as long as those of a checkpoint without a head. Each start is one of several whose files
lie in the system's cache.
"""

import argparse
import tempfile
from pathlib import Path

from bench.serving import (
    Usage,
    add_arguments,
    describe_machine,
    fill_gallery,
    gallery_shape,
    median,
    print_table,
    read_settings,
    serving,
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--tracklets", type=int, default=100_000, help="in the full gallery")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    print(f"{describe_machine()}, medians of {arguments.rounds} starts\n")
    rows = []
    for weights in dict.fromkeys((arguments.weights, "untrained")):
        for tracklets in (0, arguments.tracklets):
            with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
                rows.append(measure(Path(folder), weights, tracklets, arguments))
    columns = ("weights", "numbers", "tracklets", "ready, s", "process, MB", "its children, MB")
    print_table((*columns, "children", "threads"), rows)


def measure(
    folder: Path, weights: str, tracklets: int, arguments: argparse.Namespace
) -> list[object]:
    """A row: several starts with one gallery."""
    dim, model = gallery_shape(weights)
    data_dir = folder / "data"
    if tracklets:
        fill_gallery(data_dir, tracklets=tracklets, dim=dim, model=model, seed=arguments.seed)
    seconds: list[float] = []
    usages: list[Usage] = []
    for number in range(arguments.rounds + 1):
        with serving(
            data_dir,
            folder / f"{number}.log",
            weights=weights,
            settings=read_settings(arguments.set),
        ) as server:
            seconds.append(server.ready_s)
            usages.append(server.usage())
    counted = usages[1:]  # the first one filled the system's cache
    return [
        weights,
        dim,
        f"{tracklets:,}",
        f"{median(seconds[1:]):.2f}",
        f"{median(one.rss for one in counted) / 1e6:.0f}",
        f"{median(sum(one.children_rss) for one in counted) / 1e6:.0f}",
        f"{median(len(one.children_rss) for one in counted):.0f}",
        f"{median(one.threads for one in counted):.0f}",
    ]


if __name__ == "__main__":
    main()
