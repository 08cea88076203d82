"""What a device does without the network: how it is timed, its ceilings, exact search on it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from model.embedder import DTYPES
from model.network import Backbone

ROTATED = 2  # inputs that take turns, so that what forgets to look at its input is found out
MATRIX_RATE, COPY_RATE = "bf16 product, TFLOP/s", "copy, GB/s"
TOP_K = 10
CHUNK_ROWS = 32_768  # of the gallery in float64 at a time

# A row of a table, by heads; "failed" or "differs" tells what is wrong with it.
Row = dict[str, Any]
Rates = dict[str, float]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and at which size."""

    device: Literal["cuda", "cpu"] = "cuda"
    backbone: Backbone = "resnet50"
    sizes: tuple[tuple[int, int], ...] = ((256, 128), (128, 64))  # (height, width), pixels
    batches: tuple[int, ...] = (34, 68)  # tracklets, 510 and 1020 frames; the best of them counts
    matrix: int = 8192  # side of the square matrices that are multiplied
    copied_bytes: int = 2**32  # from one place on the device to another
    vectors: int = 1_000_000  # that are searched on the device; the CPU searches a tenth of them
    tracklets: int = 512  # that are decoded in one round
    pools: tuple[str, ...] = ("one", "threads", "processes")  # that decode
    seconds: float = 0.5  # for which anything is repeated to take the median


def median_ms(run: Callable[[Any], object], inputs: Sequence[Any], plan: Plan) -> float:
    """Median of the milliseconds that ``run`` takes for each input in turn."""
    times: list[float] = []
    until = time.perf_counter() + plan.seconds
    while len(times) < 8 or time.perf_counter() < until:
        times.append(_milliseconds(partial(run, inputs[len(times) % len(inputs)]), plan.device))
    warm = max(3, len(times) // 5)  # what wakes the card's clock is not counted
    return float(np.median(times[warm:]))


def _milliseconds(run: Callable[[], object], device: str) -> float:
    """From an idle device to the end of what is asked of it, by its own events if a GPU."""
    if device == "cpu":
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1000
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


@contextmanager
def tell_failure(row: Row) -> Iterator[None]:
    """Write what fails on some card or version into a row, and let the rest go on."""
    try:
        yield
    # Torch's errors (out of memory among them), a missing compiler, a missing package.
    except (RuntimeError, OSError, ImportError) as error:
        row["failed"] = f"{type(error).__name__}: {error}".partition("\n")[0]


def check(error: float, limit: float) -> Row:
    """An error for a row, and a complaint where it is not under the limit; NaN never is."""
    if error < limit:
        return {"relative error": error}
    return {"relative error": error, "differs": f"expected an error under {limit}"}


def measure_ceilings(plan: Plan, _: Rates) -> Iterator[Row]:
    """Matrix rates, and bytes read plus written a second of a copy, on random data."""
    device, generator = plan.device, torch.Generator(plan.device).manual_seed(0)
    for name, side in (("bf16", plan.matrix), ("fp32", plan.matrix // 2)):
        pairs = [
            torch.randn(2, side, side, generator=generator, device=device).to(DTYPES[name])
            for _ in range(ROTATED)
        ]
        ms = median_ms(lambda pair: pair[0] @ pair[1], pairs, plan)
        rate = 2 * side**3 / ms / 1e9
        yield {"what": f"{name} product, TFLOP/s", "size": f"{side}^3", "rate": rate, "ms": ms}
    size = plan.copied_bytes
    source = torch.randint(256, (size,), generator=generator, device=device, dtype=torch.uint8)
    ms = median_ms(torch.empty_like(source).copy_, [source], plan)
    yield {"what": COPY_RATE, "size": f"{size} bytes", "rate": 2 * size / ms / 1e6, "ms": ms}


def measure_search(plan: Plan, rates: Rates) -> Iterator[Row]:
    """Exact search on the device, and among a tenth of the vectors on the CPU."""
    generator = torch.Generator(plan.device).manual_seed(0)
    gallery = torch.randn(plan.vectors, 2048, generator=generator, device=plan.device)
    for row in search_rows(gallery, plan):
        yield row | {"% of the copy": 100 * row["GB/s"] / rates.get(COPY_RATE, float("nan"))}
    yield from search_rows(gallery[: plan.vectors // 10].cpu(), replace(plan, device="cpu"))


def search_rows(gallery: Tensor, plan: Plan) -> Iterator[Row]:
    """Hold the search against float64, and time it, for one query and for 16 together."""
    generator, norms = torch.Generator(plan.device).manual_seed(0), squared_norms(gallery)
    for count in (1, 16):
        shape = (ROTATED, count, gallery.shape[1])
        noise = torch.randn(shape, generator=generator, device=plan.device)
        sets = list(gallery[:count] + 0.5 * noise)  # each near some vector of the gallery
        row = {"vectors": len(gallery), "on": plan.device, "queries": count}
        row |= compare_ranks(search(sets[0], gallery, norms), exact_distances(sets[0], gallery))
        ms = median_ms(partial(search, gallery=gallery, norms=norms), sets, plan)
        yield row | {"ms": ms, "GB/s": gallery.numel() * 4 / ms / 1e6}


def search(queries: Tensor, gallery: Tensor, norms: Tensor) -> Tensor:
    """Find the nearest vectors by Euclidean distance, exactly up to rounding.

        ||q - g||^2 = ||q||^2 - 2 q.g + ||g||^2, of which ||q||^2 changes no order

    Args:
        queries: (M, D) float32.
        gallery: (N, D) float32, on the same device.
        norms: (N,) float32, of `squared_norms`.

    Returns:
        Rows of the gallery, (M, TOP_K) int64, the nearest first.
    """
    if len(queries) == 1:
        distances = torch.addmv(norms, gallery, queries[0], alpha=-2)[None]  # (1, N)
    else:
        distances = torch.addmm(norms, queries, gallery.T, alpha=-2)  # (M, N)
    return distances.topk(TOP_K, dim=1, largest=False).indices


def squared_norms(gallery: Tensor) -> Tensor:
    """||g||^2 of each of (N, D) vectors, rounded once: (N,) float32."""
    chunks = [chunk.double().square().sum(dim=1) for chunk in torch.split(gallery, CHUNK_ROWS)]
    return torch.cat(chunks).float()


def exact_distances(queries: Tensor, gallery: Tensor) -> Tensor:
    """Squared distances (M, N) float64, by differences and not by products."""
    how = "donot_use_mm_for_euclid_dist"
    chunks = [
        torch.cdist(queries.double(), chunk.double(), compute_mode=how).square()
        for chunk in torch.split(gallery, CHUNK_ROWS)
    ]
    return torch.cat(chunks, dim=1)


def compare_ranks(found: Tensor, exact: Tensor) -> Row:
    """Hold found rows of the gallery, (M, TOP_K), against float64 distances, (M, N).

    Returns:
        The share of places with the very row, and as error how much farther a found row is than the
        one that belongs there, relative, at worst.
    """
    nearest, rows = exact.topk(TOP_K, dim=1, largest=False)
    excess = ((exact.gather(1, found) - nearest).abs() / nearest).max().item()
    return {"% right rows": 100 * (found == rows).double().mean().item()} | check(excess, 1e-5)
