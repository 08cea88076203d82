"""What surrounds the network on a GPU: JPEG files to decode, and a second model."""

import io
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from PIL import Image

from bench.gpu_device import Plan, Rates, Row, check, median_ms
from bench.gpu_network import LIMITS, draw_checkpoint, draw_clips, embed
from model.embedder import Embedder
from model.frames import Clip, Preprocessing, prepare_frame

TASK_TRACKLETS = 8  # decoded by one call of a worker
BATCH_TRACKLETS = 32  # embedded together behind the decoding
Task = list[list[bytes]]  # JPEG files: the frames of some tracklets


def measure_decoding(plan: Plan, _: Rates) -> Iterator[Row]:
    """Tracklets a second from JPEG bytes: decoded only, and with the embedder behind."""
    preprocessing = Preprocessing(*plan.sizes[-1])
    embedder = Embedder(draw_checkpoint(plan, preprocessing), device=plan.device)
    clips = draw_clips(preprocessing, min(BATCH_TRACKLETS, plan.tracklets))
    ms = median_ms(embedder.embed, [list(clips)], plan)
    yield {"decoded by": "nobody", "embedded a second": len(clips) / ms * 1000}
    task = [[encode(frame) for frame in clip] for clip in clips[:TASK_TRACKLETS]]
    tasks = [task] * (plan.tracklets // TASK_TRACKLETS)
    for kind in plan.pools:
        with open_pool(kind) as pool:
            rates = [measure_pool(pool, tasks, embedder, is_embedded=it) for it in (False, True)]
        yield {"decoded by": kind, "decoded a second": rates[0], "embedded a second": rates[1]}


def encode(frame: Clip) -> bytes:
    """A JPEG file, about 4 kB at 128x64."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=90)
    return file.getvalue()


def decode(task: Task, preprocessing: Preprocessing, *, is_kept: bool) -> list[Clip]:
    """Decode some tracklets to (T, height, width, 3) uint8 RGB each.

    Returns:
        Them, or nothing where they are not kept and need not travel between processes.
    """
    clips = []
    for files in task:
        images = [Image.open(io.BytesIO(file)) for file in files]
        clips.append(np.stack([prepare_frame(image, preprocessing) for image in images]))
    return clips if is_kept else []


def open_pool(kind: str) -> Executor:
    """Make one thread, or as many threads or processes as there are cores."""
    workers = len(os.sched_getaffinity(0))
    if kind != "processes":
        return ThreadPoolExecutor(1 if kind == "one" else workers)
    # Forked from a server that knows no CUDA and has imported the rest once; this process, whose
    # threads and CUDA no fork survives, is not copied.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, context)


def measure_pool(
    pool: Executor, tasks: Sequence[Task], embedder: Embedder, *, is_embedded: bool
) -> float:
    """Tracklets a second, decoded or also embedded; median of three rounds after one to warm up."""
    work = partial(decode, preprocessing=embedder.preprocessing, is_kept=is_embedded)
    seconds = []
    for _ in range(4):
        started, waiting = time.perf_counter(), list[Clip]()
        for clips in pool.map(work, tasks):
            waiting += clips
            if len(waiting) >= BATCH_TRACKLETS:
                embedder.embed(waiting)
                waiting = []
        embedder.embed(waiting)
        seconds.append(time.perf_counter() - started)
    return sum(map(len, tasks)) / statistics.median(seconds[1:])


def measure_models(plan: Plan, _: Rates) -> Iterator[Row]:
    """Two embedders on one card, used at the same time, against each used alone."""
    preprocessing = Preprocessing(*plan.sizes[0])
    clips = list(draw_clips(preprocessing, 8))
    embedders, alone, rows = [], [], []
    for seed in range(2):
        checkpoint = draw_checkpoint(plan, preprocessing, seed)
        before, _peak = memory_mb(plan)
        embedders.append(Embedder(checkpoint, device=plan.device))
        held, _peak = memory_mb(plan)
        alone.append(embed(embedders[seed], clips))
        _held, peak = memory_mb(plan)
        row = {"model": seed + 1, "precision": embedders[seed].precision}
        rows.append(row | {"weights, MB": held - before, "peak above, MB": peak - held})
    with ThreadPoolExecutor(2) as threads:
        rounds = [list(threads.map(embed, embedders, [clips, clips])) for _ in range(3)]
    for row, expected, *got in zip(rows, alone, *rounds, strict=True):
        row["equal to the bit"] = all(torch.equal(one, expected) for one in got)
        error = (torch.stack(got) - expected).norm() / expected.norm()
        yield row | check(error.item(), LIMITS["fp32"])


def memory_mb(plan: Plan) -> tuple[float, float]:
    """What is held on the card, and was at most since the last call; nothing on a CPU."""
    if plan.device == "cpu":
        return 0.0, 0.0
    torch.cuda.synchronize()
    told = torch.cuda.memory_allocated() / 1e6, torch.cuda.max_memory_allocated() / 1e6
    torch.cuda.reset_peak_memory_stats()
    return told
