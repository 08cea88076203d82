"""The service's process as benches need it: with an embedder that costs nothing, or watched.

    .venv/bin/python -m bench.served [--free] [--profile FILE] [flags of passerby serve]

It is the service's own code otherwise. `--profile` asks, whenever the process has used a few
milliseconds of processor time (as few as the system's clock allows), what its main thread, that of
the event loop, is doing, and writes the shares at SIGUSR1.
"""

import argparse
import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from model.embedder import TrackletEmbedding
from model.frames import Clip, Preprocessing
from service.logs import configure_logging
from service.server import run
from service.settings import Settings

_EVERY_S = 0.001
_SHOWN = 40
# What a piece of code belongs to, by a part of its file's path; the innermost that is known counts.
PIECES = (
    ("multipart", ("/python_multipart/", "/service/multipart.py")),
    ("HTTP parsing and writing", ("/uvicorn/protocols/", "/h11/", "/httptools/")),
    ("decoding", ("/PIL/", "/service/uploads.py", "/service/video.py", "/model/frames.py")),
    (
        "hand-over to decoders and threads",
        (
            "/service/decoding.py",
            "/multiprocessing/",
            "/concurrent/",
            "/anyio/",
            "/asyncio/futures.py",
            "/asyncio/threads.py",
        ),
    ),
    ("worker's queue", ("/service/worker.py",)),
    ("metrics", ("/prometheus_client/", "/service/metrics.py")),
    ("logging", ("/logging/", "/service/logs.py")),
    ("JSON and bodies", ("/pydantic/", "/json/", "/service/schemas.py", "/starlette/responses.py")),
    ("middleware", ("/service/middleware.py", "/starlette/middleware/")),
    ("routing and parameters", ("/fastapi/", "/starlette/")),
    ("routes and parts", ("/service/",)),
    ("event loop and sockets", ("/asyncio/", "/uvloop/", "/selectors.py", "/uvicorn/")),
)
REST = "rest"


class FreeEmbedder:
    """A `service.worker.Embedder` that costs nothing: a few pixels are the embedding.

    Its frames go through what those of the bundled weights go through, so decoding costs the same.
    """

    model = "trsa-free"
    dim = 192
    preprocessing = Preprocessing(height=128, width=64)

    def describe(self) -> dict[str, Any]:
        """The model as a JSON object."""
        return {"fingerprint": self.model, "dim": self.dim, "device": "cpu", "precision": "none"}

    def warm_up(self) -> None:
        """Nothing gets faster."""

    def embed(
        self, clips: Sequence[Clip], *, with_attention: bool = False
    ) -> list[TrackletEmbedding]:
        """Average 16x4 pixels over the frames of each clip of (T, 128, 64, 3) uint8."""
        results = []
        for clip in clips:
            pixels = clip[:, 4::8, 8::16].mean(axis=0, dtype=np.float32)  # (16, 4, 3)
            maps = np.full((len(clip), 16, 8), 1 / 128, dtype=np.float32)
            results.append(TrackletEmbedding(pixels.ravel(), maps if with_attention else None))
        return results


class MainThreadSampler:
    """Finds out what the main thread spends its processor time on.

    Of every sample, the time that the main thread has used since the one before goes to the piece
    that it is in: so the work of other threads, whose time makes samples too, does not count.

    Args:
        path: Written at each SIGUSR1, after which all counts begin anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._pieces: defaultdict[str, float] = defaultdict(float)
        self._functions: defaultdict[str, float] = defaultdict(float)
        self._process_before = time.process_time()
        self._before = time.thread_time()

    def start(self) -> None:
        """Begin; in the main thread."""
        signal.signal(signal.SIGUSR1, self._write)
        signal.signal(signal.SIGPROF, self._take)
        signal.setitimer(signal.ITIMER_PROF, _EVERY_S, _EVERY_S)

    def _take(self, _: int, frame: FrameType | None) -> None:
        used = time.thread_time() - self._before
        self._pieces[piece_of(frame)] += used
        if frame is not None:
            code = frame.f_code
            self._functions[f"{Path(code.co_filename).name}:{code.co_name}"] += used
        self._before = time.thread_time()

    def _write(self, _: int, __: FrameType | None) -> None:
        """Write seconds by piece and by the innermost function, and of the whole process."""
        found = {
            "main_s": sum(self._pieces.values()),
            "process_s": time.process_time() - self._process_before,
            "pieces": _largest(self._pieces),
            "functions": _largest(self._functions),
        }
        aside = self._path.with_suffix(".part")
        aside.write_text(json.dumps(found, indent=1), encoding="utf-8")
        aside.replace(self._path)
        self._forget()


def _largest(seconds: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda one: -one[1])[:_SHOWN])


def piece_of(frame: FrameType | None) -> str:
    """The piece that the innermost known file of a stack belongs to."""
    while frame is not None:
        path = frame.f_code.co_filename.replace(os.sep, "/")
        for name, parts in PIECES:
            if any(part in path for part in parts):
                return name
        frame = frame.f_back
    return REST


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--free", action="store_true")
    parser.add_argument("--profile", type=Path)
    arguments, flags = parser.parse_known_args()
    settings = Settings.load(flags)
    configure_logging(settings.log_format)
    if arguments.profile is not None:
        MainThreadSampler(arguments.profile).start()
    run(settings, embedder=FreeEmbedder() if arguments.free else None)


if __name__ == "__main__":
    main()
