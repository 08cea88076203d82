"""How fast the network and the search run on a GPU, against what the card itself can do.

    .venv/bin/python -m bench.gpu --output gpu.json

First the ceilings of the card are measured, its matrix rate and its copy bandwidth; everything else
is given as a share of them. A way to run the network is timed only after it has given what eager
float32 gives on the CPU. What fails, or computes something else, is reported as such while the rest
goes on; the exit status is 1 then. --device cpu runs a tiny version of everything, which shows that
the script works and says nothing about speed.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.gpu_device import (
    Plan,
    Rates,
    Row,
    measure_ceilings,
    measure_search,
    tell_failure,
)
from bench.gpu_embedder import measure_decoding, measure_models
from bench.gpu_network import measure_network
from model.embedder import choose_device
from model.errors import DeviceError

TINY = Plan(
    device="cpu",
    backbone="conv5",
    sizes=((64, 32),),
    batches=(2,),
    matrix=128,
    copied_bytes=2**16,
    vectors=2000,
    tracklets=16,
    pools=("one", "threads"),
    seconds=0.01,
)
SECTIONS: dict[str, Callable[[Plan, Rates], Iterable[Row]]] = {
    "ceilings": measure_ceilings,
    "search": measure_search,
    "two models": measure_models,
    "tracklets from JPEG": measure_decoding,
    "network": measure_network,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file, written after each section")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args(argv)
    try:
        choose_device(arguments.device)
    except DeviceError as error:
        raise SystemExit(f"{error}; --device cpu runs a tiny version of everything") from error
    plan = TINY if arguments.device == "cpu" else Plan()
    report: Row = {"machine": describe_machine(plan), "plan": asdict(plan)}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    is_wrong, rates = False, Rates()
    for name in SECTIONS:
        rows = report[name] = run_section(name, plan, rates)
        rates |= {row["what"]: row["rate"] for row in rows if "rate" in row}
        print(f"\n## {name}\n\n{make_table(rows)}", flush=True)
        is_wrong |= any({"failed", "differs"} & row.keys() for row in rows)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if is_wrong:
        raise SystemExit("something failed or differs: see the tables")


def describe_machine(plan: Plan) -> Row:
    """What the numbers hold for."""
    told: Row = {"device": "CPU"}
    if plan.device == "cuda":
        told = {"device": torch.cuda.get_device_name(), "CUDA": torch.version.cuda}
        told["cuDNN"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    cores = len(os.sched_getaffinity(0))
    return told | {"torch": torch.__version__, "Python": platform.python_version(), "cores": cores}


def run_section(name: str, plan: Plan, rates: Rates) -> list[Row]:
    """Rows of a section; where it fails, the last one tells why."""
    rows, failure = list[Row](), Row()
    with tell_failure(failure):
        rows.extend(SECTIONS[name](plan, rates))  # those before a failure stay
    torch.cuda.empty_cache()
    return [*rows, failure] if failure else rows


def make_table(rows: Sequence[Row]) -> str:
    """Markdown; dashes where a row has no such number."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [[show(row.get(head, "-")) for head in heads] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def show(value: object) -> str:
    """A cell; numbers to three digits or to the unit."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()
