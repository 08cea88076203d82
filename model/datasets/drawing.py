"""Processes that share the drawing of a set: ``python -m model.datasets.drawing`` is one of them.

Not `multiprocessing`: it imports the program's own main module into each process, and that of our
command line brings torch along, which costs 0.8 GB and some seconds each.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.datasets.truth import TrackletTruth, parse_record, record_line
from model.datasets.writing import DrawnLayout
from model.errors import DatasetError

_PACKAGES = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Share:
    """What one process draws, as it is told on its standard input.

    Args:
        values: Of the ``SyntheticSet``.
        root: Folder to write into.
        layout: How the set lies on disk.
        masks: Whether to write which pixel is whose.
        number: Which share, from 0.
        shares: How many there are; tracklet i belongs to share i modulo this.
    """

    values: dict[str, Any]
    root: str
    layout: DrawnLayout
    masks: bool
    number: int
    shares: int


def written_by_processes(shares: list[Share], total: int) -> Generator[TrackletTruth, None, None]:
    """Let a process draw and write each share; yield what is true, in the order of the set.

    Args:
        shares: At least one, by their numbers.
        total: How many tracklets the set has.

    Raises:
        DatasetError: A process failed.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(_process(share)) for share in shares]
        for number in range(total):
            process = processes[number % len(processes)]
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                said = process.stderr.read().strip() if process.stderr else ""
                raise DatasetError(f"expected a tracklet, got {said or 'a process that ended'}")
            yield parse_record(line)


@contextmanager
def _process(share: Share) -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join(part for part in (str(_PACKAGES), os.environ.get("PYTHONPATH")) if part)
    process = subprocess.Popen(
        [sys.executable, "-m", "model.datasets.drawing"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        encoding="utf-8",
    )
    try:
        if process.stdin:
            process.stdin.write(json.dumps(asdict(share)))
            process.stdin.close()
        yield process
    finally:
        process.kill()  # one that is done is not hurt, another one must not go on writing
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def main() -> None:
    """Draw the share that standard input tells; say on standard output what is true of it."""
    # Not at the top: it imports this module.
    from model.datasets.synthetic import SyntheticSet, Writer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    share = Share(**json.load(sys.stdin))
    values = {**share.values, "occluders": tuple(share.values["occluders"])}
    writer = Writer(SyntheticSet(**values), Path(share.root), share.layout, share.masks)
    try:
        for place in writer.cast.places()[share.number :: share.shares]:
            sys.stdout.write(record_line(writer.write(place)))
            # At once, so that progress is honest and a writer whose reader is gone stops.
            sys.stdout.flush()
    except OSError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
