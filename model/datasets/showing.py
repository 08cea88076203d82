"""A data report for people: tables and grouped findings on a terminal."""

from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from model.datasets.checking import DataReport, SplitCounts
from model.datasets.findings import Severity

_COLOURS: dict[Severity, str] = {"error": "red", "warning": "yellow", "note": "cyan"}


def show_report(report: DataReport, console: Console, *, most: int | None = 10) -> None:
    """Print a report.

    Args:
        report: What to print.
        console: Where.
        most: How many places to list of each kind of finding; all where None.
    """
    console.print(_counts(report), _splits(report), sep="\n")
    groups: dict[tuple[Severity, str], list[str]] = defaultdict(list)
    for finding in report.findings:
        groups[finding.severity, finding.what].append(finding.where)
    for (severity, what), places in groups.items():
        console.print(_findings(severity, what, places, most), soft_wrap=True)
    if not report.decoded:
        console.print("frames were not opened (--no-decode)")
    console.print(_verdict(report), soft_wrap=True)


def _counts(report: DataReport) -> Table:
    table = Table(title=escape(f"{report.root}: {report.layout}"), title_justify="left")
    for column in ("identities", "cameras", "tracklets", "frames", "min", "mean", "max"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{report.identities:,}",
        f"{len(report.cameras):,}",
        f"{report.tracklets:,}",
        f"{report.frames:,}",
        f"{report.frames_min:,}",
        f"{report.frames_mean:.1f}",
        f"{report.frames_max:,}",
    )
    return table


def _splits(report: DataReport) -> Group:
    """A line for all splits of one source; counts that differ between them are ranges."""
    by_source: dict[str, list[SplitCounts]] = defaultdict(list)
    for split in report.splits:
        by_source[split.source].append(split)
    lines = []
    for source, splits in by_source.items():
        names = splits[0].name if len(splits) == 1 else f"{splits[0].name} to {splits[-1].name}"
        lines.append(Text(f"split {names}: {source}"))
        for part, counts in (
            ("train", [one.train for one in splits]),
            ("query", [one.query for one in splits]),
            ("gallery", [one.gallery for one in splits]),
        ):
            identities, tracklets = (_range(numbers) for numbers in zip(*counts, strict=True))
            lines.append(Text(f"  {part:8}{identities} identities, {tracklets} tracklets"))
    return Group(*lines)


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _findings(severity: Severity, what: str, places: list[str], most: int | None) -> Text:
    text = Text.assemble((severity, _COLOURS[severity]), f": {what}")
    if len(places) > 1:
        text.append(f" ({len(places):,})")
    for where in places[:most]:
        text.append(f"\n  {where}")
    if most is not None and len(places) > most:
        text.append(f"\n  and {len(places) - most:,} more (--all lists them)")
    return text


def _verdict(report: DataReport) -> Text:
    counts = {
        severity: sum(finding.severity == severity for finding in report.findings)
        for severity in _COLOURS
    }
    numbers = ", ".join(
        f"{count:,} {severity}{'' if count == 1 else 's'}" for severity, count in counts.items()
    )
    if report.fingerprint is None:
        return Text(f"cannot be used: {numbers}", style="red")
    return Text(f"usable as {report.fingerprint}: {numbers}")
