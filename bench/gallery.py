"""What a gallery withstands, and what it costs.

    .venv/bin/python -m bench.gallery durability --operations 200000
    .venv/bin/python -m bench.gallery kills --kills 1000
    .venv/bin/python -m bench.gallery kills --moving --kills 300
    .venv/bin/python -m bench.gallery writes
    .venv/bin/python -m bench.gallery sizes --tracklets 100000 --json sizes.json

`durability` plays random operations beside a dictionary that knows the answers, `kills` kills their
process at random and at named points, or, with `--moving`, the commands that move a gallery or
write to one, at random and at their system calls; all print their seed, and end with an error as
soon as anything is not as it should be. `writes` measures enrolments and searches beside them,
`sizes` what galleries of many drawn people take and find.
"""

import argparse
import json
import os
import platform
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

_MEMORY_DISK = Path("/dev/shm")  # noqa: S108
# Before anything loads them: kills fork, which is for processes with one thread only.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def main() -> None:
    """Do one of the four."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    _add_durability(kinds.add_parser("durability", help="a random walk beside a dictionary"))
    _add_kills(kinds.add_parser("kills", help="SIGKILL, again and again"))
    _add_writes(kinds.add_parser("writes", help="enrolments a second, and searches meanwhile"))
    _add_sizes(kinds.add_parser("sizes", help="memory, disk, time and recall of large galleries"))
    asked = parser.parse_args()
    asked.run(asked)


def _add_durability(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--operations", type=int, default=200_000)
    parser.add_argument("--index", default="Flat", help="a factory string that looks at all rows")
    parser.add_argument("--storage", choices=("float32", "float16"))
    _add_common(parser)
    parser.set_defaults(run=_durability)


def _add_kills(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument(
        "--moving",
        action="store_true",
        help="kill snapshot, restore, export, import and their like instead",
    )
    parser.add_argument(
        "--only", default="", help="with --moving: what the names of scenes contain"
    )
    _add_common(parser)
    parser.set_defaults(run=_kills)


def _add_common(parser: argparse.ArgumentParser) -> None:
    folder = _MEMORY_DISK if _MEMORY_DISK.is_dir() else None
    parser.add_argument("--seed", type=int, help="drawn, and printed, where none is given")
    parser.add_argument("--folder", type=Path, default=folder, help="where the galleries are")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two lines")


def _add_writes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tracklets", type=int, default=10_000, help="that are there before")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each way")
    parser.add_argument("--folder", type=Path, help="where the gallery is for a while")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.set_defaults(run=_writes)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tracklets", type=int, nargs="+", default=[100_000])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument(
        "--ways",
        nargs="+",
        help="factory strings, 'plain numpy', hnswlib, or usearch; with float16: before them where "
        "vectors are to be stored so",
    )
    parser.add_argument("--data", type=Path, help="where they stay instead, and are used again")
    parser.add_argument("--folder", type=Path, help="where the galleries are for a while")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.set_defaults(run=_sizes)


def _writes(asked: argparse.Namespace) -> None:
    from bench.gallery_writes import measure_writes

    print(_machine())
    found = measure_writes(
        tracklets=asked.tracklets,
        dimension=asked.dim,
        seconds=asked.seconds,
        folder=asked.folder,
        seed=asked.seed,
        tell=_say,
    )
    _keep(asked.json, found)


def _sizes(asked: argparse.Namespace) -> None:
    from bench.gallery_people import People
    from bench.gallery_sizes import Figures, Way, measure_sizes, ways_for

    print(_machine())
    found: list[Figures] = []
    for tracklets in asked.tracklets:
        people = People(tracklets, asked.dim, asked.seed)
        ways = ways_for(tracklets, asked.dim)
        if asked.ways:
            ways = tuple(Way.parse(text) for text in asked.ways)
        found += measure_sizes(
            people,
            ways,
            queries=asked.queries,
            folder=asked.folder,
            data=asked.data,
            tell=_say,
        )
        _keep(asked.json, found)  # after each size: the last takes long


def _machine() -> str:
    """What was measured on, and beside how much else."""
    import faiss

    return (
        f"{platform.machine()}, {os.cpu_count()} cores, FAISS {faiss.__version__}, "
        f"SQLite {sqlite3.sqlite_version}, Python {platform.python_version()}; "
        f"load {os.getloadavg()[0]:.1f}"
    )


def _say(line: str) -> None:
    print(line, flush=True)


def _keep(path: Path | None, found: Sequence[Any]) -> None:
    if path is not None:
        path.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n", "utf-8")


def _durability(asked: argparse.Namespace) -> None:
    _alone()
    from bench.gallery_truth import MismatchError
    from bench.gallery_walk import walk

    seed, tell = _seed(asked), _Teller(asked.every)

    def progress(done: int, counts: Counter[str]) -> None:
        tell(f"{done} of {asked.operations} operations, {counts['refused']} of them refused")

    try:
        counts = walk(
            asked.operations,
            seed=seed,
            index=asked.index,
            storage=asked.storage,
            folder=asked.folder,
            progress=progress,
        )
    except MismatchError as error:
        sys.exit(f"failed: {error}")
    for kind, count in counts.most_common():
        print(f"{count:8}  {kind}")
    print(f"all as it should be: {asked.operations} operations in {tell.spent_s:.0f} s")


def _kills(asked: argparse.Namespace) -> None:
    _alone()
    from bench.gallery_kills import Toll, kill
    from bench.gallery_truth import MismatchError

    seed, tell = _seed(asked), _Teller(asked.every)
    if asked.moving:
        _kills_of_moving(asked, seed, tell)
        return

    def progress(done: int, toll: Toll) -> None:
        tell(f"{done} of {asked.kills} kills, {toll.operations} operations acknowledged")

    try:
        toll = kill(asked.kills, seed=seed, folder=asked.folder, progress=progress)
    except MismatchError as error:
        sys.exit(f"failed: {error}")
    print(toll.report())
    print(f"nothing was lost, nothing came back: {asked.kills} kills in {tell.spent_s:.0f} s")


def _kills_of_moving(asked: argparse.Namespace, seed: int, tell: "_Teller") -> None:
    from bench.gallery_kills_moving import MovingToll, kill_moving
    from bench.gallery_truth import MismatchError

    def progress(done: int, toll: MovingToll) -> None:
        tell(
            f"{done} of {asked.kills} commands, {toll.missed} of them ended before they were killed"
        )

    try:
        toll = kill_moving(
            asked.kills, seed=seed, folder=asked.folder, only=asked.only, progress=progress
        )
    except MismatchError as error:
        sys.exit(f"failed: {error}")
    print(toll.report())
    print(
        f"all as before or done, nobody came back: {asked.kills} commands in {tell.spent_s:.0f} s"
    )


def _alone() -> None:
    """Begin this process again, to load libraries without threads of their own."""
    if all(os.environ.get(name) == "1" for name in _THREADS):
        return
    alone = {**os.environ, **dict.fromkeys(_THREADS, "1")}
    os.execve(sys.executable, [sys.executable, "-m", "bench.gallery", *sys.argv[1:]], alone)  # noqa: S606


def _seed(asked: argparse.Namespace) -> int:
    seed = int.from_bytes(os.urandom(4)) if asked.seed is None else int(asked.seed)
    print(f"seed {seed}", flush=True)
    return seed


class _Teller:
    """Prints a line now and then."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._began = self._told = time.monotonic()

    @property
    def spent_s(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if now - self._told >= self._every_s:
            self._told = now
            print(f"{self.spent_s:6.0f} s  {line}", flush=True)


if __name__ == "__main__":
    main()
