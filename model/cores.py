"""How many processor cores this process may use: what a container is given, not what the host has.

A container's share is a quota of time, which neither Python nor PyTorch looks at: with as many
threads as the host has cores they wait for each other until the quota is renewed.
"""

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path, PurePosixPath

# The kernel's first control groups name their controllers, and may mount several together.
_FIRST_MOUNTS = ("cpu", "cpu,cpuacct", "cpuacct,cpu")
_SECOND_MOUNTS = ("", "unified")


def available_cores(root: Path = Path("/")) -> int:
    """The least of what affinity and the control groups' quotas allow; at least 1.

    Args:
        root: Where ``proc`` and ``sys`` lie.
    """
    return max(1, ceil(min([_count_cores(), *_quotas(root)])))


def _count_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time of each group that this process is in and that has a quota."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            for folder in _folders(root, _SECOND_MOUNTS, group):
                yield _ratio(*_two(_read(folder / "cpu.max")))
        elif "cpu" in controllers.split(","):
            for folder in _folders(root, _FIRST_MOUNTS, group):
                quota = _read(folder / "cpu.cfs_quota_us")
                yield _ratio(quota, _read(folder / "cpu.cfs_period_us"))


def _folders(root: Path, mounts: tuple[str, ...], group: str) -> Iterator[Path]:
    """Those of a group and of all above it.

    In a container the group is told as the host calls it, but its own is often mounted on top: what
    is not there has no files to read.
    """
    path = PurePosixPath(*(part for part in PurePosixPath(group).parts if part not in ("/", "..")))
    for mount in mounts:
        for inner in (path, *path.parents):
            yield root / "sys/fs/cgroup" / mount / inner


def _two(text: str) -> tuple[str, str]:
    first, _, second = text.partition(" ")
    return first, second


def _ratio(quota: str, period: str) -> float:
    """Quota by period, both microseconds; infinite where there is none ("max", -1, no file)."""
    try:
        time_us, period_us = int(quota), int(period)
    except ValueError:
        return float("inf")
    return time_us / period_us if time_us > 0 and period_us > 0 else float("inf")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
