"""What a load test found: numbers of each rate, tables, what to beware of, a file."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from service.client import ClientError
from service.loadtest_sending import STAGES, Run, Sample

PERCENTILES = (50, 90, 99)
# A sender late by more than this, and by more than this share of the median, spoils the figures.
_LATE_MS, _LATE_SHARE = 10.0, 0.1
_FEW = 100  # answers, below which the p99 is the slowest of them or nearly


@dataclass(frozen=True, slots=True)
class Summary:
    """One rate in numbers; the warm-up is left out.

    Args:
        rate: Requests a second that were offered.
        sent: Requests that were sent.
        answered: Of them, answered with 200.
        refused: Answered with 429.
        other: How many of each other status, or of each reason why no answer came.
        not_sent: Requests that were due while too many were open.
        cut_off: Requests that were under way when the run was ended.
        achieved: Answers with 200 a second, until the last of them.
        latency_ms: Of answers with 200, from the time that each was due: p50, p90, p99, max.
        timing_ms: Median of what those answers say about themselves; ``rest`` is the latency
            without their total: sending, the network, the client.
        lag_ms: How late requests were sent: p50, p99, max.
    """

    rate: float
    sent: int
    answered: int
    refused: int
    other: dict[str, int]
    not_sent: int
    cut_off: int
    achieved: float
    latency_ms: dict[str, float]
    timing_ms: dict[str, float]
    lag_ms: dict[str, float]


def summarise(run: Run) -> Summary:
    """Count and measure what a run brought."""
    samples = [one for one in run.samples if one.due_s >= run.warmup_s]
    sent = [one for one in samples if one.outcome != "not sent"]
    good = [one for one in sent if one.status == 200]
    kinds = Counter(one.failure or str(one.status) for one in sent if one.outcome != "cut off")
    ended = max((one.due_s + one.latency_s for one in good), default=0.0)
    planned = min(run.elapsed_s, run.warmup_s + run.duration_s) if run.stopped else 0.0
    until = max(ended, planned or run.warmup_s + run.duration_s)
    return Summary(
        rate=run.rate,
        sent=len(sent),
        answered=len(good),
        refused=kinds["429"],
        other={kind: kinds[kind] for kind in sorted(kinds) if kind not in ("200", "429")},
        not_sent=len(samples) - len(sent),
        cut_off=sum(one.outcome == "cut off" for one in sent),
        achieved=len(good) / max(until - run.warmup_s, 1e-9),
        latency_ms=_spread([one.latency_s for one in good], PERCENTILES),
        timing_ms=_timing(good),
        lag_ms=_spread([one.lag_s for one in sent], (50, 99)),
    )


def _spread(seconds: Sequence[float], percentiles: Sequence[int]) -> dict[str, float]:
    """Percentiles and the maximum in milliseconds; each is a value that occurred."""
    if not seconds:
        return {}
    values = np.percentile(seconds, percentiles, method="inverted_cdf")
    spread = {f"p{at}": 1000 * float(one) for at, one in zip(percentiles, values, strict=True)}
    return {**spread, "max": 1000 * max(seconds)}


def _timing(good: Sequence[Sample]) -> dict[str, float]:
    timed = [one for one in good if one.timing_ms]
    if not timed:
        return {}
    medians = {
        name: float(np.median([one.timing_ms.get(name, 0.0) for one in timed])) for name in STAGES
    }
    rest = [1000 * one.latency_s - one.timing_ms.get("total", 0.0) for one in timed]
    return {**medians, "rest": float(np.median(rest))}


def beware(summary: Summary) -> list[str]:
    """What a reader of the figures has to know, one sentence each."""
    told = []
    at = f"at {summary.rate:g} a second"
    if summary.not_sent:
        told.append(
            f"{at}, {summary.not_sent} requests were not sent because too many were open: "
            "the load was lower than asked for"
        )
    late, median = summary.lag_ms.get("p99", 0.0), summary.latency_ms.get("p50", 0.0)
    if late > max(_LATE_MS, _LATE_SHARE * median):
        told.append(
            f"{at}, this client sent up to {summary.lag_ms['max']:.0f} ms late (p99 {late:.0f} "
            "ms): it could not keep the rate, and the latencies hold its own delay"
        )
    if 0 < summary.answered < _FEW:
        told.append(f"{at}, only {summary.answered} answers: the p99 is about the slowest of them")
    return told


def latency_table(summaries: Sequence[Summary]) -> Table:
    """One row a rate: what was answered, and how soon."""
    table = _table("Latency of answers with 200, from the time each request was due, ms")
    for column in (
        "rate/s",
        "sent",
        "200",
        "429",
        "other",
        "unsent",
        "200/s",
        "p50",
        "p90",
        "p99",
        "max",
    ):
        table.add_column(column, justify="right", no_wrap=column != "other")
    for one in summaries:
        other = ", ".join(f"{kind}: {count}" for kind, count in one.other.items())
        table.add_row(
            f"{one.rate:g}",
            str(one.sent),
            str(one.answered),
            str(one.refused),
            other or "0",
            str(one.not_sent),
            f"{one.achieved:.2f}",
            *(_ms(one.latency_ms, name) for name in ("p50", "p90", "p99", "max")),
        )
    return table


def timing_table(summaries: Sequence[Summary]) -> Table:
    """One row a rate: where the time went, as the service says, and how late this client was."""
    table = _table("Where the time went, medians, ms")
    for column in ("rate/s", *STAGES, "rest", "client's lag", "its p99"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in summaries:
        stages = (_ms(one.timing_ms, name) for name in (*STAGES, "rest"))
        table.add_row(f"{one.rate:g}", *stages, _ms(one.lag_ms, "p50"), _ms(one.lag_ms, "p99"))
    return table


def _table(title: str) -> Table:
    """A table whose columns fit into 80 letters."""
    return Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")


def _ms(values: dict[str, float], name: str) -> str:
    if name not in values:
        return "-"
    return f"{values[name]:.0f}" if values[name] >= 100 else f"{values[name]:.1f}"


def write_results(path: Path, about: dict[str, Any], runs: Sequence[Run]) -> None:
    """Write everything that was measured as JSON.

    Raises:
        ClientError: The file cannot be written.
    """
    entries = [
        {
            **asdict(summarise(run)),
            "warmup_s": run.warmup_s,
            "duration_s": run.duration_s,
            "samples": [asdict(one) for one in sorted(run.samples, key=lambda one: one.due_s)],
        }
        for run in runs
    ]
    warnings = [line for run in runs for line in beware(summarise(run))]
    try:
        path.write_text(
            json.dumps({**about, "warnings": warnings, "runs": entries}, indent=1) + "\n",
            encoding="utf-8",
        )
    except OSError as error:
        raise ClientError(f"could not write {path}: {error.strerror}") from error
