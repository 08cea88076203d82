"""What the GPU benchmark measures is right, and what is wrong or missing does not pass unseen."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import gpu
from bench.gpu_device import (
    MATRIX_RATE,
    Plan,
    Rates,
    Row,
    check,
    compare_ranks,
    exact_distances,
    search,
    squared_norms,
)
from bench.gpu_embedder import measure_decoding
from bench.gpu_network import Way, count_operations, draw_checkpoint, measure_network, speeds
from bench.gpu_network import make_ways as real_ways
from model.checkpoint import Checkpoint
from model.frames import Preprocessing

ONCE = replace(gpu.TINY, seconds=0, vectors=300, tracklets=8, pools=("threads",))


def drawn_vectors(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 96)).astype(np.float32)


@pytest.mark.parametrize("queries", [1, 5])
def test_search_finds_what_differences_in_float64_find(queries: int) -> None:
    asked, stored = drawn_vectors(queries, seed=0), drawn_vectors(700, seed=1)
    wide = ((asked[:, None].astype(np.float64) - stored[None].astype(np.float64)) ** 2).sum(2)
    gallery = torch.from_numpy(stored)

    rows = search(torch.from_numpy(asked), gallery, squared_norms(gallery))
    exact = exact_distances(torch.from_numpy(asked), gallery)

    assert np.array_equal(rows.numpy(), np.argsort(wide, axis=1)[:, :10])
    assert exact.numpy() == pytest.approx(wide, rel=1e-12)
    assert compare_ranks(rows, exact)["% right rows"] == 100


def test_a_search_that_misses_a_nearer_vector_is_flagged() -> None:
    gallery = torch.from_numpy(drawn_vectors(50, seed=1))
    exact = exact_distances(gallery[:2] + 0.1, gallery)
    second_best = exact.topk(11, dim=1, largest=False).indices[:, 1:]

    assert "differs" in compare_ranks(second_best, exact)


def test_an_error_that_is_no_number_is_flagged() -> None:
    assert "differs" in check(float("nan"), 1e-3)


def spoiled_ways(checkpoint: Checkpoint, device: str) -> Iterator[Way]:
    right = next(iter(real_ways(checkpoint, device))).run
    seen: dict[torch.Size, Tensor] = {}

    def fail(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(f"no memory on {device}\nat all")

    yield Way("right", "fp32", right)
    yield Way("scaled", "fp32", lambda frames: right(frames) * 1.01)
    # As a recorded graph that forgets to take its input.
    yield Way("stale", "bf16", lambda frames: right(seen.setdefault(frames.shape, frames)))
    yield Way("failing", "fp32", fail)


def test_only_what_gives_the_networks_embeddings_is_timed() -> None:
    right, scaled, stale, failing = measure_network(ONCE, {MATRIX_RATE: 2.0}, spoiled_ways)

    assert right["% of the matrix rate"] == pytest.approx(right["TFLOP/s"] / 2 * 100)
    assert right["frames a second"] > 0
    assert scaled["relative error"] == pytest.approx(0.01, rel=1e-3)
    assert scaled["differs"] == "expected an error under 0.001"
    assert stale["differs"] == "expected an error under 0.02"
    assert failing["failed"] == "OutOfMemoryError: no memory on cpu"
    assert not any("one tracklet, ms" in row for row in (scaled, stale, failing))


def test_the_work_of_a_frame_is_that_of_the_network() -> None:
    """A convolution of C to D channels and k x k costs 2 C D k^2 a cell; conv5 by hand."""
    cells = 16 * 8
    products = 3 * 32 * 9 * 4 * cells + cells * (
        32 * 64 * 9 + 64 * 96 * 9 + 96 * 128 * 9 + 128 * 256
    )
    pooling = 256 * cells

    work = count_operations(draw_checkpoint(ONCE, Preprocessing(64, 32)))

    assert work == 2 * (products + pooling)


def test_rates_come_of_the_fastest_batch() -> None:
    """One tracklet, the fastest of all a frame here, is no batch."""
    row = speeds({1: 0.5, 34: 51.0, 68: 51.0}, flop=8_000_000_000, matrix_rate=800.0)

    assert row == pytest.approx(
        {
            "one tracklet, ms": 0.5,
            "one, % of the matrix rate": 30,
            "frames a second": 20_000,
            "in batches of": 1020,
            "TFLOP/s": 160,
            "% of the matrix rate": 20,
        }
    )


@pytest.mark.slow
def test_processes_decode_too() -> None:
    [_, decoding] = measure_decoding(replace(ONCE, pools=("processes",)), {})

    assert decoding["decoded a second"] > 0
    assert decoding["embedded a second"] > 0


def test_everything_runs_small_on_a_cpu_and_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "TINY", ONCE)

    gpu.main(["--device", "cpu", "--output", str(tmp_path / "gpu.json")])

    report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert all(report[name] for name in gpu.SECTIONS)
    assert [row["vectors"] for row in report["search"]] == [300, 300, 30, 30]
    assert all(row["% right rows"] == 100 for row in report["search"])
    assert all(row["equal to the bit"] for row in report["two models"])
    assert "| 64x32 | Embedder bf16 |" in capsys.readouterr().out


def test_a_section_that_fails_is_told_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(plan: Plan, _: Rates) -> Iterator[Row]:
        yield {"what": "done", "rate": 1.5}
        raise RuntimeError(f"no {plan.device}")

    def go_on(_: Plan, rates: Rates) -> list[Row]:
        return [{"what": f"after {rates}"}]

    monkeypatch.setattr(gpu, "SECTIONS", {"first": fail, "second": go_on})

    with pytest.raises(SystemExit, match="something failed or differs"):
        gpu.main(["--device", "cpu"])

    shown = capsys.readouterr().out
    assert "| done | 1.5 | - |\n| - | - | RuntimeError: no cpu |" in shown
    assert "| after {'done': 1.5} |" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_so_and_how_to_try_it() -> None:
    with pytest.raises(SystemExit, match="it has 0 CUDA devices; --device cpu runs a tiny"):
        gpu.main([])
