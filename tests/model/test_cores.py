"""A process counts the cores of its container, not those of the host."""

from pathlib import Path

import pytest

from model import cores
from model.cores import available_cores


@pytest.fixture(autouse=True)
def _sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_count_cores", lambda: 16)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_control_groups_affinity_counts(tmp_path: Path) -> None:
    assert available_cores(tmp_path) == 16


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max 100000", 16),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("5000 100000", 1),
        ("9900000 100000", 16),
        ("", 16),
        ("nonsense", 16),
    ],
)
def test_a_quota_is_rounded_up_and_never_gives_cores_that_are_not_there(
    tmp_path: Path, limit: str, expected: int
) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{limit}\n"}

    assert available_cores(write(tmp_path, files)) == expected


def test_the_smallest_quota_of_all_groups_above_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/site/app/worker\n",
        "sys/fs/cgroup/site/cpu.max": "300000 100000",
        "sys/fs/cgroup/site/app/cpu.max": "400000 100000",
        "sys/fs/cgroup/site/app/worker/cpu.max": "max 100000",
    }

    assert available_cores(write(tmp_path, files)) == 3


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_the_first_kind_of_control_group_has_a_quota_too(tmp_path: Path, mount: str) -> None:
    """As in a container: the host's name of the group is told, and the group itself is mounted."""
    files = {
        "proc/self/cgroup": "5:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n0::/\n",
        f"sys/fs/cgroup/{mount}/cpu.cfs_quota_us": "350000\n",
        f"sys/fs/cgroup/{mount}/cpu.cfs_period_us": "100000\n",
    }

    assert available_cores(write(tmp_path, files)) == 4


def test_a_quota_of_minus_one_is_none(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "1:cpu:/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }

    assert available_cores(write(tmp_path, files)) == 16


def test_a_group_outside_of_the_containers_namespace_is_not_looked_for(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/../../other\n",
        "sys/fs/cgroup/cpu.max": "200000 100000\n",
        "sys/cpu.max": "100000 100000\n",
    }

    assert available_cores(write(tmp_path, files)) == 2
