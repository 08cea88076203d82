"""Half an hour of everything at once: does anything grow, does anything break?

    .venv/bin/python -m bench.soak --minutes 30 --output soak

Queries, enrolments, deletions and bad uploads at given times, at 70 % of what the service can
embed; the gallery stays about as large as it was. Resident memory of the service's processes over
time, its slope over the second half (least squares), statuses, descriptors and threads. The folder
gets a log that grows as it goes, and a picture. Ends with status 1 where a claim does not hold.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.sending import Entry, Load, Sender
from bench.serving import (
    Claim,
    Loads,
    Usage,
    Watcher,
    add_arguments,
    describe_machine,
    draw_uploads,
    fill_gallery,
    gallery_shape,
    measure_capacity,
    median,
    percentile,
    print_claims,
    print_table,
    read_settings,
    serving,
)
from service.loadtest_picture import BLUE, INK, ORANGE, RED, dress_axes, label_plainly
from service.loadtest_sending import draw_arrivals

LOAD = 0.7
SHARES = {"query": 0.5, "enrol": 0.2, "delete": 0.2, "bad": 0.1}
EMBEDDED = SHARES["query"] + SHARES["enrol"]
STORED = 1000
# A tracklet is deleted so many enrolments after its own, when that has long been answered.
KEPT = 40
CLIENTS = 32  # requests at a time; no more than are let in
LOG_EVERY_S = 10.0
IDLE_S = 15.0  # longer than connections without work are kept
_APART = 1_000_000  # ids of the rehearsal
SLOPE_MB_AN_HOUR = 20.0  # a leak of more would matter; a slope within two errors of 0 is none
EXPECTED = {"query": {200}, "enrol": {201}, "delete": {204}, "bad": {400, 415, 422}}
REFUSED = 429  # may happen where the machine is busy with something else


def main() -> None:
    """Run, print what was claimed and measured, draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=8, help="of the closed loop")
    parser.add_argument("--capacity-seconds", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=Path("soak"), help="folder; made")
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-soak-") as name:
        folder = Path(name)
        uploads = draw_uploads(folder / "uploads", 16, seed=arguments.seed)
        dim, model = gallery_shape(arguments.weights)
        fill_gallery(folder / "data", tracklets=STORED, dim=dim, model=model, seed=arguments.seed)
        with serving(
            folder / "data",
            arguments.output / "server.log",
            weights=arguments.weights,
            settings=read_settings(arguments.set),
        ) as server:
            loads = Loads(server, uploads, folder / "loads")
            rehearse(loads)
            capacity = measure_capacity(
                loads, "query", clients=arguments.clients, seconds=arguments.capacity_seconds
            )
            entries = mix(LOAD * capacity / EMBEDDED, 60 * arguments.minutes, arguments.seed)
            time.sleep(IDLE_S)
            idle = [server.usage()]
            with Watcher(server, every_s=1.0) as watcher:
                sender = loads.open(entries, clients=CLIENTS)
                load = follow(sender, watcher, arguments.output / "soak.log")
            time.sleep(IDLE_S)
            idle.append(server.usage())
    seen = [(at - load.started, usage) for at, usage in watcher.seen if at >= load.started]
    claims = judge(load, seen, idle)
    report(load, claims, capacity, arguments)
    draw(load, seen, arguments.output / "soak.png")
    if not all(claim.holds for claim in claims):
        raise SystemExit(1)


def rehearse(loads: Loads) -> None:
    """Do once what is going to be done often, so that what that opens for good is open."""
    for kind in ("enrol", "query", "delete", "bad"):
        entries = [Entry(0.0, kind, _APART + number) for number in range(2 * CLIENTS)]
        loads.open(entries, clients=CLIENTS).wait()


def mix(rate: float, seconds: float, seed: int) -> list[Entry]:
    """Draw what is asked when."""
    rng = np.random.default_rng(seed)
    times = draw_arrivals(rate, 0, seconds, seed)
    kinds = rng.choice(list(SHARES), size=len(times), p=list(SHARES.values()))
    entries = []
    enrolled, deleted = 0, 0
    for number, (due, kind) in enumerate(zip(times, kinds.tolist(), strict=True)):
        if kind == "delete" and deleted >= enrolled - KEPT:
            kind = "enrol"  # until there is what can be deleted
        if kind == "enrol":
            entries.append(Entry(due, kind, enrolled))
            enrolled += 1
        elif kind == "delete":
            entries.append(Entry(due, kind, deleted))
            deleted += 1
        else:
            entries.append(Entry(due, kind, number))
    return entries


def follow(sender: Sender, watcher: Watcher, path: Path) -> Load:
    """Write a line now and then until all has been sent."""
    with path.open("w", encoding="utf-8") as log:
        while sender.is_running():
            time.sleep(LOG_EVERY_S)
            answers = sender.so_far().answers
            if not watcher.seen:
                continue
            _, usage = watcher.seen[-1]
            line = {
                "seconds": round(answers[-1].ended_s, 1) if answers else 0,
                "memory_mb": round(usage.memory / 1e6, 1),
                "threads": usage.threads,
                "descriptors": usage.descriptors,
                "statuses": Counter(str(one.status) for one in answers),
            }
            log.write(json.dumps(line) + "\n")
            log.flush()
    return sender.wait()


def slope_of(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Slope of a least squares line, and its standard error.

    The error takes the deviations for independent. Memory's are not, so it is too small.

    Args:
        times: At least three, not all equal.
        values: As many.
    """
    x, y = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    x = x - x.mean()
    spread = float((x**2).sum())
    slope = float((x * y).sum()) / spread
    rest = y - y.mean() - slope * x
    return slope, float(np.sqrt((rest**2).sum() / (len(x) - 2) / spread))


def judge(load: Load, seen: Sequence[tuple[float, Usage]], idle: Sequence[Usage]) -> list[Claim]:
    """Hold what was seen against what was promised.

    Args:
        load: All answers.
        seen: What the service held over time.
        idle: What it held without work, before and after.
    """
    failed = Counter(
        one.failure or f"{one.kind} {one.status}"
        for one in load.answers
        if one.status == 0 or one.status >= 500
    )
    odd = Counter(
        f"{one.kind} {one.status}"
        for one in load.answers
        if one.status not in EXPECTED[one.kind] | {REFUSED} and 0 < one.status < 500
    )
    # What was not enrolled cannot be deleted.
    odd["delete 404"] -= sum(one.kind == "enrol" and one.status == REFUSED for one in load.answers)
    odd = +odd
    half = seen[len(seen) // 2 :]
    slope, error = slope_of([at for at, _ in half], [usage.memory / 1e6 for _, usage in half])
    slope, error = 3600 * slope, 3600 * error
    before, after = idle
    early = [usage.threads for _, usage in seen[len(seen) // 4 : len(seen) // 2]]
    late = [usage.threads for _, usage in seen[-len(early) :]]
    return [
        Claim("no 5xx, and every request is answered", not failed, _counted(failed)),
        Claim("each request gets the status that it must, or 429", not odd, _counted(odd)),
        Claim(
            "the slope of resident memory is about zero",
            slope < max(SLOPE_MB_AN_HOUR, 2 * error),
            f"{slope:+.1f} ± {error:.1f} MB an hour at {half[-1][1].memory / 1e6:.0f} MB",
        ),
        Claim(
            "no descriptor or socket is left over",
            after.descriptors <= before.descriptors and after.sockets <= before.sockets,
            f"without work: {before.descriptors} -> {after.descriptors} descriptors, "
            f"{before.sockets} -> {after.sockets} sockets",
        ),
        Claim(
            "threads do not grow",
            median(late) <= median(early),
            f"{median(early):.0f} in the second quarter, {median(late):.0f} in the last, at most "
            f"{max(early)} and {max(late)}",
        ),
    ]


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()) or "none else"


def report(
    load: Load, claims: Sequence[Claim], capacity: float, arguments: argparse.Namespace
) -> None:
    """Print the tables."""
    print(f"{describe_machine()}, {arguments.minutes:g} minutes, weights {arguments.weights}\n")
    lags = [one.sent_s - one.due_s for one in load.answers]
    print(
        f"{len(load.answers)} requests at {LOAD:.0%} of a capacity of {capacity:.2f} tracklets a "
        f"second. The client was late by {1000 * percentile(lags, 99):.0f} ms (p99) and used "
        f"{load.cpu_s:.1f} s of processor time.\n"
    )
    rows = []
    for kind in SHARES:
        answers = [one for one in load.answers if one.kind == kind]
        seconds = [one.latency_s for one in answers if one.status in EXPECTED[kind]]
        counts = Counter(one.failure or str(one.status) for one in answers)
        told = ", ".join(f"{status}: {count}" for status, count in sorted(counts.items()))
        rows.append(
            (kind, told, *(f"{1000 * percentile(seconds, at):.0f}" for at in (50, 99, 100)))
        )
    print_table(("", "statuses", "p50, ms", "p99, ms", "max, ms"), rows)
    print()
    print_claims(claims)


def draw(load: Load, seen: Sequence[tuple[float, Usage]], path: Path) -> None:
    """Draw memory, descriptors and threads, and latency over time."""
    from matplotlib.figure import Figure  # not pyplot, whose figures live in global state

    figure = Figure(figsize=(9, 7), layout="constrained")
    memory, held, latency = figure.subplots(3, 1, sharex=True)
    minutes = [at / 60 for at, _ in seen]
    memory.plot(minutes, [usage.memory / 1e6 for _, usage in seen], color=BLUE)
    dress_axes(memory, "", "resident memory, MB")
    memory.set_ylim(0, 1.2 * max(usage.memory for _, usage in seen) / 1e6)
    held.plot(minutes, [usage.descriptors for _, usage in seen], color=BLUE, label="descriptors")
    held.plot(minutes, [usage.threads for _, usage in seen], color=ORANGE, label="threads")
    held.set_ylim(bottom=0)
    held.legend(frameon=False, labelcolor=INK, fontsize=9)
    dress_axes(held, "", "held")
    for kind, colour in zip(SHARES, (BLUE, ORANGE, INK, RED), strict=True):
        answers = [one for one in load.answers if one.kind == kind]
        times, seconds = [one.due_s / 60 for one in answers], [one.latency_s for one in answers]
        latency.plot(times, seconds, ".", color=colour, markersize=2, label=kind)
    latency.set_yscale("log")
    label_plainly(latency.yaxis)
    latency.legend(frameon=False, labelcolor=INK, fontsize=9, ncols=4, markerscale=4)
    dress_axes(latency, "minutes", "latency, s")
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
