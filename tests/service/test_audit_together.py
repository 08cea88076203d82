"""Several processes at one audit trail: no line is lost or torn, whoever begins another file."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from service import audit as audit_module
from service.audit import MAKING_NAME, Trail, files_of
from service.audit_reading import Reading, Sought
from tests.service.processes import ROOT

# A process that appends so many lines, and says the number of each that is written.
WRITER = """
import sys
from pathlib import Path
from service.audit import Trail

directory, name, count, file_bytes, names, is_guest = sys.argv[1:]
trail = Trail(Path(directory), file_bytes=int(file_bytes), files=10_000, is_guest=is_guest == "1")
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(count)):
    about = {"tracklets": [str(one) for one in range(int(names))]}
    trail.append({"action": "query", "key": name, "count": number, **about})
    print(number, flush=True)
"""


def writer(
    data_dir: Path,
    name: str,
    count: int,
    *,
    file_bytes: int = 1000,
    names: int = 0,
    is_guest: bool = False,
) -> "subprocess.Popen[str]":
    """A process that begins to write with the first line that it gets."""
    words = [
        str(data_dir / "audit"),
        name,
        str(count),
        str(file_bytes),
        str(names),
        str(int(is_guest)),
    ]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def start(process: "subprocess.Popen[str]") -> None:
    """Let a writer begin, once it can."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def counts(data_dir: Path) -> tuple[dict[str, list[int]], int]:
    """The numbers of each writer in the order of the files, and how many lines are damaged."""
    found: dict[str, list[int]] = defaultdict(list)
    reading = Reading(data_dir)
    for line in reading.lines(Sought()):
        found[line["key"]].append(line["count"])
    return found, reading.damaged


def test_processes_that_write_and_rotate_at_once_lose_and_tear_no_line(tmp_path: Path) -> None:
    """Two of them begin other files, as a service does, and two are commands."""
    names = {"a": False, "b": False, "c": True, "d": True}
    writers = [writer(tmp_path, name, 300, is_guest=one) for name, one in names.items()]
    for one in writers:
        start(one)
    for one in writers:
        one.communicate(timeout=60)

    found, damaged = counts(tmp_path)

    assert [one.returncode for one in writers] == [0] * 4
    assert found == {name: list(range(300)) for name in names}
    assert damaged == 0
    assert len(files_of(tmp_path / "audit")) > 5


def test_a_killed_process_loses_nothing_that_it_had_written_and_spoils_nobody_elses(
    tmp_path: Path,
) -> None:
    """Long lines, which a kill can tear, and a file for every fourth of them."""
    rng = np.random.default_rng(7)
    beside = Trail(tmp_path / "audit", file_bytes=40_000, files=10_000)
    acknowledged: dict[str, list[int]] = {"beside": []}
    for kill in range(5):
        process = writer(tmp_path, f"killed{kill}", 200, file_bytes=40_000, names=300)
        start(process)
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(rng.integers(1, 20))]
        beside.append({"action": "query", "key": "beside", "count": kill})
        process.kill()
        said += [int(line) for line in process.stdout]
        process.communicate()
        acknowledged[f"killed{kill}"] = said
        acknowledged["beside"].append(kill)
    beside.append({"action": "query", "key": "beside", "count": 5})
    beside.close()

    found, damaged = counts(tmp_path)

    assert found.pop("beside") == [*range(6)]
    for name, numbers in found.items():
        assert numbers == list(range(len(numbers)))  # none is twice, none is missing
        assert numbers[: len(acknowledged[name])] == acknowledged[name]
    assert damaged <= 5


def trail(tmp_path: Path, **options: int | bool) -> Trail:
    """A trail whose files are small."""
    return Trail(tmp_path / "audit", **{"file_bytes": 500, "files": 3, **options})  # type: ignore[arg-type]


def append(to: Trail, *numbers: int) -> None:
    """Numbered lines."""
    for number in numbers:
        to.append({"action": "query", "key": "k", "count": number})


def test_who_was_left_behind_goes_on_in_the_newest_file(tmp_path: Path) -> None:
    service, command = trail(tmp_path, files=100), trail(tmp_path, is_guest=True)
    append(command, 0)
    append(service, *range(1, 20))
    append(command, 20)
    append(service, 21)
    for one in (service, command):
        one.close()

    # In the order of the files.
    assert counts(tmp_path) == ({"k": [*range(22)]}, 0)
    assert len(files_of(tmp_path / "audit")) > 3


def test_who_is_several_files_behind_does_not_write_into_a_removed_one(tmp_path: Path) -> None:
    service, command = trail(tmp_path, files=1), trail(tmp_path, is_guest=True)
    first, *_ = files_of(tmp_path / "audit")
    append(service, *range(50))
    assert not first.exists()

    command.check()
    append(command, 50)
    for one in (service, command):
        one.close()

    assert counts(tmp_path)[0]["k"][-1] == 50
    assert not first.exists()


def test_a_command_begins_no_other_file_and_removes_none(tmp_path: Path) -> None:
    """Large files, and how many are kept, are the service's to decide, by flags perhaps."""
    service = trail(tmp_path, files=100)
    append(service, *range(30))
    service.close()
    before = files_of(tmp_path / "audit")

    command = trail(tmp_path, files=1, is_guest=True)
    append(command, *range(30, 60))
    command.close()

    assert files_of(tmp_path / "audit") == before
    assert counts(tmp_path) == ({"k": [*range(60)]}, 0)


def test_half_a_line_of_somebody_else_spoils_no_other(tmp_path: Path) -> None:
    """Of a process that was killed while this one had the trail open."""
    service = trail(tmp_path, file_bytes=100_000)
    append(service, 0)
    [path] = files_of(tmp_path / "audit")
    with path.open("ab") as file:
        file.write(b'{"time": "2026-')

    append(service, 1)
    service.close()

    assert counts(tmp_path) == ({"k": [0, 1]}, 1)


def test_what_a_killed_rotation_left_is_in_nobodys_way(tmp_path: Path) -> None:
    service = trail(tmp_path, files=100)
    (tmp_path / "audit" / MAKING_NAME).write_bytes(b"half")

    append(service, *range(20))
    service.close()

    assert not (tmp_path / "audit" / MAKING_NAME).exists()
    assert counts(tmp_path) == ({"k": [*range(20)]}, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's fallocate")
def test_a_file_that_was_left_keeps_no_room(tmp_path: Path) -> None:
    """Neither where this process left it, nor where another one was killed in between."""
    service = trail(tmp_path, file_bytes=100_000)
    append(service, 0)
    following = tmp_path / "audit" / "audit-00000002.jsonl"
    following.touch(mode=0o600)  # its maker was killed at once

    append(service, 1)
    left, newest = files_of(tmp_path / "audit")
    room = [one.stat().st_blocks * 512 for one in (left, newest)]
    service.close()

    assert room[0] < 10_000 < audit_module.RESERVE_BYTES // 20 < room[1]


def test_a_sync_under_way_does_not_keep_a_left_file_locked(tmp_path: Path) -> None:
    """Its copy of the descriptor would go on holding the lock of the one that is closed."""
    service = trail(tmp_path, files=100)
    copied = os.dup(service._file)
    append(service, *range(20))

    behind = trail(tmp_path, is_guest=True)
    behind._file, behind._number, kept = os.dup(copied), 1, behind._file
    append(behind, 20)  # waits for ever where the first file is locked
    for descriptor in (copied, kept):
        os.close(descriptor)
    for one in (service, behind):
        one.close()

    assert counts(tmp_path) == ({"k": [*range(21)]}, 0)
