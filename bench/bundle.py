"""The bundled weights, and what the documentation shows of their training, from finished runs.

    .venv/bin/python -m bench.bundle run-1 run-2 run-3 --output weights/passerby.safetensors

The runs are the stages in order; the last one's checkpoint is stored in half precision. Into the
folder of --docs go the log of all stages, one JSON object a line, and a picture of their curves.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console

from model.checkpoint import load_checkpoint, save_checkpoint
from model.runs import RunFolder, versions

LIMIT_BYTES = 48_000_000
DIGITS = 5


def read_stages(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """The logs of stages as one, each line with its stage; times go on from stage to stage.

    Returns:
        Plain values; numbers are rounded to `DIGITS` significant digits.
    """
    logs = [RunFolder(run).read_log() for run in runs]
    ends = accumulate([0.0, *(max(row["time_s"] for row in log) for log in logs)])
    joined = []
    for stage, (log, began) in enumerate(zip(logs, ends, strict=False), start=1):
        for row in log:
            told = {name: _rounded(value) for name, value in row.items()}
            joined.append({"stage": stage, **told, "time_s": round(began + row["time_s"])})
    return joined


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the loss, and what was measured on people held out, over hours of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    losses = [row for row in rows if "embedding" in row]
    hours = [row["time_s"] / 3600 for row in losses]
    left.plot(hours, [row["embedding"] for row in losses], linewidth=1)
    left.set(xlabel="hours of training", ylabel="1 - cosine to the teacher", ylim=(0, None))
    measured = [row for row in rows if "measured" in row]
    names = sorted({name for row in measured for name in row if name.endswith(("rank_1", "mAP"))})
    for name in names:
        known = [row for row in measured if name in row]
        shares = [100 * row[name] for row in known]
        right.plot([row["time_s"] / 3600 for row in known], shares, marker=".", label=name)
    right.set(xlabel="hours of training", ylabel="held-out people, %", ylim=(0, 100))
    right.legend()
    first_rows = [next(row for row in rows if row["stage"] == n) for n in _stages(rows)[1:]]
    for axes in (left, right):
        axes.grid(alpha=0.3)
        for row in first_rows:
            axes.axvline(row["time_s"] / 3600, color="grey", linestyle=":")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _stages(rows: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({row["stage"] for row in rows})


def main() -> None:
    """Write the weights and the documentation's part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs, the stages in order")
    parser.add_argument("--output", type=Path, default=Path("weights/passerby.safetensors"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    console = Console()

    saved = save_checkpoint(
        load_checkpoint(RunFolder(arguments.runs[-1]).product), arguments.output, precision="fp16"
    )
    size = arguments.output.stat().st_size
    if size > LIMIT_BYTES:
        raise SystemExit(f"expected at most {LIMIT_BYTES} bytes, got {size}: {arguments.output}")
    rows = read_stages(arguments.runs)
    facts = {
        "fingerprint": saved.fingerprint,
        "stages": [RunFolder(run).read_facts()["versions"] for run in arguments.runs],
        "packed_with": versions(),
    }
    lines = [json.dumps(facts), *(json.dumps(row) for row in rows)]
    (arguments.docs / "weights-log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_curves(rows, arguments.docs / "images" / "weights-curves.png")
    console.print(f"{saved.fingerprint}: {size / 1e6:.1f} MB in {arguments.output}")


if __name__ == "__main__":
    main()
