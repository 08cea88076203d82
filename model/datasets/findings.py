"""What is missing or odd in a folder, collected instead of raised."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from model.datasets.tracklets import Split, Tracklet
from model.errors import DatasetError

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is missing or odd.

    Args:
        severity: "error" keeps the folder from being used, "warning" is probably not meant, "note"
            is good to know.
        where: A path relative to the root, or a tracklet, or "." for the root itself.
        what: The same words for the same kind of thing, so that findings can be grouped by them.
    """

    severity: Severity
    where: str
    what: str

    def to_json(self) -> dict[str, str]:
        """Return it as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Survey:
    """What a folder holds, before anything is refused.

    Args:
        root: The folder of the set, whichever of two nested ones was named.
        tracklets: All that may be used, sorted by identity, camera and name, by number.
        findings: What is missing or odd.
        distractors: Identities that are no person: never trained with or searched for.
        published: The division that the folder itself states, if any.
    """

    root: Path
    tracklets: tuple[Tracklet, ...]
    findings: tuple[Finding, ...]
    distractors: frozenset[str] = frozenset()
    published: Split | None = None


def place(path: Path, root: Path) -> str:
    """Name a path for a finding: relative to the root where it lies below it."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


@contextmanager
def noting(findings: list[Finding], path: Path, root: Path) -> Iterator[None]:
    """Turn a `DatasetError` of the block into a finding about ``path``, and go on after it."""
    try:
        yield
    except DatasetError as error:
        # The finding says where; repeating it in the words would keep findings from grouping.
        what = str(error).replace(str(path), "it")
        findings.append(Finding("error", place(path, root), what))


def expect_count(findings: list[Finding], where: str, expected: int, found: int, unit: str) -> None:
    """Warn where a count is not the published one."""
    if found != expected:
        findings.append(
            Finding("warning", where, f"expected {expected:,} {unit} as published, got {found:,}")
        )


def shorten(names: list[str], most: int = 5) -> str:
    """List some names and say how many more there are."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown
