"""Commands that are killed at their system calls; hundreds of them are a command of the bench's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gallery_kills_calls import Call, Death, can_trace, run_traced

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not can_trace(), reason="knows the system calls of Linux on x86-64 only"
)
CALLS = (
    Call("open", "a"),
    Call("write", "a"),
    Call("fsync", "a"),
    Call("rename", "a"),
    Call("unlink", "b"),
)


def work(folder: Path) -> int:
    """Do one of each."""
    made = os.open(folder / "a", os.O_WRONLY | os.O_CREAT)
    os.write(made, bytes(1000))
    os.write(1, b"")  # elsewhere
    os.fsync(made)
    (folder / "a").rename(folder / "b")
    (folder / "b").unlink()
    return 3


def test_a_process_that_nobody_kills_tells_what_it_changed(tmp_path: Path) -> None:
    end = run_traced(lambda: work(tmp_path), tmp_path)

    assert (end.calls, end.status) == (CALLS, 3)


@pytest.mark.parametrize(
    ("death", "left"),
    [
        (Death(0), {}),
        (Death(1), {"a": 0}),
        (Death(1, is_half_done=True), {"a": 500}),
        (Death(2), {"a": 1000}),
        (Death(3), {"a": 1000}),
        (Death(3, is_half_done=True), {"b": 1000}),
        (Death(4), {"b": 1000}),
        (Death(4, is_half_done=True), {}),
    ],
)
def test_a_process_dies_before_a_call_or_half_way_through_it(
    tmp_path: Path, death: Death, left: dict[str, int]
) -> None:
    """What cannot be halved has been done."""
    end = run_traced(lambda: work(tmp_path), tmp_path, death)

    assert end.status is None
    assert end.calls == CALLS[: death.number + 1]
    assert {one.name: one.stat().st_size for one in tmp_path.iterdir()} == left


def killed(*given: str) -> str:
    """What the bench says of killing; it has to be the only thread of its process."""
    command = [sys.executable, "-m", "bench.gallery", "kills", "--moving", "--seed", "0", *given]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_restore_that_is_killed_leaves_the_old_gallery_or_the_new_one() -> None:
    said = killed("--only", "restore over a gallery in use", "--kills", "4")

    assert "all as before or done, nobody came back: 4 commands" in said


@pytest.mark.slow
def test_every_command_that_moves_a_gallery_may_be_killed() -> None:
    assert "nobody came back: 84 commands" in killed("--kills", "84")
