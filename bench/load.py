"""What loading a checkpoint takes: seconds, and memory as a multiple of its weights.

    .venv/bin/python -m bench.load

Each round is a process of its own, because what a process has freed does not always go back to the
system. The weights are counted in float32, as a loaded network holds them. Memory is what comes on
top of a process that has imported everything: at its highest, and kept at the end. Pages of the
file count while it is mapped.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from model.checkpoint import BUNDLED, find_checkpoint, load_checkpoint
from model.embedder import Embedder

STEPS = ("load_checkpoint", "Embedder", "warm_up")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of what `passerby serve` does with a checkpoint at its start.

    Args:
        wall_s: Seconds that it took.
        cpu_s: Seconds of processor time, of all threads.
        peak: Most memory since the first step began, as a multiple of the weights.
        kept: Memory at its end, likewise.
    """

    wall_s: float
    cpu_s: float
    peak: float
    kept: float


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", default=BUNDLED)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    path = find_checkpoint(arguments.checkpoint)
    if arguments.child:
        steps = load_once(path, arguments.device, arguments.precision)
        print(json.dumps([asdict(step) for step in steps]))
        return
    options = ["--device", arguments.device, "--precision", arguments.precision]
    rounds = [in_a_process(path, *options) for _ in range(arguments.rounds)]
    print_table(path, rounds)


def in_a_process(path: Path, *options: str) -> list[Step]:
    """Load in a new process."""
    command = [sys.executable, "-m", "bench.load", str(path), "--child", *options]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return [Step(**values) for values in json.loads(answer.stdout.splitlines()[-1])]


def load_once(path: Path, device: str, precision: str) -> list[Step]:
    """Load in this process; the steps in their order."""
    # Not getrusage: its peak is that of the process that started this one, where that was larger.
    forget_the_peak()
    before = memory("VmRSS")
    steps: list[Step] = []

    def done(wall: float, cpu: float, weights: int) -> None:
        peak, kept = (memory(name) - before for name in ("VmHWM", "VmRSS"))
        steps.append(
            Step(
                time.perf_counter() - wall,
                time.process_time() - cpu,
                peak / weights,
                kept / weights,
            )
        )

    wall, cpu = time.perf_counter(), time.process_time()
    checkpoint = load_checkpoint(path)
    weights = sum(one.numel() for one in checkpoint.network.state_dict().values()) * 4
    done(wall, cpu, weights)
    wall, cpu = time.perf_counter(), time.process_time()
    embedder = Embedder(checkpoint, device=device, precision=precision)  # type: ignore[arg-type]
    del checkpoint
    done(wall, cpu, weights)
    wall, cpu = time.perf_counter(), time.process_time()
    embedder.warm_up()
    done(wall, cpu, weights)
    return steps


def memory(name: str) -> int:
    """A line of this process's status, bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def forget_the_peak() -> None:
    """Let VmHWM begin anew: importing may have taken more than is left of it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def print_table(path: Path, rounds: list[list[Step]]) -> None:
    """Medians of times, maxima of memory."""
    print(
        f"{path.name}, {path.stat().st_size / 1e6:.1f} MB; {len(rounds)} rounds, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| step | seconds | of a processor | peak / weights | kept / weights |")
    print("|---|---|---|---|---|")
    for name, steps in zip(STEPS, zip(*rounds, strict=True), strict=True):
        wall = statistics.median(step.wall_s for step in steps)
        cpu = statistics.median(step.cpu_s for step in steps)
        peak, kept = max(step.peak for step in steps), max(step.kept for step in steps)
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {peak:.2f} | {kept:.2f} |")


if __name__ == "__main__":
    main()
